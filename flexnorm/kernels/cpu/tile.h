// Loops over columns that lie side by side: all arithmetic is here. No loop knows what a set is.
// T is the dtype of statistics (float or double); sums are double.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "form.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define RESTRICT __restrict__
#define NOINLINE __attribute__((noinline))
#define SIMD _Pragma("omp simd")
#if defined(__SANITIZE_ADDRESS__)  // whose checks, written out at every place, take a compiler many minutes
#define INLINE inline
#define INLINE_LAMBDA
#else
#define INLINE inline __attribute__((always_inline))
#define INLINE_LAMBDA __attribute__((always_inline))
#endif

namespace ARCH {

// --- half precision, as bits

inline void of_bfloat16(const uint16_t* RESTRICT x, float* RESTRICT out, int64_t n) {
    uint32_t* bits = reinterpret_cast<uint32_t*>(out);
    SIMD for (int64_t k = 0; k < n; ++k) bits[k] = uint32_t(x[k]) << 16;
}

inline void to_bfloat16(const float* RESTRICT x, uint16_t* RESTRICT out, int64_t n) {
    const uint32_t* bits = reinterpret_cast<const uint32_t*>(x);
    SIMD for (int64_t k = 0; k < n; ++k) {
        uint32_t u = bits[k];
        uint32_t rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
        out[k] = uint16_t((u & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
    }
}

inline float wide(uint16_t h) {
    uint32_t sign = uint32_t(h & 0x8000) << 16, rest = h & 0x7fff, u;
    if (rest >= 0x7c00) u = sign | 0x7f800000 | ((rest & 0x3ff) << 13);
    else if (rest >= 0x400) u = sign | ((rest + 0x1c000) << 13);
    else {
        float f = float(rest) * 5.9604644775390625e-8f;  // a subnormal: so many times 2^-24
        std::memcpy(&u, &f, 4);
        u |= sign;
    }
    float f;
    std::memcpy(&f, &u, 4);
    return f;
}

inline uint16_t narrow(float f) {
    uint32_t u;
    std::memcpy(&u, &f, 4);
    uint32_t sign = (u >> 16) & 0x8000;
    u &= 0x7fffffff;
    if (u > 0x7f800000) return uint16_t(sign | 0x7e00);
    if (u >= 0x477ff000) return uint16_t(sign | 0x7c00);
    if (u < 0x38800000) {
        float a;
        std::memcpy(&a, &u, 4);
        return uint16_t(sign | uint32_t(std::nearbyint(a * 16777216.0f)));
    }
    return uint16_t(sign | ((u + 0xfff + ((u >> 13) & 1) - 0x38000000) >> 13));
}

inline void of_float16(const uint16_t* RESTRICT x, float* RESTRICT out, int64_t n) {
    int64_t k = 0;
#if defined(__F16C__)
    for (; k + 8 <= n; k += 8)
        _mm256_storeu_ps(out + k, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x + k))));
#endif
    for (; k < n; ++k) out[k] = wide(x[k]);
}

inline void to_float16(const float* RESTRICT x, uint16_t* RESTRICT out, int64_t n) {
    int64_t k = 0;
#if defined(__F16C__)
    for (; k + 8 <= n; k += 8)
        _mm_storeu_si128(reinterpret_cast<__m128i*>(out + k), _mm256_cvtps_ph(_mm256_loadu_ps(x + k), 0));
#endif
    for (; k < n; ++k) out[k] = narrow(x[k]);
}

inline void widen(int64_t dtype, const uint16_t* x, float* out, int64_t n) {
    if (dtype == BFLOAT16) of_bfloat16(x, out, n);
    else of_float16(x, out, n);
}
inline void narrow(int64_t dtype, const float* x, uint16_t* out, int64_t n) {
    if (dtype == BFLOAT16) to_bfloat16(x, out, n);
    else to_float16(x, out, n);
}
inline void widen(int64_t, const uint16_t*, double*, int64_t) {}  // there is no such dtype of double statistics
inline void narrow(int64_t, const double*, uint16_t*, int64_t) {}

// --- packs: N elements that lie side by side, in as many vectors of this machine as they take. So loops are written once,
// and what they add is added in the same order on every machine.

template <class T>
constexpr int WIDTH = int(sizeof(T) == 8 ? 8 : 16);  // of the widest pack: 64 bytes

#if defined(__AVX512F__)
constexpr int REGISTER = 64;
#elif defined(__AVX2__)
constexpr int REGISTER = 32;
#else
constexpr int REGISTER = 16;
#endif

template <class T, int N>
struct Vector {
    typedef T type __attribute__((vector_size(N * sizeof(T)), aligned(alignof(T)), may_alias));
};
template <class T>
struct Vector<T, 1> {
    typedef T type;
};

template <class T, int N>
struct Pack {
    static constexpr int M = N * int(sizeof(T)) <= REGISTER ? N : REGISTER / int(sizeof(T));  // in one vector
    static constexpr int COUNT = N / M, SIZE = N;
    using V = typename Vector<T, M>::type;
    using Value = T;
    V v[COUNT];

    static INLINE Pack load(const T* p) {
        Pack a;
        for (int i = 0; i < COUNT; ++i) a.v[i] = *reinterpret_cast<const V*>(p + i * M);
        return a;
    }
    INLINE void store(T* p) const {
        for (int i = 0; i < COUNT; ++i) *reinterpret_cast<V*>(p + i * M) = v[i];
    }
    static INLINE Pack all(T value) {
        Pack a;
        for (int i = 0; i < COUNT; ++i) a.v[i] = value - V{};
        return a;
    }
    friend INLINE Pack operator+(Pack a, const Pack& b) {
        for (int i = 0; i < COUNT; ++i) a.v[i] += b.v[i];
        return a;
    }
    friend INLINE Pack operator-(Pack a, const Pack& b) {
        for (int i = 0; i < COUNT; ++i) a.v[i] -= b.v[i];
        return a;
    }
    friend INLINE Pack operator*(Pack a, const Pack& b) {
        for (int i = 0; i < COUNT; ++i) a.v[i] *= b.v[i];
        return a;
    }
};

// a where the weight is above 0, and 0 elsewhere.
template <class T, int N>
INLINE Pack<T, N> where_positive(const Pack<T, N>& weight, const Pack<T, N>& a) {
    using V = typename Pack<T, N>::V;
    Pack<T, N> b;
    for (int i = 0; i < Pack<T, N>::COUNT; ++i) b.v[i] = weight.v[i] > 0 ? a.v[i] : V{};
    return b;
}

// The lower and the upper half of a vector. Compilers send it through memory, and wait for it, unless they are told.
template <class H, class V>
INLINE H half(const V& v, int i) {
    H h;
    std::memcpy(&h, reinterpret_cast<const char*>(&v) + i * sizeof h, sizeof h);
    return h;
}
#if defined(__AVX512F__)
template <>
INLINE Vector<float, 8>::type half(const Vector<float, 16>::type& v, int i) {
    return i ? _mm512_extractf32x8_ps(__m512(v), 1) : _mm512_castps512_ps256(__m512(v));
}
template <>
INLINE Vector<double, 4>::type half(const Vector<double, 8>::type& v, int i) {
    return i ? _mm512_extractf64x4_pd(__m512d(v), 1) : _mm512_castpd512_pd256(__m512d(v));
}
#endif
#if defined(__AVX2__)
template <>
INLINE Vector<float, 4>::type half(const Vector<float, 8>::type& v, int i) {
    return i ? _mm256_extractf128_ps(__m256(v), 1) : _mm256_castps256_ps128(__m256(v));
}
template <>
INLINE Vector<double, 2>::type half(const Vector<double, 4>::type& v, int i) {
    return i ? _mm256_extractf128_pd(__m256d(v), 1) : _mm256_castpd256_pd128(__m256d(v));
}
#endif

template <class T, int N>
INLINE Pack<T, N / 2> half(const Pack<T, N>& a, int i) {
    using H = Pack<T, N / 2>;
    H h;
    if constexpr (Pack<T, N>::COUNT > 1)
        for (int j = 0; j < H::COUNT; ++j) h.v[j] = a.v[i * H::COUNT + j];
    else h.v[0] = half<typename H::V>(a.v[0], i);
    return h;
}

template <class T, int N>
INLINE Pack<T, N / 2> halved(const Pack<T, N>& a) { return half(a, 0) + half(a, 1); }

// The sum of all: halves are added until one is left.
template <class T, int N>
INLINE T total(const Pack<T, N>& a) {
    if constexpr (N * sizeof(T) > 16) return total(halved(a));
    else if constexpr (N == 4) return (a.v[0][0] + a.v[0][2]) + (a.v[0][1] + a.v[0][3]);
    else if constexpr (N == 2) return a.v[0][0] + a.v[0][1];
    else return a.v[0];
}

// The same of eight, in the order in which processors add two such sums at once.
INLINE float pairwise(const Pack<float, 8>& a) {
    float v[8];
    a.store(v);
    return ((v[0] + v[1]) + (v[2] + v[3])) + ((v[4] + v[5]) + (v[6] + v[7]));
}
INLINE double pairwise(const Pack<double, 8>& a) {
    double v[4];
    halved(a).store(v);
    return (v[0] + v[1]) + (v[2] + v[3]);
}

template <class T, int N>
INLINE Pack<double, N> widened(const Pack<T, N>& a) {
    Pack<double, N> w;
    if constexpr (std::is_same<T, double>::value) w = a;
    else if constexpr (N == 1) w.v[0] = double(a.v[0]);
    else if constexpr (Pack<double, N>::COUNT == 1) w.v[0] = __builtin_convertvector(a.v[0], typename Pack<double, N>::V);
    else {
        Pack<double, N / 2> low = widened(half(a, 0)), high = widened(half(a, 1));
        for (int i = 0; i < low.COUNT; ++i) w.v[i] = low.v[i], w.v[low.COUNT + i] = high.v[i];
    }
    return w;
}

// An operand of a loop: one value for all columns, or one for each.
template <class T>
struct One {
    T value;
    template <class P>
    INLINE P at(int64_t) const { return P::all(value); }
    One from(int64_t) const { return *this; }
};
template <class T>
struct Each {
    const T* p;
    template <class P>
    INLINE P at(int64_t k) const { return P::load(p + k); }
    Each from(int64_t k) const { return {p + k}; }
};


// A number of columns; one of which eight divides leaves short runs without a rest.
struct Any {
    int64_t n;
};
struct Eights {
    int64_t n;
};

// f(a pack of the wanted size, k) for all columns.
template <class T, class F>
INLINE void sweep(Any columns, F&& f) {
    constexpr int W = WIDTH<T>;
    int64_t k = 0, n = columns.n;
    for (; k + W <= n; k += W) f(Pack<T, W>{}, k);
    if (k + W / 2 <= n) f(Pack<T, W / 2>{}, k), k += W / 2;
    if (k + W / 4 <= n) f(Pack<T, W / 4>{}, k), k += W / 4;
    for (; k < n; ++k) f(Pack<T, 1>{}, k);
}
template <class T, class F>
INLINE void sweep(Eights columns, F&& f) {
    for (int64_t k = 0; k < columns.n; k += 8) f(Pack<T, 8>{}, k);
}

template <class T, int N>
INLINE void add_to(T* p, const Pack<T, N>& a) {
    (Pack<T, N>::load(p) + a).store(p);
}
template <class T, int N, class = std::enable_if_t<!std::is_same<T, double>::value>>
INLINE void add_to(double* p, const Pack<T, N>& a) {
    (Pack<double, N>::load(p) + widened(a)).store(p);
}

// Adds to `sums` those of Q quantities: f(terms, k) gives them for a pack of columns. What is added in T is a tree of at most
// 128 terms; the rest is in double.
constexpr int TREE = 8;
constexpr int BLOCK = TREE * 16;

// Of whole blocks, of which there may be none; how many columns these are.
template <class T, int Q, class F>
INLINE int64_t reduce_blocks(int64_t n, Pack<double, 16>* wide, F&& f) {
    constexpr int W = 16;
    using P = Pack<T, W>;
    int64_t k = 0;
    for (; k + BLOCK <= n; k += BLOCK) {
        P a[Q], b[Q], c[Q], d[Q], e[Q];  // in the order in which it needs the fewest registers
        f(a, k), f(b, k + W), f(c, k + 2 * W), f(d, k + 3 * W);
        for (int q = 0; q < Q; ++q) a[q] = (a[q] + b[q]) + (c[q] + d[q]);
        f(b, k + 4 * W), f(c, k + 5 * W), f(d, k + 6 * W), f(e, k + 7 * W);
        for (int q = 0; q < Q; ++q) wide[q] = wide[q] + widened(a[q] + ((b[q] + c[q]) + (d[q] + e[q])));
    }
    return k;
}

// Of columns k..n, which are less than a block.
template <class T, int Q, class F>
INLINE void reduce_rest(int64_t k, int64_t n, double* sums, F&& f) {
    constexpr int W = 16;
    using P = Pack<T, W>;
    if (k == n) return;
    P a[Q] = {};
    Pack<T, W / 2> b[Q] = {};
    Pack<T, W / 4> c[Q] = {};
    T rest[Q] = {};
    for (; k + W <= n; k += W) {
        P t[Q];
        f(t, k);
        for (int q = 0; q < Q; ++q) a[q] = a[q] + t[q];
    }
    if (k + W / 2 <= n) f(b, k), k += W / 2;
    if (k + W / 4 <= n) f(c, k), k += W / 4;
    for (; k < n; ++k) {
        Pack<T, 1> t[Q];
        f(t, k);
        for (int q = 0; q < Q; ++q) rest[q] += t[q].v[0];
    }
    for (int q = 0; q < Q; ++q) sums[q] += double(total(halved(halved(a[q]) + b[q]) + c[q]) + rest[q]);
}

template <class T, int Q, class F>
INLINE void reduce(Any columns, double* sums, F&& f) {
    int64_t k = 0;
    if (columns.n >= BLOCK) {
        Pack<double, 16> wide[Q] = {};
        k = reduce_blocks<T, Q>(columns.n, wide, f);
        for (int q = 0; q < Q; ++q) sums[q] += total(wide[q]);
    }
    reduce_rest<T, Q>(k, columns.n, sums, f);
}

template <class T, int Q, class F>
INLINE void reduce(Eights columns, double* sums, F&& f) {
    Pack<T, 8> a[Q], t[Q];
    f(a, 0);
    for (int64_t k = 8; k < columns.n; k += 8) {
        f(t, k);
        for (int q = 0; q < Q; ++q) a[q] = a[q] + t[q];
    }
#if defined(__AVX2__)
    if constexpr (Q == 2) {  // both at once
        __m128d both;
        if constexpr (std::is_same<T, float>::value) {
            __m256 h = _mm256_hadd_ps(__m256(a[0].v[0]), __m256(a[1].v[0]));
            h = _mm256_hadd_ps(h, h);
            both = _mm_cvtps_pd(_mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1)));
        } else {
            Pack<T, 4> l = halved(a[0]), r = halved(a[1]);
            __m256d h = _mm256_hadd_pd(__m256d(l.v[0]), __m256d(r.v[0]));
            both = _mm_add_pd(_mm256_castpd256_pd128(h), _mm256_extractf128_pd(h, 1));
        }
        _mm_storeu_pd(sums, _mm_add_pd(_mm_loadu_pd(sums), both));
        return;
    }
#endif
    for (int q = 0; q < Q; ++q) sums[q] += double(pairwise(a[q]));
}

// --- sums of one set over a run: of d = x - shift, and of d * d

template <class T>
struct Deviations {
    const T* x;
    double shift;
    template <class P>
    INLINE void operator()(P* t, int64_t k) const {
        using V = typename P::Value;
        P d = wide<P>(k) - P::all(V(shift));
        t[0] = d, t[1] = d * d;
    }
    template <class P>
    INLINE P wide(int64_t k) const {
        if constexpr (std::is_same<typename P::Value, T>::value) return P::load(x + k);
        else return widened(Pack<T, P::SIZE>::load(x + k));
    }
};

// In doubles where they are few, as then no errors cancel.
template <class T, class N>
INLINE void run_sums(const T* x, N n, double shift, double* sums) {
    if (n.n >= BLOCK) reduce<T, 2>(Any{n.n}, sums, Deviations<T>{x, shift});
    else reduce<double, 2>(n, sums, Deviations<T>{x, shift});
}

// The first of eight values, and what they differ from it on average: near their mean, and the value of equal ones exactly.
template <class T>
inline double run_shift(const T* x) {
    double d = 0;
    for (int k = 1; k < 8; ++k) d += double(x[k]) - double(x[0]);
    T near = T(double(x[0]) + d * 0.125);
    return near - near == 0 ? double(near) : double(x[0]);
}

// The same sums of a set whose members come in parts, as if they lay one after another. What is less than a block is held
// until the next part.
template <class T>
class Flow {
   public:
    bool active = false;
    double shift, sums[2];
    int64_t count;

    void begin(bool known, double about) {
        active = true, knows = known, shift = about, count = held = 0;
        wide[0] = wide[1] = Pack<double, 16>{};
    }

    void add(const T* RESTRICT x, int64_t n) {
        if (n == 0) return;  // x may be null
        count += n;
        if (held) {
            int64_t more = std::min(n, BLOCK - held);
            std::memcpy(rest + held, x, sizeof(T) * size_t(more));
            held += more, x += more, n -= more;
            if (held < BLOCK) return;
            blocks(rest, BLOCK);
            held = 0;
        }
        int64_t done = n >= BLOCK ? blocks(x, n) : 0;
        held = n - done;
        std::memcpy(rest, x + done, sizeof(T) * size_t(held));
    }

    // With the last part, which need not be held. N: as `run_sums` takes so many columns.
    template <class N>
    void finish(const T* x, int64_t n) {
        if (held) add(x, n), x = rest, n = held;
        else {
            count += n;
            int64_t done = n >= BLOCK ? blocks(x, n) : 0;
            x += done, n -= done;
        }
        active = false;
        sums[0] = sums[1] = 0;
        if (count >= BLOCK) {
            for (int q = 0; q < 2; ++q) sums[q] = total(wide[q]);
            reduce_rest<T, 2>(0, n, sums, Deviations<T>{x, shift});
        } else if (n) {
            if (!knows) shift = double(x[0]);
            reduce<double, 2>(N{n}, sums, Deviations<T>{x, shift});
        }
    }

   private:
    int64_t blocks(const T* x, int64_t n) {
        if (!knows) shift = run_shift(x), knows = true;
        Pack<double, 16> w[2] = {wide[0], wide[1]};
        int64_t done = reduce_blocks<T, 2>(n, w, Deviations<T>{x, shift});
        wide[0] = w[0], wide[1] = w[1];
        return done;
    }

    bool knows;
    int64_t held;
    Pack<double, 16> wide[2];
    T rest[BLOCK];
};

// The same with weights along the columns, in doubles.
template <class T>
struct WeightedDeviations {
    const T *x, *w;
    double shift;
    template <class P>
    INLINE void operator()(P* t, int64_t k) const {
        t[0] = widened(Pack<T, P::SIZE>::load(w + k));
        P d = where_positive(t[0], widened(Pack<T, P::SIZE>::load(x + k)) - P::all(shift));  // what weighs nothing may be NaN
        t[1] = t[0] * d, t[2] = t[1] * d;
    }
};

template <class T>
inline void run_sums(const T* x, const T* w, int64_t n, double shift, double& c, double& s, double& q) {
    double sums[3] = {};
    reduce<double, 3>(Any{n}, sums, WeightedDeviations<T>{x, w, shift});
    c += sums[0], s += sums[1], q += sums[2];
}

// --- sums of a set per column, over rows

template <class T>
inline void lane_sums(const T* RESTRICT x, int64_t n, double weight, const double* RESTRICT shift, double* RESTRICT s,
                      double* RESTRICT q) {
    SIMD for (int64_t k = 0; k < n; ++k) {
        double d = double(x[k]) - shift[k];
        s[k] += weight * d;
        q[k] += weight * d * d;
    }
}

// Eight rows at once, so that one addition in eight is one of doubles.
template <class T>
inline void lane_sums(const T* const* rows, int64_t n, const double* RESTRICT shift, double* RESTRICT s,
                      double* RESTRICT q) {
    const T *RESTRICT x0 = rows[0], *RESTRICT x1 = rows[1], *RESTRICT x2 = rows[2], *RESTRICT x3 = rows[3];
    const T *RESTRICT x4 = rows[4], *RESTRICT x5 = rows[5], *RESTRICT x6 = rows[6], *RESTRICT x7 = rows[7];
    SIMD for (int64_t k = 0; k < n; ++k) {
        T c = T(shift[k]);
        T d0 = x0[k] - c, d1 = x1[k] - c, d2 = x2[k] - c, d3 = x3[k] - c;
        T d4 = x4[k] - c, d5 = x5[k] - c, d6 = x6[k] - c, d7 = x7[k] - c;
        s[k] += double(((d0 + d1) + (d2 + d3)) + ((d4 + d5) + (d6 + d7)));
        q[k] += double(((d0 * d0 + d1 * d1) + (d2 * d2 + d3 * d3)) + ((d4 * d4 + d5 * d5) + (d6 * d6 + d7 * d7)));
    }
}

// The same of eight rows, for every column.
template <class T>
inline void lane_shifts(const T* const* rows, int64_t n, double* RESTRICT shift) {
    const T *RESTRICT x0 = rows[0], *RESTRICT x1 = rows[1], *RESTRICT x2 = rows[2], *RESTRICT x3 = rows[3];
    const T *RESTRICT x4 = rows[4], *RESTRICT x5 = rows[5], *RESTRICT x6 = rows[6], *RESTRICT x7 = rows[7];
    SIMD for (int64_t k = 0; k < n; ++k) {
        T c = x0[k];
        T d = ((x1[k] - c) + (x2[k] - c)) + ((x3[k] - c) + (x4[k] - c)) + ((x5[k] - c) + (x6[k] - c)) + (x7[k] - c);
        T near = c + d * T(0.125);
        shift[k] = near - near == 0 ? double(near) : double(c);  // finite
    }
}

// M is uint8_t (membership) or T (weights). A column takes its first element as its shift, unless `fixed`.
template <class T, class M>
inline void lane_sums(const T* RESTRICT x, const M* RESTRICT m, int64_t n, bool fixed, double* RESTRICT c,
                      double* RESTRICT shift, double* RESTRICT s, double* RESTRICT q) {
    if (!fixed) SIMD for (int64_t k = 0; k < n; ++k) shift[k] = m[k] > 0 && c[k] == 0 ? double(x[k]) : shift[k];
    SIMD for (int64_t k = 0; k < n; ++k) {
        double w = std::is_same<M, uint8_t>::value ? (m[k] ? 1.0 : 0.0) : double(m[k]);
        double d = m[k] > 0 ? double(x[k]) - shift[k] : 0.0;
        c[k] += w;
        s[k] += w * d;
        q[k] += w * d * d;
    }
}

// --- the moments of a set, or of the sets of some columns. The mean is high + low, r = 1 / sigma and c = -low / sigma.

template <class V>
struct Standard {
    V high, rate, carry;
    Standard from(int64_t k) const { return {high.from(k), rate.from(k), carry.from(k)}; }
    template <class P>
    INLINE P xhat(const typename P::Value* x, int64_t k) const {
        return (P::load(x + k) - high.template at<P>(k)) * rate.template at<P>(k) + carry.template at<P>(k);
    }
};
template <class V>
Standard(V, V, V) -> Standard<V>;

// (x - mean) / sigma * weight + bias
template <class T, class V, class W, class N>
INLINE void normalize(const T* x, T* y, N n, const Standard<V>& m, W w, W b) {
    sweep<T>(n, [=](auto pack, int64_t k) INLINE_LAMBDA {
        using P = decltype(pack);
        (m.template xhat<P>(x, k) * w.template at<P>(k) + b.template at<P>(k)).store(y + k);
    });
}

// The same, with r and c already times the weight, and the bias in c.
template <class T, class V, class N>
INLINE void normalize(const T* x, T* y, N n, const Standard<V>& m) {
    sweep<T>(n, [=](auto pack, int64_t k) INLINE_LAMBDA { m.template xhat<decltype(pack)>(x, k).store(y + k); });
}

// The same of eight rows at once.
template <class T, class V>
INLINE void normalize_eight(const T* const* x, T* const* y, int64_t n, const Standard<V>& m) {
    sweep<T>(Any{n}, [=](auto pack, int64_t k) INLINE_LAMBDA {
        using P = decltype(pack);
        const P high = m.high.template at<P>(k), r = m.rate.template at<P>(k), c = m.carry.template at<P>(k);
        for (int j = 0; j < 8; ++j) ((P::load(x[j] + k) - high) * r + c).store(y[j] + k);
    });
}

// Past the caches, which saves reading what is overwritten. Whole lines are written so; of others a part has to be read.
template <class T>
inline void copy_past(const T* x, T* y, int64_t n) {
    int64_t k = 0;
#if defined(__x86_64__)
    constexpr int64_t LINE = 64 / sizeof(T);
    if (n >= 64) {
        k = int64_t((-reinterpret_cast<uintptr_t>(y) & 63) / sizeof(T));
        std::memcpy(y, x, sizeof(T) * size_t(k));
        for (; k + LINE <= n; k += LINE)
            for (int64_t at = 0; at < 64; at += REGISTER) {
                const char* from = reinterpret_cast<const char*>(x + k) + at;
                char* to = reinterpret_cast<char*>(y + k) + at;
#if defined(__AVX512F__)
                _mm512_stream_si512(reinterpret_cast<__m512i*>(to), _mm512_loadu_si512(from));
#elif defined(__AVX2__)
                _mm256_stream_si256(reinterpret_cast<__m256i*>(to), _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
#else
                _mm_stream_si128(reinterpret_cast<__m128i*>(to), _mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#endif
            }
    }
#endif
    std::memcpy(y + k, x + k, sizeof(T) * size_t(n - k));
}
// Before another thread reads it.
inline void past_done() {
#if defined(__x86_64__)
    _mm_sfence();
#endif
}

// r * w and c * w + b: what is left of the moments and the parameters of a column
template <class T, class W>
INLINE void fold(const T* r, const T* c, int64_t n, W w, W b, T* a, T* d) {
    sweep<T>(Any{n}, [=](auto pack, int64_t k) INLINE_LAMBDA {
        using P = decltype(pack);
        P weight = w.template at<P>(k);
        (P::load(r + k) * weight).store(a + k);
        (P::load(c + k) * weight + b.template at<P>(k)).store(d + k);
    });
}

template <class T, class W>
INLINE void multiply(const T* x, int64_t n, W w, T* y) {
    sweep<T>(Any{n}, [=](auto pack, int64_t k) INLINE_LAMBDA {
        using P = decltype(pack);
        (P::load(x + k) * w.template at<P>(k)).store(y + k);
    });
}

template <class T>
inline void keep(T* RESTRICT y, const uint8_t* RESTRICT m, int64_t n) {
    SIMD for (int64_t k = 0; k < n; ++k) y[k] = m[k] ? y[k] : T(0);
}

template <class T, class V>
inline void keep(const T* RESTRICT x, T* RESTRICT y, const uint8_t* RESTRICT m, int64_t n, V other) {
    SIMD for (int64_t k = 0; k < n; ++k) y[k] = m[k] ? x[k] : other.template at<Pack<T, 1>>(k).v[0];
}

// What is inside of a mask, side by side; how many.
template <class T>
inline int64_t compacted(const T* RESTRICT x, const uint8_t* RESTRICT m, int64_t n, T* RESTRICT to) {
    int64_t many = 0, k = 0;
#if defined(__AVX512F__)
    for (; k + WIDTH<T> <= n; k += WIDTH<T>) {  // what is written behind the members is written over
        __m128i bytes = WIDTH<T> == 16 ? _mm_loadu_si128(reinterpret_cast<const __m128i*>(m + k))
                                       : _mm_loadl_epi64(reinterpret_cast<const __m128i*>(m + k));
        __mmask16 inside = _mm_test_epi8_mask(bytes, bytes);
        if constexpr (WIDTH<T> == 16) _mm512_storeu_ps(to + many, _mm512_maskz_compress_ps(inside, _mm512_loadu_ps(x + k)));
        else _mm512_storeu_pd(to + many, _mm512_maskz_compress_pd(__mmask8(inside), _mm512_loadu_pd(x + k)));
        many += __builtin_popcount(inside);
    }
#endif
    for (; k < n; ++k) {
        to[many] = x[k];
        many += m[k] != 0;
    }
    return many;
}

// Narrows columns first..last to those from the first that is inside of a mask to the last. Padding is long.
inline void first_and_last(const uint8_t* m, int64_t& first, int64_t& last) {
    auto none = [=](int64_t k) {
        uint64_t eight;
        std::memcpy(&eight, m + k, 8);
        return eight == 0;
    };
    while (first + 8 <= last && none(first)) first += 8;
    while (first < last && !m[first]) ++first;
    while (first + 8 <= last && none(last - 8)) last -= 8;
    while (first < last && !m[last - 1]) --last;
}

inline int64_t members(const uint8_t* RESTRICT m, int64_t n) {
    int64_t inside = 0;
#pragma omp simd reduction(+ : inside)
    for (int64_t k = 0; k < n; ++k) inside += m[k] != 0;
    return inside;
}

// Whether all of a mask is outside (0), inside (1), or neither (2).
inline int uniform(const uint8_t* RESTRICT m, int64_t n) {
    uint8_t any = 0, all = 1;
#pragma omp simd reduction(| : any) reduction(& : all)
    for (int64_t k = 0; k < n; ++k) {
        any |= m[k];
        all &= m[k];
    }
    return all ? 1 : any ? 2 : 0;
}

template <class T>
inline void fill(T* RESTRICT y, int64_t n, T value) {
    SIMD for (int64_t k = 0; k < n; ++k) y[k] = value;
}

template <class T>
inline void gather(const T* RESTRICT from, const int32_t* RESTRICT index, T* RESTRICT out, int64_t n) {
    SIMD for (int64_t k = 0; k < n; ++k) out[k] = from[index[k]];
}

// --- activations

// a * b + c, rounded once where a processor has an instruction for it. No sum of a norm uses it, because sums are the same on
// every machine. An activation may differ in its last bits.
INLINE float fused(float a, float b, float c) {
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
    return __builtin_fmaf(a, b, c);
#else
    return a * b + c;
#endif
}

// e^-z, for z from -88.7 to 88: 2^n e^-r with r = z + n log(2); 0 above 87.7, infinity below -88.4. The polynomial is our own
// minimax fit of the relative error on |r| <= log(2) / 2, in which 1 and r are exact: 0.03 eps.
INLINE float decay_within(float z) {
    const float middle = 12582912.0f + 127.0f;  // its last bit is 1: so the lowest bits are n + 127, the exponent of 2^n
    float shifted = fused(z, -1.44269504f, middle), n = shifted - middle;
    float power = __builtin_bit_cast(float, __builtin_bit_cast(uint32_t, shifted) << 23);  // exponent 0: 0, 255: infinity
    float r = fused(n, -2.12194440e-4f, fused(n, 0.693359375f, z));  // n times the first part of log(2) is exact
    float p = 0.001381454f;
    p = fused(p, r, -0.008368745f);
    p = fused(p, r, 0.04166839f);
    p = fused(p, r, -0.16666521f);
    p = fused(p, r, 0.49999994f);
    p = fused(p, r, -1.0f);
    p = fused(p, r, 1.0f);
    return p * power;
}

// e^-z for every z. Bits are compared as integers, because compilers make one instruction of each bound. NaN gets some value:
// callers multiply or divide z by it.
INLINE float decay(float z) {
    const int32_t most = __builtin_bit_cast(int32_t, 88.0f);
    const uint32_t least = __builtin_bit_cast(uint32_t, -88.7f);
    uint32_t u = uint32_t(std::min(__builtin_bit_cast(int32_t, z), most));  // signed: negative numbers come first
    return decay_within(__builtin_bit_cast(float, std::min(u, least)));     // unsigned: they come last
}
INLINE double decay(double z) { return std::exp(-z); }

// Of the normal distribution: cdf, and bell = e^(-z^2 / 2). cdf(-x) is bell times a polynomial, our own minimax fit of the error
// of cdf on 0 <= x <= 6: 0.04 eps.
INLINE void normal(float z, float& cdf, float& bell) {
    const uint32_t most = __builtin_bit_cast(uint32_t, 13.25f);  // whose bell is 0
    float x = __builtin_bit_cast(float, std::min(__builtin_bit_cast(uint32_t, z) & 0x7fffffff, most));
    bell = decay_within(0.5f * x * x);
    float p = 5.85331e-08f;
    p = fused(p, x, -1.6036629e-06f);
    p = fused(p, x, 1.9893043e-05f);
    p = fused(p, x, -1.4979136e-04f);
    p = fused(p, x, 7.7967515e-04f);
    p = fused(p, x, -0.0030553525f);
    p = fused(p, x, 0.009659802f);
    p = fused(p, x, -0.026069177f);
    p = fused(p, x, 0.06226239f);
    p = fused(p, x, -0.1329169f);
    p = fused(p, x, 0.2499911f);
    p = fused(p, x, -0.39894179f);
    p = fused(p, x, 0.5f);
    float tail = p * bell;
    cdf = z < 0 ? tail : 1.0f - tail;
}
INLINE void normal(double z, double& cdf, double& bell) {
    cdf = 0.5 + 0.5 * std::erf(z * 0.70710678118654752440);
    bell = std::exp(-0.5 * z * z);
}

template <class T>
inline void activate(int64_t activation, T* RESTRICT y, int64_t n) {
    if (activation == RELU) {
        SIMD for (int64_t k = 0; k < n; ++k) y[k] = y[k] < 0 ? T(0) : y[k];  // keeps NaN
    } else if (activation == SILU) {
        SIMD for (int64_t k = 0; k < n; ++k) y[k] = y[k] / (T(1) + decay(y[k]));
    } else if (activation == GELU) {
        SIMD for (int64_t k = 0; k < n; ++k) {
            T cdf, bell;
            normal(y[k], cdf, bell);
            y[k] = y[k] * cdf;
        }
    }
}

// dz = dy * the derivative at z; dz may be dy.
template <class T>
inline void activate_backward(int64_t activation, const T* RESTRICT z, const T* dy, T* dz, int64_t n) {
    if (activation == RELU) {
        SIMD for (int64_t k = 0; k < n; ++k) dz[k] = z[k] <= 0 ? T(0) : dy[k];
    } else if (activation == SILU) {
        SIMD for (int64_t k = 0; k < n; ++k) {
            T s = T(1) / (T(1) + decay(z[k]));
            dz[k] = dy[k] * (s * (T(1) + z[k] * (T(1) - s)));
        }
    } else if (activation == GELU) {
        SIMD for (int64_t k = 0; k < n; ++k) {
            T cdf, bell;
            normal(z[k], cdf, bell);
            dz[k] = dy[k] * (cdf + z[k] * (T(0.39894228040143267794) * bell));
        }
    }
}

// --- backward

// Adds to `sums` those of g = dz * w and of g * xhat of a run.
template <class T, class V, class W, class N>
INLINE void dot_sums(const T* x, const T* dz, N n, const Standard<V>& m, W w, double* sums) {
    reduce<T, 2>(n, sums, [=](auto* t, int64_t k) INLINE_LAMBDA {
        using P = std::remove_reference_t<decltype(*t)>;
        P g = P::load(dz + k) * w.template at<P>(k);
        t[0] = g, t[1] = g * m.template xhat<P>(x, k);
    });
}

// The same with parameters along the columns; dz and dz * xhat are added to those of every column.
template <class T, class V, class N>
INLINE void dot_sums(const T* x, const T* dz, N n, const Standard<V>& m, Each<T> w, double* sums, T* pb, T* pw) {
    reduce<T, 2>(n, sums, [=](auto* t, int64_t k) INLINE_LAMBDA {
        using P = std::remove_reference_t<decltype(*t)>;
        P g = P::load(dz + k), xhat = m.template xhat<P>(x, k);
        (P::load(pb + k) + g).store(pb + k);
        (P::load(pw + k) + g * xhat).store(pw + k);
        g = g * w.template at<P>(k);
        t[0] = g, t[1] = g * xhat;
    });
}

// g and g * xhat added to those of every column: U is T, or double.
template <class T, class U, class V, class W, class N>
INLINE void lane_dots(const T* x, const T* dz, N n, const Standard<V>& m, W w, U* a, U* b) {
    sweep<T>(n, [=](auto pack, int64_t k) INLINE_LAMBDA {
        using P = decltype(pack);
        P g = P::load(dz + k) * w.template at<P>(k), gx = g * m.template xhat<P>(x, k);
        add_to(a + k, g), add_to(b + k, gx);
    });
}

// The sums of dz and dz * xhat of eight rows at once, added to those of every column.
template <class T, class V>
INLINE void lane_dots_eight(const T* const* x, const T* const* dz, int64_t n, const Standard<V>& m, T* a, T* b) {
    sweep<T>(Any{n}, [=](auto pack, int64_t k) INLINE_LAMBDA {
        using P = decltype(pack);
        const P high = m.high.template at<P>(k), r = m.rate.template at<P>(k), c = m.carry.template at<P>(k);
        P g[8], gx[8];
        for (int j = 0; j < 8; ++j) g[j] = P::load(dz[j] + k), gx[j] = g[j] * ((P::load(x[j] + k) - high) * r + c);
        add_to(a + k, ((g[0] + g[1]) + (g[2] + g[3])) + ((g[4] + g[5]) + (g[6] + g[7])));
        add_to(b + k, ((gx[0] + gx[1]) + (gx[2] + gx[3])) + ((gx[4] + gx[5]) + (gx[6] + gx[7])));
    });
}

// dx = (dz * w - (c1 + xhat * c2) * share) / sigma
template <class T, class V, class W, class U, class N>
INLINE void gradient(const T* x, const T* dz, T* dx, N n, const Standard<V>& m, W w, V c1, V c2, U share) {
    sweep<T>(n, [=](auto pack, int64_t k) INLINE_LAMBDA {
        using P = decltype(pack);
        P g = P::load(dz + k) * w.template at<P>(k);
        P through = c1.template at<P>(k) + m.template xhat<P>(x, k) * c2.template at<P>(k);
        ((g - through * share.template at<P>(k)) * m.rate.template at<P>(k)).store(dx + k);
    });
}

// The same of eight rows at once, of which each has a share of one.
template <class T, class V, class W>
INLINE void gradient_eight(const T* const* x, const T* const* dz, T* const* dx, int64_t n, const Standard<V>& m, W w, V c1, V c2) {
    sweep<T>(Any{n}, [=](auto pack, int64_t k) INLINE_LAMBDA {
        using P = decltype(pack);
        const P high = m.high.template at<P>(k), r = m.rate.template at<P>(k), c = m.carry.template at<P>(k);
        const P weight = w.template at<P>(k), mean = c1.template at<P>(k), slope = c2.template at<P>(k);
        for (int j = 0; j < 8; ++j) {
            P xhat = (P::load(x[j] + k) - high) * r + c;
            ((P::load(dz[j] + k) * weight - (mean + xhat * slope)) * r).store(dx[j] + k);
        }
    });
}

}  // namespace ARCH
