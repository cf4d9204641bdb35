// The causal depth-wise convolution of ops/conv.py: one pass over a sequence, forward and back.

#pragma once
#include "matrix.h"

namespace {

struct ConvSizes { int64_t tokens, width, taps; };                // T, D, K
template <class T> struct ConvIn { const T *history, *weight; };  // [B, K - 1 + T, D], [K, D]
template <class T> struct ConvOut { T* y; };                      // [B, T, D]
template <class T> struct ConvUp { const T* g_y; };
template <class T> struct ConvGrads { T *history, *weight; };  // given zeroed; of the weight for every sequence, [B, K, D]

template <class T>
void conv_forward(const ConvSizes& z, const ConvIn<T>& in, const ConvOut<T>& out, int64_t begin, int64_t end) {
    const int D = z.width;
    for (int64_t b = begin; b < end; ++b)
        for (int64_t t = 0; t < z.tokens; ++t) {
            const T* x = in.history + (b * (z.tokens + z.taps - 1) + t) * D;
            T* y = out.y + (b * z.tokens + t) * D;
            product(D, x, in.weight, y);
            for (int64_t k = 1; k < z.taps; ++k) add_product(D, x + k * D, in.weight + k * D, y);
        }
}

template <class T>
void conv_backward(const ConvSizes& z, const ConvIn<T>& in, const ConvUp<T>& up, const ConvGrads<T>& grads, int64_t begin,
                   int64_t end) {
    const int D = z.width;
    for (int64_t b = begin; b < end; ++b)
        for (int64_t t = 0; t < z.tokens; ++t) {
            const int64_t at = (b * (z.tokens + z.taps - 1) + t) * D;
            const T* g = up.g_y + (b * z.tokens + t) * D;
            for (int64_t k = 0; k < z.taps; ++k) {
                add_product(D, g, in.weight + k * D, grads.history + at + k * D);
                add_product(D, g, in.history + at + k * D, grads.weight + (b * z.taps + k) * D);
            }
        }
}

}  // namespace
