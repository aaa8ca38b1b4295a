// The gradients of parameters and weights. Each slot is written by one thread, then all are added in order.
#pragma once
#include "forward.h"

namespace ARCH {

constexpr int64_t MOST_ROWS = 64;  // whose parameter gradients are added in float32
constexpr int64_t SLOTS = 32;      // places that parameter gradients are summed in, each by one thread

struct Pair {
    const T *x, *dz;
};

class Parameters : public Forward {
   protected:
    using Forward::Forward;

    struct Slot {  // where one thread sums the gradients of parameters and weights
        double *w = nullptr, *b, *mask;
        T *lane_w, *lane_b;       // sums of some rows, where all rows have the same parameters along the columns
        int64_t* rows = nullptr;  // how many; null where there are no such sums

        explicit operator bool() const { return w != nullptr; }
    };

    bool wants_mask() const { return c.what >= BACKWARD && c.what != BACKWARD_SUMS && c.dmask; }
    bool wants_params() const { return c.what >= BACKWARD && (c.dweight || c.dbias); }
    bool wants_slots() const { return wants_params() || wants_mask(); }
    int64_t slot_size() const { return 2 * f.n_params + (wants_mask() ? f.n_mask : 0); }
    double* slot_of(int64_t slot) { return memory.data() + slot * slot_size(); }

    Slot slot(int64_t i) {
        Slot s;
        s.w = slot_of(i), s.b = s.w + f.n_params, s.mask = s.b + f.n_params;
        if (lane_sums_of_params) {
            s.lane_w = lane_memory.data() + 2 * f.columns * i, s.lane_b = s.lane_w + f.columns;
            s.rows = lane_rows.data() + i;
        }
        return s;
    }

    double* mask_slot(int64_t i) { return wants_mask() && (c.sum_g || c.what == BACKWARD) ? slot(i).mask : nullptr; }

    void count_row(const Slot& of) {
        if (of.rows && ++*of.rows == MOST_ROWS) settle_slot(of);
    }

    void settle_slot(const Slot& of) {
        for (auto [to, from] : {std::pair{of.w, of.lane_w}, std::pair{of.b, of.lane_b}}) {
            double* RESTRICT sum = to;
            T* RESTRICT lane = from;
            SIMD for (int64_t k = 0; k < f.columns; ++k) sum[k] += double(lane[k]), lane[k] = 0;
        }
        *of.rows = 0;
    }

    void reserve_slots(int64_t tasks, bool large) {
        if (!wants_slots()) return;
        int64_t size = std::max<int64_t>(1, slot_size());
        n_slots = std::max<int64_t>(1, std::min(SLOTS, f.numel / (8 * size)));
        if (!large) n_slots = std::max<int64_t>(1, std::min(n_slots, tasks));
        memory.reserve(n_slots * size);
        fill(memory.data(), n_slots * size, 0.0);
        lane_sums_of_params = wants_params() && f.params.kind == EACH && f.n_params == f.columns;
        if (!lane_sums_of_params) return;
        lane_memory.reserve(2 * f.columns * n_slots), lane_rows.reserve(n_slots);
        fill(lane_memory.data(), 2 * f.columns * n_slots, T(0)), fill(lane_rows.data(), n_slots, int64_t(0));
    }

    void reduce_slots(int64_t threads) {
        if (lane_sums_of_params)
            for (int64_t i = 0; i < n_slots; ++i) settle_slot(slot(i));
        T* targets[3] = {static_cast<T*>(c.dweight), static_cast<T*>(c.dbias),
                         wants_mask() ? static_cast<T*>(c.dmask) : nullptr};
        int64_t sizes[3] = {f.n_params, f.n_params, f.n_mask}, first = 0;
        for (int i = 0; i < 3; first += sizes[i++]) {
            if (!targets[i]) continue;
            int64_t parts = std::min<int64_t>(threads, sizes[i] * n_slots / GRAIN + 1);
            parallel(threads, parts, [&](int64_t part) {
                int64_t begin = part * sizes[i] / parts, end = (part + 1) * sizes[i] / parts;
                double* RESTRICT sum = slot_of(0) + first;
                for (int64_t slot = 1; slot < n_slots; ++slot) {
                    const double* RESTRICT more = slot_of(slot) + first;
                    SIMD for (int64_t p = begin; p < end; ++p) sum[p] += more[p];
                }
                for (int64_t p = begin; p < end; ++p) targets[i][p] = T(sum[p]);
            });
        }
    }

    // Adds dz and dz * xhat of some columns of a row to the sums of their parameters.
    template <class V>
    void of_params(Own& own, const Slot& of, const Row& row, int64_t k, int64_t n, const Pair& v, const Standard<V>& m) {
        int64_t at = row.at[PARAM];
        if (f.params.kind == ONE) {
            double sums[2] = {};
            dot_sums(v.x, v.dz, Any{n}, m, One<T>{1}, sums);
            of.b[at] += sums[0], of.w[at] += sums[1];
        } else if (f.params.kind == EACH)
            lane_dots(v.x, v.dz, Any{n}, m, One<T>{1}, of.b + at + k, of.w + at + k);
        else if (f.params.mean_run >= LONG)
            walk.table_runs<Any>(f.params, row.at[PARAM_BLOCK], k, k + n, [&](int64_t begin, Any many, int64_t id) {
                double sums[2] = {};
                dot_sums(v.x + (begin - k), v.dz + (begin - k), many, m.from(begin - k), One<T>{1}, sums);
                of.b[at + id] += sums[0], of.w[at + id] += sums[1];
            });
        else
            for (int64_t begin = 0; begin < n; begin += TILE) {
                int64_t many = std::min(TILE, n - begin);
                T *g = own.scaled[0], *gx = own.scaled[1];
                fill(g, many, T(0)), fill(gx, many, T(0));
                lane_dots(v.x + begin, v.dz + begin, Any{many}, m.from(begin), One<T>{1}, g, gx);
                add_to_params(of, row, k + begin, many, g, gx);
            }
    }

    // The same, of sums of dz and dz * xhat.
    void add_to_params(const Slot& of, const Row& row, int64_t k, int64_t n, const T* dz, const T* dzx) const {
        int64_t at = row.at[PARAM];
        const int32_t* table = f.params.table + row.at[PARAM_BLOCK] * f.columns + k;
        double *RESTRICT b = of.b + at, *RESTRICT w = of.w + at;
        if (f.params.kind == EACH)
            SIMD for (int64_t j = 0; j < n; ++j) b[k + j] += double(dz[j]), w[k + j] += double(dzx[j]);
        else if (f.params.kind == TABLE)
            for (int64_t j = 0; j < n; ++j) b[table[j]] += double(dz[j]), w[table[j]] += double(dzx[j]);
        else
            for (int64_t j = 0; j < n; ++j) *b += double(dz[j]), *w += double(dzx[j]);
    }

    // The gradient of a weight: d mean / d w = (x - mean) / n, d var / d w = ((x - mean)^2 - var) / n.
    static double mask_dot(T xhat, T mean_g, T mean_gx, T v) {
        T through_sigma = mean_gx == 0 ? T(0) : T(0.5) * (xhat * xhat - v) * mean_gx;  // without scale, xhat may be huge
        return -double(xhat * mean_g + through_sigma);
    }

    // Adds the gradients of the weights of some columns of a row to their sums.
    template <class V>
    void mask_dots(double* mask_sums, const Row& row, int64_t k, int64_t n, const T* v, const Standard<V>& m, V mean_g, V mean_gx,
                   V variance) const {
        double total = 0;
        for (int64_t j = 0; j < n; ++j) {
            using P = Pack<T, 1>;
            double dot = mask_dot(m.template xhat<P>(v, j).v[0], mean_g.template at<P>(j).v[0], mean_gx.template at<P>(j).v[0],
                                  variance.template at<P>(j).v[0]);
            if (f.mask.kind == ONE) total += dot;
            else mask_sums[row.at[MASK] + (f.mask.kind == EACH ? k + j : f.mask.table[k + j])] += dot;
        }
        if (f.mask.kind == ONE) mask_sums[row.at[MASK]] += total;
    }

    Array<double> memory;  // [slots][weight, bias, mask]
    Array<T> lane_memory;  // [slots][weight, bias]
    Array<int64_t> lane_rows;
    int64_t n_slots = 1;
    bool lane_sums_of_params = false;
};

}  // namespace ARCH
