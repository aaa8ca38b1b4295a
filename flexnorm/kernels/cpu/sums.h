// The statistics of a part of a range.
#pragma once
#include "moments.h"

namespace ARCH {

constexpr double FAR = 17;  // times that M2 may have been added, before the shift was too far away: 4 sigma

class Statistics : public MomentsOfCall {
   protected:
    using MomentsOfCall::MomentsOfCall;

    // Of a part of a range, closed. Of an EACH form, sums[0] is that of column k0.
    void sum(Own& own, const Sums& sums, const Range& range, const Part& part) {
        int64_t count = f.sets.kind == EACH ? part.k1 - part.k0 : f.sets.count;
        sums.clear(count, false);
        pass(own, sums, range, part, !f.center);
        if (!f.center) fill(sums.s, count, 0.0);  // about zero
        double most = sums.close(count);
        if (!f.center) return;
        // Once more about the mean, where one shifted pass loses digits: if the first element, which is the shift, lies far
        // away; of doubles; and of weights, as it may weigh next to nothing.
        bool all = std::is_same<T, double>::value || f.mask_kind == WEIGHTS;
        if (all || most > FAR) again(own, sums, count, range, part, all ? 0.0 : FAR);
    }

    // Of ranges whose rows follow one another, which are closed together.
    void sum_rows(Own& own, const Sums& sums, const Range* ranges, int64_t n) {
        sums.clear(n, false);
        for (int64_t i = 0; i < n; ++i) {
            const Row& row = ranges[i].base;
            if (members && !members[row.at[MASK]]) continue;
            const int64_t length = walk.inner * f.columns;
            run(sums, i, values(x, row.at[X], own.x[0], length), Share{}, Any{length}, !f.center);
        }
        if (!f.center) fill(sums.s, n, 0.0);
        double most = sums.close(n);
        if (!f.center) return;
        const double far = std::is_same<T, double>::value ? 0.0 : FAR;
        for (int64_t i = 0; i < n && (far == 0 || most > far); ++i)
            if (far == 0 || sums.added[i] > far) again(own, sums.at(i), 1, ranges[i], Part{0, walk.inner, 0, f.columns}, far);
    }

    // Sets that are near stay as they are: what a set gives does not depend on the others.
    void again(Own& own, const Sums& sums, int64_t count, const Range& range, const Part& part, double far) {
        Array<double> memory;
        if (far > 0) {
            memory.reserve(5 * count);
            double* to = memory.data();
            for (const double* from : {sums.n, sums.shift, sums.s, sums.q, sums.added}) {
                std::memcpy(to, from, sizeof(double) * size_t(count));
                to += count;
            }
        }
        for (int64_t i = 0; i < count; ++i) sums.shift[i] = double(T(sums.shift[i] + sums.s[i]));
        sums.clear(count, true);
        pass(own, sums, range, part, true);
        sums.close(count);
        if (!(far > 0)) return;
        for (int64_t i = 0; i < count; ++i) {
            const double* old = memory.data() + i;
            if (old[4 * count] > far) continue;
            sums.n[i] = old[0], sums.shift[i] = old[count], sums.s[i] = old[2 * count], sums.q[i] = old[3 * count];
        }
    }

    void pass(Own& own, const Sums& sums, const Range& range, const Part& part, bool fixed) {
        own.flow.active = false;
        if (f.sets.kind == ONE && f.mask_kind != WEIGHTS) return pass_one(own, sums, range, part, fixed);
        // Short runs of columns: sums of each column first, of all rows of the part that have the same table.
        const bool tabled = f.sets.kind == TABLE, scatters = f.few && !masked_along;
        const bool at_once = comes_at_once(range);
        const int64_t width = part.k1 - part.k0;
        Sums all = sums;
        int64_t open = -1;
        auto close = [&] {
            if (open >= 0) fold_columns(all, sums, open, part.k0, width, fixed);
        };
        pieces(
            own, range, part, true,
            [&](const Row* rows, int64_t n_rows, int64_t block, int64_t k, int64_t n) {
                if (!tabled) return columns(own, sums.at(k - part.k0), rows, n_rows, k, n, fixed);
                if (scatters) return scatter(own, sums, rows, n_rows, block, k, n, fixed);
                if (at_once) {
                    begin(own.columns, sums, block, k, n, fixed);
                    columns(own, own.columns, rows, n_rows, k, n, fixed);
                    return fold_columns(own.columns, sums, block, k, n, fixed);
                }
                if (open != block) {
                    close();
                    begin(all = own.wide_columns(width), sums, open = block, part.k0, width, fixed);
                }
                columns(own, all.at(k - part.k0), rows, n_rows, k, n, fixed);
            },
            [&](const Row& row, int64_t block, int64_t k, int64_t n, bool ends) {
                Share share = this->share(own, row, k, n);
                if (share.one == 0 || (share.outside && !own.flow.active)) return;
                const T* v = values(x, row.at[X] + k, own.x[0], n);
                walk.runs(block, k, k + n, [&](int64_t begin, auto many, int64_t id) {
                    const bool ended = ends || begin + many.n < k + n;
                    if (f.mask_kind == WEIGHTS || (ended && !share.bytes && !own.flow.active))
                        return run(sums, id, v + (begin - k), share.from(begin - k), many, fixed);
                    flow(own, sums, id, v + (begin - k), share.from(begin - k), many.n, ended, fixed);
                });
            },
            tabled && scatters);
        close();
    }

    // Members of one set are summed as if they lay one after another, whatever rows they are in.
    void pass_one(Own& own, const Sums& sums, const Range& range, const Part& part, bool fixed) {
        const bool masked = f.mask_kind == MEMBERSHIP && masked_along;
        int64_t from = 0, length = 0;  // what lies side by side
        auto flush = [&](bool last) {
            const int64_t most = same ? length : std::min(SPAN, length);  // as many as a buffer has
            if (last && length == most && !own.flow.active) {
                if (length) run(sums, 0, values(x, from, own.x[0], length), Share{}, Any{length}, fixed);
                return;
            }
            for (int64_t k = 0; k < length || last; k += most) {
                int64_t n = std::min(most, length - k);
                bool ends = last && k + n == length;
                flow(own, sums, 0, values(x, from + k, own.x[0], n), Share{}, n, ends, fixed);
                if (ends) break;
            }
        };
        walk.rows(range, part.r0, part.r1, Inside{this, members}, [&](const Row* rows, int64_t n_rows) {
            for (int64_t i = 0; i < n_rows; ++i) {
                Part in = masked && f.mask.kind == EACH ? window(own, rows[i], part) : part;
                for (int64_t k = in.k0; k < in.k1;) {
                    int64_t n = in.k1 - k;
                    if (masked) {
                        n = std::min(SPAN, n);
                        Share share = this->share(own, rows[i], k, n);
                        if (share.bytes) {
                            flush(false);
                            length = 0;
                            flow(own, sums, 0, values(x, rows[i].at[X] + k, own.x[0], n), share, n, false, fixed);
                        }
                        if (share.bytes || share.outside) {
                            k += n;
                            continue;
                        }
                    }
                    const int64_t next = rows[i].at[X] + k;
                    if (from + length != next) {
                        flush(false);
                        from = next, length = 0;
                    }
                    length += n, k += n;
                }
            }
        });
        flush(true);
    }

    // Some members of a run of one set; `ends`: the last.
    NOINLINE void flow(Own& own, const Sums& sums, int64_t id, const T* v, const Share& share, int64_t n, bool ends, bool fixed) {
        Flow<T>& flow = own.flow;
        if (!flow.active) flow.begin(fixed || sums.n[id] > 0, sums.shift[id]);
        if (share.outside) n = 0;
        else if (share.bytes) n = compacted(v, share.bytes, n, own.x[1]), v = own.x[1];
        if (!ends) return flow.add(v, n);
        if (f.sets.kind == TABLE && (flow.count + n) % 8 == 0) flow.template finish<Eights>(v, n);
        else flow.template finish<Any>(v, n);
        if (flow.count == 0) return;
        sums.shift[id] = flow.shift;
        sums.n[id] += double(flow.count), sums.s[id] += flow.sums[0], sums.q[id] += flow.sums[1];
    }

    template <class N>
    INLINE void run(const Sums& sums, int64_t id, const T* v, const Share& share, N many, bool fixed) {
        double &count = sums.n[id], &shift = sums.shift[id], &s = sums.s[id], &q = sums.q[id];
        int64_t n = many.n;
        if (!fixed && count == 0) {
            int64_t first = 0;
            if (share.weights)
                while (first < n && !(share.weights[first] > 0)) ++first;
            if (first == n) return;
            shift = !share.weights && n >= BLOCK ? run_shift(v) : double(v[first]);
        }
        if (share.weights) run_sums(v, share.weights, n, shift, count, s, q);
        else {
            double both[2] = {}, w = double(share.one);
            run_sums(v, many, shift, both);
            s += w * both[0], q += w * both[1], count += w * double(n);
        }
    }

    // Sums of every column of a tile over rows.
    void columns(Own& own, const Sums& to, const Row* rows, int64_t n_rows, int64_t k, int64_t n, bool fixed) {
        double total = 0;
        bool begun = fixed || to.n[0] > 0;
        for (int64_t i = 0; i < n_rows; ++i) {
            Share share = this->share(own, rows[i], k, n);
            if (share.outside || share.one == 0) continue;
            const T* v = values(x, rows[i].at[X] + k, own.x[0], n);
            if (masked_along) {  // then columns differ in where they begin
                if (share.weights) lane_sums(v, share.weights, n, fixed, to.n, to.shift, to.s, to.q);
                else {
                    if (!share.bytes) fill(own.bytes, n, uint8_t(1));
                    lane_sums(v, share.bytes ? share.bytes : own.bytes, n, fixed, to.n, to.shift, to.s, to.q);
                }
                continue;
            }
            const bool eight = f.mask_kind != WEIGHTS && i + 8 <= n_rows;
            if (!begun && !eight) SIMD for (int64_t j = 0; j < n; ++j) to.shift[j] = double(v[j]);
            if (eight) {
                int64_t step = 16 * (rows[i + 1].at[X] - rows[i].at[X]);  // if the rows to come lie like these
                for (int j = 0; j < 8; ++j) fetch<0>(x, rows[i + j].at[X] + step + k, n);
                const T* next[8] = {v};
                for (int j = 1; j < 8; ++j) next[j] = values(x, rows[i + j].at[X] + k, own.x[j], n);
                if (!begun) lane_shifts(next, n, to.shift);
                lane_sums(next, n, to.shift, to.s, to.q);
                total += 8, i += 7;
            } else {
                lane_sums(v, n, double(share.one), to.shift, to.s, to.q);
                total += double(share.one);
            }
            begun = true;
        }
        if (total != 0) SIMD for (int64_t j = 0; j < n; ++j) to.n[j] += total;
    }

    // Sums of columns, to be shifted to those of their sets.
    void begin(const Sums& each, const Sums& sums, int64_t block, int64_t k, int64_t n, bool fixed) const {
        each.clear(n, false);
        if (fixed) gather(sums.shift, f.sets.table + block * f.columns + k, each.shift, n);
    }

    void fold_columns(const Sums& each, const Sums& sums, int64_t block, int64_t k, int64_t n, bool fixed) const {
        const int32_t* id = f.sets.table + block * f.columns + k;
        for (int64_t j = 0; j < n; ++j) {
            if (!(each.n[j] > 0)) continue;
            int64_t i = id[j];
            if (!fixed && sums.n[i] == 0) sums.shift[i] = each.shift[j];
            double delta = each.shift[j] - sums.shift[i], m = each.n[j];
            sums.n[i] += m;
            sums.s[i] += each.s[j] + m * delta;
            sums.q[i] += each.q[j] + delta * (2 * each.s[j] + m * delta);
            sums.added[i] += each.q[j];
        }
    }

    // Row by row: a set that lies across two tiles is summed as one that lies in one.
    void scatter(Own& own, const Sums& sums, const Row* rows, int64_t n_rows, int64_t block, int64_t k, int64_t n,
                 bool fixed) {
        const int32_t* id = f.sets.table + block * f.columns + k;
        double *count = sums.n, *shift = sums.shift, *s = sums.s, *q = sums.q;
        for (int64_t i = 0; i < n_rows; ++i) {
            Share share = this->share(own, rows[i], k, n);
            if (share.outside || share.one == 0) continue;
            const T* v = values(x, rows[i].at[X] + k, own.x[0], n);
            double w = double(share.one);
            for (int64_t j = 0; j < n;) {
                int64_t set = id[j];
                if (!fixed && count[set] == 0) shift[set] = double(v[j]);
                double c = shift[set], a = s[set], b = q[set];
                int64_t first = j;
                do {
                    double d = double(v[j]) - c;
                    a += w * d, b += w * d * d;
                } while (++j < n && id[j] == set);
                count[set] += w * double(j - first), s[set] = a, q[set] = b;
            }
        }
    }
};

}  // namespace ARCH
