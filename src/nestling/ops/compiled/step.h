// One chunk of the default rule on MLP memories, forward and backward, one memory at a time so that all it touches stays
// in the cache: memory/fused.py holds the same equations over whole batches; a test ties the two.

#pragma once
#include "chunk.h"

namespace {

struct Sizes { int64_t stack, groups, tokens, inner, hidden, after; };  // n, G, C, p, h

template <class T> struct Inputs {  // `MLPStep` of fused.py
    const T *w2, *w1, *s2, *s1, *keys, *values, *queries, *eta, *mu, *decay, *mixed, *momentum, *anchor2, *anchor1;
};
template <class T> struct Outputs { T *w2, *w1, *s2, *s1, *reads; };
template <class T> struct Saved { T *pre, *error, *pulled, *out, *sizes, *gram2, *gram1, *d2, *d1, *read; };
template <class T> struct Grads {
    T *w2, *w1, *s2, *s1, *keys, *values, *queries, *eta, *mu, *decay, *mixed, *momentum, *anchor2, *anchor1;
};

template <class T>
void step_forward(const Sizes& z, const Inputs<T>& in, const Outputs<T>& out, const Saved<T>& save, int64_t begin, int64_t end) {
    const int C = z.tokens, p = z.inner, h = z.hidden, S = C + 1;
    const int64_t w = int64_t(h) * p;
    Scratch<T> scratch(2 * C * p + 7 * C * h + 4 * C * std::max(p, h) + 4 * C * C + 2 * C);
    for (int64_t g = begin; g < end; ++g) {
        auto mark = scratch.mark();
        T* rows = scratch.take(2 * C * p);  // keys, then values
        std::copy(in.keys + g * C * p, in.keys + (g + 1) * C * p, rows);
        std::copy(in.values + g * C * p, in.values + (g + 1) * C * p, rows + C * p);
        T* gram2 = save.gram2 + g * C * C;
        mm('N', 'T', C, C, p, rows, rows, T(0), gram2);
        const T *eta = in.eta + g * C, *mu = at(in.mu, g * C);
        const Tables<T> table{in.decay + g * S * S, at(in.mixed, g * S * S), at(in.momentum, g * S * S)};
        for (int64_t m = 0; m < z.stack; ++m) {
            const int64_t N = m * z.groups + g;
            auto inner = scratch.mark();
            const T *w2 = in.w2 + N * w, *w1 = in.w1 + N * w;
            T *pre = save.pre + N * 2 * C * h, *error = save.error + N * C * p, *pulled = save.pulled + N * C * h;
            T *out_k = save.out + N * C * p, *gram1 = save.gram1 + N * C * C, *sizes = save.sizes + N * 5 * C;
            T *hidden = scratch.take(2 * C * h), *both = scratch.take(2 * C * p), *error2 = scratch.take(C * h);
            mm('N', 'T', 2 * C, h, p, rows, w2, T(0), pre);
            for (int j = 0; j < 2 * C * h; ++j) hidden[j] = pre[j] * sigmoid(pre[j]);
            mm('N', 'T', 2 * C, p, h, hidden, w1, T(0), both);
            std::copy(both, both + C * p, out_k);
            for (int j = 0; j < C * p; ++j) error[j] = rows[j] - rows[C * p + j] + both[j] - both[C * p + j];
            mm('N', 'N', C, h, p, error, w1, T(0), pulled);
            for (int j = 0; j < C * h; ++j) error2[j] = pulled[j] * slope(pre[j]);
            T *h_size = sizes, *key_size = sizes + C, *total = sizes + 2 * C, *size2 = sizes + 3 * C, *rate = sizes + 4 * C;
            T* writes1 = both;  // its first half is copied, its second used up
            for (int t = 0; t < C; ++t) {
                h_size[t] = dot(h, hidden + t * h, hidden + t * h);
                key_size[t] = gram2[t * C + t];
                size2[t] = dot(h, error2 + t * h, error2 + t * h);
                total[t] = dot(p, error + t * p, error + t * p) + T(1e-6);
                rate[t] = eta[t] / (1 + eta[t] * (h_size[t] + key_size[t] * (1 + size2[t] / total[t])));
                const T scale = -rate[t] * (mu ? 1 - mu[t] : T(1));
                scaled(h, scale, error2 + t * h, error2 + t * h);
                scaled(p, scale, error + t * p, writes1 + t * p);
            }
            mm('N', 'T', C, C, h, hidden, hidden, T(0), gram1);
            const bool reads = in.queries && m == z.stack - 1;
            const T* q = reads ? in.queries + g * C * p : nullptr;
            T *read = reads ? save.read + g * C * h : nullptr, *bent = reads ? scratch.take(C * h) : nullptr;
            const Layer<T> first{h, p, w2, at(in.s2, N * w), at(in.anchor2, N * w), pre, rows, error2, rate, gram2};
            const Layer<T> second{p, h, w1, at(in.s1, N * w), at(in.anchor1, N * w), out_k, hidden, writes1, rate, gram1};
            chunk_forward(first, table, C, z.after, out.w2 + N * w, at(out.s2, N * w), save.d2 + N * C * h, q, read, scratch);
            for (int j = 0; reads && j < C * h; ++j) bent[j] = read[j] * sigmoid(read[j]);
            T* y = reads ? out.reads + g * C * p : nullptr;
            chunk_forward(second, table, C, z.after, out.w1 + N * w, at(out.s1, N * w), save.d1 + N * C * p,
                          const_cast<const T*>(bent), y, scratch);
            if (reads) axpy(C * p, T(1), q, y);
            scratch.release(inner);
        }
        scratch.release(mark);
    }
}

// The gradients of keys to tables are given zeroed; all memories of a head add to them.
template <class T>
void step_backward(const Sizes& z, const Inputs<T>& in, const Saved<T>& save, const Outputs<T>& up, const Grads<T>& g_in,
              int64_t begin, int64_t end) {
    const int C = z.tokens, p = z.inner, h = z.hidden, S = C + 1;
    const int64_t w = int64_t(h) * p;
    Scratch<T> scratch(4 * C * p + 14 * C * h + 8 * C * p + 8 * C * std::max(p, h) + 8 * C * C + 12 * C);
    for (int64_t g = begin; g < end; ++g) {
        auto mark = scratch.mark();
        T *rows = scratch.take(2 * C * p), *g_rows = scratch.take(2 * C * p);
        std::copy(in.keys + g * C * p, in.keys + (g + 1) * C * p, rows);
        std::copy(in.values + g * C * p, in.values + (g + 1) * C * p, rows + C * p);
        const T *gram2 = save.gram2 + g * C * C, *eta = in.eta + g * C, *mu = at(in.mu, g * C);
        const Tables<T> table{in.decay + g * S * S, at(in.mixed, g * S * S), at(in.momentum, g * S * S)};
        const TableGrads<T> g_table{g_in.decay + g * S * S, at(g_in.mixed, g * S * S), at(g_in.momentum, g * S * S)};
        T *g_keys = g_in.keys + g * C * p, *g_values = g_in.values + g * C * p;
        for (int64_t m = 0; m < z.stack; ++m) {
            const int64_t N = m * z.groups + g;
            auto inner = scratch.mark();
            const T *w2 = in.w2 + N * w, *w1 = in.w1 + N * w;
            const T *pre = save.pre + N * 2 * C * h, *error = save.error + N * C * p, *pulled = save.pulled + N * C * h;
            const T *out_k = save.out + N * C * p, *gram1 = save.gram1 + N * C * C, *sizes = save.sizes + N * 5 * C;
            const T *h_size = sizes, *key_size = sizes + C, *total = sizes + 2 * C, *size2 = sizes + 3 * C, *rate = sizes + 4 * C;
            T *hidden = scratch.take(2 * C * h), *bend = scratch.take(2 * C * h), *error2 = scratch.take(C * h);
            T *writes2 = scratch.take(C * h), *writes1 = scratch.take(C * p);
            for (int j = 0; j < 2 * C * h; ++j) {
                const T s = sigmoid(pre[j]);
                hidden[j] = pre[j] * s;
                bend[j] = s + s * (pre[j] - hidden[j]);  // silu'
            }
            for (int t = 0; t < C; ++t) {
                const T scale = -rate[t] * (mu ? 1 - mu[t] : T(1));
                for (int j = t * h; j < (t + 1) * h; ++j) error2[j] = pulled[j] * bend[j], writes2[j] = scale * error2[j];
                scaled(p, scale, error + t * p, writes1 + t * p);
            }

            // the recurrences, second layer first: its read is the last thing computed
            const bool reads = in.queries && up.reads && m == z.stack - 1;
            const T *q = reads ? in.queries + g * C * p : nullptr, *g_y = reads ? up.reads + g * C * p : nullptr;
            const T* read = reads ? save.read + g * C * h : nullptr;
            T *bent = reads ? scratch.take(C * h) : nullptr, *g_read = reads ? scratch.take(C * h) : nullptr;
            for (int j = 0; reads && j < C * h; ++j) bent[j] = read[j] * sigmoid(read[j]);
            T *g_h = scratch.take(C * h), *g_products1 = scratch.take(C * p), *g_writes1 = scratch.take(C * p);
            T *g_k = g_keys, *g_products2 = scratch.take(C * h), *g_writes2 = scratch.take(C * h), *g_rate = scratch.take(C);
            std::fill(g_h, g_h + C * h, T(0));
            std::fill(g_rate, g_rate + C, T(0));
            const Layer<T> first{h, p, w2, at(in.s2, N * w), at(in.anchor2, N * w), pre, rows, writes2, rate, gram2};
            const Layer<T> second{p, h, w1, at(in.s1, N * w), at(in.anchor1, N * w), out_k, hidden, writes1, rate, gram1};
            T *g_w2 = g_in.w2 + N * w, *g_w1 = g_in.w1 + N * w;
            chunk_backward(second, table, C, z.after, save.d1 + N * C * p, up.w1 + N * w, at<T>(up.s1, N * w),
                           const_cast<const T*>(bent), g_y,
                           LayerGrads<T>{g_w1, at(g_in.s1, N * w), at(g_in.anchor1, N * w), g_products1, g_h, g_writes1, g_rate, g_read},
                           g_table, scratch);
            for (int j = 0; reads && j < C * h; ++j) g_read[j] *= slope(read[j]);
            T* g_q = reads ? g_in.queries + g * C * p : nullptr;
            chunk_backward(first, table, C, z.after, save.d2 + N * C * h, up.w2 + N * w, at<T>(up.s2, N * w), q,
                           const_cast<const T*>(g_read),
                           LayerGrads<T>{g_w2, at(g_in.s2, N * w), at(g_in.anchor2, N * w), g_products2, g_k, g_writes2, g_rate, g_q},
                           g_table, scratch);
            if (reads) axpy(C * p, T(1), g_y, g_q);

            // writes u = -e (1 - mu) error, erase e = eta / (1 + eta kappa), kappa = |h|^2 + |k|^2 (1 + |error2|^2 / |error|^2)
            T *g_error = g_writes1, *g_error2 = g_writes2;
            for (int t = 0; t < C; ++t) {
                T *ge = g_error + t * p, *ge2 = g_error2 + t * h;
                const T reach = dot(p, ge, error + t * p) + dot(h, ge2, error2 + t * h);
                const T shrink = mu ? 1 - mu[t] : T(1), scale = -rate[t] * shrink, found = g_rate[t] - reach * shrink;
                const T ratio = size2[t] / total[t], kappa = h_size[t] + key_size[t] * (1 + ratio);
                const T g_kappa = -2 * rate[t] * rate[t] * found, g_ratio = g_kappa * key_size[t] / total[t];
                const T whole = 1 + eta[t] * kappa;
                g_in.eta[g * C + t] += found / (whole * whole);
                if (mu) g_in.mu[g * C + t] += reach * rate[t];
                axpy(h, g_kappa, hidden + t * h, g_h + t * h);
                axpy(p, g_kappa * (1 + ratio), rows + t * p, g_k + t * p);
                for (int j = 0; j < p; ++j) ge[j] = scale * ge[j] - g_ratio * ratio * error[t * p + j];
                for (int j = 0; j < h; ++j) ge2[j] = scale * ge2[j] + g_ratio * error2[t * h + j];
            }
            // error2 = (W1^T error) * silu'(W2 k)
            T *g_pulled = writes2, *g_pre = scratch.take(2 * C * h), *g_out = scratch.take(2 * C * p), *g_pre_keys = g_error2;
            for (int j = 0; j < C * h; ++j) {
                const T s = sigmoid(pre[j]), curve = s * (1 - s) * (2 + pre[j] - 2 * hidden[j]);  // silu''
                g_pulled[j] = g_error2[j] * bend[j];
                g_pre_keys[j] = g_error2[j] * pulled[j] * curve + g_products2[j];
            }
            mm('N', 'T', C, p, h, g_pulled, w1, T(1), g_error);
            mm('T', 'N', p, h, C, error, g_pulled, T(1), g_w1);
            // error = M(k) - M(v); W1's products for the keys serve the recurrence too
            for (int j = 0; j < C * p; ++j) g_out[j] = g_error[j] + g_products1[j], g_out[C * p + j] = -g_error[j];
            mm('T', 'N', p, h, 2 * C, g_out, hidden, T(1), g_w1);
            mm('N', 'N', 2 * C, h, p, g_out, w1, T(0), g_pre);
            for (int j = 0; j < C * h; ++j) g_pre[j] = (g_pre[j] + g_h[j]) * bend[j] + g_pre_keys[j];
            for (int j = C * h; j < 2 * C * h; ++j) g_pre[j] *= bend[j];
            mm('T', 'N', h, p, 2 * C, g_pre, rows, T(1), g_w2);
            mm('N', 'N', 2 * C, p, h, g_pre, w2, T(0), g_rows);
            for (int j = 0; j < C * p; ++j) {
                g_keys[j] += g_rows[j] + g_error[j];
                g_values[j] += g_rows[C * p + j] - g_error[j];
            }
            scratch.release(inner);
        }
        scratch.release(mark);
    }
}

}  // namespace
