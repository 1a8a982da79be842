// Compiled for its instruction set whatever the rest is compiled for; called only where the processor has it. What
// is shared with the rest is included first, so that no copy of it with these instructions can be linked elsewhere.
#include "linear.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512bf16,avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512bf16,avx2,fma,f16c")
#endif
#include "vec_avx512.h"
#include "matmul.inl"
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

const Matmul* bf16_matmul() { return &matmul; }
#else
const Matmul* bf16_matmul() { return nullptr; }
#endif
