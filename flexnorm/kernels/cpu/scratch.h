// What a thread keeps while it works on sets: their sums and moments, and buffers.
#pragma once
#include "parallel.h"
#include "tile.h"
#include "walk.h"

namespace ARCH {

using T = REAL;  // the dtype of statistics; half precision is widened on the way

// What is summed of some sets: the count, and with d = x - shift the sums of d and of d * d; and what was added to get
// there, which is more than q where columns had shifts of their own.
// After `close` the mean is shift + s, q is M2, and `added` says how many times M2 had been added.
struct Sums {
    double *n, *shift, *s, *q, *added;

    Sums at(int64_t i) const { return {n + i, shift + i, s + i, q + i, added + i}; }

    void clear(int64_t count, bool keep_shift) const {
        for (double* sum : {n, s, q, added})
            if (count == 1) *sum = 0;
            else fill(sum, count, 0.0);
        if (!keep_shift) fill(shift, count, 0.0);
    }

    // The most times that M2 of a set had been added.
    double close(int64_t count) const {
        double *RESTRICT n = this->n, *RESTRICT s = this->s, *RESTRICT q = this->q, *RESTRICT added = this->added;
        auto one = [=](int64_t i) INLINE_LAMBDA {
            double d = s[i] / (n[i] > 0 ? n[i] : 1.0), rest = q[i] - s[i] * d;
            double times = std::max(q[i], added[i]) / (rest > 0 ? rest : q[i] > 0 ? 1e-300 : 1.0);
            added[i] = times;
            s[i] = d;
            q[i] = rest < 0 ? 0 : rest;
            return times;
        };
        if (count == 1) return one(0);
        double most = 0;
#pragma omp simd reduction(max : most)
        for (int64_t i = 0; i < count; ++i) {
            double times = one(i);
            most = times > most ? times : most;
        }
        return most;
    }

    // Adds those of others to sets begin..end, both closed (Chan, Golub, LeVeque 1979).
    void merge(const Sums& others, int64_t begin, int64_t end) const {
        double *RESTRICT n = this->n, *RESTRICT shift = this->shift, *RESTRICT s = this->s, *RESTRICT q = this->q;
        const double *RESTRICT n2 = others.n, *RESTRICT shift2 = others.shift, *RESTRICT s2 = others.s;
        const double* RESTRICT q2 = others.q;
        SIMD for (int64_t i = begin; i < end; ++i) {
            double m = n2[i - begin], total = n[i] + m, part = m / (m > 0 ? total : 1.0);
            double delta = (shift2[i - begin] - shift[i]) + (s2[i - begin] - s[i]);
            double mean = s[i] + delta * part, squares = q[i] + (q2[i - begin] + delta * delta * (n[i] * part));
            const bool first = !(n[i] > 0), none = !(m > 0);
            shift[i] = first && !none ? shift2[i - begin] : shift[i];
            s[i] = none ? s[i] : first ? s2[i - begin] : mean;
            q[i] = none ? q[i] : first ? q2[i - begin] : squares;
            n[i] = none ? n[i] : total;
        }
    }
};

// Sums and moments of some sets.
struct Sets {
    Sums sums;
    double *count, *sg, *sgx;  // sums of g and g * xhat
    T *high, *low, *m2;        // the mean in two parts, and M2
    T *rate, *carry, *spread;  // 1 / sigma, -low / sigma, var / sigma^2
    T *mean_g, *mean_gx;       // means of g and g * xhat

    Sets at(int64_t i) const {
        return {sums.at(i), count + i, sg + i,     sgx + i,    high + i,   low + i,
                m2 + i,     rate + i,  carry + i,  spread + i, mean_g + i, mean_gx + i};
    }
};

// Of what a mask of a call says along columns begin..end: the first that is inside, and the end of the last.
struct Window {
    uint64_t call;
    int64_t mask, begin, end, first, last;
};

// Buffers of one thread.
class Scratch {
   public:
    // Were they powers of two wide, all buffers would lie whole pages apart, and loads wait for stores to the others (of
    // which the processor compares the last twelve bits).
    static constexpr int64_t NARROW = TILE + 48, WIDE = SPAN + 48;

    // Of the columns of a tile.
    const T* lanes_of = nullptr;  // whose values are in `lane`, of which columns, and how many fields
    int64_t lanes_block, lanes_k, lanes_fields;
    alignas(64) T lane[6][NARROW], a[NARROW], d[NARROW], scaled[2][WIDE];
    Flow<T> flow;
    alignas(64) T eight[8][NARROW];  // dy or dz of eight rows
    alignas(64) T held[3][WIDE];     // x, dz and weights of members that lie apart
    int64_t n_held = 0;
    struct {
        int64_t end, param;
    } part[SPAN];  // of these, by their parameters
    int64_t n_parts = 0;
    Window window{};
    alignas(64) double column[5][NARROW];
    Sums columns{column[0], column[1], column[2], column[3], column[4]};
    // Of those of a span.
    alignas(64) T x[8][WIDE], dy[WIDE], dz[WIDE], out[WIDE], w[WIDE], b[WIDE], weights[WIDE], ones[WIDE], zeros[WIDE];
    uint8_t bytes[WIDE];

    Scratch() { fill(ones, SPAN, T(1)), fill(zeros, SPAN, T(0)); }

    Sets sets(int64_t count) {
        int64_t n = (count + 23) / 16 * 16 + 8;
        doubles.reserve(8 * n), values.reserve(8 * n);
        double* d = doubles.data();
        T* v = values.data();
        return {{d, d + n, d + 2 * n, d + 3 * n, d + 4 * n}, d + 5 * n, d + 6 * n, d + 7 * n, v, v + n, v + 2 * n,
                v + 3 * n, v + 4 * n, v + 5 * n, v + 6 * n, v + 7 * n};
    }

    Sums wide_columns(int64_t n) { return sums(wide, n); }
    Sums chunk(int64_t n) { return sums(of_chunk, n); }
    static Sums sums(Array<double>& memory, int64_t n) {
        memory.reserve(5 * n);
        double* d = memory.data();
        return {d, d + n, d + 2 * n, d + 3 * n, d + 4 * n};
    }

    static Scratch& here() {
        static thread_local std::unique_ptr<Scratch> own;
        if (!own) own.reset(new Scratch);
        return *own;
    }

   private:
    Array<double> doubles, wide, of_chunk;
    Array<T> values;
};

}  // namespace ARCH
