// The kernels of the canonical form, compiled once for every vector width (ARCH is the name of one).
//
// A closed range that fits into a cache is read once: statistics, then y, while it is still there. A larger one is cut
// into chunks of rows and columns whose partial moments are merged in order. Chunks do not depend on the number of
// threads, and so neither do results.
#include <atomic>
#include <cstdlib>
#include <memory>
#include <new>
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

// What is summed of the sets of one range: count, and with d = x - shift the sums of d and d * d.
// After `close`: the mean is shift + s, and q is M2.
struct Sums {
    Array<double> n, shift, s, q;

    void reserve(int64_t count) { n.reserve(count), shift.reserve(count), s.reserve(count), q.reserve(count); }

    void clear(int64_t count, bool keep_shift) {
        fill(n.data(), count, 0.0), fill(s.data(), count, 0.0), fill(q.data(), count, 0.0);
        if (!keep_shift) fill(shift.data(), count, 0.0);
    }

    void close(int64_t i) {
        if (n[i] > 0) {
            double d = s[i] / n[i], rest = q[i] - s[i] * d;
            s[i] = d;
            q[i] = rest < 0 ? 0 : rest;
        }
    }

    // Chan, Golub, LeVeque 1979; both closed.
    void merge(int64_t i, Sums& other, int64_t j) {
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

template <class T>
struct Scratch {
    Sums sums;                                  // of the sets of a range
    Array<T> high, low, r, c1, c2, v;           // of the sets of a range
    Array<double> sg, sgx;
    double n[TILE], shift[TILE], s[TILE], q[TILE];  // of the columns of a tile
    T lane[6][TILE];                            // moments of the columns of a tile
    T x[4][TILE], dy[TILE], xhat[TILE], dz[TILE], out[TILE], w[TILE], b[TILE], weights[TILE], c[2][TILE];
    T ones[TILE], zeros[TILE];
    uint8_t bytes[TILE];

    Scratch() { fill(ones, TILE, T(1)), fill(zeros, TILE, T(0)); }

    void reserve(int64_t count) {
        sums.reserve(count), sg.reserve(count), sgx.reserve(count);
        for (auto* a : {&high, &low, &r, &c1, &c2, &v}) a->reserve(count);
    }

    static Scratch& here() {
        static thread_local std::unique_ptr<Scratch> own;
        if (!own) own.reset(new Scratch);
        return *own;
    }
};

template <class T, class S>
class Kernel {
   public:
    Kernel(const Form& form, const Call& call)
        : f(form), c(call), walk(form), x(static_cast<const S*>(call.x)), dy(static_cast<const S*>(call.dy)),
          y(static_cast<S*>(call.y)), weight(static_cast<const T*>(call.weight)),
          bias(static_cast<const T*>(call.bias)), bytes(static_cast<const uint8_t*>(call.mask)),
          weights(static_cast<const T*>(call.mask)) {}

    void run() {
        int64_t slots = c.what >= BACKWARD ? reserve_slots() : 1;
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
            int64_t n = stop - i, parts = c.what >= BACKWARD && wants_slots() ? std::min(slots, n) : n;
            parallel(threads, parts, [&](int64_t part) {
                for (int64_t t = i + part * n / parts, end = i + (part + 1) * n / parts; t < end; ++t)
                    for (int64_t r = tasks[t].begin; r < tasks[t].end; ++r) small(walk.range(r), part);
            });
            i = stop;
        }
        if (c.what >= BACKWARD) reduce_slots(threads);
    }

   private:
    using Own = Scratch<T>;

    struct Task {
        int64_t begin, end;  // ranges
        bool large;
    };

    struct Params {
        const T* w;  // along the columns, or null: then w and b are `ws` and `bs`
        const T* b;
        T ws, bs;
    };

    struct Share {  // what the mask says of a row and a span
        bool outside = false;            // no element is inside
        T one = 1;                       // the weight of all
        const uint8_t* bytes = nullptr;  // or along the columns
        const T* weights = nullptr;
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

    // --- one range

    void small(const Range& range, int64_t slot) {
        Own& own = Own::here();
        int64_t count = f.sets.count;
        own.reserve(count);
        if (c.what == FORWARD || c.what == STATISTICS) {
            sum(own, own.sums, range, 0, range.rows, 0, f.columns);
            for (int64_t i = 0; i < count; ++i) write(own, range, i);
        } else
            for (int64_t i = 0; i < count; ++i) read(own, range, i);
        if (c.what == FORWARD || c.what == APPLY) apply(own, own, 0, range, 0, range.rows, 0, f.columns);
        if (c.what == BACKWARD || c.what == BACKWARD_SUMS) {
            fill(own.sg.data(), count, 0.0), fill(own.sgx.data(), count, 0.0);
            dots(own, own, own.sg.data(), own.sgx.data(), 0, range, 0, range.rows, 0, f.columns, slot);
            for (int64_t i = 0; i < count; ++i) write_dots(own, range, i, own.sg[i], own.sgx[i]);
        } else if (c.what == BACKWARD_DX)
            for (int64_t i = 0; i < count; ++i) read_dots(own, range, i);
        if (c.what == BACKWARD || c.what == BACKWARD_DX)
            gradients(own, own, range, 0, range.rows, 0, f.columns, slot);
    }

    struct Chunk {
        int64_t r0, r1, k0, k1;
    };

    void large(const Range& range, int64_t threads) {
        std::vector<Chunk> chunks;
        int64_t width = std::min(f.columns, CHUNK), height = std::max<int64_t>(1, CHUNK / width);
        for (int64_t r = 0; r < range.rows; r += height)
            for (int64_t k = 0; k < f.columns; k += width)
                chunks.push_back({r, std::min(r + height, range.rows), k, std::min(k + width, f.columns)});
        int64_t n = chunks.size(), count = f.sets.count;
        bool each = f.sets.kind == EACH;
        Own& all = Own::here();
        all.reserve(count);
        auto over = [&](auto&& body) { parallel(std::min<int64_t>(threads, count / 1024 + 1), threads, [&](int64_t t) {
            for (int64_t i = t * count / threads; i < (t + 1) * count / threads; ++i) body(i);
        }); };
        if (c.what == FORWARD || c.what == STATISTICS) {
            std::vector<Sums> parts(n);
            parallel(threads, n, [&](int64_t i) {
                const Chunk& k = chunks[i];
                parts[i].reserve(each ? k.k1 - k.k0 : count);
                sum(Own::here(), parts[i], range, k.r0, k.r1, k.k0, k.k1);
            });
            all.sums.clear(count, false);
            over([&](int64_t i) {
                for (int64_t p = 0; p < n; ++p)
                    if (!each) all.sums.merge(i, parts[p], i);
                    else if (chunks[p].k0 <= i && i < chunks[p].k1) all.sums.merge(i, parts[p], i - chunks[p].k0);
                write(all, range, i, true);
            });
        } else
            over([&](int64_t i) { read(all, range, i); });
        if (c.what == FORWARD || c.what == APPLY)
            parallel(threads, n, [&](int64_t i) {  // backwards: the last chunks may still be in the cache
                const Chunk& k = chunks[n - 1 - i];
                apply(Own::here(), all, 0, range, k.r0, k.r1, k.k0, k.k1);
            });
        if (c.what < BACKWARD) return;
        int64_t slots = f.injective && !wants_mask() ? n : wants_slots() ? std::min<int64_t>(n_slots, n) : n;
        auto by_slot = [&](auto&& body) {
            parallel(threads, slots, [&](int64_t s) {
                for (int64_t i = s * n / slots; i < (s + 1) * n / slots; ++i)
                    body(i, slots == n && n > n_slots ? 0 : s);
            });
        };
        if (c.what == BACKWARD || c.what == BACKWARD_SUMS) {
            std::vector<Array<double>> parts(n);
            by_slot([&](int64_t i, int64_t slot) {
                const Chunk& k = chunks[i];
                int64_t own = each ? k.k1 - k.k0 : count;
                parts[i].reserve(2 * own);
                fill(parts[i].data(), 2 * own, 0.0);
                dots(Own::here(), all, parts[i].data(), parts[i].data() + own, each ? k.k0 : 0, range, k.r0, k.r1, k.k0,
                     k.k1, slot);
            });
            over([&](int64_t i) {
                double a = 0, b = 0;
                for (int64_t p = 0; p < n; ++p) {
                    const Chunk& k = chunks[p];
                    if (each && (i < k.k0 || i >= k.k1)) continue;
                    int64_t own = each ? k.k1 - k.k0 : count, j = each ? i - k.k0 : i;
                    a += parts[p][j], b += parts[p][own + j];
                }
                write_dots(all, range, i, a, b);
            });
        } else
            over([&](int64_t i) { read_dots(all, range, i); });
        if (c.what == BACKWARD || c.what == BACKWARD_DX)
            by_slot([&](int64_t i, int64_t slot) {
                const Chunk& k = chunks[n - 1 - i];
                gradients(Own::here(), all, range, k.r0, k.r1, k.k0, k.k1, slot);
            });
    }

    // --- the moments of a set: in tensors, and as what `normalize` takes

    int64_t place(const Range& range, int64_t i) const {
        return range.set + (f.sets.offsets ? f.sets.offsets[i] : i);
    }

    void write(Own& own, const Range& range, int64_t i, bool closed = false) {
        if (!closed) own.sums.close(i);
        double n = own.sums.n[i];
        int64_t at = place(range, i);
        T *mean = static_cast<T*>(c.mean), *low = static_cast<T*>(c.low), *m2 = static_cast<T*>(c.m2);
        double whole = n > 0 ? own.sums.shift[i] + own.sums.s[i] : 0.0;
        T high = T(whole);
        // What rounding lost, by Knuth's two-sum, as either of shift and s may be the larger.
        double part = whole - own.sums.shift[i];
        double lost = (own.sums.shift[i] - (whole - part)) + (own.sums.s[i] - part);
        mean[at] = high;
        low[at] = n > 0 && std::isfinite(whole) ? T((whole - double(high)) + lost) : T(0);
        m2[at] = n > 0 ? T(own.sums.q[i]) : T(0);
        if (c.count && c.count_wide) static_cast<T*>(c.count)[at] = T(n);
        else if (c.count) static_cast<int64_t*>(c.count)[at] = int64_t(n);
        read(own, range, i);
    }

    void read(Own& own, const Range& range, int64_t i) {
        int64_t at = place(range, i);
        double n = count_of(at);
        double m2 = double(static_cast<T*>(c.m2)[at]);
        double variance = m2 / (n > 0 ? n : 1), sigma2 = variance + f.eps;
        own.high[i] = f.center ? static_cast<T*>(c.mean)[at] : T(0);
        own.low[i] = f.center && c.low ? static_cast<T*>(c.low)[at] : T(0);
        double r = !(n > 0) ? 0.0 : !f.scale ? 1.0 : sigma2 == 0 ? 0.0 : 1.0 / std::sqrt(sigma2);
        own.r[i] = T(r);
        own.v[i] = T(variance * r * r);
    }

    double count_of(int64_t at) const {
        if (!c.count) return f.count;
        return c.count_wide ? double(static_cast<T*>(c.count)[at]) : double(static_cast<int64_t*>(c.count)[at]);
    }

    void write_dots(Own& own, const Range& range, int64_t i, double a, double b) {
        int64_t at = place(range, i);
        if (c.sum_g) {
            static_cast<T*>(c.sum_g)[at] = T(a);
            static_cast<T*>(c.sum_gx)[at] = T(b);
        }
        share_dots(own, i, at, T(a), T(b));
    }

    void read_dots(Own& own, const Range& range, int64_t i) {
        int64_t at = place(range, i);
        bool through = c.sum_g != nullptr;
        share_dots(own, i, at, through ? static_cast<T*>(c.sum_g)[at] : T(0),
                   through ? static_cast<T*>(c.sum_gx)[at] : T(0));
    }

    void share_dots(Own& own, int64_t i, int64_t at, T a, T b) {
        double n = count_of(at);
        n = n > 0 ? n : 1;
        own.c1[i] = f.center ? T(double(a) / n) : T(0);
        own.c2[i] = f.scale ? T(double(b) / n) : T(0);
    }

    // --- operands along a span

    const T* values(const S* p, T* buffer, int64_t n) const { return wide(p, buffer, n, std::is_same<T, S>()); }
    static const T* wide(const S* p, T*, int64_t, std::true_type) { return p; }
    static const T* wide(const S* p, T* buffer, int64_t n, std::false_type) {
        load(p, buffer, n);
        return buffer;
    }
    T* target(S* p, T* buffer) const { return target(p, buffer, std::is_same<T, S>()); }
    static T* target(S* p, T*, std::true_type) { return p; }
    static T* target(S*, T* buffer, std::false_type) { return buffer; }
    static void put(const T*, S*, int64_t, std::true_type) {}
    static void put(const T* buffer, S* p, int64_t n, std::false_type) { store(buffer, p, n); }

    Share share(Own& own, const Row& row, int64_t k, int64_t n) const {
        Share s;
        if (f.mask_kind == EVERYTHING) return s;
        int64_t at = row.at[MASK];
        bool membership = f.mask_kind == MEMBERSHIP;
        if (f.mask.kind == ONE) {
            if (membership) s.outside = !bytes[at];
            else s.one = weights[at];
        } else if (f.mask.kind == EACH) {
            if (membership) s.bytes = bytes + at + k;
            else s.weights = weights + at + k;
        } else if (membership) {
            gather(bytes + at, f.mask.table + k, own.bytes, n);
            s.bytes = own.bytes;
        } else {
            gather(weights + at, f.mask.table + k, own.weights, n);
            s.weights = own.weights;
        }
        return s;
    }

    Params params(Own& own, const Row& row, int64_t k, int64_t n) const {
        Params p{nullptr, nullptr, T(1), T(0)};
        int64_t at = row.at[PARAM];
        if (!weight && !bias) return p;
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

    struct Lanes {  // moments of the sets of a span of columns that have one each
        const T *high, *low, *r, *c1, *c2, *v;
    };

    Lanes lanes(Own& own, Own& from, int64_t block, int64_t k, int64_t n, int fields) const {
        if (f.sets.kind == EACH)
            return {from.high.data() + k, from.low.data() + k, from.r.data() + k,
                    from.c1.data() + k,   from.c2.data() + k,  from.v.data() + k};
        const int32_t* table = f.sets.table + block * f.columns + k;
        Array<T>* sources[6] = {&from.high, &from.low, &from.r, &from.c1, &from.c2, &from.v};
        for (int i = 0; i < fields; ++i) gather(sources[i]->data(), table, own.lane[i], n);
        return {own.lane[0], own.lane[1], own.lane[2], own.lane[3], own.lane[4], own.lane[5]};
    }

    // --- statistics

    // Of a part of a range, into `sums` (of an EACH form: of the columns from k0 on). Closed only in `small`.
    void sum(Own& own, Sums& sums, const Range& range, int64_t r0, int64_t r1, int64_t k0, int64_t k1) {
        int64_t count = f.sets.kind == EACH ? k1 - k0 : f.sets.count;
        sums.clear(count, false);
        pass(own, sums, range, r0, r1, k0, k1, !f.center);
        if (!f.center) fill(sums.s.data(), count, 0.0);  // about zero
        bool part = r1 - r0 != range.rows || k1 - k0 != f.columns;
        if (std::is_same<T, double>::value && f.center) {  // once more about the mean: shifted sums lose digits
            for (int64_t i = 0; i < count; ++i) {
                sums.close(i);
                sums.shift[i] += sums.n[i] > 0 ? sums.s[i] : 0.0;
            }
            sums.clear(count, true);
            pass(own, sums, range, r0, r1, k0, k1, true);
        }
        if (part || range.rows * f.columns > LARGE)
            for (int64_t i = 0; i < count; ++i) sums.close(i);
    }

    void pass(Own& own, Sums& sums, const Range& range, int64_t r0, int64_t r1, int64_t k0, int64_t k1, bool fixed) {
        walk.rows(range, r0, r1, [&](const Row* rows, int64_t n) {
            walk.spans(f.sets, rows[0].at[SET_BLOCK], k0, k1, [&](int64_t k, int64_t end, int64_t id) {
                if (id >= 0) {
                    for (int64_t i = 0; i < n; ++i) run(own, sums, id, rows[i], k, end - k, fixed);
                } else if (f.sets.kind == EACH) {
                    int64_t at = k - k0;
                    columns(own, rows, n, k, end - k, fixed, sums.n.data() + at, sums.shift.data() + at,
                            sums.s.data() + at, sums.q.data() + at);
                } else
                    table(own, sums, rows, n, k, end - k, fixed);
            });
        });
    }

    void run(Own& own, Sums& sums, int64_t id, const Row& row, int64_t k, int64_t n, bool fixed) {
        Share share = this->share(own, row, k, n);
        if (share.outside || share.one == 0) return;
        const T* v = values(x + row.at[X] + k, own.x[0], n);
        double &count = sums.n[id], &shift = sums.shift[id], &s = sums.s[id], &q = sums.q[id];
        if (!fixed && count == 0) {
            int64_t first = 0;
            if (share.bytes) while (first < n && !share.bytes[first]) ++first;
            if (share.weights) while (first < n && !(share.weights[first] > 0)) ++first;
            if (first == n) return;
            shift = double(v[first]);
        }
        if (share.bytes) run_sums(v, share.bytes, n, shift, count, s, q);
        else if (share.weights) run_sums(v, share.weights, n, shift, count, s, q);
        else if (share.one == 1) {
            run_sums(v, n, shift, s, q);
            count += double(n);
        } else {
            double a = 0, b = 0;
            run_sums(v, n, shift, a, b);
            s += double(share.one) * a, q += double(share.one) * b, count += double(share.one) * double(n);
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
            if (share.bytes) lane_sums(v, share.bytes, n, fixed, count, shift, s, q);
            else if (share.weights) lane_sums(v, share.weights, n, fixed, count, shift, s, q);
            else {
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
        }
        if (total != 0) SIMD for (int64_t j = 0; j < n; ++j) count[j] += total;
    }

    // Short runs of columns: sums of each column first, which are then shifted to those of its set.
    void table(Own& own, Sums& sums, const Row* rows, int64_t n_rows, int64_t k, int64_t n, bool fixed) {
        const int32_t* id = f.sets.table + rows[0].at[SET_BLOCK] * f.columns + k;
        fill(own.n, n, 0.0), fill(own.s, n, 0.0), fill(own.q, n, 0.0), fill(own.shift, n, 0.0);
        if (fixed) gather(sums.shift.data(), id, own.shift, n);
        columns(own, rows, n_rows, k, n, fixed, own.n, own.shift, own.s, own.q);
        for (int64_t j = 0; j < n; ++j) {
            if (!(own.n[j] > 0)) continue;
            int64_t i = id[j];
            if (!fixed && sums.n[i] == 0) sums.shift[i] = own.shift[j];
            double delta = own.shift[j] - sums.shift[i], m = own.n[j];
            sums.n[i] += m;
            sums.s[i] += own.s[j] + m * delta;
            sums.q[i] += own.q[j] + delta * (2 * own.s[j] + m * delta);
        }
    }

    // --- y

    void apply(Own& own, Own& from, int, const Range& range, int64_t r0, int64_t r1, int64_t k0, int64_t k1) {
        walk.rows(range, r0, r1, [&](const Row* rows, int64_t n_rows) {
            int64_t block = rows[0].at[SET_BLOCK];
            walk.spans(f.sets, block, k0, k1, [&](int64_t k, int64_t end, int64_t id) {
                int64_t n = end - k;
                Lanes m = id < 0 ? lanes(own, from, block, k, n, 3) : Lanes{};
                for (int64_t i = 0; i < n_rows; ++i) {
                    const Row& row = rows[i];
                    S* out = y + row.at[Y] + k;
                    Share share = f.mask_kind == MEMBERSHIP ? this->share(own, row, k, n) : Share{};
                    T* t = target(out, own.out);
                    if (share.outside) fill(t, n, T(0));
                    else {
                        const T* v = values(x + row.at[X] + k, own.x[0], n);
                        Params p = params(own, row, k, n);
                        if (id >= 0 && !p.w)
                            normalize(v, t, n, from.high[id], from.low[id], from.r[id] * p.ws, p.bs);
                        else if (id >= 0)
                            normalize(v, t, n, from.high[id], from.low[id], from.r[id], p.w, p.b);
                        else if (!p.w)
                            normalize(v, t, n, m.high, m.low, m.r, p.ws, p.bs);
                        else
                            normalize(v, t, n, m.high, m.low, m.r, p.w, p.b);
                        if (f.activation) activate(f.activation, t, n);
                        if (share.bytes) keep(t, share.bytes, n);
                    }
                    put(t, out, n, std::is_same<T, S>());
                }
            });
        });
    }

    // --- backward

    // xhat and dz of a row and a span, 0 outside of the mask. Returns dz, which is dy itself where it can be.
    const T* prepare(Own& own, Own& from, const Row& row, int64_t k, int64_t n, int64_t id, const Lanes& m,
                     const Params& p, const Share& share) {
        const T* v = values(x + row.at[X] + k, own.x[0], n);
        const T* g = values(dy + row.at[Y] + k, own.dy, n);
        if (id >= 0) normalize(v, own.xhat, n, from.high[id], from.low[id], from.r[id], T(0));
        else normalize(v, own.xhat, n, m.high, m.low, m.r, T(1), T(0));
        if (share.bytes) keep(own.xhat, share.bytes, n);
        if (!f.activation && !share.bytes) return g;
        std::memcpy(own.dz, g, sizeof(T) * size_t(n));
        if (share.bytes) keep(own.dz, share.bytes, n);
        if (f.activation) {
            if (p.w) normalize(own.xhat, own.out, n, T(0), T(0), T(1), p.w, p.b);
            else normalize(own.xhat, own.out, n, T(0), T(0), p.ws, p.bs);
            activate_backward(f.activation, own.out, own.dz, n);
        }
        return own.dz;
    }

    void dots(Own& own, Own& from, double* sg, double* sgx, int64_t first, const Range& range, int64_t r0, int64_t r1,
              int64_t k0, int64_t k1, int64_t slot) {
        double* pw = c.dweight ? slot_of(slot) : nullptr;
        double* pb = c.dbias ? slot_of(slot) + f.n_params : nullptr;
        walk.rows(range, r0, r1, [&](const Row* rows, int64_t n_rows) {
            int64_t block = rows[0].at[SET_BLOCK];
            walk.spans(f.sets, block, k0, k1, [&](int64_t k, int64_t end, int64_t id) {
                int64_t n = end - k;
                bool tabled = id < 0 && f.sets.kind == TABLE;
                Lanes m = id < 0 ? lanes(own, from, block, k, n, 3) : Lanes{};
                double *a = tabled ? own.s : sg + (k - first), *b = tabled ? own.q : sgx + (k - first);
                if (tabled) fill(a, n, 0.0), fill(b, n, 0.0);
                for (int64_t i = 0; i < n_rows; ++i) {
                    const Row& row = rows[i];
                    Share share = f.mask_kind == MEMBERSHIP ? this->share(own, row, k, n) : Share{};
                    if (share.outside) continue;
                    Params p = params(own, row, k, n);
                    const T* dz = prepare(own, from, row, k, n, id, m, p, share);
                    int64_t at = row.at[PARAM];
                    if (id >= 0 && !p.w) {
                        double s = 0, t = 0;
                        dot_sums(dz, own.xhat, n, s, t);
                        sg[id] += double(p.ws) * s, sgx[id] += double(p.ws) * t;
                        if (f.params.kind == ONE) {
                            if (pw) pw[at] += t;
                            if (pb) pb[at] += s;
                            continue;
                        }
                    } else if (id >= 0) dot_sums(dz, p.w, own.xhat, n, sg[id], sgx[id]);
                    else if (!p.w) lane_dots(dz, own.xhat, n, double(p.ws), a, b);
                    else lane_dots(dz, p.w, own.xhat, n, a, b);
                    if (pw || pb) param_dots(own, row, k, n, dz, pw, pb);
                }
                if (tabled) {
                    const int32_t* ids = f.sets.table + block * f.columns + k;
                    for (int64_t j = 0; j < n; ++j) sg[ids[j]] += a[j], sgx[ids[j]] += b[j];
                }
            });
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
            double* spare = own.n;  // where nobody asks for one of the two
            lane_dots(dz, own.xhat, n, 1.0, pb ? pb + at + k : spare, pw ? pw + at + k : spare);
        } else {
            const int32_t* table = f.params.table + row.at[PARAM_BLOCK] * f.columns + k;
            for (int64_t j = 0; j < n; ++j) {
                if (pw) pw[at + table[j]] += double(dz[j]) * double(own.xhat[j]);
                if (pb) pb[at + table[j]] += double(dz[j]);
            }
        }
    }

    void gradients(Own& own, Own& from, const Range& range, int64_t r0, int64_t r1, int64_t k0, int64_t k1,
                   int64_t slot) {
        bool through = c.sum_g || c.what == BACKWARD;
        double* pm = c.dmask ? slot_of(slot) + 2 * f.n_params : nullptr;
        walk.rows(range, r0, r1, [&](const Row* rows, int64_t n_rows) {
            int64_t block = rows[0].at[SET_BLOCK];
            walk.spans(f.sets, block, k0, k1, [&](int64_t k, int64_t end, int64_t id) {
                int64_t n = end - k;
                Lanes m = id < 0 ? lanes(own, from, block, k, n, 6) : Lanes{};
                for (int64_t i = 0; i < n_rows; ++i) {
                    const Row& row = rows[i];
                    S* out = y + row.at[Y] + k;
                    T* t = target(out, own.out);
                    Share share = this->share(own, row, k, n);
                    if (share.outside) {
                        fill(t, n, T(0));
                        put(t, out, n, std::is_same<T, S>());
                        continue;
                    }
                    Params p = params(own, row, k, n);
                    const T* dz = prepare(own, from, row, k, n, id, m, p, share);
                    if (pm && through) mask_dots(own, from, row, k, n, id, m, pm);
                    if (share.weights && through) {
                        const T* w = share.weights;
                        SIMD for (int64_t j = 0; j < n; ++j) {
                            own.c[0][j] = (id < 0 ? m.c1[j] : from.c1[id]) * w[j];
                            own.c[1][j] = (id < 0 ? m.c2[j] : from.c2[id]) * w[j];
                        }
                        const T* r = m.r;
                        if (id >= 0) fill(own.lane[5], n, from.r[id]), r = own.lane[5];
                        if (!p.w) gradient(dz, own.xhat, t, n, p.ws, own.c[0], own.c[1], r);
                        else gradient(dz, own.xhat, t, n, p.w, own.c[0], own.c[1], r);
                    } else if (id >= 0) {
                        T c1 = from.c1[id] * share.one, c2 = from.c2[id] * share.one;
                        if (!p.w) gradient(dz, own.xhat, t, n, p.ws, c1, c2, from.r[id]);
                        else gradient(dz, own.xhat, t, n, p.w, c1, c2, from.r[id]);
                    } else {
                        const T *c1 = m.c1, *c2 = m.c2;
                        if (share.one != 1) {
                            normalize(c1, own.c[0], n, T(0), T(0), share.one, T(0));
                            normalize(c2, own.c[1], n, T(0), T(0), share.one, T(0));
                            c1 = own.c[0], c2 = own.c[1];
                        }
                        if (!p.w) gradient(dz, own.xhat, t, n, p.ws, c1, c2, m.r);
                        else gradient(dz, own.xhat, t, n, p.w, c1, c2, m.r);
                    }
                    if (share.bytes) keep(t, share.bytes, n);
                    put(t, out, n, std::is_same<T, S>());
                }
            });
        });
    }

    // The gradient of weights: d mean / d w = (x - mean) / n, d var / d w = ((x - mean)^2 - var) / n.
    void mask_dots(Own& own, Own& from, const Row& row, int64_t k, int64_t n, int64_t id, const Lanes& m, double* pm) {
        T* d = own.c[0];
        for (int64_t j = 0; j < n; ++j) {
            T c1 = id < 0 ? m.c1[j] : from.c1[id], c2 = id < 0 ? m.c2[j] : from.c2[id];
            T v = id < 0 ? m.v[j] : from.v[id], h = own.xhat[j];
            d[j] = -(h * c1 + T(0.5) * (h * h - v) * c2);
        }
        int64_t at = row.at[MASK];
        double total = 0;
        for (int64_t j = 0; j < n; ++j) {
            if (f.mask.kind == ONE) total += double(d[j]);
            else pm[at + (f.mask.kind == EACH ? k + j : f.mask.table[k + j])] += double(d[j]);
        }
        if (f.mask.kind == ONE) pm[at] += total;
    }

    // --- gradients of parameters and weights: each slot is written by one thread, then all are added in order

    bool wants_mask() const { return c.dmask && c.what != BACKWARD_SUMS; }
    bool wants_slots() const { return c.dweight || c.dbias || c.dmask; }
    int64_t slot_size() const { return 2 * f.n_params + (wants_mask() ? f.n_mask : 0); }
    double* slot_of(int64_t slot) { return memory.data() + slot * slot_size(); }

    int64_t reserve_slots() {
        n_slots = 1;
        if (!wants_slots()) return 1;
        int64_t size = std::max<int64_t>(1, slot_size());
        n_slots = std::max<int64_t>(1, std::min(SLOTS, f.numel / (8 * size)));
        memory.reserve(n_slots * size);
        fill(memory.data(), n_slots * size, 0.0);
        return n_slots;
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
