// One token through `layers/titans.py`, forward only: projections, gates, and every memory's write and read.

#pragma once
#include <numeric>

#include "decode.h"

namespace {

// settings of a layer, as layers/one_token.py gives them
enum Rate : int64_t { RATE_ONE, RATE_LEARNED, RATE_GATE };
enum Decay : int64_t { DECAY_NONE, DECAY_LEARNED, DECAY_FIXED };
enum Read : int64_t { READ_BEFORE, READ_AFTER, READ_CHUNK };
enum Step : int64_t { STEP_PLAIN, STEP_LAYER, STEP_JOINT };
enum Skip : int64_t { SKIP_NONE, SKIP_OUTER, SKIP_INNER };
enum Part { X, Q, K, V, GATE, ETA, ALPHA, MU, ERASE, PARTS };  // of the input projection
enum Role { AS_Q, AS_K, AS_V, AS_ETA, AS_ALPHA, MAIN, ROLES };  // what a memory is for; the first three are the paths

constexpr int GROUPS = 3, LAYERS = 2;
struct Group { int64_t memories, layers, outputs, skip; };
struct Place { int64_t group, index; };  // of a memory; group -1: a static projection takes its part
struct MemoryStep {
    int64_t dim, heads, width, hidden, taps, path_taps;
    int64_t convolved;  // bit i: part i of the input projection sees the convolved input
    int64_t gated, momentum, erase_gate, rate, decay, read;
    int64_t l2, dgd, gated_erase, step, relative, tied_write, erase_heads, unit_values, self_targets, erase_last;
    Group groups[GROUPS];
    Place roles[ROLES];
};
template <class T> using Weights = T* [GROUPS][LAYERS];  // [B, n, H, o, i] each
template <class T> struct MemoryGiven {
    const T *x, *conv, *path_q, *path_k, *path_v;  // the token and the state
    Weights<const T> start, now, velocity;
    const T *in, *out, *norm, *conv_w, *q_w, *k_w, *v_w;  // the layer
    const T *eta, *alpha, *mu, *erase, *first_rate, *projection_rate, *range;
    Weights<const T> anchor;  // [n, H, o, i]
};
template <class T> struct MemoryMade {
    T *y, *conv, *path_q, *path_k, *path_v;
    Weights<T> now, velocity;
};

// What the token says to one head
template <class T> struct Token { T eta, alpha, mu, erase; const T *q, *k, *v; };

// One layer of one memory of one head
template <class T> struct MemoryLayer {
    int outputs, inputs;
    const T *start, *now, *velocity, *anchor;
    T *next, *next_velocity;
};

template <class T> void apply(int outputs, int inputs, const T* w, const T* x, T* y) {
    for (int r = 0; r < outputs; ++r) y[r] = dot(inputs, w + r * inputs, x);
}

// `memory.architectures`: M(z) of a memory with these weights; a: W2 z, s: the second layer's input
template <class T> void memory_read(const MemoryLayer<T>* layer, int layers, int64_t skip, const T* const* w, const T* z, T* a, T* s, T* y) {
    const int p = layer[0].inputs, h = layer[0].outputs;
    if (layers == 1) return apply(h, p, w[0], z, y);
    apply(h, p, w[0], z, a);
    for (int j = 0; j < h; ++j) s[j] = silu(a[j]) + (skip == SKIP_INNER ? z[j] : T(0));
    apply(layer[1].outputs, h, w[1], s, y);
    if (skip == SKIP_OUTER) axpy(p, T(1), z, y);
}

// W <- alpha W + (1 - alpha) W* - beta W x x^T + S with S <- mu S - (1 - mu) e d x^T: NL Eq. 88 in one layer
template <class T> void write_layer(const MemoryLayer<T>& l, bool momentum, const Token<T>& t, T e, T beta, const T* x, const T* d) {
    const int n = l.inputs;
    const T shrink = momentum ? 1 - t.mu : T(1), alpha = t.alpha;
    for (int r = 0; r < l.outputs; ++r) {
        const T *w = l.now + r * n, u = -shrink * e * d[r], made = u - (beta != 0 ? beta * dot(n, w, x) : T(0));
        T* next = l.next + r * n;
        for (int j = 0; j < n; ++j) next[j] = alpha * w[j] + made * x[j];
        if (l.anchor) axpy(n, 1 - alpha, l.anchor + r * n, next);
        if (!momentum) continue;
        const T* s = l.velocity + r * n;
        T* next_s = l.next_velocity + r * n;
        axpy(n, t.mu, s, next);
        for (int j = 0; j < n; ++j) next_s[j] = t.mu * s[j] + u * x[j];
    }
}

// `memory.rule.advance` for one token of one memory: its gradient at the chunk's start, and what that writes. `own`: the
// main memory's erase gate and factor on its first layer's step.
template <class T>
void memory_write(const MemoryStep& z, const MemoryLayer<T>* layer, int layers, int64_t skip, const Token<T>& t, bool own, T first_rate,
                  T range, T* room) {
    const int p = z.width, h = std::max<int64_t>(z.hidden, p), o = layer[layers - 1].outputs;
    T *a = room, *s = a + h, *error = s + h, *target = error + h, *back = target + h, *a_v = back + h, *s_v = a_v + h;
    const T *start[LAYERS] = {layer[0].start, layers > 1 ? layer[1].start : nullptr}, *wanted = t.v;
    if (z.l2 || layers > 1) memory_read(layer, layers, skip, start, t.k, a, s, error);
    if (z.self_targets) memory_read(layer, layers, skip, start, t.v, a_v, s_v, target), wanted = target;
    for (int j = 0; j < o; ++j) error[j] = (z.l2 ? error[j] : T(0)) - wanted[j];
    const T* inputs[LAYERS] = {t.k, s};
    const T* errors[LAYERS] = {layers > 1 ? back : error, error};
    T sizes[LAYERS] = {dot(p, t.k, t.k), 0}, rates[LAYERS] = {t.eta, t.eta};
    if (layers > 1) {  // through the second layer's weights, to the first layer's product
        const int hidden = layer[1].inputs;
        std::fill(back, back + hidden, T(0));
        for (int r = 0; r < o; ++r) axpy(hidden, error[r], layer[1].start + r * hidden, back);
        for (int j = 0; j < hidden; ++j) back[j] *= slope(a[j]);
        sizes[1] = dot(hidden, s, s);
    }
    const T tiny(1e-6);
    const auto step = [&](T kappa) { return z.relative ? t.eta / (kappa + tiny) : t.eta / (1 + t.eta * kappa); };
    if (z.step == STEP_JOINT) {
        T kappa = sizes[layers - 1];
        if (layers > 1) kappa += sizes[0] * (1 + dot(layer[1].inputs, back, back) / (dot(o, error, error) + tiny));
        rates[0] = rates[1] = step(kappa);
    } else if (z.step == STEP_LAYER) {
        for (int l = 0; l < layers; ++l) rates[l] = step(sizes[l]);
    }
    if (own) rates[0] *= first_rate;
    for (int l = 0; l < layers; ++l) {
        T e = rates[l];
        if (own && z.erase_gate && z.tied_write) e *= t.erase;
        T beta = z.gated_erase ? e * t.alpha : z.dgd ? e : T(0);
        if (own && z.erase_gate && l == (z.erase_last ? layers - 1 : 0)) beta = range * t.erase * t.alpha / (sizes[l] + tiny);
        write_layer(layer[l], z.momentum, t, e, beta, inputs[l], errors[l]);
    }
}

template <class T>
void memory_step(const MemoryStep& z, const MemoryGiven<T>& in, const MemoryMade<T>& out, int64_t begin, int64_t end) {
    const int H = z.heads, p = z.width, D = z.dim, inner = H * p, B = end - begin, wide = std::max<int64_t>(z.hidden, p);
    const auto adapts = [&](int role) { return z.roles[role].group >= 0; };
    const auto path = [&](int role) { return adapts(role) ? 0 : inner; };
    const bool projects = adapts(AS_Q) || adapts(AS_K) || adapts(AS_V) || adapts(AS_ETA) || adapts(AS_ALPHA);
    const int sizes[PARTS] = {
        projects ? inner : 0, path(AS_Q), path(AS_K), path(AS_V), z.gated ? inner : 0,
        z.rate != RATE_ONE && !adapts(AS_ETA) ? H : 0, z.decay == DECAY_LEARNED && !adapts(AS_ALPHA) ? H : 0,
        z.momentum ? H : 0, z.erase_gate ? H : 0};
    const int total = std::accumulate(sizes, sizes + PARTS, 0);
    Scratch<T> scratch(B * (D + total + inner) + 5 * inner + 10 * wide);
    T *mixed = scratch.take(B * D), *parts = scratch.take(B * total), *reads = scratch.take(B * inner);
    T *raw = scratch.take(inner), *room = scratch.take(7 * wide), *a = scratch.take(wide), *s = scratch.take(wide);
    T *bent = scratch.take(3 * inner), *made = scratch.take(inner);
    const T* x = in.x + begin * D;
    for (int b = 0; z.taps && b < B; ++b) {
        const int64_t at = (begin + b) * (z.taps - 1) * D;
        convolve<T>(D, z.taps, x + b * D, in.conv + at, in.conv_w, mixed + b * D, out.conv + at);
    }
    T* part[PARTS];
    for (int i = 0, row = 0; i < PARTS; row += sizes[i++]) {
        part[i] = parts + B * row;
        const T *input = z.convolved >> i & 1 ? mixed : x, *rows = in.in + row * int64_t(D);
        if (sizes[i]) mm<T>('N', 'T', B, sizes[i], D, input, rows, T(0), part[i]);
    }
    const T *taps[3] = {in.q_w, in.k_w, in.v_w}, *past[3] = {in.path_q, in.path_k, in.path_v};
    T* kept[3] = {out.path_q, out.path_k, out.path_v};
    for (int b = 0; b < B; ++b) {
        const T* paths[3];  // q, k and v where they are static, else what their memory takes
        T* own = part[X] + b * inner;
        for (int i = 0; i < 3; ++i) {
            T* row = adapts(i) ? own : part[Q + i] + b * inner;
            if (z.path_taps) {
                const int64_t at = (begin + b) * (z.path_taps - 1) * inner;
                std::copy(row, row + inner, raw);
                if (adapts(i)) row = bent + i * inner;
                convolve<T>(inner, z.path_taps, raw, past[i] + at, taps[i], row, kept[i] + at);
                for (int j = 0; j < inner; ++j) row[j] = silu(row[j]);
            }
            const bool divided = adapts(i) ? z.path_taps > 0 : i < 2 || z.unit_values;  // `own` below, once
            for (int h = 0; divided && h < H; ++h) unit(p, row + h * p);
            paths[i] = row;
        }
        for (int h = 0; projects && h < H; ++h) unit(p, own + h * p);
        for (int h = 0; h < H; ++h) {
            const int at = b * H + h;
            MemoryLayer<T> layers[ROLES][LAYERS];
            for (int role = 0; role < ROLES; ++role) {
                const Place& place = z.roles[role];
                if (place.group < 0) continue;
                const Group& group = z.groups[place.group];
                for (int l = 0; l < group.layers; ++l) {
                    MemoryLayer<T>& layer = layers[role][l];
                    layer.outputs = l + 1 < group.layers ? z.hidden : group.outputs;
                    layer.inputs = l ? z.hidden : p;
                    const int64_t size = int64_t(layer.outputs) * layer.inputs;
                    const int64_t w = (((begin + b) * group.memories + place.index) * H + h) * size;
                    layer.start = in.start[place.group][l] + w, layer.now = in.now[place.group][l] + w;
                    layer.next = out.now[place.group][l] + w;
                    layer.velocity = z.momentum ? in.velocity[place.group][l] + w : nullptr;
                    layer.next_velocity = z.momentum ? out.velocity[place.group][l] + w : nullptr;
                    const T* anchor = in.anchor[place.group][l];
                    layer.anchor = anchor ? anchor + (place.index * H + h) * size : nullptr;
                }
            }
            const auto count = [&](int role) { return z.groups[z.roles[role].group].layers; };
            const auto skip = [&](int role) { return z.groups[z.roles[role].group].skip; };
            const auto say = [&](int role, const T* given, T* y) {  // NL Eqs. 83-85, by the weights of the chunk's start
                const T* w[LAYERS] = {layers[role][0].start, count(role) > 1 ? layers[role][1].start : nullptr};
                memory_read(layers[role], count(role), skip(role), w, given, a, s, y);
            };
            const T* said[3];
            for (int i = 0; i < 3; ++i) {
                said[i] = paths[i] + h * p;
                if (!adapts(i)) continue;
                T* y = made + i * p;
                say(i, said[i], y);
                if (i < 2 || z.unit_values) unit(p, y);
                said[i] = y;
            }
            Token<T> t{1, 1, 0, 0, said[0], said[1], said[2]};
            const auto logit = [&](int role, int i, const T* bias) {
                T y;
                if (!adapts(role)) return part[i][at] + bias[h];
                say(role, own + h * p, &y);
                return y + bias[h];
            };
            if (z.rate != RATE_ONE) {
                const T given = logit(AS_ETA, ETA, in.eta);
                t.eta = z.rate == RATE_GATE ? stretched(given) : given > 20 ? given : std::log1p(std::exp(given));
            }
            if (z.decay == DECAY_LEARNED) t.alpha = sigmoid(logit(AS_ALPHA, ALPHA, in.alpha));
            if (z.decay == DECAY_FIXED) t.alpha = 1 - std::ldexp(T(1), -5 - h);
            if (z.momentum) t.mu = sigmoid(part[MU][at] + in.mu[h]);
            if (z.erase_gate && h < z.erase_heads) t.erase = stretched(part[ERASE][at] + in.erase[h]);
            const T first_rate = in.first_rate ? std::exp(in.first_rate[h]) : T(1), range = z.erase_gate ? *in.range : T(0);
            for (int role = 0; role < ROLES; ++role) {
                if (!adapts(role)) continue;
                Token<T> heard = t;
                if (role != MAIN && in.projection_rate) heard.eta *= std::exp(in.projection_rate[h]);
                memory_write(z, layers[role], count(role), skip(role), heard, role == MAIN, first_rate, range, room);
            }
            T* read = reads + at * p;
            const T* w[LAYERS] = {nullptr, nullptr};
            for (int l = 0; l < count(MAIN); ++l) {
                const MemoryLayer<T>& layer = layers[MAIN][l];
                w[l] = z.read == READ_AFTER ? layer.next : z.read == READ_BEFORE ? layer.now : layer.start;
            }
            memory_read(layers[MAIN], count(MAIN), skip(MAIN), w, t.q, a, s, read);
            const T scale = 1 / std::sqrt(dot(p, read, read) / p + T(1e-6));
            for (int j = 0; j < p; ++j) read[j] *= scale * in.norm[j];
            for (int j = 0; z.gated && j < p; ++j) read[j] *= silu(part[GATE][at * p + j]);
        }
    }
    mm<T>('N', 'T', B, D, inner, reads, in.out, T(0), out.y + begin * D);
}

}  // namespace
