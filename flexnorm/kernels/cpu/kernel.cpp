// The kernels of the canonical form, compiled once for every vector width (ARCH is the name of one).
//
// A closed range that fits into a cache is read once: statistics, then y, while it is still there. A larger one is cut
// into chunks of rows and columns whose partial moments are merged in order. Chunks do not depend on the number of
// threads, and so neither do results.
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

constexpr int64_t LARGE = 1 << 18;   // elements of a range that is cut: 1 MiB of float32, the second cache of a core
constexpr int64_t CHUNK = 1 << 16;   // elements of a chunk
constexpr int64_t GRAIN = 1 << 15;   // elements that pay for waking a thread (5 us)
constexpr int64_t SLOTS = 32;        // places that parameter gradients are summed in, each by one thread

template <class F>
void parallel(int64_t threads, int64_t n, F&& f) {
    threads = std::min(threads, n);
#ifdef _OPENMP
    if (threads > 1) {
        std::atomic<int64_t> next{0};
        std::atomic<bool> failed{false};
#pragma omp parallel num_threads(int(threads))
        try {
            for (int64_t i; (i = next++) < n;) f(i);
        } catch (...) {
            failed = true;
        }
        if (failed) throw std::bad_alloc();
        return;
    }
#endif
    for (int64_t i = 0; i < n; ++i) f(i);
}

// Memory that is written before it is read.
template <class V>
class Array {
   public:
    void reserve(int64_t n) {
        if (n <= size) return;
        memory.reset(static_cast<V*>(std::malloc(sizeof(V) * size_t(n))));
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

// What is summed of some sets: the count, and with d = x - shift the sums of d and of d * d.
// After `close` the mean is shift + s, and q is M2.
struct Sums {
    double *n, *shift, *s, *q;

    Sums at(int64_t i) const { return {n + i, shift + i, s + i, q + i}; }

    void clear(int64_t count, bool keep_shift) const {
        fill(n, count, 0.0), fill(s, count, 0.0), fill(q, count, 0.0);
        if (!keep_shift) fill(shift, count, 0.0);
    }

    void close(int64_t count) const {
        double *RESTRICT n = this->n, *RESTRICT s = this->s, *RESTRICT q = this->q;
        SIMD for (int64_t i = 0; i < count; ++i) {
            double d = s[i] / (n[i] > 0 ? n[i] : 1.0), rest = q[i] - s[i] * d;
            s[i] = d;
            q[i] = rest < 0 ? 0 : rest;
        }
    }

    // Chan, Golub, LeVeque 1979; both closed.
    void merge(int64_t i, const Sums& other, int64_t j) const {
        double m = other.n[j];
        if (!(m > 0)) return;
        if (!(n[i] > 0)) {
            n[i] = m, shift[i] = other.shift[j], s[i] = other.s[j], q[i] = other.q[j];
            return;
        }
        double delta = (other.shift[j] - shift[i]) + (other.s[j] - s[i]), total = n[i] + m;
        s[i] += delta * (m / total);
        q[i] += other.q[j] + delta * delta * (n[i] * m / total);
        n[i] = total;
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

// Buffers of one thread.
template <class T>
class Scratch {
   public:
    // Were they TILE wide, all buffers would lie whole pages apart, and loads wait for stores to the others (of which
    // the processor compares the last twelve bits).
    static constexpr int64_t WIDTH = TILE + 48;

    // Of the columns of a tile.
    T lane[6][WIDTH], a[WIDTH], d[WIDTH];
    T x[4][WIDTH], dy[WIDTH], xhat[WIDTH], dz[WIDTH], out[WIDTH], w[WIDTH], b[WIDTH], weights[WIDTH], scaled[2][WIDTH];
    T ones[WIDTH], zeros[WIDTH];
    uint8_t bytes[WIDTH];
    double column[4][WIDTH];
    Sums columns{column[0], column[1], column[2], column[3]};

    Scratch() { fill(ones, TILE, T(1)), fill(zeros, TILE, T(0)); }

    Sets<T> sets(int64_t count) {
        int64_t n = (count + 23) / 16 * 16 + 8;
        doubles.reserve(7 * n), values.reserve(8 * n);
        double* d = doubles.data();
        T* v = values.data();
        return {{d, d + n, d + 2 * n, d + 3 * n}, d + 4 * n, d + 5 * n, d + 6 * n, v, v + n, v + 2 * n, v + 3 * n,
                v + 4 * n, v + 5 * n, v + 6 * n, v + 7 * n};
    }

    static Scratch& here() {
        static thread_local std::unique_ptr<Scratch> own;
        if (!own) own.reset(new Scratch);
        return *own;
    }

   private:
    Array<double> doubles;
    Array<T> values;
};

template <class T, class S>
class Kernel {
   public:
    Kernel(const Form& form, const Call& call)
        : f(form), c(call), walk(form), x(static_cast<const S*>(call.x)), dy(static_cast<const S*>(call.dy)),
          y(static_cast<S*>(call.y)), weight(static_cast<const T*>(call.weight)),
          bias(static_cast<const T*>(call.bias)), bytes(static_cast<const uint8_t*>(call.mask)),
          weights(static_cast<const T*>(call.mask)) {
        one_param = f.param_label == nullptr;
        auto check = [&](const Dim* dims, int64_t n) {
            for (int64_t d = 0; d < n; ++d) one_param = one_param && !dims[d].step[PARAM] && !dims[d].step[PARAM_BLOCK];
        };
        check(f.inner, f.n_inner), check(f.segment, f.n_segment);
        const Dim* next = f.n_segment && f.outer_at == f.n_outer ? f.segment : f.n_outer ? f.outer + (f.n_outer - 1) : nullptr;
        int64_t steps = next == f.segment ? walk.elements / std::max<int64_t>(1, f.groups) : 1;
        if (next && !f.order) ahead = next->step[X] * steps, ahead_y = next->step[Y] * steps;
    }

    void run() {
        if (c.what >= BACKWARD) reserve_slots();
        std::vector<Task> tasks = cut();
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

    struct Params {
        const T* w = nullptr;  // along the columns, or null: then w and b are `ws` and `bs`
        const T* b = nullptr;
        T ws = 1, bs = 0;
    };

    struct Share {  // what the mask says of a row and some columns
        bool outside = false;            // no element is inside
        T one = 1;                       // the weight of all
        const uint8_t* bytes = nullptr;  // or along the columns
        const T* weights = nullptr;
    };

    struct Lanes {  // of the sets of some columns, one each
        const T *high, *r, *c, *c1, *c2, *v;
    };

    std::vector<Task> cut() const {
        std::vector<Task> tasks;
        int64_t n = walk.ranges(), filled = 0, begin = 0;
        if (walk.uniform()) {
            int64_t each = std::max<int64_t>(1, walk.inner * f.columns);
            bool big = each > LARGE;
            int64_t step = big ? 1 : std::max<int64_t>(1, GRAIN / each);
            for (int64_t r = 0; r < n; r += step) tasks.push_back({r, std::min(r + step, n), big});
            return tasks;
        }
        for (int64_t r = 0; r < n; ++r) {
            int64_t size = walk.range(r).rows * f.columns;
            bool big = size > LARGE;
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

    // --- ranges

    // Several at a time, so that the moments of many sets are worked out together.
    void small(int64_t begin, int64_t end, int64_t slot) {
        Own& own = Own::here();
        int64_t count = f.sets.count, most = std::min(BATCH, std::max<int64_t>(1, 2 * BATCH / count));
        Range ranges[BATCH];
        Sets<T> sets = own.sets(most * count);
        while (begin < end) {
            int64_t n = std::min(most, end - begin);
            for (int64_t i = 0; i < n; ++i) ranges[i] = walk.range(begin + i);
            begin += n;
            auto each = [&](auto&& body) {
                for (int64_t i = 0; i < n; ++i) body(ranges[i], Part{0, ranges[i].rows, 0, f.columns}, sets.at(i * count));
            };
            if (f.order && begin < end) fetch_rows(walk.range(begin));
            if (c.what == FORWARD || c.what == STATISTICS) {
                each([&](const Range& range, const Part& all, const Sets<T>& of) { sum(own, of.sums, range, all); });
                write(sets, ranges, n, 0, count);
            } else
                read(sets, ranges, n, 0, count);
            if (c.what == FORWARD || c.what == APPLY)
                each([&](const Range& range, const Part& all, const Sets<T>& of) { apply(own, of, range, all); });
            if (c.what < BACKWARD) continue;
            if (c.what != BACKWARD_DX) {
                fill(sets.sg, n * count, 0.0), fill(sets.sgx, n * count, 0.0);
                each([&](const Range& range, const Part& all, const Sets<T>& of) {
                    dots(own, of, of.sg, of.sgx, 0, range, all, slot);
                });
                write_dots(sets, ranges, n, 0, count);
            } else
                read_dots(sets, ranges, n, 0, count);
            if (c.what != BACKWARD_SUMS)
                each([&](const Range& range, const Part& all, const Sets<T>& of) { gradients(own, of, range, all, slot); });
        }
    }

    void large(const Range& range, int64_t threads) {
        std::vector<Part> parts;
        // Sums per column want many rows, sums of runs long ones.
        bool tall = walk.by_column(range.rows, SHORT);
        int64_t size = range.rows * f.columns, chunk = CHUNK;
        // A part keeps sums of all sets of the range; together they take no more memory than x.
        if (f.sets.kind == TABLE) chunk = std::max(chunk, size / std::max<int64_t>(2, size / (8 * f.sets.count)));
        int64_t width = std::min(f.columns, tall ? std::max(TILE, chunk / range.rows) : chunk);
        int64_t height = std::max<int64_t>(1, chunk / width);
        for (int64_t r = 0; r < range.rows; r += height)
            for (int64_t k = 0; k < f.columns; k += width)
                parts.push_back({r, std::min(r + height, range.rows), k, std::min(k + width, f.columns)});
        int64_t n = parts.size(), count = f.sets.count;
        int64_t next = std::exchange(ahead, 0), next_y = std::exchange(ahead_y, 0);
        bool each = f.sets.kind == EACH;  // then a part knows the sets of its own columns only
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
                int64_t own = last(p) - first(p);
                memory[p].reserve(4 * own);
                double* d = memory[p].data();
                sums[p] = {d, d + own, d + 2 * own, d + 3 * own};
                sum(Own::here(), sums[p], range, parts[p]);
            });
            all.sums.clear(count, false);
            sets([&](int64_t begin, int64_t end) {
                for (int64_t p = 0; p < n; ++p)
                    for (int64_t i = std::max(begin, first(p)); i < std::min(end, last(p)); ++i)
                        all.sums.merge(i, sums[p], i - first(p));
                write(all, &range, 1, begin, end);
            });
        } else
            sets([&](int64_t begin, int64_t end) { read(all, &range, 1, begin, end); });
        if (c.what == FORWARD || c.what == APPLY)
            parallel(threads, n, [&](int64_t p) {  // backwards: the last parts may still be in a cache
                apply(Own::here(), all, range, parts[n - 1 - p]);
            });
        if (c.what < BACKWARD) {
            ahead = next, ahead_y = next_y;
            return;
        }
        // Where every element has a parameter of its own, no two parts meet in one.
        bool alone = f.injective && !wants_mask();
        int64_t slots = alone || !wants_slots() ? n : std::min(n_slots, n);
        auto by_slot = [&](auto&& body) {  // body(part, slot)
            parallel(threads, slots, [&](int64_t s) {
                for (int64_t p = s * n / slots; p < (s + 1) * n / slots; ++p) body(p, alone ? 0 : s);
            });
        };
        if (c.what != BACKWARD_DX) {
            std::vector<Array<double>> sums(n);
            by_slot([&](int64_t p, int64_t slot) {
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
            by_slot([&](int64_t p, int64_t slot) { gradients(Own::here(), all, range, parts[n - 1 - p], slot); });
        ahead = next, ahead_y = next_y;
    }

    // A part of a range, either in tiles of columns (tile(rows, how many, block, k, n)) or in runs of one set
    // (run(row, k, n, id)). Sums per column pay where rows share them, or where runs are short.
    template <class Tile, class Run>
    void pieces(const Range& range, const Part& part, int64_t shortest, Tile&& tile, Run&& run) const {
        walk.rows(range, part.r0, part.r1, [&](const Row* rows, int64_t n_rows) {
            int64_t block = rows[0].at[SET_BLOCK];
            if (walk.by_column(n_rows, shortest)) {
                for (int64_t k = part.k0; k < part.k1; k += TILE)
                    tile(rows, n_rows, block, k, std::min(TILE, part.k1 - k));
            } else
                for (int64_t i = 0; i < n_rows; ++i)
                    walk.runs(block, part.k0, part.k1,
                              [&](int64_t k, int64_t end, int64_t id) { run(rows[i], k, end - k, id); });
        });
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

    // Asks for what the next range reads and writes, while this one is worked on: then memory is busy all the time.
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
    T* target(S* p, T* buffer) const { return target(p, buffer, Same()); }
    static T* target(S* p, T*, std::true_type) { return p; }
    static T* target(S*, T* buffer, std::false_type) { return buffer; }
    static void put(const T*, S*, int64_t, std::true_type) {}
    static void put(const T* buffer, S* p, int64_t n, std::false_type) { store(buffer, p, n); }

    // The same for rows that lie anywhere.
    void fetch_rows(const Range& range) const {
        if (range.rows * f.columns > LARGE / 8) return;
        walk.rows(range, 0, range.rows, [&](const Row* rows, int64_t n) {
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

    Share membership(Own& own, const Row& row, int64_t k, int64_t n) const {
        return f.mask_kind == MEMBERSHIP ? share(own, row, k, n) : Share{};
    }

    Params params(Own& own, const Row& row, int64_t k, int64_t n) const {
        Params p;
        if (!weight && !bias) return p;
        int64_t at = row.at[PARAM];
        if (f.params.kind == ONE) {
            if (weight) p.ws = weight[at];
            if (bias) p.bs = bias[at];
        } else if (f.params.kind == EACH) {
            p.w = weight ? weight + at + k : own.ones;
            p.b = bias ? bias + at + k : own.zeros;
        } else {
            const int32_t* table = f.params.table + row.at[PARAM_BLOCK] * f.columns + k;
            if (weight) gather(weight + at, table, own.w, n);
            if (bias) gather(bias + at, table, own.b, n);
            p.w = weight ? own.w : own.ones;
            p.b = bias ? own.b : own.zeros;
        }
        return p;
    }

    Lanes lanes(Own& own, const Sets<T>& from, int64_t block, int64_t k, int64_t n, int fields) const {
        const T* sources[6] = {from.high, from.r, from.c, from.c1, from.c2, from.v};
        const T* at[6] = {};
        for (int i = 0; i < fields; ++i) {
            at[i] = f.sets.kind == EACH ? sources[i] + k : own.lane[i];
            if (f.sets.kind == TABLE) gather(sources[i], f.sets.table + block * f.columns + k, own.lane[i], n);
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
        sums.close(count);
        // Once more about the mean, where one shifted pass loses digits: of doubles, and if the first element, which is
        // the shift, may weigh next to nothing and lie far from the others.
        if (f.center && (std::is_same<T, double>::value || f.mask_kind == WEIGHTS)) {
            for (int64_t i = 0; i < count; ++i) sums.shift[i] += sums.s[i];
            sums.clear(count, true);
            pass(own, sums, range, part, true);
            sums.close(count);
        }
    }

    void pass(Own& own, const Sums& sums, const Range& range, const Part& part, bool fixed) {
        if (f.sets.kind == ONE && f.mask_kind == EVERYTHING) return pass_plain(own, sums, range, part, fixed);
        pieces(
            range, part, SHORT,
            [&](const Row* rows, int64_t n_rows, int64_t block, int64_t k, int64_t n) {
                if (f.sets.kind == EACH) {
                    int64_t at = k - part.k0;
                    columns(own, rows, n_rows, k, n, fixed, sums.n + at, sums.shift + at,
                            sums.s + at, sums.q + at);
                } else
                    table(own, sums, rows, n_rows, block, k, n, fixed);
            },
            [&](const Row& row, int64_t k, int64_t n, int64_t id) {
                run(sums, id, x + row.at[X] + k, own, share(own, row, k, n), n, fixed);
            });
    }

    // Rows that follow one another in memory are one run.
    void pass_plain(Own& own, const Sums& sums, const Range& range, const Part& part, bool fixed) {
        const S* from = nullptr;
        int64_t length = 0;
        auto flush = [&] {
            for (int64_t k = 0; k < length; k += TILE)
                run(sums, 0, from + k, own, Share{}, std::min(TILE, length - k), fixed);
        };
        walk.rows(range, part.r0, part.r1, [&](const Row* rows, int64_t n_rows) {
            for (int64_t i = 0; i < n_rows; ++i) {
                const S* next = x + rows[i].at[X] + part.k0;
                if (from + length != next) {
                    flush();
                    from = next, length = 0;
                }
                length += part.k1 - part.k0;
            }
        });
        flush();
    }

    void run(const Sums& sums, int64_t id, const S* p, Own& own, const Share& share, int64_t n, bool fixed) {
        if (share.outside || share.one == 0) return;
        const T* v = values(p, own.x[0], n);
        double &count = sums.n[id], &shift = sums.shift[id], &s = sums.s[id], &q = sums.q[id];
        if (!fixed && count == 0) {
            int64_t first = 0;
            if (share.bytes)
                while (first < n && !share.bytes[first]) ++first;
            if (share.weights)
                while (first < n && !(share.weights[first] > 0)) ++first;
            if (first == n) return;
            shift = double(v[first]);
        }
        if (share.bytes) run_sums(v, share.bytes, n, shift, count, s, q);
        else if (share.weights) run_sums(v, share.weights, n, shift, count, s, q);
        else {
            double a = 0, b = 0, w = double(share.one);
            run_sums(v, n, shift, a, b);
            s += w * a, q += w * b, count += w * double(n);
        }
    }

    void columns(Own& own, const Row* rows, int64_t n_rows, int64_t k, int64_t n, bool fixed, double* count,
                 double* shift, double* s, double* q) {
        double total = 0;
        bool begun = fixed || count[0] > 0;
        for (int64_t i = 0; i < n_rows; ++i) {
            Share share = this->share(own, rows[i], k, n);
            if (share.outside || share.one == 0) continue;
            const T* v = values(x + rows[i].at[X] + k, own.x[0], n);
            if (f.mask_kind != EVERYTHING && f.mask.kind != ONE) {  // then columns differ in where they begin
                if (share.weights) lane_sums(v, share.weights, n, fixed, count, shift, s, q);
                else {
                    if (!share.bytes) fill(own.bytes, n, uint8_t(1));
                    lane_sums(v, share.bytes ? share.bytes : own.bytes, n, fixed, count, shift, s, q);
                }
                continue;
            }
            if (!begun) SIMD for (int64_t j = 0; j < n; ++j) shift[j] = double(v[j]);
            begun = true;
            if (f.mask_kind == EVERYTHING && i + 4 <= n_rows) {
                const T* next[4] = {v};
                for (int j = 1; j < 4; ++j) next[j] = values(x + rows[i + j].at[X] + k, own.x[j], n);
                lane_sums(next[0], next[1], next[2], next[3], n, shift, s, q);
                total += 4, i += 3;
            } else {
                lane_sums(v, n, double(share.one), shift, s, q);
                total += double(share.one);
            }
        }
        if (total != 0) SIMD for (int64_t j = 0; j < n; ++j) count[j] += total;
    }

    // Short runs of columns: sums of each column first, which are then shifted to those of its set.
    void table(Own& own, const Sums& sums, const Row* rows, int64_t n_rows, int64_t block, int64_t k, int64_t n, bool fixed) {
        const int32_t* id = f.sets.table + block * f.columns + k;
        if (n_rows < MANY && (f.mask_kind == EVERYTHING || f.mask.kind == ONE))
            return scatter(own, sums, rows, n_rows, id, k, n, fixed);
        const Sums& each = own.columns;
        each.clear(n, false);
        if (fixed) gather(sums.shift, id, each.shift, n);
        columns(own, rows, n_rows, k, n, fixed, each.n, each.shift, each.s, each.q);
        for (int64_t j = 0; j < n; ++j) {
            if (!(each.n[j] > 0)) continue;
            int64_t i = id[j];
            if (!fixed && sums.n[i] == 0) sums.shift[i] = each.shift[j];
            double delta = each.shift[j] - sums.shift[i], m = each.n[j];
            sums.n[i] += m;
            sums.s[i] += each.s[j] + m * delta;
            sums.q[i] += each.q[j] + delta * (2 * each.s[j] + m * delta);
        }
    }

    void scatter(Own& own, const Sums& sums, const Row* rows, int64_t n_rows, const int32_t* id, int64_t k, int64_t n,
                 bool fixed) {
        double *count = sums.n, *shift = sums.shift, *s = sums.s, *q = sums.q;
        for (int64_t i = 0; i < n_rows; ++i) {
            Share share = this->share(own, rows[i], k, n);
            if (share.outside || share.one == 0) continue;
            const T* v = values(x + rows[i].at[X] + k, own.x[0], n);
            double w = double(share.one);
            for (int64_t j = 0; j < n;) {
                int64_t set = id[j];
                if (!fixed && count[set] == 0) shift[set] = double(v[j]);
                double c = shift[set], a = 0, b = 0;
                int64_t first = j;
                do {
                    double d = double(v[j]) - c;
                    a += d, b += d * d;
                } while (++j < n && id[j] == set);
                count[set] += w * double(j - first), s[set] += w * a, q[set] += w * b;
            }
        }
    }

    // --- y

    void apply(Own& own, const Sets<T>& from, const Range& range, const Part& part) {
        pieces(
            range, part, SHORT,
            [&](const Row* rows, int64_t n_rows, int64_t block, int64_t k, int64_t n) {
                Lanes m = lanes(own, from, block, k, n, 3);
                for (int64_t i = 0; i < n_rows; ++i) {
                    if (i == 0 || !one_param) combine(own, m, params(own, rows[i], k, n), n);
                    y_of(own, rows[i], k, n, [&](const T* v, T* t) { normalize(v, t, n, m.high, own.a, own.d); });
                }
            },
            [&](const Row& row, int64_t k, int64_t n, int64_t id) {
                y_of(own, row, k, n, [&](const T* v, T* t) {
                    Params p = params(own, row, k, n);
                    T high = from.high[id], r = from.r[id], c = from.c[id];
                    if (p.w) normalize(v, t, n, high, r, c, p.w, p.b);
                    else normalize(v, t, n, high, r * p.ws, c * p.ws + p.bs);
                });
            });
    }

    void combine(Own& own, const Lanes& m, const Params& p, int64_t n) const {
        if (p.w) fold(m.r, m.c, n, p.w, p.b, own.a, own.d);
        else fold(m.r, m.c, n, p.ws, p.bs, own.a, own.d);
    }

    template <class F>
    void y_of(Own& own, const Row& row, int64_t k, int64_t n, F&& formula) {
        S* out = y + row.at[Y] + k;
        fetch<0>(x + row.at[X] + k + ahead, n);
        fetch<1>(out + ahead_y, n);
        T* t = target(out, own.out);
        Share share = membership(own, row, k, n);
        if (share.outside) fill(t, n, T(0));
        else {
            formula(values(x + row.at[X] + k, own.x[0], n), t);
            if (f.activation) activate(f.activation, t, n);
            if (share.bytes) keep(t, share.bytes, n);
        }
        put(t, out, n, Same());
    }

    // --- backward

    // dz of a row, with xhat beside it: dy through the activation, 0 outside of the mask. It is dy itself where it can be.
    const T* dz_of(Own& own, const Row& row, int64_t k, int64_t n, const Params& p, const Share& share) {
        const T* g = values(dy + row.at[Y] + k, own.dy, n);
        if (share.bytes) keep(own.xhat, share.bytes, n);
        if (!f.activation && !share.bytes) return g;
        std::memcpy(own.dz, g, sizeof(T) * size_t(n));
        if (share.bytes) keep(own.dz, share.bytes, n);
        if (f.activation) {
            if (p.w) affine(own.xhat, own.out, n, p.w, p.b);
            else affine(own.xhat, own.out, n, p.ws, p.bs);
            activate_backward(f.activation, own.out, own.dz, n);
        }
        return own.dz;
    }

    void xhat_of(Own& own, const Row& row, int64_t k, int64_t n, const Lanes& m) {
        normalize(values(x + row.at[X] + k, own.x[0], n), own.xhat, n, m.high, m.r, m.c);
    }
    void xhat_of(Own& own, const Sets<T>& from, const Row& row, int64_t k, int64_t n, int64_t id) {
        normalize(values(x + row.at[X] + k, own.x[0], n), own.xhat, n, from.high[id], from.r[id], from.c[id]);
    }

    // Sums of g and g * xhat of a part of a range, sg[0] being that of set `first`; and of the parameters.
    void dots(Own& own, const Sets<T>& from, double* sg, double* sgx, int64_t first, const Range& range, const Part& part,
              int64_t slot) {
        double* pw = c.dweight ? slot_of(slot) : nullptr;
        double* pb = c.dbias ? slot_of(slot) + f.n_params : nullptr;
        pieces(
            range, part, SHORT,
            [&](const Row* rows, int64_t n_rows, int64_t block, int64_t k, int64_t n) {
                bool tabled = f.sets.kind == TABLE;
                Lanes m = lanes(own, from, block, k, n, 3);
                double *a = tabled ? own.columns.s : sg + (k - first);
                double *b = tabled ? own.columns.q : sgx + (k - first);
                if (tabled) fill(a, n, 0.0), fill(b, n, 0.0);
                for (int64_t i = 0; i < n_rows; ++i) {
                    Share share = membership(own, rows[i], k, n);
                    if (share.outside) continue;
                    Params p = params(own, rows[i], k, n);
                    xhat_of(own, rows[i], k, n, m);
                    const T* dz = dz_of(own, rows[i], k, n, p, share);
                    if (p.w) lane_dots(dz, p.w, own.xhat, n, a, b);
                    else lane_dots(dz, own.xhat, n, double(p.ws), a, b);
                    if (pw || pb) param_dots(own, rows[i], k, n, dz, pw, pb);
                }
                const int32_t* ids = f.sets.table + block * f.columns + k;
                if (tabled)
                    for (int64_t j = 0; j < n; ++j) sg[ids[j]] += a[j], sgx[ids[j]] += b[j];
            },
            [&](const Row& row, int64_t k, int64_t n, int64_t id) {
                Share share = membership(own, row, k, n);
                if (share.outside) return;
                Params p = params(own, row, k, n);
                xhat_of(own, from, row, k, n, id);
                const T* dz = dz_of(own, row, k, n, p, share);
                if (p.w) {
                    dot_sums(dz, p.w, own.xhat, n, sg[id], sgx[id]);
                    if (pw || pb) param_dots(own, row, k, n, dz, pw, pb);
                    return;
                }
                double s = 0, t = 0;
                dot_sums(dz, own.xhat, n, s, t);
                sg[id] += double(p.ws) * s, sgx[id] += double(p.ws) * t;
                if (pw) pw[row.at[PARAM]] += t;
                if (pb) pb[row.at[PARAM]] += s;
            });
    }

    void param_dots(Own& own, const Row& row, int64_t k, int64_t n, const T* dz, double* pw, double* pb) {
        int64_t at = row.at[PARAM];
        if (f.params.kind == ONE) {
            double s = 0, t = 0;
            dot_sums(dz, own.xhat, n, s, t);
            if (pw) pw[at] += t;
            if (pb) pb[at] += s;
        } else if (f.params.kind == EACH) {
            double* spare = own.columns.n;  // where nobody asks for one of the two
            lane_dots(dz, own.xhat, n, 1.0, pb ? pb + at + k : spare, pw ? pw + at + k : spare);
        } else {
            const int32_t* table = f.params.table + row.at[PARAM_BLOCK] * f.columns + k;
            for (int64_t j = 0; j < n; ++j) {
                if (pw) pw[at + table[j]] += double(dz[j]) * double(own.xhat[j]);
                if (pb) pb[at + table[j]] += double(dz[j]);
            }
        }
    }

    void gradients(Own& own, const Sets<T>& from, const Range& range, const Part& part, int64_t slot) {
        double* pm = wants_mask() && (c.sum_g || c.what == BACKWARD) ? slot_of(slot) + 2 * f.n_params : nullptr;
        pieces(
            range, part, SHORT,
            [&](const Row* rows, int64_t n_rows, int64_t block, int64_t k, int64_t n) {
                Lanes m = lanes(own, from, block, k, n, 6);
                for (int64_t i = 0; i < n_rows; ++i)
                    dx_of(own, rows[i], k, n, pm, [&] { xhat_of(own, rows[i], k, n, m); },
                          [&](const Share& share, const Params& p, const T* dz, T* t) {
                              const T *c1 = m.c1, *c2 = m.c2;
                              if (share.weights || share.one != 1) {
                                  const T* w = share.weights;
                                  if (!w) fill(own.a, n, share.one), w = own.a;
                                  affine(c1, own.scaled[0], n, w, own.zeros), affine(c2, own.scaled[1], n, w, own.zeros);
                                  c1 = own.scaled[0], c2 = own.scaled[1];
                              }
                              if (p.w) gradient(dz, own.xhat, t, n, p.w, c1, c2, m.r);
                              else gradient(dz, own.xhat, t, n, p.ws, c1, c2, m.r);
                          },
                          [&](int64_t j) { return mask_dot(own.xhat[j], m.c1[j], m.c2[j], m.v[j]); });
            },
            [&](const Row& row, int64_t k, int64_t n, int64_t id) {
                T c1 = from.c1[id], c2 = from.c2[id], r = from.r[id], v = from.v[id];
                dx_of(own, row, k, n, pm, [&] { xhat_of(own, from, row, k, n, id); },
                      [&](const Share& share, const Params& p, const T* dz, T* t) {
                          if (share.weights) {
                              affine(share.weights, own.scaled[0], n, c1, T(0));
                              affine(share.weights, own.scaled[1], n, c2, T(0));
                              fill(own.a, n, r);
                              if (p.w) gradient(dz, own.xhat, t, n, p.w, own.scaled[0], own.scaled[1], own.a);
                              else gradient(dz, own.xhat, t, n, p.ws, own.scaled[0], own.scaled[1], own.a);
                          } else if (p.w)
                              gradient(dz, own.xhat, t, n, p.w, c1 * share.one, c2 * share.one, r);
                          else
                              gradient(dz, own.xhat, t, n, p.ws, c1 * share.one, c2 * share.one, r);
                      },
                      [&](int64_t j) { return mask_dot(own.xhat[j], c1, c2, v); });
            });
    }

    // The gradient of a weight: d mean / d w = (x - mean) / n, d var / d w = ((x - mean)^2 - var) / n.
    static double mask_dot(T xhat, T c1, T c2, T v) {
        T through_sigma = c2 == 0 ? T(0) : T(0.5) * (xhat * xhat - v) * c2;  // without scale, xhat may be huge
        return -double(xhat * c1 + through_sigma);
    }

    template <class Xhat, class Formula, class Dot>
    void dx_of(Own& own, const Row& row, int64_t k, int64_t n, double* pm, Xhat&& xhat, Formula&& formula, Dot&& dot) {
        S* out = y + row.at[Y] + k;
        fetch<0>(x + row.at[X] + k + ahead, n);
        fetch<0>(dy + row.at[Y] + k + ahead_y, n);
        fetch<1>(out + ahead_y, n);
        T* t = target(out, own.out);
        Share share = this->share(own, row, k, n);
        if (share.outside) fill(t, n, T(0));
        else {
            Params p = params(own, row, k, n);
            xhat();
            const T* dz = dz_of(own, row, k, n, p, share);
            if (pm) {
                double total = 0;
                for (int64_t j = 0; j < n; ++j)
                    if (f.mask.kind == ONE) total += dot(j);
                    else pm[row.at[MASK] + (f.mask.kind == EACH ? k + j : f.mask.table[k + j])] += dot(j);
                if (f.mask.kind == ONE) pm[row.at[MASK]] += total;
            }
            formula(share, p, dz, t);
            if (share.bytes) keep(t, share.bytes, n);
        }
        put(t, out, n, Same());
    }

    // --- gradients of parameters and weights: each slot is written by one thread, then all are added in order

    bool wants_mask() const { return c.what >= BACKWARD && c.what != BACKWARD_SUMS && c.dmask; }
    bool wants_slots() const { return c.what >= BACKWARD && (c.dweight || c.dbias || wants_mask()); }
    int64_t slot_size() const { return 2 * f.n_params + (wants_mask() ? f.n_mask : 0); }
    double* slot_of(int64_t slot) { return memory.data() + slot * slot_size(); }

    void reserve_slots() {
        if (!wants_slots()) return;
        int64_t size = std::max<int64_t>(1, slot_size());
        n_slots = std::max<int64_t>(1, std::min(SLOTS, f.numel / (8 * size)));
        memory.reserve(n_slots * size);
        fill(memory.data(), n_slots * size, 0.0);
    }

    void reduce_slots(int64_t threads) {
        T* targets[3] = {static_cast<T*>(c.dweight), static_cast<T*>(c.dbias),
                         wants_mask() ? static_cast<T*>(c.dmask) : nullptr};
        int64_t sizes[3] = {f.n_params, f.n_params, f.n_mask}, first = 0;
        for (int i = 0; i < 3; first += sizes[i++]) {
            if (!targets[i]) continue;
            int64_t parts = std::min<int64_t>(threads, sizes[i] * n_slots / GRAIN + 1);
            parallel(threads, parts, [&](int64_t part) {
                for (int64_t p = part * sizes[i] / parts; p < (part + 1) * sizes[i] / parts; ++p) {
                    double total = 0;
                    for (int64_t slot = 0; slot < n_slots; ++slot) total += slot_of(slot)[first + p];
                    targets[i][p] = T(total);
                }
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
    int64_t n_slots = 1;
    bool one_param;     // all rows of a range have the same parameters
    int64_t ahead = 0, ahead_y = 0;  // from a range to the next, in x and in y
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
