#include "entry.h"

// Compiled from kernel.cpp, by vector width and dtype of statistics.
#if defined(__x86_64__)
namespace avx512_float { int run(const Form&, const Call&); }
namespace avx512_double { int run(const Form&, const Call&); }
namespace avx2_float { int run(const Form&, const Call&); }
namespace avx2_double { int run(const Form&, const Call&); }
#endif
namespace plain_float { int run(const Form&, const Call&); }
namespace plain_double { int run(const Form&, const Call&); }

static int widest() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl"))
        return 0;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return 1;
#endif
    return 2;
}

static int width = widest();

int run(const Form& form, const Call& call) {
    const bool wide = form.dtype == FLOAT64;
#if defined(__x86_64__)
    if (width == 0) return wide ? avx512_double::run(form, call) : avx512_float::run(form, call);
    if (width == 1) return wide ? avx2_double::run(form, call) : avx2_float::run(form, call);
#endif
    return wide ? plain_double::run(form, call) : plain_float::run(form, call);
}

int vector_width() { return width; }
void set_vector_width(int wanted) { width = wanted < widest() ? widest() : wanted; }
