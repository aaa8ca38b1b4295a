// Loops over threads, and memory of one.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#ifdef _OPENMP
#include <omp.h>
#endif

#include "form.h"

namespace ARCH {

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

}  // namespace ARCH
