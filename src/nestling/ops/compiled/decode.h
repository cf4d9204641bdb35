// One token through a sequence layer, forward only: what the layers share, and `layers/attention.py`.

#pragma once
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
