// Where a large result is written. Its memory may be new, so that every page of 4 KiB is made at the first write to it: then
// the kernel of the system takes most of the time, and a write past the caches costs it twice. Or its pages are there, as
// in a process that keeps freed memory: then a write past the caches saves reading what is overwritten.
#pragma once
#include <cstdint>
#ifdef __linux__
#include <sys/mman.h>
#include <unistd.h>
#endif

enum Pages { ASK, FRESH, RESIDENT };

constexpr int64_t PAST = 1 << 24;  // bytes of a result that no cache would keep
constexpr int64_t HUGE = 1 << 25;  // bytes of a result that is a mapping of its own, which goes back when it is freed

// Some pages of the result are asked for. Where one is missing, the system is advised to make pages of 2 MiB, of which
// there are fewer to be made.
inline bool writes_past(char* result, int64_t bytes, Pages known) {
    if (bytes <= PAST) return false;
#ifdef __linux__
    const uintptr_t page = uintptr_t(sysconf(_SC_PAGESIZE));
    bool resident = known != FRESH;
    for (int64_t quarter = 1; quarter < 4 && known == ASK; ++quarter) {
        unsigned char is_there = 1;
        void* at = reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(result) + uintptr_t(bytes / 4 * quarter)) & ~(page - 1));
        if (mincore(at, 1, &is_there) == 0 && !(is_there & 1)) resident = false;
    }
    if (resident) return true;
    const uintptr_t huge = 1 << 21, begin = (reinterpret_cast<uintptr_t>(result) + huge - 1) & ~(huge - 1);
    const uintptr_t end = (reinterpret_cast<uintptr_t>(result) + uintptr_t(bytes)) & ~(huge - 1);
    if (bytes > HUGE && begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
    return false;
#else
    return known != FRESH;
#endif
}
