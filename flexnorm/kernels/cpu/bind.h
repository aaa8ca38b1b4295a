// From a pattern and the numbers of one call (sizes, strides, labels) to the form of form.h. All of it is worked out anew
// at every call, in less than a microsecond where no table is made. Nothing is kept.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "form.h"

constexpr int MOST = 16;  // elementary axes, dims of a tensor, labels, terms of an operand

// What indexes a tensor over some sets, outermost first: an axis, or ~label.
struct Terms {
    int32_t n, elements;
    int32_t term[MOST], length[MOST];  // terms of each element, as the pattern writes it
};

enum Operand { OF_SETS, OF_MASK, OF_PARAMS, OPERANDS };

// All that is known before tensors come. It is made once for a formula and a rank of x.
struct Pattern {
    int32_t dims, rank, labels;
    int32_t dim_of[MOST];  // elementary axis -> dim of x
    int64_t told[MOST];    // its size, or -1
    int32_t label_rank[MOST], label_axes[MOST][MOST];
    int32_t present[OPERANDS];
    Terms operand[OPERANDS];
    int64_t center, scale, activation, labels_merge;
    double eps;
};

struct Label {
    const int64_t* ids;
    int64_t count;
    const int64_t* offsets;
    const int64_t* order;  // null: the ids are sorted
};

// What a call brings, of x's own dims.
struct Numbers {
    int64_t dtype, mask_kind;
    int64_t size[MOST], x[MOST], y[MOST];
    int64_t mask_dims, mask_size[MOST], param_dims, param_size[MOST];  // dims -1: there is no such tensor
    Label label[MOST];
    int64_t label_size[MOST][MOST];
};

// Memory of the tables of one call.
struct Tables {
    std::vector<int32_t> table[OPERANDS], runs[OPERANDS];
    std::vector<int64_t> offsets[OPERANDS], run_ptr[OPERANDS], param_label, ids, order, segment_offsets, segment_sets;
};

class Binder {
   public:
    int64_t size[MOST], xs[MOST], ys[MOST];  // of the elementary axes
    int order[MOST], n = 0, cut = 0;         // axes in the order of the memory; those behind the cut are columns
    bool copied = false;                     // x has no contiguous axis, or overlaps itself

    Binder(const Pattern& pattern, const Numbers& numbers, Tables& tables) : p(pattern), v(numbers), t(tables) {}

    // The sizes of the elementary axes. False: something has another shape than the pattern says.
    bool sizes(bool labelled = true) {
        int64_t known[MOST];
        int open[MOST];
        for (int d = 0; d < p.dims; ++d) known[d] = 1, open[d] = -1;
        for (int a = 0; a < p.rank; ++a) {
            int d = p.dim_of[a];
            if (p.told[a] >= 0) {
                size[a] = p.told[a];
                if (__builtin_mul_overflow(known[d], size[a], &known[d])) return false;
            }
            else if (open[d] >= 0) return false;
            else open[d] = a;
        }
        for (int d = 0; d < p.dims; ++d) {
            if (open[d] < 0) {
                if (known[d] != v.size[d]) return false;
                continue;
            }
            if (known[d] == 0 || v.size[d] % known[d]) return false;
            size[open[d]] = v.size[d] / known[d];
        }
        for (int a = p.rank - 1; a >= 0; --a) {  // strides of the view that is split
            int d = p.dim_of[a];
            bool inner = a + 1 < p.rank && p.dim_of[a + 1] == d;
            xs[a] = inner ? xs[a + 1] * size[a + 1] : v.x[d];
            ys[a] = inner ? ys[a + 1] * size[a + 1] : v.y[d];
        }
        for (int l = 0; labelled && l < p.labels; ++l)
            for (int j = 0; j < p.label_rank[l]; ++j)
                if (v.label_size[l][j] != size[p.label_axes[l][j]]) return false;
        return fits(OF_MASK, v.mask_dims, v.mask_size) && fits(OF_PARAMS, v.param_dims, v.param_size);
    }

    // Whether a tensor has the shape of an operand as the pattern writes it.
    bool fits(int operand, int64_t dims, const int64_t* given) const {
        if (dims < 0) return true;
        int64_t expected[MOST];
        if (dims != shape(operand, expected)) return false;
        return std::equal(given, given + dims, expected);
    }
    int shape(int operand, int64_t* to) const {
        const Terms& terms = p.operand[operand];
        for (int e = 0, i = 0; e < terms.elements; ++e) {
            to[e] = 1;
            for (int j = 0; j < terms.length[e]; ++j) to[e] *= term_size(terms.term[i++]);
        }
        return terms.elements;
    }
    int64_t count(int operand) const {
        int64_t all = 1;
        for (int i = 0; i < p.operand[operand].n; ++i) all *= term_size(p.operand[operand].term[i]);
        return all;
    }

    // Chooses the place between rows and columns. A pattern that has a mask is cut as if it were given: then what is all
    // valid is summed as what has no mask.
    void choose() {
        steps(OF_SETS), steps(OF_MASK), steps(OF_PARAMS);
        count_unknown();
        for (int o = 0; o < OPERANDS; ++o)
            if (p.present[o]) counted_steps(o);
        memory_order();
        copied = !dense_inside();
        if (copied) std::copy(ys, ys + p.rank, xs);
        int inner = n;
        int64_t expected = 1;
        while (inner) {
            int a = order[inner - 1];
            if (size[a] != 1 && (xs[a] != expected || ys[a] != expected)) break;
            expected *= size[a], --inner;
        }
        cut = inner;
        double best = cost(inner);
        for (int place = inner + 1; place < n; ++place)
            if (double other = cost(place); other < best) best = other, cut = place;
    }

    // Fills the form. False: an axis too many for it.
    bool form(Form& f, bool masked) {
        choose();
        std::memset(&f, 0, offsetof(Form, outer));
        f.dtype = v.dtype, f.columns = 1, f.numel = 1;
        for (int i = cut; i < n; ++i) f.columns *= size[order[i]];
        for (int a = 0; a < p.rank; ++a) f.numel *= size[a];
        int consumed[MOST], set_block[MOST], param_block[MOST], label_axes[MOST];
        const int eaten = this->consumed(cut, consumed);
        const int set_blocks = blocks(OF_SETS, cut, set_block), param_blocks = blocks(OF_PARAMS, cut, param_block);
        const int labelled = param_labels(label_axes);
        int64_t in_set_block[MOST] = {}, in_param_block[MOST] = {}, in_label[MOST] = {};
        strides(set_block, set_blocks, in_set_block), strides(param_block, param_blocks, in_param_block);
        strides(label_axes, labelled, in_label);
        auto dim = [&](int a) {
            return Dim{size[a], {xs[a], ys[a], op[OF_SETS].step[a], masked ? op[OF_MASK].step[a] : 0,
                                 op[OF_PARAMS].step[a], in_set_block[a], in_param_block[a], in_label[a]}};
        };
        // Rows: kept axes, then pooled ones. The axes that labels consume stand at the place of the first of them.
        auto walk = [&](bool kept, Dim* to, int64_t& at) {
            int64_t m = 0, start = 0;
            at = 0;
            for (int i = 0; i < cut; ++i) {
                int a = order[i];
                if (eaten && a == consumed[0]) at = start = m;
                if (among(a, consumed, eaten) || (op[OF_SETS].step[a] != 0) != kept || size[a] == 1) continue;
                Dim d = dim(a);
                if (m > start && joins(to[m - 1], d)) d.size *= to[m - 1].size, to[m - 1] = d;
                else if (m == DIMS - 1) return int64_t(-1);
                else to[m++] = d;
            }
            return m;
        };
        f.n_outer = walk(true, f.outer, f.outer_at);
        f.n_inner = walk(false, f.inner, f.inner_at);
        if (f.n_outer < 0 || f.n_inner < 0 || eaten >= DIMS) return false;
        f.offsets = f.order = f.segment_sets = f.param_label = nullptr;
        f.segment_step = f.groups = 0;
        bool injective = p.present[OF_PARAMS];
        for (int i = 0; i < n && injective; ++i) {
            int a = order[i];
            bool within = i >= cut || among(a, consumed, eaten) || !op[OF_SETS].step[a];
            injective = !within || size[a] == 1 || op[OF_PARAMS].step[a] != 0;
        }
        f.injective = injective;
        if (eaten) {
            std::sort(consumed, consumed + eaten);
            f.n_segment = eaten;
            for (int i = 0; i < eaten; ++i) f.segment[i] = dim(consumed[i]);
            segments(f, consumed, eaten);
        }
        if (labelled) {
            t.param_label.resize(product(label_axes, labelled));
            add(label_axes, labelled, nullptr, label_steps_of_rows, t.param_label.data());
            f.param_label = t.param_label.data();
        }
        f.sets = f.mask = f.params = Column{};
        f.sets.count = f.mask.count = f.params.count = 1;
        column(f.sets, OF_SETS, set_block, set_blocks);
        if (masked) column(f.mask, OF_MASK, nullptr, 0);
        else if (p.present[OF_MASK]) f.mask.kind = kind(OF_MASK, cut);
        if (p.present[OF_PARAMS]) column(f.params, OF_PARAMS, param_block, param_blocks);
        f.n_sets = count(OF_SETS);
        f.n_params = p.present[OF_PARAMS] ? count(OF_PARAMS) : 0;
        f.n_mask = masked ? count(OF_MASK) : 0;
        f.mask_kind = masked ? v.mask_kind : int64_t(EVERYTHING);
        f.center = p.center, f.scale = p.scale, f.activation = p.activation, f.eps = p.eps;
        f.count = !masked && !p.labels_merge ? double(f.numel / std::max<int64_t>(1, f.n_sets)) : 0;
        f.few = share(cut) < MANY;
        f.apart = is_column(0, cut) && any_label(OF_SETS, 0);
        f.shared = shared(cut, consumed, eaten);
        f.by_runs = f.params.kind == TABLE && run(OF_PARAMS, cut) >= double(SHORT);
        f.chunk = chunk(cut);
        return true;
    }

    void kinds(int64_t* to) const {
        for (int o = 0; o < OPERANDS; ++o) to[o] = p.present[o] ? kind(o, cut) : ONE;
    }

   private:
    struct Steps {  // how far one more of an axis, or of a label, goes in a contiguous tensor
        int64_t step[MOST] = {}, label[MOST] = {};
        uint64_t counted[MOST] = {};  // the step, if axes had the sizes that they count as
        bool reads[MOST] = {};
    };

    // What decides the order of a sum: the oracle of tests has the same names (tests/cutter.py).
    static constexpr int64_t GROUPS = 16;           // values of a label
    static constexpr int64_t MANY = 4;              // rows that pay for a sum per column
    static constexpr int64_t ROWS_OF_EACH = 1024;   // rows of a chunk, where every column has a set of its own
    static constexpr int64_t ROWS = 512;            // where runs of columns have, at most

    const Pattern& p;
    const Numbers& v;
    Tables& t;
    Steps op[OPERANDS];
    int64_t counts[MOST];  // what an axis counts as, where the cut is chosen
    bool unknown[MOST] = {};  // a kept axis whose size nobody told
    int64_t label_steps_of_rows[MOST] = {};

    int64_t term_size(int term) const { return term >= 0 ? size[term] : v.label[~term].count; }

    void steps(int operand) {
        Steps& o = op[operand];
        if (!p.present[operand]) return;
        int64_t step = 1;
        for (int i = p.operand[operand].n - 1; i >= 0; --i) {
            int term = p.operand[operand].term[i];
            if (term >= 0) o.step[term] = step;
            else o.label[~term] = step, o.reads[~term] = true;
            step *= term_size(term);
        }
    }
    void counted_steps(int operand) {
        uint64_t step = 1;  // of many axes it goes round, as the others do that it is compared with
        for (int i = p.operand[operand].n - 1; i >= 0; --i) {
            int term = p.operand[operand].term[i];
            if (term >= 0) op[operand].counted[term] = step;
            step *= uint64_t(term >= 0 ? counts[term] : GROUPS);
        }
    }

    static bool among(int a, const int* axes, int k) { return std::find(axes, axes + k, a) != axes + k; }
    bool reads(int label, int axis) const {
        const int32_t* axes = p.label_axes[label];
        return std::find(axes, axes + p.label_rank[label], axis) != axes + p.label_rank[label];
    }
    bool reads_any(int label, const int* axes, int k) const {
        for (int i = 0; i < k; ++i)
            if (reads(label, axes[i])) return true;
        return false;
    }
    bool reads_columns(int label, int place) const { return reads_any(label, order + place, n - place); }
    int64_t product(const int* axes, int k) const {
        int64_t all = 1;
        for (int i = 0; i < k; ++i) all *= size[axes[i]];
        return all;
    }
    void strides(const int* axes, int k, int64_t* to) const {
        int64_t step = 1;
        for (int i = k - 1; i >= 0; --i) to[axes[i]] = step, step *= size[axes[i]];
    }
    static bool joins(const Dim& outer, const Dim& inner) {
        for (int s = 0; s < STEPS; ++s)
            if (outer.step[s] != inner.step[s] * inner.size) return false;
        return true;
    }

    // A cut decides in which order a set is summed. So it may not read what does not belong to a set: what such an axis
    // counts as, whatever its size.
    void count_unknown() {
        constexpr int64_t SAMPLES = 4;                  // the first axis, where it is kept and nobody told its size
        constexpr int64_t KEPT = 64;                    // any other kept axis whose size nobody told
        constexpr int64_t MEMBERS = 256;                // a pooled axis that a mask covers, or that a label reads with others
        constexpr int64_t LABELLED = GROUPS * MEMBERS;  // one that a label reads alone: so many members of so many sets
        for (int a = 0; a < p.rank; ++a) {
            counts[a] = size[a];
            if (p.told[a] >= 0) continue;
            bool labelled = false, alone = true;
            for (int l = 0; l < p.labels; ++l)
                if (op[OF_SETS].reads[l] && reads(l, a)) labelled = true, alone = alone && p.label_rank[l] == 1;
            if (op[OF_SETS].step[a]) counts[a] = a ? KEPT : SAMPLES, unknown[a] = true;
            else if (labelled) counts[a] = alone ? LABELLED : MEMBERS;
            else if (op[OF_MASK].step[a]) counts[a] = MEMBERS;
        }
    }
    double counted(const int* axes, int k) const {
        double all = 1;
        for (int i = 0; i < k; ++i) all *= double(counts[axes[i]]);
        return all;
    }

    // Axes from the outermost in memory to the innermost, as torch.empty_like keeps them. An axis that counts as 1 is left
    // out, unless a label reads it; and so is an innermost kept one of size 1, of which strides say nothing.
    void memory_order() {
        bool expanded = false;  // copies of those are contiguous
        for (int a = 0; a < p.rank; ++a) expanded = expanded || (ys[a] == 0 && size[a] > 1);
        int all[MOST];
        for (int a = 0; a < p.rank; ++a) all[a] = a;
        if (!expanded) std::stable_sort(all, all + p.rank, [&](int a, int b) { return ys[a] > ys[b]; });
        for (int i = 0; i < p.rank; ++i)
            if (counts[all[i]] != 1 || is_read(all[i])) order[n++] = all[i];
        while (n && size[order[n - 1]] == 1 && op[OF_SETS].step[order[n - 1]] && !is_read(order[n - 1])) --n;
    }
    bool is_read(int axis) const {
        for (int l = 0; l < p.labels; ++l)
            if (reads(l, axis) && (op[OF_SETS].reads[l] || op[OF_PARAMS].reads[l])) return true;
        return false;
    }

    bool dense_inside() const {
        int last = -1;
        for (int i = 0; i < n; ++i) {
            if (size[order[i]] == 1) continue;
            last = order[i];
            if (xs[last] == 0) return false;
        }
        return last < 0 || xs[last] == 1;
    }

    // --- what the cost of a cut is made of

    Kind kind(int operand, int place) const {
        const Steps& o = op[operand];
        for (int l = 0; l < p.labels; ++l)
            if (o.reads[l] && reads_columns(l, place)) return TABLE;
        bool any = false, straight = true;
        uint64_t expected = 1;
        for (int i = n - 1; i >= place; --i) {
            int a = order[i];
            if (counts[a] == 1) continue;
            any = any || o.step[a] != 0, straight = straight && o.counted[a] == expected;
            expected *= uint64_t(counts[a]);
        }
        return !any ? ONE : straight ? EACH : TABLE;
    }

    bool is_column(int axis, int place) const { return among(axis, order + place, n - place); }
    bool any_label(int operand, int axis) const {
        for (int l = 0; l < p.labels; ++l)
            if (op[operand].reads[l] && reads(l, axis)) return true;
        return false;
    }

    // Columns that follow one another and for which the operand is one.
    double run(int operand, int place) const {
        double all = 1;
        for (int i = n - 1; i >= place; --i) {
            if (op[operand].step[order[i]] || any_label(operand, order[i])) break;
            all *= double(counts[order[i]]);
        }
        return all;
    }

    // Axes of rows that labels read which read columns too.
    int blocks(int operand, int place, int* found) const {
        int k = 0;
        for (int i = 0; i < place; ++i)
            for (int l = 0; l < p.labels; ++l)
                if (op[operand].reads[l] && reads(l, order[i]) && reads_columns(l, place)) {
                    found[k++] = order[i];
                    break;
                }
        return k;
    }

    // Axes of rows that are visited by the groups of labels, which read rows alone.
    int consumed(int place, int* found) const {
        int k = 0;
        for (int i = 0; i < place; ++i)
            for (int l = 0; l < p.labels; ++l)
                if (op[OF_SETS].reads[l] && reads(l, order[i]) && !reads_columns(l, place)) {
                    found[k++] = order[i];
                    break;
                }
        return k;
    }

    // Rows of a range that have the same sets along the columns.
    double share(int place) const {
        int eaten[MOST], block[MOST];
        const int e = consumed(place, eaten), b = blocks(OF_SETS, place, block);
        double groups = 1, pooled = 1, members = 1;
        for (int l = 0; l < p.labels; ++l)
            if (op[OF_SETS].reads[l] && !reads_columns(l, place)) groups *= double(GROUPS);
        for (int i = 0; i < place; ++i) {
            const int a = order[i];
            if (among(a, block, b)) continue;
            const double many = double(counts[a]);
            if (among(a, eaten, e)) members *= many, groups *= op[OF_SETS].step[a] ? many : 1;
            else if (!op[OF_SETS].step[a]) pooled *= many;
        }
        return pooled * std::max(1.0, std::floor(members / groups));
    }

    // Whether no axis of the rows of a range leads to other parameters.
    bool shared(int place, const int* eaten, int e) const {
        const Steps& o = op[OF_PARAMS];
        for (int i = 0; p.present[OF_PARAMS] && i < place; ++i) {
            const int a = order[i];
            bool within = among(a, eaten, e) || !op[OF_SETS].step[a];
            if (within && counts[a] != 1 && (o.step[a] || any_label(OF_PARAMS, a))) return false;
        }
        return true;
    }

    int64_t chunk(int place) const {
        const Kind of_sets = kind(OF_SETS, place);
        if (of_sets == ONE) return 0;
        if (of_sets == EACH) return ROWS_OF_EACH;
        return std::min(ROWS, std::max<int64_t>(64, int64_t(double(CHUNK) / run(OF_SETS, place)) / 64 * 64));
    }

    // Work per element of forward and backward, beside the passes over x that all cuts share, in units of about 6 ns. It
    // reads counts, and no size. It only ranks cuts.
    double cost(int place) const {
        constexpr double RANGE = 25;   // to begin a range
        constexpr double ROW = 35;     // to begin a row that is summed in runs
        constexpr double TILED = 10;   // to begin one that is summed column by column
        constexpr double RUN = 15;     // to begin a run of columns
        constexpr double SCATTER = 3;  // to sum columns that lie anywhere, one after another
        constexpr double FOLD = 5;     // to add the sums of a column to those of its set: once for all rows that share it
        constexpr double ENTRY = .5;   // to make an entry of a table, or to look one up for all rows
        constexpr double LOOKUP = .8;  // to look up the parameters of every column at every row
        constexpr double LABEL = 4;    // to make an entry from labels, which may be others at the next call
        constexpr double BLOCK = 1;    // to have another table every few rows
        constexpr double LINES = .05;  // to sum columns whose sums leave the first cache
        constexpr double WIDE = 4096;  // so many columns
        const Kind of_sets = kind(OF_SETS, place);
        if (of_sets == TABLE && unknown[0] && is_column(0, place))  // how samples lie is not the layout of a set
            return std::numeric_limits<double>::infinity();
        const double width = std::max(1.0, counted(order + place, n - place)), total = std::max(1.0, counted(order, n));
        const double share = this->share(place), run = this->run(OF_SETS, place);
        const bool by_column = of_sets == EACH || (of_sets == TABLE && run < double(share < MANY ? SHORT : SPLIT));
        double work = (by_column ? TILED : ROW) / width + RANGE / (width * share), side_by_side = 1;
        if (of_sets == TABLE) work += !by_column ? RUN / run : share < MANY ? SCATTER : FOLD / share;
        for (int i = place; i < n; ++i)
            if (!unknown[order[i]]) side_by_side *= double(counts[order[i]]);
        for (int o = 0; o < OPERANDS; ++o) {
            if (!p.present[o]) continue;
            const Kind what = kind(o, place);
            if (what == TABLE) {
                int block[MOST];
                const int many = blocks(o, place, block);
                bool labelled = false;
                for (int l = 0; l < p.labels; ++l) labelled = labelled || (op[o].reads[l] && reads_columns(l, place));
                work += (labelled ? LABEL : ENTRY) * counted(block, many) * width / total + BLOCK * many;
                if (o == OF_MASK) work += ENTRY;
                else if (o == OF_PARAMS && by_column) work += ENTRY * std::max(.1, 1 / share);
                else if (o == OF_PARAMS) {
                    const double own = this->run(o, place);
                    work += own >= double(SHORT) ? RUN / own : LOOKUP;
                }
            }
            if (what != ONE && o != OF_MASK && side_by_side > WIDE) work += LINES;
        }
        return work;
    }

    // --- tables

    // For every choice of indices on some axes, outermost first: what these axes and the labels add.
    template <class V>
    void add(const int* axes, int k, const int64_t* axis_step, const int64_t* label_step, V* to) const {
        int read[MOST], many = 0;
        int64_t stride[MOST][MOST] = {}, at[MOST] = {}, index[MOST] = {}, value = 0;
        for (int l = 0; l < p.labels; ++l) {
            if (!label_step[l]) continue;
            int64_t step = 1;
            for (int j = p.label_rank[l] - 1; j >= 0; --j) {
                stride[many][p.label_axes[l][j]] = step;
                step *= size[p.label_axes[l][j]];
            }
            read[many++] = l;
        }
        const int64_t all = product(axes, k);
        const int last = k ? axes[k - 1] : -1;
        const int64_t length = k ? size[last] : 1, step = k && axis_step ? axis_step[last] : 0;
        for (int64_t i = 0; i < all; i += length) {
            for (int64_t j = 0; j < length; ++j) {
                int64_t sum = value + j * step;
                for (int m = 0; m < many; ++m)
                    sum += label_step[read[m]] * v.label[read[m]].ids[at[m] + (k ? j * stride[m][last] : 0)];
                to[i + j] = V(sum);
            }
            for (int d = k - 2; d >= 0; --d) {
                int a = axes[d];
                int64_t own = axis_step ? axis_step[a] : 0;
                value += own;
                for (int m = 0; m < many; ++m) at[m] += stride[m][a];
                if (++index[d] < size[a]) break;
                value -= own * size[a];
                for (int m = 0; m < many; ++m) at[m] -= stride[m][a] * size[a];
                index[d] = 0;
            }
        }
    }

    // The axes, ascending, of the labels that say which parameter a row has.
    int param_labels(int* axes) {
        int k = 0;
        for (int l = 0; l < p.labels; ++l)
            if (op[OF_PARAMS].reads[l] && !reads_columns(l, cut)) label_steps_of_rows[l] = op[OF_PARAMS].label[l];
        for (int a = 0; a < p.rank; ++a)
            for (int l = 0; l < p.labels; ++l)
                if (label_steps_of_rows[l] && reads(l, a)) {
                    axes[k++] = a;
                    break;
                }
        return k;
    }

    // The elements of the axes that labels consume, group by group.
    void segments(Form& f, const int* axes, int k) {
        struct Term {
            int axis, label;
            int64_t count, step;
        } terms[2 * MOST];
        int many = 0;
        for (int i = 0; i < k; ++i)
            if (op[OF_SETS].step[axes[i]]) terms[many++] = {axes[i], -1, size[axes[i]], op[OF_SETS].step[axes[i]]};
        for (int l = 0; l < p.labels; ++l)
            if (op[OF_SETS].reads[l] && !reads_columns(l, cut))
                terms[many++] = {-1, l, v.label[l].count, op[OF_SETS].label[l]};
        if (many == 1) {
            int l = terms[0].label;
            bool own = p.label_rank[l] == k;  // and not turned
            for (int j = 0; own && j < k; ++j) own = p.label_axes[l][j] == axes[j];
            if (own) {
                f.offsets = v.label[l].offsets, f.order = v.label[l].order;
                f.segment_step = terms[0].step, f.groups = v.label[l].count;
                return;
            }
        }
        // One label over all axes, which counts the choices of all terms.
        int64_t axis_step[MOST] = {}, label_step[MOST] = {}, groups = 1;
        for (int i = many - 1; i >= 0; --i) {
            (terms[i].axis >= 0 ? axis_step[terms[i].axis] : label_step[terms[i].label]) = groups;
            groups *= terms[i].count;
        }
        t.segment_sets.assign(1, 0);
        for (int i = 0; i < many; ++i) spread(t.segment_sets, terms[i].count, terms[i].step);
        const int64_t elements = product(axes, k);
        t.ids.resize(elements);
        add(axes, k, axis_step, label_step, t.ids.data());
        t.segment_offsets.assign(groups + 1, 0);
        for (int64_t id : t.ids) ++t.segment_offsets[id + 1];
        for (int64_t g = 0; g < groups; ++g) t.segment_offsets[g + 1] += t.segment_offsets[g];
        if (!std::is_sorted(t.ids.begin(), t.ids.end())) {
            std::vector<int64_t> at(t.segment_offsets.begin(), t.segment_offsets.end());
            t.order.resize(elements);
            for (int64_t i = 0; i < elements; ++i) t.order[at[t.ids[i]]++] = i;
            f.order = t.order.data();
        }
        f.offsets = t.segment_offsets.data(), f.segment_sets = t.segment_sets.data(), f.groups = groups;
    }

    // Every place so far, and from each of them `count` more, `step` apart.
    static void spread(std::vector<int64_t>& places, int64_t count, int64_t step) {
        std::vector<int64_t> next;
        next.reserve(places.size() * size_t(count));
        for (int64_t place : places)
            for (int64_t i = 0; i < count; ++i) next.push_back(place + i * step);
        places.swap(next);
    }

    // What columns (and axes of blocks) add to the place of an element.
    void column(Column& c, int operand, const int* block, int many_blocks) {
        const Steps& o = op[operand];
        c.kind = kind(operand, cut);
        const int k = n - cut;
        const int* columns = order + cut;
        const int64_t width = product(columns, k), many = product(block, many_blocks);
        if (c.kind == EACH && operand == OF_SETS) c.count = width;
        if (c.kind != TABLE) return;
        int over[2 * MOST];
        std::copy(block, block + many_blocks, over), std::copy(columns, columns + k, over + many_blocks);
        int64_t axis_step[MOST] = {}, label_step[MOST] = {};
        auto& table = t.table[operand];
        table.resize(size_t(many * width));
        if (operand == OF_SETS) {  // numbered from 0 to a count, with the place of each
            struct Term {
                int64_t *number, count, step;
            } terms[2 * MOST];
            int m = 0;
            for (int i = 0; i < k; ++i)
                if (int a = columns[i]; o.step[a]) terms[m++] = {axis_step + a, size[a], o.step[a]};
            for (int l = 0; l < p.labels; ++l)
                if (o.reads[l] && reads_columns(l, cut)) terms[m++] = {label_step + l, v.label[l].count, o.label[l]};
            int64_t count = 1;
            for (int i = m - 1; i >= 0; --i) *terms[i].number = count, count *= terms[i].count;
            add(over, many_blocks + k, axis_step, label_step, table.data());
            const bool few = count > std::max<int64_t>(1024, 4 * width);  // of many values few are met
            bool straight = m == 1 && terms[0].step == 1 && !few;
            if (!straight) {
                auto& places = t.offsets[operand];
                places.assign(1, 0);
                for (int i = 0; i < m; ++i) spread(places, terms[i].count, terms[i].step);
                if (few) {
                    std::vector<int32_t> met(table);
                    std::sort(met.begin(), met.end());
                    met.erase(std::unique(met.begin(), met.end()), met.end());
                    for (int32_t& id : table) id = int32_t(std::lower_bound(met.begin(), met.end(), id) - met.begin());
                    std::vector<int64_t> next;
                    for (int32_t id : met) next.push_back(places[size_t(id)]);
                    places.swap(next);
                    count = int64_t(places.size());
                }
                c.offsets = places.data();
            }
            c.count = count;
        } else {
            for (int i = 0; i < k; ++i) axis_step[columns[i]] = o.step[columns[i]];
            for (int l = 0; l < p.labels; ++l)
                if (o.reads[l] && reads_columns(l, cut)) label_step[l] = o.label[l];
            add(over, many_blocks + k, axis_step, label_step, table.data());
        }
        c.table = table.data();
        auto& runs = t.runs[operand];
        auto& first = t.run_ptr[operand];
        runs.clear(), first.assign(1, 0);
        bool even = width % 8 == 0;
        c.shortest = width, c.longest = 0;
        for (int64_t b = 0; b < many; ++b) {
            const int32_t* row = table.data() + b * width;
            for (int64_t i = 0; i < width;) {
                const int64_t begin = i++;
                while (i < width && row[i] == row[begin]) ++i;
                runs.push_back(int32_t(begin));
                even = even && begin % 8 == 0;
                c.shortest = std::min(c.shortest, i - begin), c.longest = std::max(c.longest, i - begin);
            }
            first.push_back(int64_t(runs.size()));
        }
        c.runs = runs.data(), c.run_ptr = first.data();
        c.mean_run = many * width / std::max<int64_t>(1, int64_t(runs.size()));
        c.blocks = many, c.even = even;
    }
};
