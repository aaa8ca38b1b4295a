// Moments and sums of sets, between the tensors of a call and what the loops read.
#pragma once
#include "operands.h"

namespace ARCH {

class MomentsOfCall : public Operands {
   protected:
    using Operands::Operands;

    // Calls body(of the sets, of the tensors, how many) for all that lie side by side in both.
    template <class F>
    void together(const Range* ranges, int64_t n, int64_t begin, int64_t end, F&& body) const {
        int64_t count = f.sets.count;
        for (int64_t i = 0; i < n;) {
            int64_t from = i++;
            if (!f.sets.offsets)
                while (i < n && ranges[i].set == ranges[i - 1].set + count) ++i;
            body(from * count + begin, ranges[from].set + (f.sets.offsets ? 0 : begin), (i - from - 1) * count + end - begin);
        }
    }

    template <class V, class W>
    void put_sets(void* tensor, const V* values, const Range* ranges, int64_t n, int64_t begin, int64_t end) const {
        W* t = static_cast<W*>(tensor);
        if (!t) return;
        together(ranges, n, begin, end, [&](int64_t from, int64_t to, int64_t many) {
            const V* RESTRICT v = values + from;
            W* RESTRICT w = t + to;
            const int64_t* places = f.sets.offsets + begin;
            if (f.sets.offsets)
                for (int64_t i = 0; i < many; ++i) w[places[i]] = W(v[i]);
            else
                SIMD for (int64_t i = 0; i < many; ++i) w[i] = W(v[i]);
        });
    }

    template <class V, class W>
    void get_sets(const void* tensor, V* values, const Range* ranges, int64_t n, int64_t begin, int64_t end) const {
        const W* t = static_cast<const W*>(tensor);
        together(ranges, n, begin, end, [&](int64_t from, int64_t to, int64_t many) {
            V* RESTRICT v = values + from;
            const W* RESTRICT w = t + to;
            const int64_t* places = f.sets.offsets + begin;
            if (f.sets.offsets)
                for (int64_t i = 0; i < many; ++i) v[i] = V(w[places[i]]);
            else
                SIMD for (int64_t i = 0; i < many; ++i) v[i] = V(w[i]);
        });
    }

    void write_moments(const Sets& sets, const Range* ranges, int64_t n_ranges, int64_t begin, int64_t end) {
        int64_t last = (n_ranges - 1) * f.sets.count + end;
        const double *RESTRICT n = sets.sums.n, *RESTRICT shift = sets.sums.shift, *RESTRICT s = sets.sums.s;
        const double* RESTRICT q = sets.sums.q;
        T *RESTRICT high = sets.high, *RESTRICT low = sets.low, *RESTRICT m2 = sets.m2;
        double* RESTRICT count = sets.count;
        const bool wide = c.count_wide;
        SIMD for (int64_t i = begin; i < last; ++i) {
            double filled = n[i] > 0 ? 1.0 : 0.0, a = shift[i], b = s[i], whole = (a + b) * filled;
            // What rounding lost, by Knuth's two-sum, as either of the two may be the larger.
            double part = whole - a, lost = ((a - (whole - part)) + (b - part)) * filled;
            high[i] = T(whole);
            double rest = (whole - double(high[i])) + lost;
            low[i] = rest == rest ? T(rest) : T(0);  // inf - inf
            m2[i] = T(q[i] * filled);
            count[i] = wide ? double(T(n[i])) : n[i];  // as in the tensor
        }
        put_sets<T, T>(c.mean, high, ranges, n_ranges, begin, end);
        put_sets<T, T>(c.low, low, ranges, n_ranges, begin, end);
        put_sets<T, T>(c.m2, m2, ranges, n_ranges, begin, end);
        if (wide) put_sets<double, T>(c.count, count, ranges, n_ranges, begin, end);
        else put_sets<double, int64_t>(c.count, count, ranges, n_ranges, begin, end);
        settle(sets, begin, last);
    }

    void read_moments(const Sets& sets, const Range* ranges, int64_t n_ranges, int64_t begin, int64_t end) {
        int64_t last = (n_ranges - 1) * f.sets.count + end;
        if (!c.count) fill(sets.count + begin, last - begin, f.count);
        else if (c.count_wide) get_sets<double, T>(c.count, sets.count, ranges, n_ranges, begin, end);
        else get_sets<double, int64_t>(c.count, sets.count, ranges, n_ranges, begin, end);
        get_sets<T, T>(c.mean, sets.high, ranges, n_ranges, begin, end);
        get_sets<T, T>(c.low, sets.low, ranges, n_ranges, begin, end);
        get_sets<T, T>(c.m2, sets.m2, ranges, n_ranges, begin, end);
        settle(sets, begin, last);
    }

    void settle(const Sets& sets, int64_t begin, int64_t end) {
        const double* RESTRICT count = sets.count;
        const T *RESTRICT low = sets.low, *RESTRICT m2 = sets.m2;
        T *RESTRICT rate = sets.rate, *RESTRICT carry = sets.carry, *RESTRICT spread = sets.spread;
        if (!f.center) fill(sets.high + begin, end - begin, T(0));
        const T center = f.center ? -1 : 0, eps = T(f.eps);
        const bool scale = f.scale;
        SIMD for (int64_t i = begin; i < end; ++i) {
            T n = T(count[i]), variance = m2[i] / (n > 0 ? n : T(1)), sigma2 = variance + eps;
            T inverse = sigma2 == 0 ? T(0) : T(1) / std::sqrt(sigma2);
            inverse = n > 0 ? (scale ? inverse : T(1)) : T(0);
            rate[i] = inverse;
            carry[i] = center * low[i] * inverse;
            spread[i] = variance * inverse * inverse;
        }
    }

    void write_dots(const Sets& sets, const Range* ranges, int64_t n_ranges, int64_t begin, int64_t end) {
        put_sets<double, T>(c.sum_g, sets.sg, ranges, n_ranges, begin, end);
        put_sets<double, T>(c.sum_gx, sets.sgx, ranges, n_ranges, begin, end);
        share_dots(sets, begin, (n_ranges - 1) * f.sets.count + end);
    }

    void read_dots(const Sets& sets, const Range* ranges, int64_t n_ranges, int64_t begin, int64_t end) {
        int64_t last = (n_ranges - 1) * f.sets.count + end;
        if (c.sum_g) {
            get_sets<double, T>(c.sum_g, sets.sg, ranges, n_ranges, begin, end);
            get_sets<double, T>(c.sum_gx, sets.sgx, ranges, n_ranges, begin, end);
        } else
            fill(sets.sg + begin, last - begin, 0.0), fill(sets.sgx + begin, last - begin, 0.0);
        share_dots(sets, begin, last);
    }

    void share_dots(const Sets& sets, int64_t begin, int64_t end) {
        const double *RESTRICT count = sets.count, *RESTRICT sg = sets.sg, *RESTRICT sgx = sets.sgx;
        T *RESTRICT mean_g = sets.mean_g, *RESTRICT mean_gx = sets.mean_gx;
        double center = f.center ? 1 : 0, scale = f.scale ? 1 : 0;
        SIMD for (int64_t i = begin; i < end; ++i) {
            double n = count[i] > 0 ? count[i] : 1.0;
            mean_g[i] = T(center * double(T(sg[i])) / n);  // rounded as in a tensor of sums
            mean_gx[i] = T(scale * double(T(sgx[i])) / n);
        }
    }
};

}  // namespace ARCH
