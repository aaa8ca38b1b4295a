// The kernels of the canonical form, compiled once for every vector width (ARCH is the name of one).
//
// A closed range that fits into a cache is read once: statistics, then y, while it is still there. A larger one is shared
// by all threads.
//
// A set has one order of summation, which is its own: its members are summed in chunks of so many that are inside of the
// mask, and the moments of chunks are merged in order. Who sums a chunk, and what lies beside it, changes no bit.
#include <atomic>
#include <cstdlib>
#include <memory>
#include <new>
#include <utility>
#include <vector>
#ifdef _OPENMP
#include <omp.h>
#endif

#include "tile.h"
#include "walk.h"

namespace ARCH {

constexpr int64_t LARGE = 1 << 18;   // elements of a range that is shared: 1 MiB of float32, the second cache of a core
constexpr int64_t GRAIN = 1 << 15;   // elements that pay for waking a thread (5 us)
constexpr double FAR = 17;           // times that M2 may have been added, before the shift was too far away: 4 sigma
constexpr int64_t MOST_ROWS = 64;    // whose parameter gradients are added in float32
constexpr int64_t SLOTS = 32;        // places that parameter gradients are summed in, each by one thread

// f(0) ... f(n - 1). Every thread goes through a share of its own, forwards, so that what it asks memory for ahead of time is
// its own too; whoever is done takes from the end of another's share.
template <class F>
void parallel(int64_t threads, int64_t n, F&& f) {
    threads = std::min(threads, n);
#ifdef _OPENMP
    if (threads > 1) {
        struct alignas(64) Share {
            std::atomic<uint64_t> rest;  // begin in the lower half, end in the upper
        };
        auto packed = [](uint64_t begin, uint64_t end) { return begin | end << 32; };
        std::unique_ptr<Share[]> shares(new Share[size_t(threads)]);
        for (int64_t t = 0; t < threads; ++t) shares[t].rest = packed(t * n / threads, (t + 1) * n / threads);
        auto take = [&](int64_t t, bool own) -> int64_t {
            uint64_t rest = shares[t].rest;
            for (;;) {
                uint64_t begin = uint32_t(rest), end = rest >> 32;
                if (begin >= end) return -1;
                uint64_t left = own ? packed(begin + 1, end) : packed(begin, end - 1);
                if (shares[t].rest.compare_exchange_weak(rest, left)) return int64_t(own ? begin : end - 1);
            }
        };
        std::atomic<bool> failed{false};
#pragma omp parallel num_threads(int(threads))
        try {
            int64_t me = omp_get_thread_num();
            for (int64_t other = 0; other < threads; ++other)
                for (int64_t i; (i = take((me + other) % threads, other == 0)) >= 0;) f(i);
        } catch (...) {
            failed = true;
        }
        if (failed) throw std::bad_alloc();
        return;
    }
#endif
    for (int64_t i = 0; i < n; ++i) f(i);
}

// Memory that is written before it is read. It begins with a line of the cache: of vectors, none is cut in two.
template <class V>
class Array {
   public:
    void reserve(int64_t n) {
        if (n <= size) return;
        memory.reset(static_cast<V*>(std::aligned_alloc(64, (sizeof(V) * size_t(n) + 63) / 64 * 64)));
        size = memory ? n : 0;
        if (!memory) throw std::bad_alloc();
    }
    V* data() { return memory.get(); }
    V& operator[](int64_t i) { return memory.get()[i]; }

   private:
    struct Free {
        void operator()(V* p) const { std::free(p); }
    };
    std::unique_ptr<V, Free> memory;
    int64_t size = 0;
};

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

// Of some sets: their sums; their moments, r = 1 / sigma, c = -low * r, v = var * r * r; the sums of g and g * xhat and
// their means c1 and c2.
template <class T>
struct Sets {
    Sums sums;
    double *count, *sg, *sgx;
    T *high, *low, *m2, *r, *c, *c1, *c2, *v;

    Sets at(int64_t i) const {
        return {sums.at(i), count + i, sg + i, sgx + i, high + i, low + i, m2 + i, r + i, c + i, c1 + i, c2 + i, v + i};
    }
};

// Of what a mask of a call says along columns begin..end: the first that is inside, and the end of the last.
struct Window {
    uint64_t call;
    int64_t mask, begin, end, first, last;
};

// Buffers of one thread.
template <class T>
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

    Sets<T> sets(int64_t count) {
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

// Of all dtypes: their buffers remember what the mask of a call said.
inline std::atomic<uint64_t> calls{0};

template <class T, class S>
class Kernel {
   public:
    Kernel(const Form& form, const Call& call)
        : f(form), c(call), walk(form), x(static_cast<const S*>(call.x)), dy(static_cast<const S*>(call.dy)),
          y(static_cast<S*>(call.y)), weight(static_cast<const T*>(call.weight)),
          bias(static_cast<const T*>(call.bias)), bytes(static_cast<const uint8_t*>(call.mask)),
          weights(static_cast<const T*>(call.mask)), streams(call.past && (form.columns >= TILE || form.columns % 16 == 0)),
          leaves_dz(Same::value && form.activation && call.what == BACKWARD), broken(form.sets.kind == TABLE && !form.sets.even),
          one_param(form.shared), masked_along(form.mask.kind != ONE),
          members(form.mask_kind == MEMBERSHIP && !masked_along ? bytes : nullptr),
          rowwise(walk.uniform() && form.n_inner <= 1 && form.sets.kind == ONE && form.columns <= SPAN &&
                  walk.inner * form.columns <= CHUNK &&
                  (form.mask_kind == EVERYTHING || (form.mask_kind == MEMBERSHIP && !masked_along))),
          adjacent(walk.inner == 1 || (Same::value && form.n_inner == 1 && form.inner[0].step[X] == form.columns)),
          eights(form.shared && !masked_along) {}

    void run() {
        const std::vector<Task> tasks = cut();
        if (c.what >= BACKWARD) reserve_slots(tasks);
        int64_t threads = f.numel < GRAIN ? 1 : c.threads;
        for (size_t i = 0; i < tasks.size();) {
            if (tasks[i].large) {
                large(walk.range(tasks[i].begin), threads);
                ++i;
                continue;
            }
            size_t stop = i;
            while (stop < tasks.size() && !tasks[stop].large) ++stop;
            int64_t n = stop - i, parts = wants_slots() ? std::min(n_slots, n) : n;
            parallel(threads, parts, [&](int64_t part) {
                for (int64_t t = i + part * n / parts, end = i + (part + 1) * n / parts; t < end; ++t)
                    small(tasks[t].begin, tasks[t].end, part);
                Past<T>::done();
            });
            i = stop;
        }
        if (c.what >= BACKWARD) reduce_slots(threads);
    }

   private:
    using Own = Scratch<T>;
    using Same = std::is_same<T, S>;

    struct Task {
        int64_t begin, end;  // ranges
        bool large;
    };

    struct Part {  // of a range: rows r0..r1, columns k0..k1
        int64_t r0, r1, k0, k1;
    };

    struct Inside {  // rows of which something is inside of the mask; of those of nobody, all
        const Kernel* kernel = nullptr;
        const uint8_t* members = nullptr;

        bool all() const { return !members && !(kernel && kernel->masked_along && kernel->f.mask_kind == MEMBERSHIP); }
        bool operator()(int64_t mask) const { return members ? members[mask] != 0 : kernel->is_inside(mask); }
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

    struct Slot {  // where one thread sums the gradients of parameters and weights
        double *w = nullptr, *b, *mask;
        T *lane_w, *lane_b;       // sums of some rows, where all rows have the same parameters along the columns
        int64_t* rows = nullptr;  // how many; null where there are no such sums

        explicit operator bool() const { return w != nullptr; }
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
        const T *high, *r, *c, *c1, *c2, *v;

        Standard<Each<T>> standard() const { return {{high}, {r}, {c}}; }
    };

    static Standard<One<T>> standard(const Sets<T>& sets, int64_t id) {
        return {{sets.high[id]}, {sets.r[id]}, {sets.c[id]}};
    }

    // Whether all threads share a range. Where it is one chunk they would wait for each other, so they take several ranges.
    bool is_large(const Range& range, int64_t ranges) const {
        bool alone = f.sets.kind == TABLE && range.rows <= 4 * f.chunk && ranges >= 4;
        return range.rows * f.columns > LARGE && !alone;
    }

    std::vector<Task> cut() const {
        std::vector<Task> tasks;
        int64_t n = walk.ranges(), filled = 0, begin = 0;
        if (walk.uniform()) {
            int64_t each = std::max<int64_t>(1, walk.inner * f.columns);
            bool big = n && is_large(walk.range(0), n);
            int64_t step = big ? 1 : std::max<int64_t>(1, GRAIN / each);
            for (int64_t r = 0; r < n; r += step) tasks.push_back({r, std::min(r + step, n), big});
            return tasks;
        }
        for (int64_t r = 0; r < n; ++r) {
            const Range range = walk.range(r);
            int64_t size = range.rows * f.columns;
            bool big = is_large(range, n);
            if (filled && (big || filled + size > GRAIN)) {
                tasks.push_back({begin, r, false});
                filled = 0;
            }
            if (big) tasks.push_back({r, r + 1, true});
            else {
                if (!filled) begin = r;
                filled += std::max<int64_t>(size, 16);
            }
        }
        if (filled) tasks.push_back({begin, n, false});
        return tasks;
    }

    // --- chunks

    // Whether a range is surely one chunk.
    bool is_chunk(const Range& range) const {
        return f.chunk ? range.rows <= f.chunk : range.rows * f.columns <= CHUNK;
    }

    // The chunks of a range, in order. Of one set, they have CHUNK members and the rest of a row; a row of more members is cut.
    // Else they have so many rows. Rows outside of the mask are not counted. Rows of several blocks are not cut within one,
    // where a block has no more rows than a chunk.
    std::vector<Part> chunks(const Range& range) const {
        std::vector<Part> parts;
        if (is_chunk(range)) return {{0, range.rows, 0, f.columns}};
        if (!f.chunk && (f.mask_kind == MEMBERSHIP && masked_along)) return chunks_of_members(range);
        if (!f.chunk && f.columns > CHUNK) {
            for (int64_t r = 0; r < range.rows; ++r)
                for (int64_t k = 0; k < f.columns; k += CHUNK) parts.push_back({r, r + 1, k, std::min(k + CHUNK, f.columns)});
            return parts;
        }
        const int64_t limit = f.chunk ? f.chunk : (CHUNK + f.columns - 1) / f.columns;
        int64_t block = walk.rows_of_block(range);
        if (block < range.rows && block <= limit) {
            // Partial sums of all sets take no more memory than x.
            int64_t least = std::max(limit, 8 * f.sets.count / f.columns), height = std::max<int64_t>(1, least / block) * block;
            for (int64_t r = 0; r < range.rows; r += height) parts.push_back({r, std::min(r + height, range.rows), 0, f.columns});
            return parts;
        }
        for (int64_t b = 0; b < range.rows; b += block) {
            const int64_t stop = std::min(b + block, range.rows);
            int64_t r = b, inside = 0, row = b;
            if (f.mask_kind != MEMBERSHIP)
                for (; r + limit < stop; r += limit) parts.push_back({r, r + limit, 0, f.columns});
            else
                walk.masks(range, b, stop, [&](int64_t at, int64_t step, int64_t n) {
                    for (int64_t i = 0; i < n; ++i, ++row) {
                        if (!is_inside(at + i * step)) continue;
                        if (inside == limit) {
                            parts.push_back({r, row, 0, f.columns});
                            r = row, inside = 0;
                        }
                        ++inside;
                    }
                });
            parts.push_back({r, stop, 0, f.columns});
        }
        return parts;
    }

    std::vector<Part> chunks_of_members(const Range& range) const {
        std::vector<Part> parts;
        int64_t begin = 0, row = 0, filled = 0, last = -1, inside = 0;
        auto close = [&](int64_t end) {
            if (begin < end) parts.push_back({begin, end, 0, f.columns});
            begin = end, filled = 0;
        };
        walk.masks(range, 0, range.rows, [&](int64_t at, int64_t step, int64_t n) {
            for (int64_t i = 0; i < n; ++i, ++row) {
                int64_t own = at + i * step;
                if (own != last) inside = count(own, 0, f.columns), last = own;
                if (inside <= CHUNK) {
                    if ((filled += inside) >= CHUNK) close(row + 1);
                    continue;
                }
                close(row);
                for (int64_t k = 0, next; k < f.columns; k = next) {
                    int64_t some = 0;
                    for (next = k; next < f.columns && some < CHUNK;) {
                        int64_t more = std::min(CHUNK - some, f.columns - next);
                        some += count(own, next, next + more), next += more;
                    }
                    parts.push_back({row, row + 1, k, next});
                }
                begin = row + 1;
            }
        });
        close(range.rows);
        return parts;
    }

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

    // --- ranges

    // Several at a time, so that the moments of many sets are worked out together.
    void small(int64_t begin, int64_t end, int64_t slot) {
        Own& own = Own::here();
        int64_t count = f.sets.count, most = std::min(BATCH, std::max<int64_t>(1, 2 * BATCH / count));
        Range ranges[BATCH];
        Sets<T> sets = own.sets(most * count);
        while (begin < end) {
            int64_t n = std::min(most, end - begin);
            walk.ranges(begin, n, ranges);
            begin += n;
            auto each = [&](auto&& body) {
                for (int64_t i = 0; i < n; ++i) body(ranges[i], Part{0, ranges[i].rows, 0, f.columns}, sets.at(i * count));
            };
            if (f.order && begin < end) fetch_rows(walk.range(begin));
            if (c.what == FORWARD || c.what == STATISTICS) {
                if (rowwise && adjacent && !(members && walk.inner > 1)) sum_rows(own, sets.sums, ranges, n);
                else each([&](const Range& range, const Part& all, const Sets<T>& of) {
                    if (is_chunk(range)) return sum(own, of.sums, range, all);
                    const std::vector<Part> parts = chunks(range);
                    sum(own, of.sums, range, parts[0]);
                    Sums more = own.chunk(count);
                    for (size_t p = 1; p < parts.size(); ++p) {
                        sum(own, more, range, parts[p]);
                        of.sums.merge(more, 0, count);
                    }
                });
                write(sets, ranges, n, 0, count);
            } else
                read(sets, ranges, n, 0, count);
            if (c.what == FORWARD || c.what == APPLY) {
                if (rowwise) apply_rows(own, sets, ranges, n);
                else each([&](const Range& range, const Part& all, const Sets<T>& of) { apply(own, of, range, all); });
            }
            if (c.what < BACKWARD) continue;
            if (c.what != BACKWARD_DX) {
                fill(sets.sg, n * count, 0.0), fill(sets.sgx, n * count, 0.0);
                if (rowwise) dot_rows(own, sets, ranges, n, slot);
                else each([&](const Range& range, const Part& all, const Sets<T>& of) {
                    if (is_chunk(range)) return dots(own, of, of.sg, of.sgx, 0, range, all, slot);
                    Sums more = own.chunk(count);
                    for (const Part& part : chunks(range)) {
                        fill(more.s, count, 0.0), fill(more.q, count, 0.0);
                        dots(own, of, more.s, more.q, 0, range, part, slot);
                        for (int64_t i = 0; i < count; ++i) of.sg[i] += more.s[i], of.sgx[i] += more.q[i];
                    }
                });
                write_dots(sets, ranges, n, 0, count);
            } else
                read_dots(sets, ranges, n, 0, count);
            if (c.what == BACKWARD_SUMS) continue;
            if (rowwise) gradients_of_rows(own, sets, ranges, n, slot);
            else each([&](const Range& range, const Part& all, const Sets<T>& of) { gradients(own, of, range, all, slot); });
        }
    }

    void large(const Range& range, int64_t threads) {
        bool leaves = std::exchange(leaves_dz, false);
        int64_t count = f.sets.count;
        const bool each = f.sets.kind == EACH;  // then a part knows the sets of its own columns only
        std::vector<Part> parts;
        for (const Part& chunk : chunks(range)) {
            int64_t width = each ? std::max(TILE, CHUNK / (chunk.r1 - chunk.r0) / 64 * 64) : f.columns;
            for (int64_t k = chunk.k0; k < chunk.k1; k += width)
                parts.push_back({chunk.r0, chunk.r1, k, std::min(k + width, chunk.k1)});
        }
        const int64_t n = parts.size();
        Own& own = Own::here();
        Sets<T> all = own.sets(count);
        auto sets = [&](auto&& body) {  // body(begin, end)
            int64_t pieces = std::min(threads, count / 1024 + 1);
            parallel(threads, pieces, [&](int64_t p) { body(p * count / pieces, (p + 1) * count / pieces); });
        };
        auto first = [&](int64_t p) { return each ? parts[p].k0 : 0; };
        auto last = [&](int64_t p) { return each ? parts[p].k1 : count; };
        if (c.what == FORWARD || c.what == STATISTICS) {
            std::vector<Array<double>> memory(n);
            std::vector<Sums> sums(n);
            parallel(threads, n, [&](int64_t p) {
                sums[p] = Own::sums(memory[p], last(p) - first(p));
                sum(Own::here(), sums[p], range, parts[p]);
            });
            all.sums.clear(count, false);
            sets([&](int64_t begin, int64_t end) {
                for (int64_t p = 0; p < n; ++p) {
                    int64_t from = std::max(begin, first(p)), to = std::min(end, last(p));
                    if (from < to) all.sums.merge(sums[p].at(from - first(p)), from, to);
                }
                write(all, &range, 1, begin, end);
            });
        } else
            sets([&](int64_t begin, int64_t end) { read(all, &range, 1, begin, end); });
        // What is worked out element by element is shared in any way.
        std::vector<Part> shares;
        int64_t width = std::min(f.columns, std::max(TILE, f.sets.kind == ONE ? CHUNK : CHUNK / range.rows / 64 * 64));
        int64_t height = std::max<int64_t>(1, CHUNK / width);
        for (int64_t r = 0; r < range.rows; r += height)
            for (int64_t k = 0; k < f.columns; k += width)
                shares.push_back({r, std::min(r + height, range.rows), k, std::min(k + width, f.columns)});
        const int64_t n_shares = shares.size();
        if (c.what == FORWARD || c.what == APPLY)
            parallel(threads, n_shares, [&](int64_t p) {  // backwards: the last may still be in a cache
                apply(Own::here(), all, range, shares[n_shares - 1 - p]);
                Past<T>::done();
            });
        if (c.what < BACKWARD) return;
        // Where every element has a parameter of its own, no two parts meet in one.
        bool alone = f.injective && !wants_mask();
        bool lanes_before = lane_sums_of_params;
        if (alone) lane_sums_of_params = false;  // whose rows one thread counts
        auto by_slot = [&](int64_t n, auto&& body) {  // body(part, slot)
            int64_t slots = alone || !wants_slots() ? n : std::min(n_slots, n);
            parallel(threads, slots, [&](int64_t s) {
                for (int64_t p = s * n / slots; p < (s + 1) * n / slots; ++p) body(p, alone ? 0 : s);
            });
        };
        if (c.what != BACKWARD_DX) {
            std::vector<Array<double>> sums(n);
            by_slot(n, [&](int64_t p, int64_t slot) {
                int64_t own = last(p) - first(p);
                sums[p].reserve(2 * own);
                fill(sums[p].data(), 2 * own, 0.0);
                dots(Own::here(), all, sums[p].data(), sums[p].data() + own, first(p), range, parts[p], slot);
            });
            sets([&](int64_t begin, int64_t end) {
                fill(all.sg + begin, end - begin, 0.0), fill(all.sgx + begin, end - begin, 0.0);
                for (int64_t p = 0; p < n; ++p)
                    for (int64_t i = std::max(begin, first(p)); i < std::min(end, last(p)); ++i) {
                        all.sg[i] += sums[p][i - first(p)];
                        all.sgx[i] += sums[p][last(p) - first(p) + i - first(p)];
                    }
                write_dots(all, &range, 1, begin, end);
            });
        } else
            sets([&](int64_t begin, int64_t end) { read_dots(all, &range, 1, begin, end); });
        if (c.what != BACKWARD_SUMS)
            by_slot(n_shares, [&](int64_t p, int64_t slot) {
                gradients(Own::here(), all, range, shares[n_shares - 1 - p], slot);
                Past<T>::done();
            });
        lane_sums_of_params = lanes_before;
        leaves_dz = leaves;
    }

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

    // --- the moments of sets begin..end of ranges (of all, if there are several): in tensors, and as `normalize` takes them

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

    void write(const Sets<T>& sets, const Range* ranges, int64_t n_ranges, int64_t begin, int64_t end) {
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

    void read(const Sets<T>& sets, const Range* ranges, int64_t n_ranges, int64_t begin, int64_t end) {
        int64_t last = (n_ranges - 1) * f.sets.count + end;
        if (!c.count) fill(sets.count + begin, last - begin, f.count);
        else if (c.count_wide) get_sets<double, T>(c.count, sets.count, ranges, n_ranges, begin, end);
        else get_sets<double, int64_t>(c.count, sets.count, ranges, n_ranges, begin, end);
        get_sets<T, T>(c.mean, sets.high, ranges, n_ranges, begin, end);
        get_sets<T, T>(c.low, sets.low, ranges, n_ranges, begin, end);
        get_sets<T, T>(c.m2, sets.m2, ranges, n_ranges, begin, end);
        settle(sets, begin, last);
    }

    void settle(const Sets<T>& sets, int64_t begin, int64_t end) {
        const double* RESTRICT count = sets.count;
        const T *RESTRICT low = sets.low, *RESTRICT m2 = sets.m2;
        T *RESTRICT r = sets.r, *RESTRICT c = sets.c, *RESTRICT v = sets.v;
        if (!f.center) fill(sets.high + begin, end - begin, T(0));
        const T center = f.center ? -1 : 0, eps = T(f.eps);
        const bool scale = f.scale;
        SIMD for (int64_t i = begin; i < end; ++i) {
            T n = T(count[i]), variance = m2[i] / (n > 0 ? n : T(1)), sigma2 = variance + eps;
            T inverse = sigma2 == 0 ? T(0) : T(1) / std::sqrt(sigma2);
            inverse = n > 0 ? (scale ? inverse : T(1)) : T(0);
            r[i] = inverse;
            c[i] = center * low[i] * inverse;
            v[i] = variance * inverse * inverse;
        }
    }

    void write_dots(const Sets<T>& sets, const Range* ranges, int64_t n_ranges, int64_t begin, int64_t end) {
        put_sets<double, T>(c.sum_g, sets.sg, ranges, n_ranges, begin, end);
        put_sets<double, T>(c.sum_gx, sets.sgx, ranges, n_ranges, begin, end);
        share_dots(sets, begin, (n_ranges - 1) * f.sets.count + end);
    }

    void read_dots(const Sets<T>& sets, const Range* ranges, int64_t n_ranges, int64_t begin, int64_t end) {
        int64_t last = (n_ranges - 1) * f.sets.count + end;
        if (c.sum_g) {
            get_sets<double, T>(c.sum_g, sets.sg, ranges, n_ranges, begin, end);
            get_sets<double, T>(c.sum_gx, sets.sgx, ranges, n_ranges, begin, end);
        } else
            fill(sets.sg + begin, last - begin, 0.0), fill(sets.sgx + begin, last - begin, 0.0);
        share_dots(sets, begin, last);
    }

    void share_dots(const Sets<T>& sets, int64_t begin, int64_t end) {
        const double *RESTRICT count = sets.count, *RESTRICT sg = sets.sg, *RESTRICT sgx = sets.sgx;
        T *RESTRICT c1 = sets.c1, *RESTRICT c2 = sets.c2;
        double center = f.center ? 1 : 0, scale = f.scale ? 1 : 0;
        SIMD for (int64_t i = begin; i < end; ++i) {
            double n = count[i] > 0 ? count[i] : 1.0;
            c1[i] = T(center * double(T(sg[i])) / n);  // rounded as in a tensor of sums
            c2[i] = T(scale * double(T(sgx[i])) / n);
        }
    }

    // --- operands along columns k..k+n of a row

    // Asks for what the next range reads and writes, while this one is worked on. Where rows lie in order, processors do
    // that by themselves.
    template <int WRITE>
    static void fetch(const S* p, int64_t n) {
        for (int64_t k = 0; k < n; k += int64_t(64 / sizeof(S))) __builtin_prefetch(p + k, WRITE, 2);
    }

    const T* values(const S* p, T* buffer, int64_t n) const { return wide(p, buffer, n, Same()); }
    static const T* wide(const S* p, T*, int64_t, std::true_type) { return p; }
    static const T* wide(const S* p, T* buffer, int64_t n, std::false_type) {
        load(p, buffer, n);
        return buffer;
    }
    void fetch_rows(const Range& range) const {
        if (range.rows * f.columns > LARGE / 8) return;
        walk.rows(range, 0, range.rows, Inside{}, [&](const Row* rows, int64_t n) {
            for (int64_t i = 0; i < n; ++i) {
                fetch<0>(x + rows[i].at[X], f.columns);
                if (y) fetch<1>(y + rows[i].at[Y], f.columns);
                if (dy) fetch<0>(dy + rows[i].at[Y], f.columns);
            }
        });
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

    Lanes lanes(Own& own, const Sets<T>& from, int64_t block, int64_t k, int64_t n, int fields) const {
        // One tile of columns is looked up once for all rows.
        bool known = own.lanes_of == from.high && own.lanes_block == block && own.lanes_k == k && own.lanes_fields >= fields;
        own.lanes_of = from.high, own.lanes_block = block, own.lanes_k = k;
        own.lanes_fields = known ? own.lanes_fields : fields;
        const T* sources[6] = {from.high, from.r, from.c, from.c1, from.c2, from.v};
        const T* at[6] = {};
        for (int i = 0; i < fields; ++i) {
            at[i] = f.sets.kind == EACH ? sources[i] + k : own.lane[i];
            if (f.sets.kind == TABLE && !known) gather(sources[i], f.sets.table + block * f.columns + k, own.lane[i], n);
        }
        return {at[0], at[1], at[2], at[3], at[4], at[5]};
    }

    // --- statistics

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
            run(sums, i, values(x + row.at[X], own.x[0], length), Share{}, Any{length}, !f.center);
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
                const T* v = values(x + row.at[X] + k, own.x[0], n);
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
        const S* from = nullptr;
        int64_t length = 0;
        auto flush = [&](bool last) {
            const int64_t most = Same::value ? length : std::min(SPAN, length);  // as many as a buffer has
            if (last && length == most && !own.flow.active) {
                if (length) run(sums, 0, values(from, own.x[0], length), Share{}, Any{length}, fixed);
                return;
            }
            for (int64_t k = 0; k < length || last; k += most) {
                int64_t n = std::min(most, length - k);
                bool ends = last && k + n == length;
                flow(own, sums, 0, values(from + k, own.x[0], n), Share{}, n, ends, fixed);
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
                            length = 0, from = nullptr;
                            flow(own, sums, 0, values(x + rows[i].at[X] + k, own.x[0], n), share, n, false, fixed);
                        }
                        if (share.bytes || share.outside) {
                            k += n;
                            continue;
                        }
                    }
                    const S* next = x + rows[i].at[X] + k;
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
            const T* v = values(x + rows[i].at[X] + k, own.x[0], n);
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
                for (int j = 0; j < 8; ++j) fetch<0>(x + rows[i + j].at[X] + step + k, n);
                const T* next[8] = {v};
                for (int j = 1; j < 8; ++j) next[j] = values(x + rows[i + j].at[X] + k, own.x[j], n);
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
            const T* v = values(x + rows[i].at[X] + k, own.x[0], n);
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

    // --- y

    void apply(Own& own, const Sets<T>& from, const Range& range, const Part& part) {
        own.lanes_of = nullptr;
        pieces(
            own, range, part, false,
            [&](const Row* rows, int64_t n_rows, int64_t block, int64_t k, int64_t n) {
                Lanes m = lanes(own, from, block, k, n, 3);
                if (one_param) {
                    Params p = params(own, rows[0], k, n);
                    with(p, 0, [&](auto w, auto b) { fold(m.r, m.c, n, w, b, own.a, own.d); });
                    m.r = own.a, m.c = own.d;
                }
                for (int64_t i = 0; i < n_rows; ++i) {
                    if constexpr (Same::value)
                        if (i + 8 <= n_rows && one_param && !f.activation && plain(rows + i)) {
                            const T* v[8];
                            T* to[8];
                            for (int j = 0; j < 8; ++j) v[j] = x + rows[i + j].at[X] + k, to[j] = y + rows[i + j].at[Y] + k;
                            normalize_eight(v, to, n, m.standard());
                            i += 7;
                            continue;
                        }
                    y_of(own, rows[i], k, n, [&](const T* v, auto t) {
                        if (one_param) return normalize(v, t, Any{n}, m.standard());
                        Params p = params(own, rows[i], k, n);
                        with(p, 0, [&](auto w, auto b) { normalize(v, t, Any{n}, m.standard(), w, b); });
                    });
                }
            },
            [&](const Row& row, int64_t block, int64_t k, int64_t n, bool) {
                y_of(own, row, k, n, [&](const T* v, auto t) {
                    Params p = params(own, row, k, n, f.by_runs);
                    walk.runs(block, k, k + n, [&](int64_t begin, auto many, int64_t id) {
                        apply_run(row, begin, v + (begin - k), t + (begin - k), many, standard(from, id), p, begin - k);
                    });
                });
            });
    }

    // Of one set, whose columns begin with `begin`, and `at` among those of the parameters.
    template <class O, class N>
    INLINE void apply_run(const Row& row, int64_t begin, const T* v, O to, N n, const Standard<One<T>>& m, const Params& p,
                          int64_t at) const {
        if (p.w) return normalize(v, to, n, m, Each<T>{p.w + at}, Each<T>{p.b + at});
        if (p.by_runs) return apply_by_params(row, begin, v, to, n.n, m);
        normalize(v, to, n, weighted(m, p.ws, p.bs));
    }
    template <class O>
    NOINLINE void apply_by_params(const Row& row, int64_t begin, const T* v, O to, int64_t n, Standard<One<T>> m) const {
        by_params(row, begin, n, [=](int64_t k, Any many, T w, T b, int64_t) INLINE_LAMBDA {
            normalize(v + k, to + k, many, weighted(m, w, b));
        });
    }
    static INLINE Standard<One<T>> weighted(const Standard<One<T>>& m, T w, T b) {
        return {m.high, {m.r.value * w}, {m.c.value * w + b}};
    }

    void apply_rows(Own& own, const Sets<T>& from, const Range* ranges, int64_t n) {
        each_row(ranges, n, [&](int64_t i, const Row& row) {
            y_of(own, row, 0, f.columns, [&](const T* v, auto t) {
                apply_run(row, 0, v, t, Any{f.columns}, standard(from, i), params(own, row, 0, f.columns, f.by_runs), 0);
            });
        });
    }

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

    // Whether eight rows are inside of the mask, and their results go where they belong.
    bool plain(const Row* rows) const {
        if (streams || f.mask_kind == WEIGHTS || masked_along) return false;
        bool inside = true;
        for (int j = 0; members && j < 8; ++j) inside = inside && members[rows[j].at[MASK]];
        return inside;
    }

    template <class F>
    void y_of(Own& own, const Row& row, int64_t k, int64_t n, F&& formula) {
        Share share = membership(own, row, k, n);
        bool done = !f.activation && !share.bytes && !broken;  // with the formula
        write(own, y + row.at[Y] + k, n, share.outside, done, [&](auto to) {
            formula(values(x + row.at[X] + k, own.x[0], n), to);
            if (f.activation) activate(f.activation, to.p, n);
            if (share.bytes) keep(to.p, share.bytes, n);
        });
    }

    // Some columns of a row of results: make(Place or Past) makes them, where they belong or in a buffer on their way there:
    // if they have another dtype, and if they go past the caches, and are not `done` with one formula.
    template <class F>
    void write(Own& own, S* out, int64_t n, bool nothing, bool done, F&& make) {
        if constexpr (Same::value) {
            if (!streams || leaves_dz) {
                if (nothing) clear<T>(Place<T>{out}, n);
                else make(Place<T>{out});
            } else if (nothing) clear<T>(Past<T>{out}, n);
            else if (done) make(Past<T>{out});
            else make(Place<T>{own.out}), copy<T>(own.out, Past<T>{out}, n);
        } else {
            if (nothing) clear<T>(Place<T>{own.out}, n);
            else make(Place<T>{own.out});
            store(own.out, out, n);
        }
    }

    // --- backward

    struct Pair {
        const T *x, *dz;
    };

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
            if (p.dz != dz) std::memcpy(dz, p.dz, sizeof(T) * size_t(n));
            z(p.x, own.out);
            activate_backward(f.activation, own.out, dz, n);
            p.dz = dz;
        }
        return p;
    }

    // Without an activation, and where no padding lies between.
    INLINE bool is_given(const Share& share) const { return !share.bytes && !f.activation; }
    INLINE Pair given(Own& own, const Row& row, int64_t k, int64_t n, T* x_buffer, T* dy_buffer) const {
        return {values(x + row.at[X] + k, x_buffer, n), dy ? values(dy + row.at[Y] + k, dy_buffer, n) : own.zeros};
    }

    T* left_at(const Row& row, int64_t k) const {
        if constexpr (Same::value) return y + row.at[Y] + k;
        else return nullptr;
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
            with(p, 0, [&](auto w, auto b) { normalize(v, Place<T>{z}, Any{n}, m.standard(), w, b); });
        };
        return made(own, row, k, n, share, of_sums, inside, activated, x_buffer, dy_buffer, dz_buffer);
    }

    INLINE Pair pair(Own& own, const Row& row, int64_t block, int64_t k, int64_t n, const Share& share, bool of_sums,
                     const Params& p, const Sets<T>& from) {
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
                apply_run(row, begin, v + at, Place<T>{z + at}, many, standard(from, id), p, at);
            });
        };
        return made(own, row, k, n, share, of_sums, inside, activated, own.x[0], own.dy, own.dz);
    }

    // Sums of g and g * xhat of a part of a range, sg[0] being that of set `first`; and of the parameters.
    void dots(Own& own, const Sets<T>& from, double* sg, double* sgx, int64_t first, const Range& range, const Part& part,
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

    void dot_rows(Own& own, const Sets<T>& from, const Range* ranges, int64_t n, int64_t slot) {
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
    NOINLINE void dots_apart(Own& own, const Sets<T>& from, double* sg, double* sgx, const Slot& of, const Row& row,
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

    void gradients(Own& own, const Sets<T>& from, const Range& range, const Part& part, int64_t slot) {
        double* pm = mask_slot(slot);
        own.lanes_of = nullptr;
        pieces(
            own, range, part, false,
            [&](const Row* rows, int64_t n_rows, int64_t block, int64_t k, int64_t n) {
                Lanes m = lanes(own, from, block, k, n, 6);
                Params p;
                Each<T> c1{m.c1}, c2{m.c2};
                for (int64_t i = 0; i < n_rows; ++i) {
                    if constexpr (Same::value)
                        if (i + 8 <= n_rows && one_param && !f.activation && dy && !pm && plain(rows + i)) {
                            if (!p.known) p = params(own, rows[i], k, n);
                            const T *v[8], *dz[8];
                            T* to[8];
                            for (int j = 0; j < 8; ++j) {
                                const Row& row = rows[i + j];
                                v[j] = x + row.at[X] + k, dz[j] = dy + row.at[Y] + k, to[j] = y + row.at[Y] + k;
                            }
                            with(p.w, p.ws, [&](auto w) { gradient_eight(v, dz, to, n, m.standard(), w, c1, c2); });
                            i += 7;
                            continue;
                        }
                    dx_of(own, rows[i], k, n, [&](const Share& share, auto t) {
                        if (!one_param || !p.known) p = params(own, rows[i], k, n);
                        Pair v = pair(own, rows[i], k, n, share, false, p, m);
                        if (pm) mask_dots(pm, rows[i], k, n, v.x, m.standard(), c1, c2, Each<T>{m.v});
                        with(share.weights, share.one, [&](auto part) {
                            with(p.w, p.ws, [&](auto w) { gradient(v.x, v.dz, t, Any{n}, m.standard(), w, c1, c2, part); });
                        });
                    });
                }
            },
            [&](const Row& row, int64_t block, int64_t k, int64_t n, bool) {
                dx_of(own, row, k, n, [&](const Share& share, auto t) {
                    Params p = params(own, row, k, n, f.by_runs);
                    Pair v = pair(own, row, block, k, n, share, false, p, from);
                    walk.runs(block, k, k + n, [&](int64_t begin, auto many, int64_t id) {
                        int64_t at = begin - k;
                        gradient_of_run(pm, row, begin, many, {v.x + at, v.dz + at}, t + at, share.from(at), p, at, from.at(id));
                    });
                });
            });
    }

    // Of the set that `of` begins with, whose columns begin with `begin`, and `at` among those of the parameters.
    template <class O, class N>
    INLINE void gradient_of_run(double* pm, const Row& row, int64_t begin, N n, const Pair& v, O to, const Share& share,
                                const Params& p, int64_t at, const Sets<T>& of) const {
        Standard<One<T>> m = standard(of, 0);
        One<T> c1{of.c1[0]}, c2{of.c2[0]};
        if (pm) mask_dots(pm, row, begin, n.n, v.x, m, c1, c2, One<T>{of.v[0]});
        with(share.weights, share.one, [&](auto part) {
            if (p.by_runs) return gradient_by_params(row, begin, n.n, v, to, m, c1, c2, part);
            with(p.w ? p.w + at : nullptr, p.ws, [&](auto w) { gradient(v.x, v.dz, to, n, m, w, c1, c2, part); });
        });
    }
    template <class O, class U>
    NOINLINE void gradient_by_params(const Row& row, int64_t begin, int64_t n, Pair v, O to, Standard<One<T>> m, One<T> c1,
                                     One<T> c2, U part) const {
        by_params(row, begin, n, [=](int64_t k, Any many, T w, T, int64_t) INLINE_LAMBDA {
            gradient(v.x + k, v.dz + k, to + k, many, m, One<T>{w}, c1, c2, part.from(k));
        });
    }

    void gradients_of_rows(Own& own, const Sets<T>& from, const Range* ranges, int64_t n, int64_t slot) {
        double* pm = mask_slot(slot);
        each_row(ranges, n, [&](int64_t i, const Row& row) {
            dx_of(own, row, 0, f.columns, [&](const Share& share, auto t) {
                Params p = params(own, row, 0, f.columns, f.by_runs);
                Pair v = pair(own, row, 0, 0, f.columns, share, false, p, from.at(i));
                gradient_of_run(pm, row, 0, Any{f.columns}, v, t, share, p, 0, from.at(i));
            });
        });
    }

    // The gradient of a weight: d mean / d w = (x - mean) / n, d var / d w = ((x - mean)^2 - var) / n.
    static double mask_dot(T xhat, T c1, T c2, T v) {
        T through_sigma = c2 == 0 ? T(0) : T(0.5) * (xhat * xhat - v) * c2;  // without scale, xhat may be huge
        return -double(xhat * c1 + through_sigma);
    }

    // Adds the gradients of the weights of some columns of a row to their sums.
    template <class V>
    void mask_dots(double* pm, const Row& row, int64_t k, int64_t n, const T* v, const Standard<V>& m, V c1, V c2,
                   V variance) const {
        double total = 0;
        for (int64_t j = 0; j < n; ++j) {
            using P = Pack<T, 1>;
            double dot = mask_dot(m.template xhat<P>(v, j).v[0], c1.template at<P>(j).v[0], c2.template at<P>(j).v[0],
                                  variance.template at<P>(j).v[0]);
            if (f.mask.kind == ONE) total += dot;
            else pm[row.at[MASK] + (f.mask.kind == EACH ? k + j : f.mask.table[k + j])] += dot;
        }
        if (f.mask.kind == ONE) pm[row.at[MASK]] += total;
    }

    template <class F>
    void dx_of(Own& own, const Row& row, int64_t k, int64_t n, F&& formula) {
        Share share = this->share(own, row, k, n);
        write(own, y + row.at[Y] + k, n, share.outside, !share.bytes && !broken, [&](auto to) {
            formula(share, to);
            if (share.bytes) keep(to.p, share.bytes, n);
        });
    }

    // --- gradients of parameters and weights: each slot is written by one thread, then all are added in order

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

    void reserve_slots(const std::vector<Task>& tasks) {
        if (!wants_slots()) return;
        int64_t size = std::max<int64_t>(1, slot_size());
        n_slots = std::max<int64_t>(1, std::min(SLOTS, f.numel / (8 * size)));
        bool large = false;
        for (const Task& task : tasks) large = large || task.large;
        if (!large) n_slots = std::max<int64_t>(1, std::min(n_slots, int64_t(tasks.size())));
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

    const Form& f;
    const Call& c;
    Walk walk;
    const S *x, *dy;
    S* y;
    const T *weight, *bias;
    const uint8_t* bytes;
    const T* weights;
    Array<double> memory;  // [slots][weight, bias, mask]
    Array<T> lane_memory;  // [slots][weight, bias]
    Array<int64_t> lane_rows;
    int64_t n_slots = 1;
    bool lane_sums_of_params = false;
    const bool streams;  // the result is written past the caches, and its rows are mostly whole lines
    bool leaves_dz;      // in memory that a cache holds
    const bool broken;   // runs begin anywhere in a line
    const bool one_param;     // all rows of a range have the same parameters
    const bool masked_along;  // masks of this pattern vary along the columns, also where none is given
    const uint8_t* members;   // the mask, where it says of whole rows whether they are inside
    const bool rowwise;       // a range is one chunk of a set, in rows that are equal steps apart
    const bool adjacent;      // its rows follow one another
    const bool eights;        // rows of a tile are taken by eight
    const uint64_t number = ++calls;  // of this call
};

int run(const Form& form, const Call& call) {
    try {
        switch (form.dtype) {
            case FLOAT32: Kernel<float, float>(form, call).run(); return 0;
            case FLOAT64: Kernel<double, double>(form, call).run(); return 0;
            case BFLOAT16: Kernel<float, bf16>(form, call).run(); return 0;
            case FLOAT16: Kernel<float, f16>(form, call).run(); return 0;
        }
        return 2;
    } catch (const std::bad_alloc&) {
        return 1;
    }
}

}  // namespace ARCH
