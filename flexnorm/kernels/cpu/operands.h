// The operands of a call, as the loops over rows read them.
#pragma once
#include "scratch.h"

namespace ARCH {

// Of all dtypes in a unit: their buffers remember what the mask of a call said.
inline std::atomic<uint64_t> calls{0};

class Operands {
   protected:
    using Own = Scratch;

    Operands(const Form& form, const Call& call)
        : f(form), c(call), walk(form), x(call.x), dy(call.dy), y(call.y), weight(static_cast<const T*>(call.weight)),
          bias(static_cast<const T*>(call.bias)), bytes(static_cast<const uint8_t*>(call.mask)),
          weights(static_cast<const T*>(call.mask)), same(form.dtype == FLOAT32 || form.dtype == FLOAT64),
          streams(call.past && (form.columns >= TILE || form.columns % 16 == 0)),
          leaves_dz(same && form.activation && call.what == BACKWARD), one_param(form.shared),
          masked_along(form.mask.kind != ONE), members(form.mask_kind == MEMBERSHIP && !masked_along ? bytes : nullptr),
          rowwise(walk.uniform() && form.n_inner <= 1 && form.sets.kind == ONE && form.columns <= SPAN &&
                  walk.inner * form.columns <= CHUNK &&
                  (form.mask_kind == EVERYTHING || (form.mask_kind == MEMBERSHIP && !masked_along))),
          adjacent(walk.inner == 1 || (same && form.n_inner == 1 && form.inner[0].step[X] == form.columns)),
          eights(form.shared && !masked_along) {}

    struct Part {  // of a range: rows r0..r1, columns k0..k1
        int64_t r0, r1, k0, k1;
    };

    struct Inside {  // rows of which something is inside of the mask; of those of nobody, all
        const Operands* call = nullptr;
        const uint8_t* members = nullptr;

        bool all() const { return !members && !(call && call->masked_along && call->f.mask_kind == MEMBERSHIP); }
        bool operator()(int64_t mask) const { return members ? members[mask] != 0 : call->is_inside(mask); }
    };

    struct Params {
        const T* w = nullptr;  // along the columns, or null: then w and b are `ws` and `bs`, or lie by runs
        const T* b = nullptr;
        T ws = 1, bs = 0;
        bool known = false, by_runs = false;
    };

    struct Share {  // what the mask says of a row and some columns
        bool outside = false;            // no element is inside
        T one = 1;                       // the weight of all
        const uint8_t* bytes = nullptr;  // or along the columns
        const T* weights = nullptr;

        Share from(int64_t k) const { return {outside, one, bytes ? bytes + k : nullptr, weights ? weights + k : nullptr}; }
    };

    // An operand along the columns, or one for all.
    template <class F>
    static void with(const T* along, T one, F&& f) {
        if (along) f(Each<T>{along});
        else f(One<T>{one});
    }
    template <class F>
    static void with(const Params& p, int64_t at, F&& f) {  // weight and bias
        if (p.w) f(Each<T>{p.w + at}, Each<T>{p.b + at});
        else f(One<T>{p.ws}, One<T>{p.bs});
    }

    struct Lanes {  // of the sets of some columns, one each
        const T *high, *rate, *carry, *mean_g, *mean_gx, *spread;

        Standard<Each<T>> standard() const { return {{high}, {rate}, {carry}}; }
    };

    static Standard<One<T>> standard(const Sets& sets, int64_t id) {
        return {{sets.high[id]}, {sets.rate[id]}, {sets.carry[id]}};
    }

    // --- x, dy and results

    // Asks for what is read, or written, soon.
    template <int WRITE>
    void fetch(const void* tensor, int64_t at, int64_t n) const {
        const int64_t size = same ? int64_t(sizeof(T)) : 2;
        const char* p = static_cast<const char*>(tensor) + at * size;
        for (int64_t i = 0; i < n * size; i += 64) __builtin_prefetch(p + i, WRITE, 2);
    }

    // In the dtype of statistics: the tensor itself, or widened.
    const T* values(const void* tensor, int64_t at, T* buffer, int64_t n) const {
        if (same) return static_cast<const T*>(tensor) + at;
        widen(f.dtype, static_cast<const uint16_t*>(tensor) + at, buffer, n);
        return buffer;
    }

    // Some columns of a row of results: make(to) makes them, where they belong or in a buffer on their way there: if they
    // have another dtype, or go past the caches.
    template <class F>
    void write(Own& own, int64_t at, int64_t n, bool nothing, F&& make) {
        if (same && (!streams || leaves_dz)) {
            T* out = static_cast<T*>(y) + at;
            if (nothing) std::memset(out, 0, sizeof(T) * size_t(n));
            else make(out);
            return;
        }
        if (nothing) std::memset(own.out, 0, sizeof(T) * size_t(n));
        else make(own.out);
        if (same) copy_past(own.out, static_cast<T*>(y) + at, n);
        else narrow(f.dtype, own.out, static_cast<uint16_t*>(y) + at, n);
    }

    // --- the mask

    // Whether something of a row is inside, of which the mask lies there.
    bool is_inside(int64_t mask) const {
        if (f.mask_kind != MEMBERSHIP) return true;
        if (members) return members[mask];
        if (f.sets.kind == ONE) return true;
        for (int64_t k = 0; k < f.columns; ++k)
            if (bytes[mask + (f.mask.kind == EACH ? k : f.mask.table[k])]) return true;
        return false;
    }

    // Columns begin..end that the mask of a row says to be.
    int64_t count(int64_t mask, int64_t begin, int64_t end) const {
        if (f.mask.kind == EACH) return ARCH::members(bytes + mask + begin, end - begin);
        int64_t n = 0;
        for (int64_t k = begin; k < end; ++k) n += bytes[mask + f.mask.table[k]] != 0;
        return n;
    }

    // The columns of a row from the first to the last that the mask says to be.
    Part window(Own& own, const Row& row, const Part& part) const {
        const uint8_t* m = bytes + row.at[MASK];
        Window& last = own.window;
        if (last.call != number || last.mask != row.at[MASK] || last.begin != part.k0 || last.end != part.k1) {
            last = {number, row.at[MASK], part.k0, part.k1, part.k0, part.k1};
            first_and_last(m, last.first, last.last);
        }
        return {part.r0, part.r1, last.first, last.last};
    }

    Share share(Own& own, const Row& row, int64_t k, int64_t n) const {
        Share s;
        if (f.mask_kind == EVERYTHING) return s;
        int64_t at = row.at[MASK];
        if (f.mask_kind == WEIGHTS) {
            if (f.mask.kind == ONE) s.one = weights[at];
            else if (f.mask.kind == EACH) s.weights = weights + at + k;
            else gather(weights + at, f.mask.table + k, own.weights, n), s.weights = own.weights;
            return s;
        }
        if (f.mask.kind == ONE) {
            s.outside = !bytes[at];
            return s;
        }
        if (f.mask.kind == EACH) s.bytes = bytes + at + k;
        else gather(bytes + at, f.mask.table + k, own.bytes, n), s.bytes = own.bytes;
        int all = uniform(s.bytes, n);  // padding lies together: most tiles are of one kind
        s.outside = all == 0;
        if (all != 2) s.bytes = nullptr;
        return s;
    }

    INLINE Share membership(Own& own, const Row& row, int64_t k, int64_t n) const {
        Share s;
        if (f.mask_kind != MEMBERSHIP) return s;
        if (masked_along) return share(own, row, k, n);
        s.outside = !bytes[row.at[MASK]];
        return s;
    }

    // --- the parameters

    INLINE Params params(Own& own, const Row& row, int64_t k, int64_t n, bool by_runs = false) const {
        Params p;
        p.known = true, p.by_runs = by_runs;
        if (!weight && !bias) return p;
        int64_t at = row.at[PARAM];
        if (f.params.kind == ONE) {
            if (weight) p.ws = weight[at];
            if (bias) p.bs = bias[at];
        } else if (f.params.kind == EACH) {
            p.w = weight ? weight + at + k : own.ones;
            p.b = bias ? bias + at + k : own.zeros;
        } else if (!by_runs) {
            look_up(own, row, k, n);
            p.w = weight ? own.w : own.ones;
            p.b = bias ? own.b : own.zeros;
        }
        return p;
    }

    // visit(the first of some columns, how many, their weight, their bias, their parameter) for n columns from `begin`.
    template <class F>
    INLINE void by_params(const Row& row, int64_t begin, int64_t n, F&& visit) const {
        const int64_t at = row.at[PARAM], block = row.at[PARAM_BLOCK];
        auto one = [&](int64_t k, Any many, int64_t id) INLINE_LAMBDA {
            visit(k - begin, many, weight ? weight[at + id] : T(1), bias ? bias[at + id] : T(0), at + id);
        };
        const int32_t* table = f.params.table + block * f.columns + begin;
        // Between two runs of one value lie more columns than these.
        if (n <= f.params.shortest && table[0] == table[n - 1]) return one(begin, Any{n}, table[0]);
        walk.table_runs<Any>(f.params, block, begin, begin + n, one);
    }

    NOINLINE void look_up(Own& own, const Row& row, int64_t k, int64_t n) const {
        const int64_t at = row.at[PARAM], block = row.at[PARAM_BLOCK];
        if (f.params.mean_run >= LONG)
            walk.table_runs<Any>(f.params, block, k, k + n, [&](int64_t begin, Any many, int64_t id) {
                if (weight) fill(own.w + (begin - k), many.n, weight[at + id]);
                if (bias) fill(own.b + (begin - k), many.n, bias[at + id]);
            });
        else {
            const int32_t* table = f.params.table + block * f.columns + k;
            if (weight) gather(weight + at, table, own.w, n);
            if (bias) gather(bias + at, table, own.b, n);
        }
    }

    // --- the moments of columns

    Lanes lanes(Own& own, const Sets& from, int64_t block, int64_t k, int64_t n, int fields) const {
        // One tile of columns is looked up once for all rows.
        bool known = own.lanes_of == from.high && own.lanes_block == block && own.lanes_k == k && own.lanes_fields >= fields;
        own.lanes_of = from.high, own.lanes_block = block, own.lanes_k = k;
        own.lanes_fields = known ? own.lanes_fields : fields;
        const T* sources[6] = {from.high, from.rate, from.carry, from.mean_g, from.mean_gx, from.spread};
        const T* at[6] = {};
        for (int i = 0; i < fields; ++i) {
            at[i] = f.sets.kind == EACH ? sources[i] + k : own.lane[i];
            if (f.sets.kind == TABLE && !known) gather(sources[i], f.sets.table + block * f.columns + k, own.lane[i], n);
        }
        return {at[0], at[1], at[2], at[3], at[4], at[5]};
    }

    // --- rows

    // A part of a range: tiles of columns of many rows (tile(rows, how many, block, k, n)), and spans of runs of one row
    // (span(row, block, k, n, whether its last run ends there)). With `inside`, only what the mask says to be. With `singly`,
    // the tiles of one row come before those of the next.
    template <class Tile, class Span>
    void pieces(Own& own, const Range& range, const Part& part, bool inside, Tile&& tile, Span&& span, bool singly = false) const {
        const bool narrows = inside && f.sets.kind == ONE && f.mask_kind == MEMBERSHIP && f.mask.kind == EACH;
        const bool spans = walk.has_spans(), one_span = !narrows && walk.is_span(part.k0, part.k1);
        walk.rows(range, part.r0, part.r1, inside ? Inside{this, members} : Inside{}, [&](const Row* rows, int64_t n_rows) {
            const int64_t block = rows[0].at[SET_BLOCK];
            auto each = [&](int64_t k, int64_t n) { tile(rows, n_rows, block, k, n); };
            if (one_span)
                for (int64_t i = 0; i < n_rows; ++i) span(rows[i], block, part.k0, part.k1 - part.k0, true);
            else if (!spans && !singly) walk.stretches(block, part.k0, part.k1, each, [](int64_t, int64_t, bool) {});
            else
                for (int64_t i = 0; i < n_rows; ++i) {
                    Part in = narrows ? window(own, rows[i], part) : part;
                    walk.stretches(
                        block, in.k0, in.k1,
                        [&](int64_t k, int64_t n) {
                            if (singly) tile(rows + i, 1, block, k, n);
                            else if (i == 0) each(k, n);
                        },
                        [&](int64_t k, int64_t n, bool ends) { span(rows[i], block, k, n, ends); });
                }
        });
    }

    // Whether all rows that have the same table come together, so that sums of their columns need not be kept. If runs are
    // summed by themselves too, these come first in any case.
    bool comes_at_once(const Range& range) const { return !walk.has_spans() && walk.rows_of_block(range) <= BATCH; }

    // visit(number of the range, row) for all rows of ranges whose rows are equal steps apart.
    template <class F>
    INLINE void each_row(const Range* ranges, int64_t n, F&& visit) const {
        for (int64_t i = 0; i < n; ++i) {
            Row next = ranges[i].base;
            for (int64_t r = 0; r < walk.inner; ++r) {
                Row row = next;
                if (f.param_label) row.at[PARAM] += f.param_label[row.at[PARAM_LABEL]];
                if (f.n_inner) step(next, f.inner[0]);
                visit(i, row);
            }
        }
    }

    const Form& f;
    const Call& c;
    Walk walk;
    const void *x, *dy;
    void* y;
    const T *weight, *bias;
    const uint8_t* bytes;  // the mask, one of both
    const T* weights;
    const bool same;          // tensors have the dtype of statistics
    const bool streams;       // the result is written past the caches, and its rows are mostly whole lines
    bool leaves_dz;           // in memory that a cache holds
    const bool one_param;     // all rows of a range have the same parameters
    const bool masked_along;  // masks of this pattern vary along the columns, also where none is given
    const uint8_t* members;   // the mask, where it says of whole rows whether they are inside
    const bool rowwise;       // a range is one chunk of a set, in rows that are equal steps apart
    const bool adjacent;      // its rows follow one another
    const bool eights;        // rows of a tile are taken by eight
    const uint64_t number = ++calls;  // of this call
};

}  // namespace ARCH
