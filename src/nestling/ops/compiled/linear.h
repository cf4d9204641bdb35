// One chunk of the default rule on linear memories M(z) = W z, forward and backward: `memory.rule.advance` for one layer.

#pragma once
#include "chunk.h"

namespace {

struct LinearSizes { int64_t stack, groups, tokens, in, out, after; };  // n, G, C, i, o

template <class T> struct LinearIn {
    const T *weight, *velocity, *keys, *values, *queries, *eta, *mu, *decay, *mixed, *momentum, *anchor;
};
template <class T> struct LinearOut { T *weight, *velocity, *reads; };
template <class T> struct LinearSaved { T *products, *error, *rate, *gram, *d; };
template <class T> struct LinearGrads {
    T *weight, *velocity, *keys, *values, *queries, *eta, *mu, *decay, *mixed, *momentum, *anchor;
};

template <class T> T one_minus(const T* mu, int t) { return mu ? 1 - mu[t] : T(1); }

template <class T>
void linear_forward(const LinearSizes& z, const LinearIn<T>& in, const LinearOut<T>& out, const LinearSaved<T>& save,
                    int64_t begin, int64_t end) {
    const int C = z.tokens, i = z.in, o = z.out, S = C + 1;
    const int64_t w = z.in * z.out;
    Scratch<T> scratch(4 * C * o + 2 * C * C);
    for (int64_t g = begin; g < end; ++g) {
        const T *k = in.keys + g * C * i, *v = in.values + g * C * i, *eta = in.eta + g * C, *mu = at(in.mu, g * C);
        const Tables<T> table{in.decay + g * S * S, at(in.mixed, g * S * S), at(in.momentum, g * S * S)};
        T* gram = save.gram + g * C * C;
        mm('N', 'T', C, C, i, k, k, T(0), gram);
        for (int64_t m = 0; m < z.stack; ++m) {
            const int64_t N = m * z.groups + g;
            auto mark = scratch.mark();
            const T* W = in.weight + N * w;
            T *made = save.products + N * C * o, *error = save.error + N * C * o, *rate = save.rate + N * C;
            T* writes = scratch.take(C * o);
            mm('N', 'T', C, o, i, k, W, T(0), made);
            mm('N', 'T', C, o, i, v, W, T(0), error);
            for (int t = 0; t < C; ++t) {
                rate[t] = eta[t] / (1 + eta[t] * gram[t * C + t]);
                for (int j = t * o; j < (t + 1) * o; ++j) {
                    error[j] = made[j] - error[j];
                    writes[j] = -rate[t] * one_minus(mu, t) * error[j];
                }
            }
            const bool reads = in.queries && m == z.stack - 1;
            const Layer<T> c{o, i, W, at(in.velocity, N * w), at(in.anchor, N * w), made, k, writes, rate, gram};
            chunk_forward(c, table, C, z.after, out.weight + N * w, at(out.velocity, N * w), save.d + N * C * o,
                          reads ? in.queries + g * C * i : nullptr, reads ? out.reads + g * C * o : nullptr, scratch);
            scratch.release(mark);
        }
    }
}

// The gradients of keys to tables are given zeroed; all memories of a head add to them.
template <class T>
void linear_backward(const LinearSizes& z, const LinearIn<T>& in, const LinearSaved<T>& save, const LinearOut<T>& up,
                     const LinearGrads<T>& grads, int64_t begin, int64_t end) {
    const int C = z.tokens, i = z.in, o = z.out, S = C + 1;
    const int64_t w = z.in * z.out;
    Scratch<T> scratch(7 * C * o + C * i + 4 * C * C + 2 * C);
    for (int64_t g = begin; g < end; ++g) {
        const T *k = in.keys + g * C * i, *v = in.values + g * C * i, *eta = in.eta + g * C, *mu = at(in.mu, g * C);
        const T* gram = save.gram + g * C * C;
        const Tables<T> table{in.decay + g * S * S, at(in.mixed, g * S * S), at(in.momentum, g * S * S)};
        const TableGrads<T> g_table{grads.decay + g * S * S, at(grads.mixed, g * S * S), at(grads.momentum, g * S * S)};
        T *g_k = grads.keys + g * C * i, *g_v = grads.values + g * C * i;
        for (int64_t m = 0; m < z.stack; ++m) {
            const int64_t N = m * z.groups + g;
            auto mark = scratch.mark();
            const T *W = in.weight + N * w, *made = save.products + N * C * o, *error = save.error + N * C * o;
            const T* rate = save.rate + N * C;
            T *writes = scratch.take(C * o), *g_writes = scratch.take(C * o), *g_made = scratch.take(C * o);
            T *g_rate = scratch.take(C), *g_W = grads.weight + N * w;
            std::fill(g_rate, g_rate + C, T(0));
            for (int t = 0; t < C; ++t) scaled(o, -rate[t] * one_minus(mu, t), error + t * o, writes + t * o);
            const bool reads = in.queries && up.reads && m == z.stack - 1;
            const Layer<T> c{o, i, W, at(in.velocity, N * w), at(in.anchor, N * w), made, k, writes, rate, gram};
            const LayerGrads<T> g_c{g_W, at(grads.velocity, N * w), at(grads.anchor, N * w), g_made, g_k, g_writes, g_rate,
                                    reads ? grads.queries + g * C * i : nullptr};
            chunk_backward(c, table, C, z.after, save.d + N * C * o, static_cast<const T*>(up.weight + N * w),
                           static_cast<const T*>(at(up.velocity, N * w)), reads ? in.queries + g * C * i : nullptr,
                           static_cast<const T*>(reads ? up.reads + g * C * o : nullptr), g_c, g_table, scratch);
            // u = -e (1 - mu) error, e = eta / (1 + eta |k|^2), error = W k - W v
            T* g_target = writes;
            for (int t = 0; t < C; ++t) {
                const T reach = dot(o, g_writes + t * o, error + t * o), shrink = one_minus(mu, t);
                const T found = g_rate[t] - reach * shrink, whole = 1 + eta[t] * gram[t * C + t];
                grads.eta[g * C + t] += found / (whole * whole);
                if (mu) grads.mu[g * C + t] += reach * rate[t];
                axpy(i, -2 * rate[t] * rate[t] * found, k + t * i, g_k + t * i);
                for (int j = t * o; j < (t + 1) * o; ++j) {
                    g_target[j] = rate[t] * shrink * g_writes[j];
                    g_made[j] -= g_target[j];
                }
            }
            mm('T', 'N', o, i, C, g_made, k, T(1), g_W);
            mm('T', 'N', o, i, C, g_target, v, T(1), g_W);
            mm('N', 'N', C, i, o, g_made, W, T(1), g_k);
            mm('N', 'N', C, i, o, g_target, W, T(1), g_v);
            scratch.release(mark);
        }
    }
}

}  // namespace
