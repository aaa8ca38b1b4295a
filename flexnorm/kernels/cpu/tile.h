// Loops over columns that lie side by side: all arithmetic is here. No loop knows what a set is.
// S is the dtype in memory, T that of statistics (float or double); sums are double.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "form.h"

#if defined(__F16C__)
#include <immintrin.h>
#endif

#define RESTRICT __restrict__
#define SIMD _Pragma("omp simd")

namespace ARCH {

struct bf16 { uint16_t bits; };
struct f16 { uint16_t bits; };

// --- dtypes

inline void load(const bf16* RESTRICT x, float* RESTRICT out, int64_t n) {
    uint32_t* bits = reinterpret_cast<uint32_t*>(out);
    SIMD for (int64_t k = 0; k < n; ++k) bits[k] = uint32_t(x[k].bits) << 16;
}

inline void store(const float* RESTRICT x, bf16* RESTRICT out, int64_t n) {
    const uint32_t* bits = reinterpret_cast<const uint32_t*>(x);
    SIMD for (int64_t k = 0; k < n; ++k) {
        uint32_t u = bits[k];
        uint32_t rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
        out[k].bits = uint16_t((u & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
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

inline void load(const f16* RESTRICT x, float* RESTRICT out, int64_t n) {
    int64_t k = 0;
#if defined(__F16C__)
    for (; k + 8 <= n; k += 8)
        _mm256_storeu_ps(out + k, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x + k))));
#endif
    for (; k < n; ++k) out[k] = wide(x[k].bits);
}

inline void store(const float* RESTRICT x, f16* RESTRICT out, int64_t n) {
    int64_t k = 0;
#if defined(__F16C__)
    for (; k + 8 <= n; k += 8)
        _mm_storeu_si128(reinterpret_cast<__m128i*>(out + k), _mm256_cvtps_ph(_mm256_loadu_ps(x + k), 0));
#endif
    for (; k < n; ++k) out[k].bits = narrow(x[k]);
}

// --- sums of one set over a run: of d = x - shift, and of d * d

template <class T>
inline void run_sums(const T* RESTRICT x, int64_t n, double shift, double& s, double& q) {
    double a = 0, b = 0;
#pragma omp simd reduction(+ : a, b)
    for (int64_t k = 0; k < n; ++k) {
        double d = double(x[k]) - shift;
        a += d;
        b += d * d;
    }
    s += a, q += b;
}

template <class T>
inline void run_sums(const T* RESTRICT x, const uint8_t* RESTRICT m, int64_t n, double shift, double& c, double& s,
                     double& q) {
    double a = 0, b = 0;
    int32_t inside = 0;
#pragma omp simd reduction(+ : a, b, inside)
    for (int64_t k = 0; k < n; ++k) {
        double d = m[k] ? double(x[k]) - shift : 0.0;
        a += d;
        b += d * d;
        inside += m[k] != 0;
    }
    c += inside, s += a, q += b;
}

template <class T>
inline void run_sums(const T* RESTRICT x, const T* RESTRICT w, int64_t n, double shift, double& c, double& s,
                     double& q) {
    double a = 0, b = 0, total = 0;
#pragma omp simd reduction(+ : a, b, total)
    for (int64_t k = 0; k < n; ++k) {
        double d = w[k] > 0 ? double(x[k]) - shift : 0.0;  // what weighs nothing may be NaN
        double wd = double(w[k]) * d;
        a += wd;
        b += wd * d;
        total += w[k];
    }
    c += total, s += a, q += b;
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

template <class T>
inline void lane_sums(const T* RESTRICT x0, const T* RESTRICT x1, const T* RESTRICT x2, const T* RESTRICT x3,
                      int64_t n, const double* RESTRICT shift, double* RESTRICT s, double* RESTRICT q) {
    SIMD for (int64_t k = 0; k < n; ++k) {
        double c = shift[k];
        double d0 = double(x0[k]) - c, d1 = double(x1[k]) - c, d2 = double(x2[k]) - c, d3 = double(x3[k]) - c;
        s[k] += (d0 + d1) + (d2 + d3);
        q[k] += (d0 * d0 + d1 * d1) + (d2 * d2 + d3 * d3);
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

// --- (x - mean) / sigma * weight + bias. The mean is high + low, and c = -low / sigma.

template <class T>
inline void normalize(const T* RESTRICT x, T* RESTRICT y, int64_t n, T high, T a, T b) {
    SIMD for (int64_t k = 0; k < n; ++k) y[k] = (x[k] - high) * a + b;
}

template <class T>
inline void normalize(const T* RESTRICT x, T* RESTRICT y, int64_t n, T high, T r, T c, const T* RESTRICT w,
                      const T* RESTRICT b) {
    SIMD for (int64_t k = 0; k < n; ++k) y[k] = ((x[k] - high) * r + c) * w[k] + b[k];
}

template <class T>
inline void normalize(const T* RESTRICT x, T* RESTRICT y, int64_t n, const T* RESTRICT high, const T* RESTRICT a,
                      const T* RESTRICT b) {
    SIMD for (int64_t k = 0; k < n; ++k) y[k] = (x[k] - high[k]) * a[k] + b[k];
}

// a = r * w and b = c * w + b: what is left of the moments and the parameters of a column
template <class T>
inline void fold(const T* RESTRICT r, const T* RESTRICT c, int64_t n, const T* RESTRICT w, const T* RESTRICT b,
                 T* RESTRICT a, T* RESTRICT d) {
    SIMD for (int64_t k = 0; k < n; ++k) {
        a[k] = r[k] * w[k];
        d[k] = c[k] * w[k] + b[k];
    }
}

template <class T>
inline void fold(const T* RESTRICT r, const T* RESTRICT c, int64_t n, T w, T b, T* RESTRICT a, T* RESTRICT d) {
    SIMD for (int64_t k = 0; k < n; ++k) {
        a[k] = r[k] * w;
        d[k] = c[k] * w + b;
    }
}

// z = xhat * w + b
template <class T>
inline void affine(const T* RESTRICT xhat, T* RESTRICT z, int64_t n, const T* RESTRICT w, const T* RESTRICT b) {
    SIMD for (int64_t k = 0; k < n; ++k) z[k] = xhat[k] * w[k] + b[k];
}

template <class T>
inline void affine(const T* RESTRICT xhat, T* RESTRICT z, int64_t n, T w, T b) {
    SIMD for (int64_t k = 0; k < n; ++k) z[k] = xhat[k] * w + b;
}

template <class T>
inline void keep(T* RESTRICT y, const uint8_t* RESTRICT m, int64_t n) {
    SIMD for (int64_t k = 0; k < n; ++k) y[k] = m[k] ? y[k] : T(0);
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

inline float exponential(float z) {  // cephes' expf: 2 ulp
    float x = z < -87.0f ? -87.0f : z > 88.0f ? 88.0f : z;
    float shifted = x * 1.44269504f + 12582912.0f;
    int32_t bits = __builtin_bit_cast(int32_t, shifted);
    float n = shifted - 12582912.0f;
    float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    int32_t power = int32_t(uint32_t(bits - 0x4b400000 + 127) << 23);
    float y = p * __builtin_bit_cast(float, power);
    y = z < -87.0f ? 0.0f : y;
    return z > 88.0f ? __builtin_inff() : y;
}

inline float error_function(float x) {  // two minimax polynomials: 1 ulp
    float t = std::fabs(x), s = x * x;
    float u = -1.72853470e-5f * t + 3.83197126e-4f, v = -3.88396438e-3f * t + 2.42546219e-2f;
    u = u * s + v;
    u = u * t - 1.06777877e-1f;
    u = u * t - 6.34846687e-1f;
    u = u * t - 1.28717512e-1f;
    u = 1.0f - exponential(u * t - t);
    float p = -5.96761703e-4f;
    p = p * s + 4.99119423e-3f;
    p = p * s - 2.67681349e-2f;
    p = p * s + 1.12819925e-1f;
    p = p * s - 3.76125336e-1f;
    p = p * s + 1.28379166e-1f;
    p = p * x + x;
    u = t > 4.0f ? 1.0f : u;
    return t > 0.927734375f ? (x < 0 ? -u : u) : p;
}

inline double exponential(double x) { return std::exp(x); }
inline double error_function(double x) { return std::erf(x); }

template <class T>
inline T sigmoid(T z) { return T(1) / (T(1) + exponential(-z)); }
template <class T>
inline T normal_cdf(T z) { return T(0.5) + T(0.5) * error_function(z * T(0.70710678118654752440)); }

template <class T>
inline void activate(int64_t activation, T* RESTRICT y, int64_t n) {
    if (activation == RELU) {
        SIMD for (int64_t k = 0; k < n; ++k) y[k] = y[k] < 0 ? T(0) : y[k];  // keeps NaN
    } else if (activation == SILU) {
        SIMD for (int64_t k = 0; k < n; ++k) y[k] = y[k] * sigmoid(y[k]);
    } else if (activation == GELU) {
        SIMD for (int64_t k = 0; k < n; ++k) y[k] = y[k] * normal_cdf(y[k]);
    }
}

// dz = dy * the derivative at z
template <class T>
inline void activate_backward(int64_t activation, const T* RESTRICT z, T* RESTRICT dz, int64_t n) {
    if (activation == RELU) {
        SIMD for (int64_t k = 0; k < n; ++k) dz[k] = z[k] <= 0 ? T(0) : dz[k];
    } else if (activation == SILU) {
        SIMD for (int64_t k = 0; k < n; ++k) {
            T s = sigmoid(z[k]);
            dz[k] = dz[k] * (s * (T(1) + z[k] * (T(1) - s)));
        }
    } else if (activation == GELU) {
        SIMD for (int64_t k = 0; k < n; ++k) {
            T density = T(0.39894228040143267794) * exponential(T(-0.5) * z[k] * z[k]);
            dz[k] = dz[k] * (normal_cdf(z[k]) + z[k] * density);
        }
    }
}

// --- backward: sums of g = dz * weight and of g * xhat, of dz and of dz * xhat

template <class T>
inline void dot_sums(const T* RESTRICT dz, const T* RESTRICT xhat, int64_t n, double& a, double& b) {
    double s = 0, t = 0;
#pragma omp simd reduction(+ : s, t)
    for (int64_t k = 0; k < n; ++k) {
        s += double(dz[k]);
        t += double(dz[k]) * double(xhat[k]);
    }
    a += s, b += t;
}

template <class T>
inline void dot_sums(const T* RESTRICT dz, const T* RESTRICT w, const T* RESTRICT xhat, int64_t n, double& a,
                     double& b) {
    double s = 0, t = 0;
#pragma omp simd reduction(+ : s, t)
    for (int64_t k = 0; k < n; ++k) {
        double g = double(dz[k]) * double(w[k]);
        s += g;
        t += g * double(xhat[k]);
    }
    a += s, b += t;
}

template <class T>
inline void lane_dots(const T* RESTRICT dz, const T* RESTRICT xhat, int64_t n, double weight, double* RESTRICT a,
                      double* RESTRICT b) {
    SIMD for (int64_t k = 0; k < n; ++k) {
        double g = double(dz[k]) * weight;
        a[k] += g;
        b[k] += g * double(xhat[k]);
    }
}

template <class T>
inline void lane_dots(const T* RESTRICT dz, const T* RESTRICT w, const T* RESTRICT xhat, int64_t n,
                      double* RESTRICT a, double* RESTRICT b) {
    SIMD for (int64_t k = 0; k < n; ++k) {
        double g = double(dz[k]) * double(w[k]);
        a[k] += g;
        b[k] += g * double(xhat[k]);
    }
}

// dx = (g - (mean of g + xhat * mean of g * xhat) * share) / sigma

template <class T>
inline void gradient(const T* RESTRICT g, const T* RESTRICT xhat, T* RESTRICT dx, int64_t n, T w, T c1, T c2, T r) {
    SIMD for (int64_t k = 0; k < n; ++k) dx[k] = (g[k] * w - (c1 + xhat[k] * c2)) * r;
}

template <class T>
inline void gradient(const T* RESTRICT g, const T* RESTRICT xhat, T* RESTRICT dx, int64_t n, const T* RESTRICT w,
                     T c1, T c2, T r) {
    SIMD for (int64_t k = 0; k < n; ++k) dx[k] = (g[k] * w[k] - (c1 + xhat[k] * c2)) * r;
}

template <class T>
inline void gradient(const T* RESTRICT g, const T* RESTRICT xhat, T* RESTRICT dx, int64_t n, T w,
                     const T* RESTRICT c1, const T* RESTRICT c2, const T* RESTRICT r) {
    SIMD for (int64_t k = 0; k < n; ++k) dx[k] = (g[k] * w - (c1[k] + xhat[k] * c2[k])) * r[k];
}

template <class T>
inline void gradient(const T* RESTRICT g, const T* RESTRICT xhat, T* RESTRICT dx, int64_t n, const T* RESTRICT w,
                     const T* RESTRICT c1, const T* RESTRICT c2, const T* RESTRICT r) {
    SIMD for (int64_t k = 0; k < n; ++k) dx[k] = (g[k] * w[k] - (c1[k] + xhat[k] * c2[k])) * r[k];
}

}  // namespace ARCH
