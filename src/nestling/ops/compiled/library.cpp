// What Python calls: NAME_float32 and NAME_float64(sizes, structs of pointers ..., begin, end), which work on the memories
// (or the heads) begin..end of a batch.

#include "conv.h"
#include "decay.h"
#include "decode.h"
#include "linear.h"
#include "memory_step.h"
#include "read.h"
#include "step.h"
#include "unit.h"

#define EXPORT2(name, Z, A, B)                                                                                        \
    extern "C" void name##_float32(const Z* z, const A<float>* a, const B<float>* b, int64_t begin, int64_t end) {    \
        name<float>(*z, *a, *b, begin, end);                                                                          \
    }                                                                                                                 \
    extern "C" void name##_float64(const Z* z, const A<double>* a, const B<double>* b, int64_t begin, int64_t end) {  \
        name<double>(*z, *a, *b, begin, end);                                                                         \
    }
#define EXPORT3(name, Z, A, B, C)                                                                                     \
    extern "C" void name##_float32(const Z* z, const A<float>* a, const B<float>* b, const C<float>* c, int64_t begin, \
                                   int64_t end) { name<float>(*z, *a, *b, *c, begin, end); }                          \
    extern "C" void name##_float64(const Z* z, const A<double>* a, const B<double>* b, const C<double>* c,            \
                                   int64_t begin, int64_t end) { name<double>(*z, *a, *b, *c, begin, end); }
#define EXPORT4(name, Z, A, B, C, D)                                                                                  \
    extern "C" void name##_float32(const Z* z, const A<float>* a, const B<float>* b, const C<float>* c,               \
                                   const D<float>* d, int64_t begin, int64_t end) {                                   \
        name<float>(*z, *a, *b, *c, *d, begin, end);                                                                  \
    }                                                                                                                 \
    extern "C" void name##_float64(const Z* z, const A<double>* a, const B<double>* b, const C<double>* c,            \
                                   const D<double>* d, int64_t begin, int64_t end) {                                  \
        name<double>(*z, *a, *b, *c, *d, begin, end);                                                                 \
    }

EXPORT2(rule_forward, Batch, ChunkInputs, ChunkOutputs)
EXPORT3(rule_backward, Batch, ChunkInputs, ChunkUp, ChunkGrads)
EXPORT3(step_forward, Sizes, Inputs, Outputs, Saved)
EXPORT4(step_backward, Sizes, Inputs, Saved, Outputs, Grads)
EXPORT3(linear_forward, LinearSizes, LinearIn, LinearOut, LinearSaved)
EXPORT4(linear_backward, LinearSizes, LinearIn, LinearSaved, LinearOut, LinearGrads)
EXPORT2(read_forward, ReadSizes, ReadIn, ReadOut)
EXPORT3(read_backward, ReadSizes, ReadIn, ReadUp, ReadGrads)
EXPORT2(table_forward, Table, TableIn, TableOut)
EXPORT3(table_backward, Table, TableIn, TableUp, TableIn)
EXPORT2(conv_forward, ConvSizes, ConvIn, ConvOut)
EXPORT3(conv_backward, ConvSizes, ConvIn, ConvUp, ConvGrads)
EXPORT2(unit_forward, UnitSizes, UnitIn, UnitOut)
EXPORT2(unit_backward, UnitSizes, UnitUp, UnitOut)
EXPORT2(memory_step, MemoryStep, MemoryGiven, MemoryMade)
EXPORT2(attention_step, AttentionStep, AttentionGiven, AttentionMade)

extern "C" void use_blas(void* sgemm, void* dgemm) {
    Blas<float>::gemm = reinterpret_cast<Blas<float>::Gemm>(sgemm);
    Blas<double>::gemm = reinterpret_cast<Blas<double>::Gemm>(dgemm);
}
