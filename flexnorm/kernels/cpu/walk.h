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

struct alignas(64) Row {  // a line of the cache
    int64_t at[STEPS];
};

struct Range {
    Row base;
    int64_t set;             // the first of its sets
    int64_t first, members;  // of the segment
    int64_t rows;
};

// So far along an axis, and one step, as vectors: left to itself a compiler takes them apart, and whoever reads a row that
// was written in parts waits.
using Places = Vector<int64_t, STEPS>::type;

INLINE void go(Row& row, const Dim& dim, int64_t index) {
    Places& at = *reinterpret_cast<Places*>(row.at);
    at = at + *reinterpret_cast<const Places*>(dim.step) * index;
}

INLINE void step(Row& row, const Dim& dim) {
    Places& at = *reinterpret_cast<Places*>(row.at);
    at = at + *reinterpret_cast<const Places*>(dim.step);
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

    // Ranges begin, begin + 1, ...: so many.
    void ranges(int64_t begin, int64_t n, Range* to) const {
        const bool steps = uniform() && f.n_outer > 0;
        const Dim* last = f.outer + (f.n_outer - 1);
        Range next;
        for (int64_t i = 0, left = 0; i < n; ++i) {
            if (left-- > 0) step(next.base, *last), next.set += last->step[SET];
            else {
                next = range(begin + i);
                left = steps ? last->size - 1 - (begin + i) % last->size : 0;
            }
            to[i] = next;
        }
    }

    // Rows begin..end of a range, in batches that share the block of the sets: f(rows, how many). Only those that are inside.
    template <class I, class F>
    void rows(const Range& range, int64_t begin, int64_t end, const I& inside, F&& visit) const {
        if (begin >= end) return;
        if (!f.n_inner && !f.n_segment) {
            Row row = range.base;
            if (!inside.all() && !inside(row.at[MASK])) return;
            if (f.param_label) row.at[PARAM] += f.param_label[row.at[PARAM_LABEL]];
            return visit(&row, 1);
        }
        Row batch[BATCH];
        int64_t filled = 0;
        Place place(*this, range, begin);
        const bool blocks = f.sets.kind == TABLE && f.sets.blocks > 1, all = inside.all(), ordered = place.ordered;
        const Dim* last = ordered ? nullptr : place.last;
        const bool plain = all && !blocks && !ordered && !f.param_label;  // rows are equal steps apart, and all are met
        for (int64_t r = begin; r < end;) {
            Row row = place.outer(*this, range);
            int64_t i = place.i(), n = std::min(end - r, place.left());
            r += n;
            if (last) go(row, *last, place.segment ? range.first + i : i);
            for (int64_t more; plain && n > 0; n -= more) {
                more = std::min(n, BATCH - filled);
                for (int64_t j = filled; j < filled + more; ++j) {
                    batch[j] = row;
                    if (last) step(row, *last);
                }
                if ((filled += more) == BATCH) {
                    visit(batch, filled);
                    filled = 0;
                }
            }
            for (; n > 0; ++i, --n) {
                batch[filled] = row;
                if (ordered) member(batch[filled], range.first + i);
                else if (last) step(row, *last);
                if (!all && !inside(batch[filled].at[MASK])) continue;
                if (blocks && filled && batch[filled].at[SET_BLOCK] != batch[0].at[SET_BLOCK]) {
                    visit(batch, filled);
                    batch[0] = batch[filled];
                    filled = 0;
                }
                if (f.param_label) batch[filled].at[PARAM] += f.param_label[batch[filled].at[PARAM_LABEL]];
                if (++filled == BATCH) {
                    visit(batch, filled);
                    filled = 0;
                }
            }
            place.advance();
        }
        if (filled) visit(batch, filled);
    }

    // Where the mask of rows begin..end lies: f(of the first, from one to the next, how many).
    template <class F>
    void masks(const Range& range, int64_t begin, int64_t end, F&& visit) const {
        Place place(*this, range, begin);
        for (int64_t r = begin; r < end;) {
            Row row = place.outer(*this, range);
            int64_t i = place.i(), n = std::min(end - r, place.left());
            r += n;
            if (place.ordered)
                for (; n > 0; ++i, --n) {
                    Row own = row;
                    member(own, range.first + i);
                    visit(own.at[MASK], int64_t(0), int64_t(1));
                }
            else {
                int64_t step = place.last ? place.last->step[MASK] : 0;
                visit(row.at[MASK] + step * (place.segment ? range.first + i : i), step, n);
            }
            place.advance();
        }
    }

    // Rows that follow one another and share the block of the sets, however many ranges there are.
    int64_t rows_of_block(const Range& range) const {
        if (f.sets.kind != TABLE || f.sets.blocks == 1) return std::max<int64_t>(1, range.rows);
        int64_t n = 1;
        for (int64_t d = f.n_inner; d >= 0; --d) {
            if (f.n_segment && d == f.inner_at) {
                for (int64_t s = 0; s < f.n_segment; ++s)
                    if (f.segment[s].step[SET_BLOCK]) return n;
                n *= range.members;
            }
            if (d == 0) break;
            if (f.inner[d - 1].step[SET_BLOCK]) return n;
            n *= f.inner[d - 1].size;
        }
        return std::max<int64_t>(1, n);
    }

    // The least columns of a run that is summed by itself.
    int64_t least() const { return f.apart ? f.columns + 1 : f.few ? SHORT : SPLIT; }
    bool has_spans() const { return f.sets.kind == ONE || (f.sets.kind == TABLE && f.sets.longest >= least()); }

    // Whether these columns are one span of whole runs.
    bool is_span(int64_t begin, int64_t end) const {
        if (end - begin > SPAN) return false;
        return f.sets.kind == ONE || (f.sets.kind == TABLE && f.sets.shortest >= least() && begin == 0 && end == f.columns);
    }

    // Columns begin..end, for which sums are kept of every column, to be shared by many rows (each(k, n), in tiles), or of
    // every run of one set (run(k, n, whether its last run ends there), in spans that begin where runs do). A run decides
    // by its own length, so no set is summed in another way for what lies beside it.
    template <class E, class R>
    void stretches(int64_t block, int64_t begin, int64_t end, E&& each, R&& run) const {
        auto tiles = [&](int64_t k, int64_t stop) {
            for (; k < stop; k += TILE) each(k, std::min(TILE, stop - k));
        };
        auto spans = [&](int64_t k, int64_t stop) {
            while (k < stop) {
                int64_t next = span_end(block, k, stop);
                run(k, next - k, ends_run(block, next, end));
                k = next;
            }
        };
        if (f.sets.kind == EACH) return tiles(begin, end);
        if (f.sets.kind == ONE) return spans(begin, end);
        const int64_t least = this->least();
        if (f.sets.longest < least) return tiles(begin, end);
        if (f.sets.shortest >= least) return spans(begin, end);
        const int32_t* first = f.sets.runs;
        int64_t i = run_at(f.sets, block, begin), stop = f.sets.run_ptr[block + 1];
        auto length = [&](int64_t i) { return (i + 1 < stop ? first[i + 1] : f.columns) - first[i]; };
        while (begin < end) {
            const bool many = length(i) >= least;
            do ++i;
            while (i < stop && first[i] < end && (length(i) >= least) == many);
            int64_t next = i < stop ? std::min<int64_t>(first[i], end) : end;
            if (many) spans(begin, next);
            else tiles(begin, next);
            begin = next;
        }
    }

    // Runs of columns begin..end that meet one set: f(begin, how many, id of the set).
    template <class F>
    void runs(int64_t block, int64_t begin, int64_t end, F&& visit) const {
        if (f.sets.kind == ONE) return visit(begin, Any{end - begin}, int64_t(0));
        table_runs<Any>(f.sets, block, begin, end, [&](int64_t k, Any n, int64_t id) INLINE_LAMBDA {
            if (n.n % 8 == 0 && n.n < TREE * 16) visit(k, Eights{n.n}, id);
            else visit(k, n, id);
        });
    }

    // The same of an operand that has a table: the last is what it says.
    template <class N, class F>
    void table_runs(const Column& column, int64_t block, int64_t begin, int64_t end, F&& visit) const {
        const int32_t* first = column.runs;
        const int32_t* table = column.table + block * f.columns;
        int64_t i = column.run_ptr[block], stop = column.run_ptr[block + 1];
        if (begin) i = run_at(column, block, begin);
        while (begin < end) {
            int64_t next = ++i < stop ? std::min<int64_t>(first[i], end) : end;
            visit(begin, N{next - begin}, int64_t(table[begin]));
            begin = next;
        }
    }

    const Form& f;
    int64_t inner, outer, elements;

   private:
    // Where a walk over the rows of a range is: an index along every axis, the innermost last.
    struct Place {
        int64_t at[DIMS + 1], size[DIMS + 1], n = 0;  // the size of segments is negative
        const Dim* last = nullptr;
        bool segment = false, ordered = false;  // the innermost axis is that of segments; its members are looked up

        INLINE Place(const Walk& walk, const Range& range, int64_t row) {
            const Form& f = walk.f;
            for (int64_t d = 0; d <= f.n_inner; ++d) {
                if (f.n_segment && d == f.inner_at) size[n++] = -range.members;
                if (d < f.n_inner) size[n++] = f.inner[d].size;
            }
            for (int64_t d = n - 1; d >= 0; --d) {
                int64_t s = std::abs(size[d]);
                at[d] = row % s;
                row /= s;
            }
            if (n == 0) return;
            segment = size[n - 1] < 0;
            ordered = segment && (f.order || f.n_segment > 1);
            last = segment ? f.segment : f.inner + (f.n_inner - 1);
        }

        int64_t i() const { return n ? at[n - 1] : 0; }
        int64_t left() const { return n ? std::abs(size[n - 1]) - at[n - 1] : 1; }

        // The row but for what the innermost axis adds.
        INLINE Row outer(const Walk& walk, const Range& range) const {
            Row row = range.base;
            int64_t dim = 0;
            for (int64_t d = 0; d < n - 1; ++d) {
                if (size[d] < 0) walk.member(row, range.first + at[d]);
                else go(row, walk.f.inner[dim++], at[d]);
            }
            return row;
        }

        void advance() {
            for (int64_t d = n - 2; d >= 0; --d) {
                if (++at[d] < std::abs(size[d])) break;
                at[d] = 0;
            }
            if (n) at[n - 1] = 0;
        }
    };

    static int64_t run_at(const Column& column, int64_t block, int64_t k) {
        if (column.shortest == column.longest) return column.run_ptr[block] + int32_t(k) / int32_t(column.longest);
        const int32_t *begin = column.runs + column.run_ptr[block], *end = column.runs + column.run_ptr[block + 1];
        return std::upper_bound(begin, end, int32_t(k)) - column.runs - 1;
    }

    // Where a span that begins with column k ends: with a run, or a whole number of spans from where a longer one began.
    int64_t span_end(int64_t block, int64_t k, int64_t stop) const {
        int64_t most = k + SPAN;
        if (most >= stop || f.sets.kind == ONE) return std::min(most, stop);
        int64_t begin = f.sets.runs[run_at(f.sets, block, most)];
        if (begin > k) return begin;
        begin = f.sets.runs[run_at(f.sets, block, k)];
        return begin + ((k - begin) / SPAN + 1) * SPAN;
    }

    bool ends_run(int64_t block, int64_t k, int64_t end) const {
        if (f.sets.kind == ONE) return k == end;
        const int32_t* table = f.sets.table + block * f.columns;
        return k == f.columns || table[k] != table[k - 1];
    }

    INLINE void member(Row& row, int64_t place) const {
        int64_t index = f.order ? f.order[place] : place;
        if (f.n_segment == 1) return go(row, f.segment[0], index);
        for (int64_t d = f.n_segment - 1; d >= 0; --d) {
            go(row, f.segment[d], index % f.segment[d].size);
            index /= f.segment[d].size;
        }
    }
};

}  // namespace ARCH
