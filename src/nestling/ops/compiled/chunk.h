// The generalised delta rule over one chunk of one memory, forward and backward: ops/chunk.py holds the same equations over
// whole batches; a test ties the two. Row-major.

#pragma once
#include "matrix.h"

namespace {

template <class T> struct Tables { const T *decay, *mixed, *momentum; };              // A, K, M [C + 1, C + 1]
template <class T> struct TableGrads { T *decay, *mixed, *momentum; };

template <class T> const T* at(const T* x, int64_t offset) { return x ? x + offset : nullptr; }
template <class T> T* at(T* x, int64_t offset) { return x ? x + offset : nullptr; }

// One linear layer of a memory and what the chunk does to it: `Chunk` of ops/chunk.py.
template <class T> struct Layer {
    int out, in;
    const T *weight, *velocity, *anchor;  // W_0, S_0, W* [o, i]
    const T *products, *keys, *writes, *erase, *gram;  // W_0 x, x, u, beta, x x^T
};

// d_t = u_t - beta_t W_{t-1} x_t (u_t without an erase), then W and S after the chunk, and the reads of `queries`.
template <class T>
void chunk_forward(const Layer<T>& c, const Tables<T>& table, int C, bool after, T* weight, T* velocity, T* d,
                   const T* queries, T* reads, Scratch<T>& scratch) {
    const int o = c.out, i = c.in, S = C + 1, n = o * i;
    const T *A = table.decay, *K = table.mixed, *M = table.momentum;
    auto mark = scratch.mark();
    T *rows = scratch.take(C * o), *more = scratch.take(C * o), *square = scratch.take(C * C);

    if (c.erase) {
        T* base = d;
        for (int t = 0; t < C; ++t) scaled(o, A[t * S], c.products + t * o, base + t * o);
        if (c.anchor) {
            mm('N', 'T', C, o, i, c.keys, c.anchor, T(0), more);
            for (int t = 0; t < C; ++t) axpy(o, 1 - A[t * S], more + t * o, base + t * o);
        }
        if (c.velocity) {
            mm('N', 'T', C, o, i, c.keys, c.velocity, T(0), more);
            for (int t = 0; t < C; ++t) axpy(o, K[t * S], more + t * o, base + t * o);
            for (int t = 0; t < C; ++t) product(C, c.gram + t * C, K + t * S + 1, square + t * C);
            mm('N', 'N', C, o, C, square, c.writes, T(1), base);
        }
        for (int t = 0; t < C; ++t) {
            for (int j = 0; j < o; ++j) d[t * o + j] = c.writes[t * o + j] - c.erase[t] * base[t * o + j];
            for (int j = 0; j < C; ++j) square[t * C + j] = c.erase[t] * c.gram[t * C + j] * A[t * S + 1 + j];
        }
        solve(C, o, square, d);
    } else {
        std::copy(c.writes, c.writes + C * o, d);
    }

    const T *last = A + C * S, *last_k = K ? K + C * S : nullptr, *last_m = M ? M + C * S : nullptr;
    scaled(n, last[0], c.weight, weight);
    if (c.anchor) axpy(n, 1 - last[0], c.anchor, weight);
    for (int t = 0; t < C; ++t) scaled(o, last[t + 1], d + t * o, rows + t * o);
    if (c.velocity) {
        axpy(n, last_k[0], c.velocity, weight);
        scaled(n, last_m[0], c.velocity, velocity);
        for (int t = 0; t < C; ++t) {
            axpy(o, last_k[t + 1], c.writes + t * o, rows + t * o);
            scaled(o, last_m[t + 1], c.writes + t * o, more + t * o);
        }
        mm('T', 'N', o, i, C, more, c.keys, T(1), velocity);
    }
    mm('T', 'N', o, i, C, rows, c.keys, T(1), weight);

    if (queries) {
        T* scores = scratch.take(C * C);
        const T *a = A + (after ? S : 0), *k = K ? K + (after ? S : 0) : nullptr;  // what each token's read has seen
        mm('N', 'T', C, C, i, queries, c.keys, T(0), scores);
        mm('N', 'T', C, o, i, queries, c.weight, T(0), reads);
        for (int t = 0; t < C; ++t) scaled(o, a[t * S], reads + t * o, reads + t * o);
        if (c.anchor) {
            mm('N', 'T', C, o, i, queries, c.anchor, T(0), more);
            for (int t = 0; t < C; ++t) axpy(o, 1 - a[t * S], more + t * o, reads + t * o);
        }
        if (c.velocity) {
            mm('N', 'T', C, o, i, queries, c.velocity, T(0), more);
            for (int t = 0; t < C; ++t) axpy(o, k[t * S], more + t * o, reads + t * o);
            for (int t = 0; t < C; ++t) product(C, scores + t * C, k + t * S + 1, square + t * C);
            mm('N', 'N', C, o, C, square, c.writes, T(1), reads);
        }
        for (int t = 0; t < C; ++t) product(C, scores + t * C, a + t * S + 1, scores + t * C);
        mm('N', 'N', C, o, C, scores, d, T(1), reads);
    }
    scratch.release(mark);
}

// Gradients of a layer's chunk; those of keys, tables and erase are added to, the others written.
template <class T> struct LayerGrads { T *weight, *velocity, *anchor, *products, *keys, *writes, *erase, *queries; };

template <class T>
void chunk_backward(const Layer<T>& c, const Tables<T>& table, int C, bool after, const T* d, const T* g_w, const T* g_s,
                    const T* queries, const T* g_r, const LayerGrads<T>& g, const TableGrads<T>& gt, Scratch<T>& scratch) {
    const int o = c.out, i = c.in, S = C + 1, n = o * i;
    const T *A = table.decay, *K = table.mixed, *M = table.momentum;
    auto mark = scratch.mark();
    T *rows = scratch.take(C * o), *g_d = scratch.take(C * o), *pull = scratch.take(C * i), *square = scratch.take(C * C);
    T *g_gram = scratch.take(C * C), *y = scratch.take(C * o);

    // the state after the chunk: W' = A[C, 0] W_0 + K[C, 0] S_0 + left^T x
    const T* last = A + C * S;
    T *ga = gt.decay, *gk = gt.mixed, *gm = gt.momentum;
    mm('N', 'T', C, o, i, c.keys, g_w, T(0), g_d);
    ga[C * S] += dot(n, g_w, c.weight);
    scaled(n, last[0], g_w, g.weight);
    if (c.anchor) {
        ga[C * S] -= dot(n, g_w, c.anchor);
        scaled(n, 1 - last[0], g_w, g.anchor);
    }
    for (int t = 0; t < C; ++t) {
        ga[C * S + t + 1] += dot(o, g_d + t * o, d + t * o);
        scaled(o, last[t + 1], d + t * o, rows + t * o);
    }
    if (c.velocity) {
        const T *last_k = K + C * S, *last_m = M + C * S;
        gk[C * S] += dot(n, g_w, c.velocity);
        gm[C * S] += dot(n, g_s, c.velocity);
        for (int j = 0; j < n; ++j) g.velocity[j] = last_m[0] * g_s[j] + last_k[0] * g_w[j];
        mm('N', 'T', C, o, i, c.keys, g_s, T(0), g.writes);
        for (int t = 0; t < C; ++t) {
            const T *u = c.writes + t * o, *xw = g_d + t * o;
            T* gu = g.writes + t * o;
            gk[C * S + t + 1] += dot(o, xw, u);
            gm[C * S + t + 1] += dot(o, gu, u);
            for (int j = 0; j < o; ++j) gu[j] = last_m[t + 1] * gu[j] + last_k[t + 1] * xw[j];
            axpy(o, last_k[t + 1], u, rows + t * o);
            scaled(o, last_m[t + 1], u, y + t * o);
        }
        mm('N', 'N', C, i, o, y, g_s, T(1), g.keys);
    }
    mm('N', 'N', C, i, o, rows, g_w, T(1), g.keys);
    for (int t = 0; t < C; ++t) scaled(o, last[t + 1], g_d + t * o, g_d + t * o);

    if (queries && g_r) {
        const int first = after ? 1 : 0;
        const T *a = A + first * S, *k = K ? K + first * S : nullptr;
        T *scores = scratch.take(C * C), *g_scores = scratch.take(C * C), *gar = ga + first * S, *gkr = gk ? gk + first * S : nullptr;
        // a read row r_t = f_t W q_t of a matrix W with factor f: gradients of f, q and W
        auto through = [&](const T* matrix, const T* f, bool one_minus, T* g_f, T* g_matrix, bool begin) {
            mm('N', 'N', C, i, o, g_r, matrix, T(0), pull);
            for (int t = 0; t < C; ++t) {
                const T factor = one_minus ? 1 - f[t * S] : f[t * S], found = dot(i, pull + t * i, queries + t * i);
                g_f[t * S] += one_minus ? -found : found;
                if (begin) scaled(i, factor, pull + t * i, g.queries + t * i);
                else axpy(i, factor, pull + t * i, g.queries + t * i);
                scaled(o, factor, g_r + t * o, rows + t * o);
            }
            mm('T', 'N', o, i, C, rows, queries, T(1), g_matrix);
        };
        // scores times factors times rows: gradients of all three
        auto past = [&](const T* factors, const T* values, T* g_factors, T* g_values, bool begin) {
            for (int t = 0; t < C; ++t) product(C, scores + t * C, factors + t * S + 1, square + t * C);
            mm('T', 'N', C, o, C, square, g_r, T(1), g_values);
            mm('N', 'T', C, C, o, g_r, values, T(0), square);
            for (int t = 0; t < C; ++t)
                for (int j = 0; j < C; ++j) {
                    const T found = square[t * C + j], scaled_back = found * factors[t * S + 1 + j];
                    g_factors[t * S + 1 + j] += scores[t * C + j] * found;
                    g_scores[t * C + j] = begin ? scaled_back : g_scores[t * C + j] + scaled_back;
                }
        };
        mm('N', 'T', C, C, i, queries, c.keys, T(0), scores);
        through(c.weight, a, false, gar, g.weight, true);
        if (c.anchor) through(c.anchor, a, true, gar, g.anchor, false);
        past(a, d, gar, g_d, true);
        if (c.velocity) {
            through(c.velocity, k, false, gkr, g.velocity, false);
            past(k, c.writes, gkr, g.writes, false);
        }
        mm('N', 'N', C, i, C, g_scores, c.keys, T(1), g.queries);
        mm('T', 'N', C, i, C, g_scores, queries, T(1), g.keys);
    }

    if (!c.erase) {
        for (int j = 0; j < C * o; ++j) g.writes[j] = c.velocity ? g.writes[j] + g_d[j] : g_d[j];
        scratch.release(mark);
        return;
    }

    // the triangular system (I + beta (gram . A)) d = u - beta base, whose right side has the gradient y
    for (int t = 0; t < C; ++t)
        for (int j = 0; j < C; ++j) square[t * C + j] = c.erase[t] * c.gram[t * C + j] * A[t * S + 1 + j];
    std::copy(g_d, g_d + C * o, y);
    solve_transposed(C, o, square, y);
    T* g_erase = scratch.take(C);
    for (int t = 0; t < C; ++t) {
        const T found = dot(o, y + t * o, c.products + t * o);
        g_erase[t] = A[t * S] * found;
        ga[t * S] -= c.erase[t] * found;
        scaled(o, -c.erase[t] * A[t * S], y + t * o, g.products + t * o);
    }
    // through beta_t f_t Q x_t: gradients of beta, f, x and Q
    auto through = [&](const T* matrix, const T* f, bool one_minus, T* g_f, T* g_matrix) {
        mm('N', 'N', C, i, o, y, matrix, T(0), pull);
        for (int t = 0; t < C; ++t) {
            const T factor = one_minus ? 1 - f[t * S] : f[t * S], found = dot(i, pull + t * i, c.keys + t * i);
            g_erase[t] += factor * found;
            g_f[t * S] += one_minus ? c.erase[t] * found : -c.erase[t] * found;
            axpy(i, -c.erase[t] * factor, pull + t * i, g.keys + t * i);
            scaled(o, -c.erase[t] * factor, y + t * o, rows + t * o);
        }
        mm('T', 'N', o, i, C, rows, c.keys, T(1), g_matrix);
    };
    auto past = [&](const T* factors, const T* values, T* g_factors, bool begin) {
        mm('N', 'T', C, C, o, y, values, T(0), square);
        for (int t = 0; t < C; ++t)
            for (int j = 0; j < C; ++j) {
                const T found = square[t * C + j], scaled_back = found * factors[t * S + 1 + j];
                g_factors[t * S + 1 + j] -= c.erase[t] * c.gram[t * C + j] * found;
                g_gram[t * C + j] = begin ? scaled_back : g_gram[t * C + j] + scaled_back;
            }
    };
    if (c.anchor) through(c.anchor, A, true, ga, g.anchor);
    past(A, d, ga, true);
    if (c.velocity) {
        through(c.velocity, K, false, gk, g.velocity);
        past(K, c.writes, gk, false);
        for (int t = 0; t < C; ++t)
            for (int j = 0; j < C; ++j) square[t * C + j] = -c.erase[t] * c.gram[t * C + j] * K[t * S + 1 + j];
        axpy(C * o, T(1), y, g.writes);
        mm('T', 'N', C, o, C, square, y, T(1), g.writes);
    } else {
        std::copy(y, y + C * o, g.writes);
    }
    for (int t = 0; t < C; ++t) g.erase[t] -= g_erase[t] + dot(C, g_gram + t * C, c.gram + t * C);
    for (int t = 0; t < C; ++t)
        for (int j = 0; j < C; ++j)
            square[t * C + j] = -c.erase[t] * g_gram[t * C + j] - c.erase[j] * g_gram[j * C + t];
    mm('N', 'N', C, i, C, square, c.keys, T(1), g.keys);
    scratch.release(mark);
}

struct Batch { int64_t memories, read, tokens, out, in, after; };  // N, R, C, o, i

template <class T> struct ChunkInputs {  // `Chunk` of ops/chunk.py
    const T *weight, *velocity, *products, *keys, *writes, *erase, *decay, *mixed, *momentum, *queries, *anchor;
};
template <class T> struct ChunkOutputs { T *weight, *velocity, *reads, *d, *gram; };
template <class T> struct ChunkUp { const T *weight, *velocity, *reads, *d, *gram; };
template <class T> struct ChunkGrads {
    T *weight, *velocity, *products, *keys, *writes, *erase, *decay, *mixed, *momentum, *queries, *anchor;
};

template <class T> Layer<T> layer(const Batch& z, const ChunkInputs<T>& in, const T* gram, int64_t N) {
    const int64_t w = z.out * z.in, rows = z.tokens * z.out;
    return {int(z.out), int(z.in), in.weight + N * w, at(in.velocity, N * w), at(in.anchor, N * w),
            at(in.products, N * rows), in.keys + N * z.tokens * z.in, in.writes + N * rows, at(in.erase, N * z.tokens), gram};
}

template <class T> Tables<T> tables(const Batch& z, const ChunkInputs<T>& in, int64_t N) {
    const int64_t size = (z.tokens + 1) * (z.tokens + 1);
    return {in.decay + N * size, at(in.mixed, N * size), at(in.momentum, N * size)};
}

template <class T>
void rule_forward(const Batch& z, const ChunkInputs<T>& in, const ChunkOutputs<T>& out, int64_t begin, int64_t end) {
    const int64_t C = z.tokens, w = z.out * z.in;
    Scratch<T> scratch(2 * C * z.out + 2 * C * C);
    for (int64_t N = begin; N < end; ++N) {
        T* gram = out.gram + N * C * C;
        const Layer<T> c = layer(z, in, static_cast<const T*>(gram), N);
        if (c.erase) mm('N', 'T', C, C, z.in, c.keys, c.keys, T(0), gram);
        const int64_t R = N - (z.memories - z.read);
        const bool reads = in.queries && R >= 0;
        chunk_forward(c, tables(z, in, N), C, z.after, out.weight + N * w, at(out.velocity, N * w), out.d + N * C * z.out,
                      reads ? in.queries + R * C * z.in : nullptr, reads ? out.reads + R * C * z.out : nullptr, scratch);
    }
}

// The gradients of keys, erase and tables are given zeroed.
template <class T>
void rule_backward(const Batch& z, const ChunkInputs<T>& in, const ChunkUp<T>& up, const ChunkGrads<T>& g, int64_t begin,
                   int64_t end) {
    const int64_t C = z.tokens, w = z.out * z.in, rows = C * z.out, S = (C + 1) * (C + 1);
    Scratch<T> scratch(3 * rows + C * z.in + 4 * C * C + C);
    for (int64_t N = begin; N < end; ++N) {
        const int64_t R = N - (z.memories - z.read);
        const bool reads = in.queries && up.reads && R >= 0;
        const LayerGrads<T> grads{g.weight + N * w, at(g.velocity, N * w), at(g.anchor, N * w), at(g.products, N * rows),
                                  g.keys + N * C * z.in, g.writes + N * rows, at(g.erase, N * C),
                                  reads ? g.queries + R * C * z.in : nullptr};
        const TableGrads<T> table{g.decay + N * S, at(g.mixed, N * S), at(g.momentum, N * S)};
        chunk_backward(layer(z, in, up.gram + N * C * C, N), tables(z, in, N), C, z.after, up.d + N * rows, up.weight + N * w,
                       at(up.velocity, N * w), reads ? in.queries + R * C * z.in : nullptr,
                       reads ? up.reads + R * rows : nullptr, grads, table, scratch);
    }
}

}  // namespace
