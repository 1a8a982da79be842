// Compiled for its instruction set whatever the rest is compiled for; called only where the processor has it. What
// is shared with the rest is included first, so that no copy of it with these instructions can be linked elsewhere.
#include "linear.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif
#include "vec_avx2.h"
#include "kernels.inl"
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

const Kernels* avx2_kernels() { return &table; }
#else
const Kernels* avx2_kernels() { return nullptr; }
#endif
