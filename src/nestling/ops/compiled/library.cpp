// What Python calls: work on the memories (or, for `step`, the heads) begin..end of a batch.

#include "step.h"

#define EXPORT(T, name)                                                                                                   \
    extern "C" void rule_forward_##name(const Batch* z, const ChunkInputs<T>* in, const ChunkOutputs<T>* out,             \
                                        int64_t begin, int64_t end) { rule_forward<T>(*z, *in, *out, begin, end); }       \
    extern "C" void rule_backward_##name(const Batch* z, const ChunkInputs<T>* in, const ChunkUp<T>* up,                  \
                                         const ChunkGrads<T>* g, int64_t begin, int64_t end) {                            \
        rule_backward<T>(*z, *in, *up, *g, begin, end);                                                                   \
    }                                                                                                                     \
    extern "C" void step_forward_##name(const Sizes* z, const Inputs<T>* in, const Outputs<T>* out, const Saved<T>* save, \
                                        int64_t begin, int64_t end) { step_forward<T>(*z, *in, *out, *save, begin, end); }\
    extern "C" void step_backward_##name(const Sizes* z, const Inputs<T>* in, const Saved<T>* save, const Outputs<T>* up, \
                                         const Grads<T>* g, int64_t begin, int64_t end) {                                 \
        step_backward<T>(*z, *in, *save, *up, *g, begin, end);                                                            \
    }
EXPORT(float, float32)
EXPORT(double, float64)

extern "C" void use_blas(void* sgemm, void* strsm, void* dgemm, void* dtrsm) {
    Blas<float>::gemm = reinterpret_cast<Blas<float>::Gemm>(sgemm);
    Blas<float>::trsm = reinterpret_cast<Blas<float>::Trsm>(strsm);
    Blas<double>::gemm = reinterpret_cast<Blas<double>::Gemm>(dgemm);
    Blas<double>::trsm = reinterpret_cast<Blas<double>::Trsm>(dtrsm);
}
