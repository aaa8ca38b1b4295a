// The kernels of the canonical form. They are compiled for each vector width and dtype of statistics: ARCH is the name of
// such a unit, REAL the dtype.
//
// A closed range that fits into a cache is read once: statistics, then y, while it is still there. A larger one is shared
// by all threads.
//
// A set has one order of summation, which is its own: its members are summed in chunks of so many that are inside of the
// mask, and the moments of chunks are merged in order. Who sums a chunk, and what lies beside it, changes no bit.
#include "schedule.h"

namespace ARCH {

int run(const Form& form, const Call& call) {
    try {
        Schedule(form, call).run();
        return 0;
    } catch (const std::bad_alloc&) {
        return 1;
    }
}

}  // namespace ARCH
