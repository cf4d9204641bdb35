// Outputs of a stack of residual MLP memories M(z) = z + W1 silu(W2 z) at fixed weights, and their gradients.

#pragma once
#include "matrix.h"

namespace {

struct ReadSizes { int64_t stack, groups, tokens, inner, hidden; };  // n, G, C, p, h
template <class T> struct ReadIn { const T *w2, *w1, *x; };           // weights [N, ...] of at least n * G memories, x [G, C, p]
template <class T> struct ReadOut { T *y, *pre; };                    // [n * G, C, p], and W2 x [n * G, C, h]
template <class T> struct ReadUp { const T *pre, *g_y; };
template <class T> struct ReadGrads { T *w2, *w1, *x; };  // of x: given zeroed

template <class T>
void read_forward(const ReadSizes& z, const ReadIn<T>& in, const ReadOut<T>& out, int64_t begin, int64_t end) {
    const int C = z.tokens, p = z.inner, h = z.hidden;
    const int64_t w = z.inner * z.hidden;
    Scratch<T> scratch(C * h);
    T* hidden = scratch.take(C * h);
    for (int64_t g = begin; g < end; ++g)
        for (int64_t N = g; N < z.stack * z.groups; N += z.groups) {
            T *pre = out.pre + N * C * h, *y = out.y + N * C * p;
            const T* x = in.x + g * C * p;
            mm('N', 'T', C, h, p, x, in.w2 + N * w, T(0), pre);
            for (int j = 0; j < C * h; ++j) hidden[j] = pre[j] * sigmoid(pre[j]);
            std::copy(x, x + C * p, y);
            mm('N', 'T', C, p, h, hidden, in.w1 + N * w, T(1), y);
        }
}

template <class T>
void read_backward(const ReadSizes& z, const ReadIn<T>& in, const ReadUp<T>& up, const ReadGrads<T>& g_in, int64_t begin,
                   int64_t end) {
    const int C = z.tokens, p = z.inner, h = z.hidden;
    const int64_t w = z.inner * z.hidden;
    Scratch<T> scratch(2 * C * h);
    T *hidden = scratch.take(C * h), *g_pre = scratch.take(C * h);
    for (int64_t g = begin; g < end; ++g)
        for (int64_t N = g; N < z.stack * z.groups; N += z.groups) {
            const T *pre = up.pre + N * C * h, *g_y = up.g_y + N * C * p;
            T* g_x = g_in.x + g * C * p;
            mm('N', 'N', C, h, p, g_y, in.w1 + N * w, T(0), g_pre);
            for (int j = 0; j < C * h; ++j) {
                const T s = sigmoid(pre[j]);
                hidden[j] = pre[j] * s;
                g_pre[j] *= s + s * (pre[j] - hidden[j]);
            }
            mm('T', 'N', p, h, C, g_y, hidden, T(0), g_in.w1 + N * w);
            mm('T', 'N', h, p, C, g_pre, in.x + g * C * p, T(0), g_in.w2 + N * w);
            axpy(C * p, T(1), g_y, g_x);
            mm('N', 'N', C, p, h, g_pre, in.w2 + N * w, T(1), g_x);
        }
}

}  // namespace
