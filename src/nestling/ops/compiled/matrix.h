// Small row-major matrices: products by BLAS, rows by loops that the compiler turns into vector instructions.

#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>

namespace {

template <class T> struct Blas {
    using Gemm = void (*)(const char*, const char*, const int*, const int*, const int*, const T*, const T*, const int*,
                          const T*, const int*, const T*, T*, const int*);
    static Gemm gemm;
};
template <class T> typename Blas<T>::Gemm Blas<T>::gemm = nullptr;

// c [m, n] = alpha a b + beta c, where a is stored [m, k] ('N') or [k, m] ('T') and b [k, n] or [n, k]; rows of `lda` numbers
template <class T> void mm(char ta, char tb, int m, int n, int k, const T* a, int lda, const T* b, T alpha, T beta, T* c) {
    const int ldb = tb == 'N' ? n : k;
    Blas<T>::gemm(&tb, &ta, &n, &m, &k, &alpha, b, &ldb, a, &lda, &beta, c, &n);  // columns first: c^T = b^T a^T
}
template <class T> void mm(char ta, char tb, int m, int n, int k, const T* a, const T* b, T beta, T* c) {
    mm(ta, tb, m, n, k, a, ta == 'N' ? k : m, b, T(1), beta, c);
}

template <class T> void scaled(int n, T a, const T* x, T* y) {
    for (int j = 0; j < n; ++j) y[j] = a * x[j];
}
template <class T> void axpy(int n, T a, const T* __restrict x, T* __restrict y) {
    for (int j = 0; j < n; ++j) y[j] += a * x[j];
}
// x [n, columns] <- (I + L)^-1 x; L [n, n] strictly lower. Blocks on the diagonal by rows, what is below by products.
template <class T> void solve(int n, int columns, const T* L, T* x) {
    constexpr int size = 16;
    for (int begin = 0; begin < n; begin += size) {
        const int end = std::min(n, begin + size);
        for (int t = begin + 1; t < end; ++t)
            for (int j = begin; j < t; ++j) axpy(columns, -L[t * n + j], x + j * columns, x + t * columns);
        if (end < n)
            mm('N', 'N', n - end, columns, end - begin, L + end * n + begin, n, x + begin * columns, T(-1), T(1), x + end * columns);
    }
}

// x <- (I + L)^-T x
template <class T> void solve_transposed(int n, int columns, const T* L, T* x) {
    constexpr int size = 16;
    for (int begin = (n - 1) / size * size; begin >= 0; begin -= size) {
        const int end = std::min(n, begin + size);
        for (int t = end - 1; t > begin; --t)
            for (int j = begin; j < t; ++j) axpy(columns, -L[t * n + j], x + t * columns, x + j * columns);
        if (begin > 0)
            mm('T', 'N', begin, columns, end - begin, L + begin * n, n, x + begin * columns, T(-1), T(1), x);
    }
}

template <class T> void product(int n, const T* x, const T* y, T* z) {
    for (int j = 0; j < n; ++j) z[j] = x[j] * y[j];
}
template <class T> void add_product(int n, const T* __restrict x, const T* __restrict y, T* __restrict z) {
    for (int j = 0; j < n; ++j) z[j] += x[j] * y[j];
}
template <class T> T dot(int n, const T* __restrict x, const T* __restrict y) {
    T sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int j = 0; j < n; ++j) sum += x[j] * y[j];
    return sum;
}

// exp by range reduction and a polynomial (Cephes), so that loops over it become vector instructions
inline float exponential(float x) {
    x = x > 88.0f ? 88.0f : x;
    x = x < -87.0f ? -87.0f : x;
    const float n = std::nearbyint(x * 1.44269504f);
    const float r = x - n * 0.693359375f + n * 2.12194440e-4f;
    float y = 1.9875691500e-4f;
    y = y * r + 1.3981999507e-3f;
    y = y * r + 8.3334519073e-3f;
    y = y * r + 4.1665795894e-2f;
    y = y * r + 1.6666665459e-1f;
    y = y * r + 5.0000001201e-1f;
    y = y * r * r + r + 1.0f;
    const int32_t bits = (static_cast<int32_t>(n) + 127) << 23;
    float power;
    std::memcpy(&power, &bits, 4);
    return y * power;
}
inline double exponential(double x) { return std::exp(x); }

template <class T> T sigmoid(T x) { return T(1) / (T(1) + exponential(-x)); }
template <class T> T slope(T x) {  // silu'
    const T s = sigmoid(x);
    return s + s * (x - x * s);
}

// Memory for temporaries of one thread, taken and released like a stack; every piece begins on a cache line.
template <class T> class Scratch {
    static constexpr size_t line = 64 / sizeof(T);
    T* memory;
    size_t used = 0, size;

  public:
    explicit Scratch(size_t n) : size((n / line + 64) * line) {
        memory = static_cast<T*>(std::aligned_alloc(64, size * sizeof(T)));
        if (!memory) throw std::bad_alloc();
    }
    Scratch(const Scratch&) = delete;
    ~Scratch() { std::free(memory); }
    T* take(size_t n) {
        T* found = memory + used;
        used += (n + line - 1) / line * line;
        if (used > size) std::abort();  // the sizes in forward() and backward() are too small
        return found;
    }
    size_t mark() const { return used; }
    void release(size_t mark) { used = mark; }
};

}  // namespace
