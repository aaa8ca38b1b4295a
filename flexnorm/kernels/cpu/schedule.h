// Who computes what: ranges are cut into tasks, and large ranges into chunks.
#pragma once
#include <utility>
#include <vector>

#include "backward.h"

namespace ARCH {

constexpr int64_t LARGE = 1 << 18;  // elements of a range that is shared: 1 MiB of float32, the second cache of a core

class Schedule : public Backward {
   public:
    Schedule(const Form& form, const Call& call) : Backward(form, call) {}

    void run() {
        const std::vector<Task> tasks = cut();
        const bool any_large = std::any_of(tasks.begin(), tasks.end(), [](const Task& task) { return task.large; });
        if (c.what >= BACKWARD) reserve_slots(int64_t(tasks.size()), any_large);
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
                past_done();
            });
            i = stop;
        }
        if (c.what >= BACKWARD) reduce_slots(threads);
    }

   private:
    struct Task {
        int64_t begin, end;  // ranges
        bool large;
    };

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

    // --- ranges

    // Several at a time, so that the moments of many sets are worked out together.
    void small(int64_t begin, int64_t end, int64_t slot) {
        Own& own = Own::here();
        int64_t count = f.sets.count, most = std::min(BATCH, std::max<int64_t>(1, 2 * BATCH / count));
        Range ranges[BATCH];
        Sets sets = own.sets(most * count);
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
                else each([&](const Range& range, const Part& all, const Sets& of) {
                    if (is_chunk(range)) return sum(own, of.sums, range, all);
                    const std::vector<Part> parts = chunks(range);
                    sum(own, of.sums, range, parts[0]);
                    Sums more = own.chunk(count);
                    for (size_t p = 1; p < parts.size(); ++p) {
                        sum(own, more, range, parts[p]);
                        of.sums.merge(more, 0, count);
                    }
                });
                write_moments(sets, ranges, n, 0, count);
            } else
                read_moments(sets, ranges, n, 0, count);
            if (c.what == FORWARD || c.what == APPLY) {
                if (rowwise) apply_rows(own, sets, ranges, n);
                else each([&](const Range& range, const Part& all, const Sets& of) { apply(own, of, range, all); });
            }
            if (c.what < BACKWARD) continue;
            if (c.what != BACKWARD_DX) {
                fill(sets.sg, n * count, 0.0), fill(sets.sgx, n * count, 0.0);
                if (rowwise) dot_rows(own, sets, ranges, n, slot);
                else each([&](const Range& range, const Part& all, const Sets& of) {
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
            else each([&](const Range& range, const Part& all, const Sets& of) { gradients(own, of, range, all, slot); });
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
        Sets all = own.sets(count);
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
                write_moments(all, &range, 1, begin, end);
            });
        } else
            sets([&](int64_t begin, int64_t end) { read_moments(all, &range, 1, begin, end); });
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
                past_done();
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
                past_done();
            });
        lane_sums_of_params = lanes_before;
        leaves_dz = leaves;
    }

    // Asks for what the next range reads and writes, while this one is worked on. Where rows lie in order, processors do
    // that by themselves.
    void fetch_rows(const Range& range) const {
        if (range.rows * f.columns > LARGE / 8) return;
        walk.rows(range, 0, range.rows, Inside{}, [&](const Row* rows, int64_t n) {
            for (int64_t i = 0; i < n; ++i) {
                fetch<0>(x, rows[i].at[X], f.columns);
                if (y) fetch<1>(y, rows[i].at[Y], f.columns);
                if (dy) fetch<0>(dy, rows[i].at[Y], f.columns);
            }
        });
    }
};

}  // namespace ARCH
