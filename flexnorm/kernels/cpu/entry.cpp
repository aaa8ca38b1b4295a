#include "entry.h"

#if defined(__x86_64__)
namespace avx512 { int run(const Form&, const Call&); }
namespace avx2 { int run(const Form&, const Call&); }
#endif
namespace plain { int run(const Form&, const Call&); }

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
#if defined(__x86_64__)
    if (width == 0) return avx512::run(form, call);
    if (width == 1) return avx2::run(form, call);
#endif
    return plain::run(form, call);
}

int vector_width() { return width; }
void set_vector_width(int wanted) { width = wanted < widest() ? widest() : wanted; }
