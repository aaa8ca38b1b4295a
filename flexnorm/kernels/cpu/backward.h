// The gradient of x, and the sums that it is made of.
#pragma once
#include "parameters.h"

namespace ARCH {

class Backward : public Parameters {
   protected:
    using Parameters::Parameters;

    // x and dz of some columns of a row: dy through the activation. Outside of the mask they are the mean and 0. They are the
    // tensors themselves where they can be. An activation is worked out for the sums, and left where dx will be.
    template <class H, class Z>
    NOINLINE Pair made(Own& own, const Row& row, int64_t k, int64_t n, const Share& share, bool of_sums, H&& inside, Z&& z,
              T* x_buffer, T* dy_buffer, T* dz_buffer) {
        bool left = !of_sums && leaves_dz;
        Pair p = given(own, row, k, n, x_buffer, dy_buffer);
        if (left) p.dz = left_at(row, k);
        if (share.bytes) {
            inside(p.x, own.x[1]), keep(p.dz, own.dz, share.bytes, n, One<T>{0});
            p = {own.x[1], own.dz};
        }
        if (f.activation && !left) {
            T* dz = leaves_dz ? left_at(row, k) : dz_buffer;
            z(p.x, own.out);
            activate_backward(f.activation, own.out, p.dz, dz, n);
            p.dz = dz;
        }
        return p;
    }

    // Without an activation, and where no padding lies between.
    INLINE bool is_given(const Share& share) const { return !share.bytes && !f.activation; }
    INLINE Pair given(Own& own, const Row& row, int64_t k, int64_t n, T* x_buffer, T* dy_buffer) const {
        return {values(x, row.at[X] + k, x_buffer, n), dy ? values(dy, row.at[Y] + k, dy_buffer, n) : own.zeros};
    }

    T* left_at(const Row& row, int64_t k) const {
        return static_cast<T*>(y) + row.at[Y] + k;
    }

    INLINE Pair pair(Own& own, const Row& row, int64_t k, int64_t n, const Share& share, bool of_sums, const Params& p,
                     const Lanes& m) {
        return pair(own, row, k, n, share, of_sums, p, m, own.x[0], own.dy, own.dz);
    }

    INLINE Pair pair(Own& own, const Row& row, int64_t k, int64_t n, const Share& share, bool of_sums, const Params& p,
                     const Lanes& m, T* x_buffer, T* dy_buffer, T* dz_buffer) {
        if (is_given(share)) return given(own, row, k, n, x_buffer, dy_buffer);
        auto inside = [&](const T* v, T* to) { keep(v, to, share.bytes, n, Each<T>{m.high}); };
        auto activated = [&](const T* v, T* z) {
            with(p, 0, [&](auto w, auto b) { normalize(v, z, Any{n}, m.standard(), w, b); });
        };
        return made(own, row, k, n, share, of_sums, inside, activated, x_buffer, dy_buffer, dz_buffer);
    }

    INLINE Pair pair(Own& own, const Row& row, int64_t block, int64_t k, int64_t n, const Share& share, bool of_sums,
                     const Params& p, const Sets& from) {
        if (is_given(share)) return given(own, row, k, n, own.x[0], own.dy);
        auto inside = [&](const T* v, T* to) {
            walk.runs(block, k, k + n, [&](int64_t begin, auto many, int64_t id) {
                int64_t at = begin - k;
                keep(v + at, to + at, share.bytes + at, many.n, One<T>{from.high[id]});
            });
        };
        auto activated = [&](const T* v, T* z) {
            walk.runs(block, k, k + n, [&](int64_t begin, auto many, int64_t id) {
                const int64_t at = begin - k;
                apply_run(row, begin, v + at, z + at, many, standard(from, id), p, at);
            });
        };
        return made(own, row, k, n, share, of_sums, inside, activated, own.x[0], own.dy, own.dz);
    }

    // Sums of g and g * xhat of a part of a range, sg[0] being that of set `first`; and of the parameters.
    void dots(Own& own, const Sets& from, double* sg, double* sgx, int64_t first, const Range& range, const Part& part,
              int64_t slot) {
        Slot of = c.dweight || c.dbias ? this->slot(slot) : Slot{};
        own.lanes_of = nullptr, own.n_held = own.n_parts = 0;
        const bool tabled = f.sets.kind == TABLE, at_once = comes_at_once(range);
        const int64_t width = part.k1 - part.k0;
        double *a_sums = nullptr, *b_sums = nullptr;  // of every column, where more rows share a table than come at once
        int64_t open = -1;
        auto close = [&] {
            const int32_t* ids = f.sets.table + open * f.columns + part.k0;
            if (open >= 0)
                for (int64_t j = 0; j < width; ++j) sg[ids[j]] += a_sums[j], sgx[ids[j]] += b_sums[j];
        };
        pieces(
            own, range, part, true,
            [&](const Row* rows, int64_t n_rows, int64_t block, int64_t k, int64_t n) {
                Lanes m = lanes(own, from, block, k, n, 3);
                // Sums of dz and dz * xhat, where all rows have the same parameters; else those of g and g * xhat.
                T *a = own.a, *b = own.d;
                fill(a, n, T(0)), fill(b, n, T(0));
                Params p;
                for (int64_t i = 0; i < n_rows; ++i) {
                    if (eights && i + 8 <= n_rows) {
                        if (!p.known) p = params(own, rows[0], k, n);
                        const T *v[8], *dz[8];
                        for (int j = 0; j < 8; ++j) {
                            Pair own_row = pair(own, rows[i + j], k, n, Share{}, true, p, m, own.x[j], own.eight[j], own.eight[j]);
                            v[j] = own_row.x, dz[j] = own_row.dz;
                        }
                        lane_dots_eight(v, dz, n, m.standard(), a, b);
                        i += 7;
                        continue;
                    }
                    Share share = membership(own, rows[i], k, n);
                    if (share.outside) continue;
                    if (!one_param || !p.known) p = params(own, rows[i], k, n);
                    Pair v = pair(own, rows[i], k, n, share, true, p, m);
                    if (one_param) lane_dots(v.x, v.dz, Any{n}, m.standard(), One<T>{1}, a, b);
                    else with(p.w, p.ws, [&](auto w) { lane_dots(v.x, v.dz, Any{n}, m.standard(), w, a, b); });
                    if (of && !one_param) of_params(own, of, rows[i], k, n, v, m.standard());
                }
                if (one_param && p.known) {
                    if (of) add_to_params(of, rows[0], k, n, a, b);
                    with(p.w, p.ws, [&](auto w) { multiply(a, n, w, a), multiply(b, n, w, b); });
                }
                if (tabled && at_once) {
                    const int32_t* ids = f.sets.table + block * f.columns + k;
                    for (int64_t j = 0; j < n; ++j) sg[ids[j]] += double(a[j]), sgx[ids[j]] += double(b[j]);
                    return;
                }
                if (tabled && open != block) {
                    close();
                    open = block;
                    Sums wide = own.wide_columns(width);
                    a_sums = wide.s, b_sums = wide.q;
                    fill(a_sums, width, 0.0), fill(b_sums, width, 0.0);
                }
                double *RESTRICT s = tabled ? a_sums + (k - part.k0) : sg + (k - first);
                double *RESTRICT t = tabled ? b_sums + (k - part.k0) : sgx + (k - first);
                SIMD for (int64_t j = 0; j < n; ++j) s[j] += double(a[j]), t[j] += double(b[j]);
            },
            [&](const Row& row, int64_t block, int64_t k, int64_t n, bool ends) {
                Share share = membership(own, row, k, n);
                if (share.bytes || own.n_held) return dots_apart(own, from, sg, sgx, of, row, block, k, n, ends, share);
                if (share.outside) return;
                Params p = params(own, row, k, n, f.by_runs);
                Pair v = pair(own, row, block, k, n, share, true, p, from);
                count_row(of);
                walk.runs(block, k, k + n, [&](int64_t begin, auto many, int64_t id) {
                    int64_t at = begin - k;
                    dots_of_run(own, of, row, begin, many, {v.x + at, v.dz + at}, p, at, standard(from, id), sg[id], sgx[id]);
                });
            });
        if (tabled) close();
    }

    // Of one set, whose columns begin with `begin`, and `at` among those of the parameters.
    template <class N>
    INLINE void dots_of_run(Own& own, const Slot& of, const Row& row, int64_t begin, N n, const Pair& v, const Params& p,
                            int64_t at, const Standard<One<T>>& m, double& sg, double& sgx) {
        double sums[2] = {};
        if (of.rows && p.w) dot_sums(v.x, v.dz, n, m, Each<T>{p.w + at}, sums, of.lane_b + begin, of.lane_w + begin);
        else if (p.w) {
            dot_sums(v.x, v.dz, n, m, Each<T>{p.w + at}, sums);
            if (of) of_params(own, of, row, begin, n.n, v, m);
        } else if (p.by_runs) {
            dots_by_params(of, row, begin, n.n, v, m, sums);
        } else {
            dot_sums(v.x, v.dz, n, m, One<T>{1}, sums);
            if (of) of.b[row.at[PARAM]] += sums[0], of.w[row.at[PARAM]] += sums[1];
            sums[0] *= double(p.ws), sums[1] *= double(p.ws);
        }
        sg += sums[0], sgx += sums[1];
    }
    NOINLINE void dots_by_params(const Slot& of, const Row& row, int64_t begin, int64_t n, Pair v, Standard<One<T>> m,
                                 double* sums) const {
        by_params(row, begin, n, [=](int64_t k, Any many, T, T, int64_t param) INLINE_LAMBDA {
            dots_of_param(of, param, v.x + k, v.dz + k, many.n, m, sums);
        });
    }

    void dot_rows(Own& own, const Sets& from, const Range* ranges, int64_t n, int64_t slot) {
        Slot of = c.dweight || c.dbias ? this->slot(slot) : Slot{};
        each_row(ranges, n, [&](int64_t i, const Row& row) {
            if (members && !members[row.at[MASK]]) return;
            Params p = params(own, row, 0, f.columns, f.by_runs);
            Pair v = pair(own, row, 0, 0, f.columns, Share{}, true, p, from.at(i));
            count_row(of);
            dots_of_run(own, of, row, 0, Any{f.columns}, v, p, 0, standard(from, i), from.sg[i], from.sgx[i]);
        });
    }

    // The same of a span whose members lie apart, or follow such: they are brought together, so that they are summed as if
    // they lay side by side.
    NOINLINE void dots_apart(Own& own, const Sets& from, double* sg, double* sgx, const Slot& of, const Row& row,
                             int64_t block, int64_t k, int64_t n, bool ends, const Share& share) {
        Params p = params(own, row, k, n, f.by_runs);
        Pair v{};
        if (!share.outside) v = pair(own, row, block, k, n, share, true, p, from);
        walk.runs(block, k, k + n, [&](int64_t begin, auto many, int64_t id) {
            Standard<One<T>> m = standard(from, id);
            auto flush = [&] {
                double sums[2] = {};
                auto add = [&](auto some) {
                    if (p.w) dot_sums(own.held[0], own.held[1], some, m, Each<T>{own.held[2]}, sums);
                    else dot_sums(own.held[0], own.held[1], some, m, One<T>{1}, sums);
                };
                if (p.by_runs)
                    for (int64_t i = 0, at = 0; i < own.n_parts; at = own.part[i++].end)
                        dots_of_param(of, own.part[i].param, own.held[0] + at, own.held[1] + at, own.part[i].end - at, m, sums);
                else if (f.sets.kind == TABLE && own.n_held % 8 == 0 && own.n_held < BLOCK) add(Eights{own.n_held});
                else add(Any{own.n_held});
                if (!p.by_runs && !p.w) {
                    if (of) of.b[row.at[PARAM]] += sums[0], of.w[row.at[PARAM]] += sums[1];
                    sums[0] *= double(p.ws), sums[1] *= double(p.ws);
                }
                sg[id] += sums[0], sgx[id] += sums[1];
                own.n_held = own.n_parts = 0;
            };
            auto hold = [&](int64_t at, int64_t n, int64_t param) {
                const T* operands[3] = {v.x + at, v.dz + at, p.w ? p.w + at : nullptr};
                for (int64_t i = 0, more; i < n; i += more) {
                    more = std::min(n - i, SPAN - own.n_held);
                    int64_t inside = more;
                    for (int q = 0; q < (p.w ? 3 : 2); ++q) {
                        T* to = own.held[q] + own.n_held;
                        if (share.bytes) inside = compacted(operands[q] + i, share.bytes + at + i, more, to);
                        else std::memcpy(to, operands[q] + i, sizeof(T) * size_t(more));
                    }
                    own.n_held += inside;
                    if (p.by_runs && inside) {
                        const bool goes_on = own.n_parts && own.part[own.n_parts - 1].param == param;
                        own.part[goes_on ? own.n_parts - 1 : own.n_parts++] = {own.n_held, param};
                    }
                    if (own.n_held == SPAN) flush();
                }
            };
            if (!share.outside) {
                if (p.w && of) of_params(own, of, row, begin, many.n, {v.x + (begin - k), v.dz + (begin - k)}, m);
                if (p.by_runs)
                    by_params(row, begin, many.n, [&](int64_t at, Any some, T, T, int64_t param) {
                        hold(begin - k + at, some.n, param);
                    });
                else hold(begin - k, many.n, 0);
            }
            if (own.n_held && (ends || begin + many.n < k + n)) flush();
        });
    }

    // Of n members that have one parameter.
    INLINE void dots_of_param(const Slot& of, int64_t param, const T* v, const T* dz, int64_t n, const Standard<One<T>>& m,
                              double* sums) const {
        double own[2] = {}, w = weight ? double(weight[param]) : 1.0;
        if (n % 8 == 0 && n < BLOCK) dot_sums(v, dz, Eights{n}, m, One<T>{1}, own);
        else dot_sums(v, dz, Any{n}, m, One<T>{1}, own);
        if (of) of.b[param] += own[0], of.w[param] += own[1];
        sums[0] += w * own[0], sums[1] += w * own[1];
    }

    void gradients(Own& own, const Sets& from, const Range& range, const Part& part, int64_t slot) {
        double* mask_sums = mask_slot(slot);
        own.lanes_of = nullptr;
        pieces(
            own, range, part, false,
            [&](const Row* rows, int64_t n_rows, int64_t block, int64_t k, int64_t n) {
                Lanes m = lanes(own, from, block, k, n, 6);
                Params p;
                Each<T> mean_g{m.mean_g}, mean_gx{m.mean_gx};
                for (int64_t i = 0; i < n_rows; ++i) {
                    if (i + 8 <= n_rows && one_param && !f.activation && dy && !mask_sums && plain(rows + i)) {
                        if (!p.known) p = params(own, rows[i], k, n);
                        const T *v[8], *dz[8];
                        T* to[8];
                        for (int j = 0; j < 8; ++j) {
                            const Row& row = rows[i + j];
                            v[j] = values(x, row.at[X] + k, nullptr, n), dz[j] = values(dy, row.at[Y] + k, nullptr, n);
                            to[j] = static_cast<T*>(y) + row.at[Y] + k;
                        }
                        with(p.w, p.ws, [&](auto w) { gradient_eight(v, dz, to, n, m.standard(), w, mean_g, mean_gx); });
                        i += 7;
                        continue;
                    }
                    dx_of(own, rows[i], k, n, [&](const Share& share, T* t) {
                        if (!one_param || !p.known) p = params(own, rows[i], k, n);
                        Pair v = pair(own, rows[i], k, n, share, false, p, m);
                        if (mask_sums) mask_dots(mask_sums, rows[i], k, n, v.x, m.standard(), mean_g, mean_gx, Each<T>{m.spread});
                        with(share.weights, share.one, [&](auto part) {
                            with(p.w, p.ws, [&](auto w) { gradient(v.x, v.dz, t, Any{n}, m.standard(), w, mean_g, mean_gx, part); });
                        });
                    });
                }
            },
            [&](const Row& row, int64_t block, int64_t k, int64_t n, bool) {
                dx_of(own, row, k, n, [&](const Share& share, T* t) {
                    Params p = params(own, row, k, n, f.by_runs);
                    Pair v = pair(own, row, block, k, n, share, false, p, from);
                    walk.runs(block, k, k + n, [&](int64_t begin, auto many, int64_t id) {
                        int64_t at = begin - k;
                        gradient_of_run(mask_sums, row, begin, many, {v.x + at, v.dz + at}, t + at, share.from(at), p, at, from.at(id));
                    });
                });
            });
    }

    // Of the set that `of` begins with, whose columns begin with `begin`, and `at` among those of the parameters.
    template <class N>
    INLINE void gradient_of_run(double* mask_sums, const Row& row, int64_t begin, N n, const Pair& v, T* to, const Share& share,
                                const Params& p, int64_t at, const Sets& of) const {
        Standard<One<T>> m = standard(of, 0);
        One<T> mean_g{of.mean_g[0]}, mean_gx{of.mean_gx[0]};
        if (mask_sums) mask_dots(mask_sums, row, begin, n.n, v.x, m, mean_g, mean_gx, One<T>{of.spread[0]});
        with(share.weights, share.one, [&](auto part) {
            if (p.by_runs) return gradient_by_params(row, begin, n.n, v, to, m, mean_g, mean_gx, part);
            with(p.w ? p.w + at : nullptr, p.ws, [&](auto w) { gradient(v.x, v.dz, to, n, m, w, mean_g, mean_gx, part); });
        });
    }
    template <class U>
    NOINLINE void gradient_by_params(const Row& row, int64_t begin, int64_t n, Pair v, T* to, Standard<One<T>> m, One<T> mean_g,
                                     One<T> mean_gx, U part) const {
        by_params(row, begin, n, [=](int64_t k, Any many, T w, T, int64_t) INLINE_LAMBDA {
            gradient(v.x + k, v.dz + k, to + k, many, m, One<T>{w}, mean_g, mean_gx, part.from(k));
        });
    }

    void gradients_of_rows(Own& own, const Sets& from, const Range* ranges, int64_t n, int64_t slot) {
        double* mask_sums = mask_slot(slot);
        each_row(ranges, n, [&](int64_t i, const Row& row) {
            dx_of(own, row, 0, f.columns, [&](const Share& share, T* t) {
                Params p = params(own, row, 0, f.columns, f.by_runs);
                Pair v = pair(own, row, 0, 0, f.columns, share, false, p, from.at(i));
                gradient_of_run(mask_sums, row, 0, Any{f.columns}, v, t, share, p, 0, from.at(i));
            });
        });
    }

    template <class F>
    void dx_of(Own& own, const Row& row, int64_t k, int64_t n, F&& formula) {
        Share share = this->share(own, row, k, n);
        write(own, row.at[Y] + k, n, share.outside, [&](T* to) {
            formula(share, to);
            if (share.bytes) keep(to, share.bytes, n);
        });
    }
};

}  // namespace ARCH
