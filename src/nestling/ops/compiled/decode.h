// One token through a sequence layer, forward only: `layers/titans.py` on linear memories, and `layers/attention.py`.

#pragma once
#include <numeric>
#include <vector>

#include "matrix.h"

namespace {

template <class T> T silu(T x) { return x * sigmoid(x); }

// y [n] of x [n] and the taps - 1 inputs before it, w [n, taps]; `next` is what the following token needs
template <class T> void convolve(int n, int taps, const T* x, const T* past, const T* w, T* y, T* next) {
    for (int j = 0; j < n; ++j) y[j] = x[j] * w[j * taps + taps - 1];
    for (int k = 0; k + 1 < taps; ++k)
        for (int j = 0; j < n; ++j) y[j] += past[k * n + j] * w[j * taps + k];
    if (taps < 2) return;
    std::copy(past + n, past + (taps - 1) * n, next);
    std::copy(x, x + n, next + (taps - 2) * n);
}

template <class T> void unit(int n, T* x) {  // x / |x|, as `titans_groups.unit`
    scaled(n, 1 / std::sqrt(dot(n, x, x) + T(1e-6)), x, x);
}
template <class T> T stretched(T x) {  // `titans_groups.gate`, with exact ends
    return std::min(T(1), std::max(T(0), T(1.1) * sigmoid(x) - T(0.05)));
}

// settings of a layer, as ops/compiled/decode.py gives them
enum Rate : int64_t { RATE_ONE, RATE_LEARNED, RATE_GATE };
enum Decay : int64_t { DECAY_NONE, DECAY_LEARNED, DECAY_FIXED };
enum Read : int64_t { READ_BEFORE, READ_AFTER, READ_CHUNK };
struct MemoryStep {
    int64_t dim, heads, width, taps, path_taps;
    int64_t convolved;  // bit i: part i of the input projection sees the convolved input
    int64_t gated, momentum, erase_gate, rate, decay, read;
    int64_t l2, dgd, gated_erase, full_step, relative, tied_write, unit_values;
};
template <class T> struct MemoryGiven {
    const T *x, *conv, *start, *now, *velocity, *path_q, *path_k, *path_v;                                // the token and the state
    const T *in, *out, *norm, *conv_w, *q_w, *k_w, *v_w, *eta, *alpha, *mu, *erase, *anchor, *range;  // the layer
};
template <class T> struct MemoryMade { T *y, *conv, *now, *velocity, *path_q, *path_k, *path_v; };

// What the token says to one head: u and the gates, then W <- alpha W + (1 - alpha) W* - beta W k k^T + S
template <class T> struct Token { T eta, alpha, mu, erase; const T *q, *k, *v; };

template <class T>
void memory_head(const MemoryStep& z, const Token<T>& t, const T* start, const T* W, const T* S, const T* anchor, T range,
                 T* W_new, T* S_new, T* read, T* u, T* made) {
    const int p = z.width;
    const T size = dot(p, t.k, t.k);
    T rate = t.eta;
    if (z.full_step) rate = z.relative ? t.eta / (size + T(1e-6)) : t.eta / (1 + t.eta * size);
    if (z.erase_gate && z.tied_write) rate *= t.erase;
    T beta = z.gated_erase ? rate * t.alpha : z.dgd ? rate : T(0);
    if (z.erase_gate) beta = range * t.erase * t.alpha / (size + T(1e-6));
    const T shrink = z.momentum ? 1 - t.mu : T(1);
    for (int i = 0; i < p; ++i) {
        const T error = z.l2 ? dot(p, start + i * p, t.k) - t.v[i] : -t.v[i];
        u[i] = -shrink * rate * error;
        made[i] = u[i] - beta * dot(p, W + i * p, t.k);
    }
    for (int i = 0; i < p; ++i) {
        const T *w = W + i * p, *w0 = anchor ? anchor + i * p : nullptr, *s = z.momentum ? S + i * p : nullptr;
        T* next = W_new + i * p;
        for (int j = 0; j < p; ++j) next[j] = t.alpha * w[j] + made[i] * t.k[j];
        if (w0) axpy(p, 1 - t.alpha, w0, next);
        if (s) {
            axpy(p, t.mu, s, next);
            for (int j = 0; j < p; ++j) S_new[i * p + j] = t.mu * s[j] + u[i] * t.k[j];
        }
        read[i] = dot(p, z.read == READ_AFTER ? next : z.read == READ_BEFORE ? w : start + i * p, t.q);
    }
}

template <class T>
void memory_step(const MemoryStep& z, const MemoryGiven<T>& in, const MemoryMade<T>& out, int64_t begin, int64_t end) {
    const int H = z.heads, p = z.width, D = z.dim, inner = H * p, B = end - begin;
    // parts of the input projection: q, k, v, gate, eta, alpha, mu, erase
    const int sizes[8] = {inner, inner, inner, z.gated ? inner : 0, z.rate != RATE_ONE ? H : 0,
                          z.decay == DECAY_LEARNED ? H : 0, z.momentum ? H : 0, z.erase_gate ? H : 0};
    const int total = std::accumulate(sizes, sizes + 8, 0);
    Scratch<T> scratch(B * (D + total + inner) + inner + 2 * p);
    T *mixed = scratch.take(B * D), *parts = scratch.take(B * total), *reads = scratch.take(B * inner);
    T *raw = scratch.take(inner), *u = scratch.take(p), *made = scratch.take(p);
    const T* x = in.x + begin * D;
    for (int b = 0; z.taps && b < B; ++b) {
        const int64_t at = (begin + b) * (z.taps - 1) * D;
        convolve<T>(D, z.taps, x + b * D, in.conv + at, in.conv_w, mixed + b * D, out.conv + at);
    }
    T* part[8];
    for (int i = 0, row = 0; i < 8; row += sizes[i++]) {
        part[i] = parts + B * row;
        const T *input = z.convolved >> i & 1 ? mixed : x, *rows = in.in + row * int64_t(D);
        if (sizes[i]) mm<T>('N', 'T', B, sizes[i], D, input, rows, T(0), part[i]);
    }
    const T *taps[3] = {in.q_w, in.k_w, in.v_w}, *past[3] = {in.path_q, in.path_k, in.path_v};
    T* kept[3] = {out.path_q, out.path_k, out.path_v};
    for (int b = 0; b < B; ++b) {
        for (int i = 0; i < 3; ++i) {
            T* row = part[i] + b * inner;
            if (z.path_taps) {
                const int64_t at = (begin + b) * (z.path_taps - 1) * inner;
                std::copy(row, row + inner, raw);
                convolve<T>(inner, z.path_taps, raw, past[i] + at, taps[i], row, kept[i] + at);
                for (int j = 0; j < inner; ++j) row[j] = silu(row[j]);
            }
            for (int h = 0; h < H && (i < 2 || z.unit_values); ++h) unit(p, row + h * p);
        }
        for (int h = 0; h < H; ++h) {
            const int at = b * H + h;
            Token<T> t{1, 1, 0, 0, part[0] + at * p, part[1] + at * p, part[2] + at * p};
            if (z.rate != RATE_ONE) {
                const T logit = part[4][at] + in.eta[h];
                t.eta = z.rate == RATE_GATE ? stretched(logit) : logit > 20 ? logit : std::log1p(std::exp(logit));
            }
            if (z.decay == DECAY_LEARNED) t.alpha = sigmoid(part[5][at] + in.alpha[h]);
            if (z.decay == DECAY_FIXED) t.alpha = 1 - std::ldexp(T(1), -5 - h);
            if (z.momentum) t.mu = sigmoid(part[6][at] + in.mu[h]);
            if (z.erase_gate) t.erase = stretched(part[7][at] + in.erase[h]);
            const int64_t w = ((begin + b) * H + h) * int64_t(p) * p;
            T* read = reads + at * p;
            memory_head<T>(z, t, in.start + w, in.now + w, z.momentum ? in.velocity + w : nullptr,
                           in.anchor ? in.anchor + h * int64_t(p) * p : nullptr, z.erase_gate ? *in.range : T(0), out.now + w,
                           z.momentum ? out.velocity + w : nullptr, read, u, made);
            const T scale = 1 / std::sqrt(dot(p, read, read) / p + T(1e-6));
            for (int j = 0; j < p; ++j) read[j] *= scale * in.norm[j];
            for (int j = 0; z.gated && j < p; ++j) read[j] *= silu(part[3][at * p + j]);
        }
    }
    mm<T>('N', 'T', B, D, inner, reads, in.out, T(0), out.y + begin * D);
}

struct AttentionStep { int64_t dim, heads, groups, width, taps, gated, columns, keep; };  // keep: of the new state
template <class T> struct AttentionGiven {
    const T *x, *conv, *keys, *values;
    const bool* valid;
    const int64_t *positions, *tokens, *window;  // window: one number, or none
    const T *q, *k, *v, *gate, *out, *conv_w, *q_norm, *k_norm, *eps, *frequencies;
};
template <class T> struct AttentionMade {
    T *y, *conv, *keys, *values;
    bool* valid;
    int64_t *positions, *tokens;
};

template <class T> void prepare_head(int p, T* x, const T* norm, T eps, const T* cos, const T* sin) {
    if (norm) {
        const T scale = 1 / std::sqrt(dot(p, x, x) / p + eps);
        for (int j = 0; j < p; ++j) x[j] *= scale * norm[j];
    }
    for (int j = 0; j < p / 2; ++j) {  // `rotary.rotate`
        const T a = x[j], b = x[j + p / 2];
        x[j] = a * cos[j] - b * sin[j];
        x[j + p / 2] = b * cos[j] + a * sin[j];
    }
}

template <class T>
void attention_step(const AttentionStep& z, const AttentionGiven<T>& in, const AttentionMade<T>& out, int64_t begin,
                    int64_t end) {
    const int H = z.heads, G = z.groups, p = z.width, D = z.dim, B = end - begin, S = z.columns;
    const int inner = H * p, wide = G * p, half = p / 2;
    Scratch<T> scratch(B * (D + 3 * inner + 2 * wide) + S + 1 + 2 * half);
    T *mixed = scratch.take(B * D), *q = scratch.take(B * inner), *k = scratch.take(B * wide), *v = scratch.take(B * wide);
    T *gate = scratch.take(B * inner), *read = scratch.take(B * inner), *score = scratch.take(S + 1);
    T *cos = scratch.take(half), *sin = scratch.take(half);
    const T* seen = in.x + begin * D;
    if (z.taps) {
        for (int b = 0; b < B; ++b) {
            const int64_t at = (begin + b) * (z.taps - 1) * D;
            convolve<T>(D, z.taps, seen + b * D, in.conv + at, in.conv_w, mixed + b * D, out.conv + at);
        }
        seen = mixed;
    }
    mm<T>('N', 'T', B, inner, D, seen, in.q, T(0), q);
    mm<T>('N', 'T', B, wide, D, seen, in.k, T(0), k);
    mm<T>('N', 'T', B, wide, D, seen, in.v, T(0), v);
    if (z.gated) mm<T>('N', 'T', B, inner, D, seen, in.gate, T(0), gate);
    std::vector<int> order(S + 1);
    for (int b = 0; b < B; ++b) {
        const int64_t row = begin + b, place = in.tokens[row];
        const bool* valid = in.valid + row * S;
        const int64_t* positions = in.positions + row * S;
        const T *keys = in.keys + row * S * wide, *values = in.values + row * S * wide;
        T *key = k + b * wide, *value = v + b * wide;
        for (int j = 0; j < half; ++j) {
            const T angle = T(place) * in.frequencies[j];
            cos[j] = std::cos(angle);
            sin[j] = std::sin(angle);
        }
        for (int g = 0; g < G; ++g) prepare_head(p, key + g * p, in.k_norm, *in.eps, cos, sin);
        for (int h = 0; h < H; ++h) {
            T *query = q + b * inner + h * p, *y = read + b * inner + h * p;
            prepare_head(p, query, in.q_norm, *in.eps, cos, sin);
            const int g = h / (H / G);
            T most = score[S] = dot(p, query, key + g * p);
            for (int s = 0; s < S; ++s) {
                const bool sees = valid[s] && (!in.window || place - positions[s] < *in.window);
                score[s] = sees ? dot(p, query, keys + s * int64_t(wide) + g * p) : -INFINITY;
                most = std::max(most, score[s]);
            }
            const T scale = 1 / std::sqrt(T(p));
            T sum = 0;
            std::fill(y, y + p, T(0));
            for (int s = 0; s <= S; ++s) {
                score[s] = score[s] == -INFINITY ? T(0) : exponential((score[s] - most) * scale);
                sum += score[s];
            }
            for (int s = 0; s < S; ++s)
                if (score[s] != 0) axpy(p, score[s], values + s * int64_t(wide) + g * p, y);
            axpy(p, score[S], value + g * p, y);
            for (int j = 0; j < p; ++j) y[j] *= (z.gated ? silu(gate[b * inner + h * p + j]) : T(1)) / sum;
        }
        // the columns of the new state, in their order, of which padding falls out first
        int dropped = S + 1 - z.keep, count = 0;
        std::fill(order.begin(), order.end(), 1);
        for (int s = 0; s < S && dropped; ++s)
            if (!valid[s]) order[s] = 0, --dropped;
        for (int s = 0; s < S && dropped; ++s)
            if (valid[s]) order[s] = 0, --dropped;
        if (dropped) order[S] = 0;  // a window of one token keeps nothing
        for (int s = 0; s <= S; ++s) {
            if (!order[s]) continue;
            const int64_t to = row * z.keep + count++;
            const T *from_k = s < S ? keys + s * int64_t(wide) : key, *from_v = s < S ? values + s * int64_t(wide) : value;
            std::copy(from_k, from_k + wide, out.keys + to * wide);
            std::copy(from_v, from_v + wide, out.values + to * wide);
            out.valid[to] = s < S ? valid[s] : true;
            out.positions[to] = s < S ? positions[s] : place;
        }
        out.tokens[row] = place + 1;
    }
    mm<T>('N', 'T', B, D, inner, read, in.out, T(0), out.y + begin * D);
}

}  // namespace
