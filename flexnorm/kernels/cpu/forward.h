// y, from moments.
#pragma once
#include "sums.h"

namespace ARCH {

class Forward : public Statistics {
   protected:
    using Statistics::Statistics;

    void apply(Own& own, const Sets& from, const Range& range, const Part& part) {
        own.lanes_of = nullptr;
        pieces(
            own, range, part, false,
            [&](const Row* rows, int64_t n_rows, int64_t block, int64_t k, int64_t n) {
                Lanes m = lanes(own, from, block, k, n, 3);
                if (one_param) {
                    Params p = params(own, rows[0], k, n);
                    with(p, 0, [&](auto w, auto b) { fold(m.rate, m.carry, n, w, b, own.a, own.d); });
                    m.rate = own.a, m.carry = own.d;
                }
                for (int64_t i = 0; i < n_rows; ++i) {
                    if (i + 8 <= n_rows && one_param && !f.activation && plain(rows + i)) {
                        const T* v[8];
                        T* to[8];
                        for (int j = 0; j < 8; ++j)
                            v[j] = values(x, rows[i + j].at[X] + k, nullptr, n), to[j] = static_cast<T*>(y) + rows[i + j].at[Y] + k;
                        normalize_eight(v, to, n, m.standard());
                        i += 7;
                        continue;
                    }
                    y_of(own, rows[i], k, n, [&](const T* v, T* t) {
                        if (one_param) return normalize(v, t, Any{n}, m.standard());
                        Params p = params(own, rows[i], k, n);
                        with(p, 0, [&](auto w, auto b) { normalize(v, t, Any{n}, m.standard(), w, b); });
                    });
                }
            },
            [&](const Row& row, int64_t block, int64_t k, int64_t n, bool) {
                y_of(own, row, k, n, [&](const T* v, T* t) {
                    Params p = params(own, row, k, n, f.by_runs);
                    walk.runs(block, k, k + n, [&](int64_t begin, auto many, int64_t id) {
                        apply_run(row, begin, v + (begin - k), t + (begin - k), many, standard(from, id), p, begin - k);
                    });
                });
            });
    }

    // Of one set, whose columns begin with `begin`, and `at` among those of the parameters.
    template <class N>
    INLINE void apply_run(const Row& row, int64_t begin, const T* v, T* to, N n, const Standard<One<T>>& m, const Params& p,
                          int64_t at) const {
        if (p.w) return normalize(v, to, n, m, Each<T>{p.w + at}, Each<T>{p.b + at});
        if (p.by_runs) return apply_by_params(row, begin, v, to, n.n, m);
        normalize(v, to, n, weighted(m, p.ws, p.bs));
    }
    NOINLINE void apply_by_params(const Row& row, int64_t begin, const T* v, T* to, int64_t n, Standard<One<T>> m) const {
        by_params(row, begin, n, [=](int64_t k, Any many, T w, T b, int64_t) INLINE_LAMBDA {
            normalize(v + k, to + k, many, weighted(m, w, b));
        });
    }
    static INLINE Standard<One<T>> weighted(const Standard<One<T>>& m, T w, T b) {
        return {m.high, {m.rate.value * w}, {m.carry.value * w + b}};
    }

    void apply_rows(Own& own, const Sets& from, const Range* ranges, int64_t n) {
        each_row(ranges, n, [&](int64_t i, const Row& row) {
            y_of(own, row, 0, f.columns, [&](const T* v, T* t) {
                apply_run(row, 0, v, t, Any{f.columns}, standard(from, i), params(own, row, 0, f.columns, f.by_runs), 0);
            });
        });
    }

    // Whether eight rows are inside of the mask, and their results go where they belong.
    bool plain(const Row* rows) const {
        if (!same || streams || f.mask_kind == WEIGHTS || masked_along) return false;
        bool inside = true;
        for (int j = 0; members && j < 8; ++j) inside = inside && members[rows[j].at[MASK]];
        return inside;
    }

    template <class F>
    void y_of(Own& own, const Row& row, int64_t k, int64_t n, F&& formula) {
        Share share = membership(own, row, k, n);
        write(own, row.at[Y] + k, n, share.outside, [&](T* to) {
            formula(values(x, row.at[X] + k, own.x[0], n), to);
            if (f.activation) activate(f.activation, to, n);
            if (share.bytes) keep(to, share.bytes, n);
        });
    }
};

}  // namespace ARCH
