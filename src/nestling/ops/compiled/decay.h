// Products of decay and momentum between any two tokens of a chunk: `decay_table` of ops/chunk.py.

#pragma once
#include "matrix.h"

namespace {

// A[t, j] = prod_{s=j+1..t} a_s for t >= j, else 0
template <class T> void products(int C, const T* a, T* A) {
    const int S = C + 1;
    std::fill(A, A + S * S, T(0));
    A[0] = 1;
    for (int t = 1; t < S; ++t) {
        scaled(t, a[t - 1], A + (t - 1) * S, A + t * S);
        A[t * S + t] = 1;
    }
}

// da_t = sum_{j<t} g[t, j] A[t-1, j], where g gathers what later rows pass back; g is used up
template <class T> void products_back(int C, const T* a, const T* A, T* g, T* g_a) {
    const int S = C + 1;
    for (int t = C; t > 0; --t) {
        g_a[t - 1] = dot(t, g + t * S, A + (t - 1) * S);
        axpy(t, a[t - 1], g + t * S, g + (t - 1) * S);
    }
}

struct Table { int64_t tokens, moves; };
template <class T> struct TableIn { const T *decay, *momentum; };
template <class T> struct TableOut { T *decay, *mixed, *momentum; };
template <class T> struct TableUp { const T *A, *M, *g_decay, *g_mixed, *g_momentum; };

template <class T>
void table_forward(const Table& z, const TableIn<T>& in, const TableOut<T>& out, int64_t begin, int64_t end) {
    const int C = z.tokens, S = C + 1;
    for (int64_t N = begin; N < end; ++N) {
        T* A = out.decay + N * S * S;
        products(C, in.decay + N * C, A);
        if (!z.moves) continue;
        T *K = out.mixed + N * S * S, *M = out.momentum + N * S * S;
        products(C, in.momentum + N * C, M);
        mm('N', 'N', S, S, S, A, M, T(0), K);
        axpy(S * S, T(-1), A, K);
    }
}

template <class T>
void table_backward(const Table& z, const TableIn<T>& in, const TableUp<T>& up, const TableIn<T>& grads, int64_t begin,
                    int64_t end) {
    const int C = z.tokens, S = C + 1;
    Scratch<T> scratch(S * S);
    T* g = scratch.take(S * S);
    for (int64_t N = begin; N < end; ++N) {
        const int64_t at = N * S * S;
        const T *A = up.A + at, *M = z.moves ? up.M + at : nullptr, *g_K = z.moves ? up.g_mixed + at : nullptr;
        std::copy(up.g_decay + at, up.g_decay + at + S * S, g);
        if (z.moves) {
            axpy(S * S, T(-1), g_K, g);
            mm('N', 'T', S, S, S, g_K, M, T(1), g);
        }
        products_back(C, in.decay + N * C, A, g, const_cast<T*>(grads.decay) + N * C);
        if (!z.moves) continue;
        std::copy(up.g_momentum + at, up.g_momentum + at + S * S, g);
        mm('T', 'N', S, S, S, A, g_K, T(1), g);
        products_back(C, in.momentum + N * C, M, g, const_cast<T*>(grads.momentum) + N * C);
    }
}

}  // namespace
