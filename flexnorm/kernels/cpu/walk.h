// The walk over a form: closed ranges, their rows, and the runs of columns that meet one set.
#pragma once
#include <algorithm>
#include <cstdint>

#include "form.h"
#include "tile.h"

namespace ARCH {

constexpr int64_t TILE = 512;    // columns at a time: sums of doubles and some rows of them fit in the first cache
constexpr int64_t SPAN = 2048;   // columns of one row at a time
constexpr int64_t BATCH = 64;    // rows at a time
constexpr int64_t MANY = 4;      // rows that pay for sums per column
constexpr int64_t SPLIT = 256;   // a run of columns so long is summed by itself, whatever the rows
constexpr int64_t LONG = 16;     // columns of a run that pay for looking for its end
constexpr int64_t SHORT = 8;     // shorter ones are not, whatever the rows

struct Row {
    int64_t at[STEPS];
};

struct Range {
    Row base;
    int64_t set;             // the first of its sets
    int64_t first, members;  // of the segment
    int64_t rows;
};

inline void go(Row& row, const Dim& dim, int64_t index) {
    for (int s = 0; s < STEPS; ++s) row.at[s] += index * dim.step[s];
}

class Walk {
   public:
    explicit Walk(const Form& form) : f(form), inner(1), outer(1), elements(1) {
        for (int d = 0; d < f.n_inner; ++d) inner *= f.inner[d].size;
        for (int d = 0; d < f.n_outer; ++d) outer *= f.outer[d].size;
        for (int d = 0; d < f.n_segment; ++d) elements *= f.segment[d].size;
    }

    int64_t ranges() const { return outer * (f.n_segment ? f.groups : 1); }
    bool uniform() const { return f.n_segment == 0; }

    Range range(int64_t index) const {
        Range r{};
        r.members = 1;
        for (int64_t d = f.n_outer; d >= 0; --d) {  // the innermost varies fastest; the segments stand before outer_at
            if (f.n_segment && d == f.outer_at) {
                int64_t group = index % f.groups;
                index /= f.groups;
                r.first = f.offsets[group];
                r.members = f.offsets[group + 1] - r.first;
                r.set += f.segment_sets ? f.segment_sets[group] : group * f.segment_step;
            }
            if (d > 0) {
                const Dim& dim = f.outer[d - 1];
                go(r.base, dim, index % dim.size);
                index /= dim.size;
            }
        }
        r.set += r.base.at[SET];
        r.rows = r.members * inner;
        return r;
    }

    // Rows begin..end of a range, in batches that share the block of the sets: f(rows, how many).
    template <class F>
    void rows(const Range& range, int64_t begin, int64_t end, F&& visit) const {
        if (begin >= end) return;
        Row batch[BATCH];
        int64_t filled = 0;
        int64_t at[DIMS + 1], size[DIMS + 1];
        int64_t n = 0;
        for (int64_t d = 0; d <= f.n_inner; ++d) {
            if (f.n_segment && d == f.inner_at) size[n++] = -range.members;
            if (d < f.n_inner) size[n++] = f.inner[d].size;
        }
        int64_t rest = begin;
        for (int64_t d = n - 1; d >= 0; --d) {
            int64_t s = std::abs(size[d]);
            at[d] = rest % s;
            rest /= s;
        }
        const bool ordered = n && size[n - 1] < 0 && (f.order || f.n_segment > 1);
        const Dim* last = n == 0 ? nullptr : size[n - 1] < 0 ? f.segment : f.inner + (f.n_inner - 1);
        const bool blocks = f.sets.kind == TABLE;
        for (int64_t r = begin; r < end;) {
            Row row = range.base;
            int64_t dim = 0;
            for (int64_t d = 0; d < n - 1; ++d) {
                if (size[d] < 0) member(row, range.first + at[d]);
                else go(row, f.inner[dim++], at[d]);
            }
            int64_t i = n ? at[n - 1] : 0, stop = std::min(i + end - r, n ? std::abs(size[n - 1]) : 1);
            const Row base = row;
            if (n && !ordered) go(row, *last, size[n - 1] < 0 ? range.first + i : i);
            for (r += stop - i; i < stop; ++i) {
                if (ordered) member(row = base, range.first + i);
                if (blocks && filled && row.at[SET_BLOCK] != batch[0].at[SET_BLOCK]) {
                    visit(batch, filled);
                    filled = 0;
                }
                Row& next = batch[filled++] = row;
                if (f.param_label) next.at[PARAM] += f.param_label[row.at[PARAM_LABEL]];
                if (filled == BATCH) {
                    visit(batch, filled);
                    filled = 0;
                }
                if (n && !ordered)
                    for (int s = 0; s < STEPS; ++s) row.at[s] += last->step[s];
            }
            for (int64_t d = n - 2; d >= 0; --d) {
                if (++at[d] < std::abs(size[d])) break;
                at[d] = 0;
            }
            if (n) at[n - 1] = 0;
        }
        if (filled) visit(batch, filled);
    }

    // Whether sums are kept column by column, to be shared by many rows, and not run by run.
    bool by_column(int64_t rows) const {
        if (f.sets.kind != TABLE) return f.sets.kind == EACH;
        return f.sets.mean_run < (rows >= MANY ? SPLIT : SHORT);
    }

    // Runs of columns begin..end that meet one set: f(begin, how many, id of the set).
    template <class F>
    void runs(int64_t block, int64_t begin, int64_t end, F&& visit) const {
        if (f.sets.kind == ONE) visit(begin, Any{end - begin}, int64_t(0));
        else if (f.sets.even) table_runs<Eights>(f.sets, block, begin, end, visit);
        else table_runs<Any>(f.sets, block, begin, end, visit);
    }

    // The same of an operand that has a table: the last is what it says.
    template <class N, class F>
    void table_runs(const Column& column, int64_t block, int64_t begin, int64_t end, F&& visit) const {
        const int32_t* first = column.runs;
        const int32_t* table = column.table + block * f.columns;
        int64_t i = column.run_ptr[block], stop = column.run_ptr[block + 1];
        if (begin) i = std::upper_bound(first + i, first + stop, int32_t(begin)) - first - 1;
        while (begin < end) {
            int64_t next = ++i < stop ? std::min<int64_t>(first[i], end) : end;
            visit(begin, N{next - begin}, int64_t(table[begin]));
            begin = next;
        }
    }

    const Form& f;
    int64_t inner, outer, elements;

   private:
    void member(Row& row, int64_t place) const {
        int64_t index = f.order ? f.order[place] : place;
        if (f.n_segment == 1) return go(row, f.segment[0], index);
        for (int64_t d = f.n_segment - 1; d >= 0; --d) {
            go(row, f.segment[d], index % f.segment[d].size);
            index /= f.segment[d].size;
        }
    }
};

}  // namespace ARCH
