// The one symbol that Python calls: it picks the widest vectors that this machine has.
#include "form.h"

#if defined(__x86_64__)
namespace avx512 { int run(const Form&, const Call&); }
namespace avx2 { int run(const Form&, const Call&); }
#endif
namespace plain { int run(const Form&, const Call&); }

// 0: AVX-512, 1: AVX2, 2: what every machine of its kind has.
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

extern "C" {

#define PUBLIC __attribute__((visibility("default")))

// 0: done. 1: no memory. 2: no such dtype.
PUBLIC int flexnorm_run(const Form* form, const Call* call) {
#if defined(__x86_64__)
    if (width == 0) return avx512::run(*form, *call);
    if (width == 1) return avx2::run(*form, *call);
#endif
    return plain::run(*form, *call);
}

PUBLIC int flexnorm_width() { return width; }

// For tests: the kernels of narrower vectors than the machine has.
PUBLIC void flexnorm_set_width(int wanted) { width = wanted < widest() ? widest() : wanted; }

// The sizes of the structs, which Python compares with its own.
PUBLIC int64_t flexnorm_size_of_form() { return sizeof(Form); }
PUBLIC int64_t flexnorm_size_of_call() { return sizeof(Call); }
}
