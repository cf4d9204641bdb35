// Rows divided by their length: `unit` of ops/unit.py.

#pragma once
#include "matrix.h"

namespace {

struct UnitSizes { int64_t width; };
template <class T> struct UnitIn { const T* x; };                   // [N, p]
template <class T> struct UnitOut { T *y, *scale; };                // y, and 1 / |x| [N]
template <class T> struct UnitUp { const T *y, *scale, *g_y; };

template <class T>
void unit_forward(const UnitSizes& z, const UnitIn<T>& in, const UnitOut<T>& out, int64_t begin, int64_t end) {
    const int p = z.width;
    for (int64_t n = begin; n < end; ++n) {
        const T* x = in.x + n * p;
        out.scale[n] = T(1) / std::sqrt(dot(p, x, x) + T(1e-6));
        scaled(p, out.scale[n], x, out.y + n * p);
    }
}

template <class T>
void unit_backward(const UnitSizes& z, const UnitUp<T>& up, const UnitOut<T>& grads, int64_t begin, int64_t end) {
    const int p = z.width;
    for (int64_t n = begin; n < end; ++n) {
        const T *y = up.y + n * p, *g = up.g_y + n * p, s = up.scale[n];
        scaled(p, s, g, grads.y + n * p);
        axpy(p, -s * dot(p, y, g), y, grads.y + n * p);
    }
}

}  // namespace
