// The few instructions of NVIDIA's that C++ has no name for. Each takes and gives raw 32-bit registers, so that the code
// above them is plain C++, which tests/kernels/cuda compiles for the CPU with instructions of its own making.
#ifndef EORA_PRIMITIVES
#define EORA_PRIMITIVES
#include <cstdint>

#define EORA_SHARED_MEMORY(name) extern __shared__ __align__(1024) unsigned char name[]
#define EORA_LAUNCH(kernel, blocks, threads, bytes, stream, ...) \
    kernel<<<blocks, threads, bytes, stream>>>(__VA_ARGS__)

namespace eora {

__device__ inline uint32_t shared_address(const void* place) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(place));
}

// BYTES from global to shared memory, without registers in between; zeros where not `live`, and nothing is read then.
template <int BYTES>
__device__ inline void copy_async(void* to, const void* from, bool live) {
    const int read = live ? BYTES : 0;
    if constexpr (BYTES == 16)
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(read));
    else
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared_address(to)), "l"(from), "n"(BYTES),
                     "r"(read));
}

// All copies since the last call are one group, of which all but the last PENDING are waited for.
__device__ inline void close_group() { asm volatile("cp.async.commit_group;"); }
template <int PENDING>
__device__ inline void wait_groups() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// Two 16-bit halves out of two registers: selector as of the instruction prmt.
template <uint32_t SELECTOR>
__device__ inline uint32_t halves(uint32_t a, uint32_t b) {
    return __byte_perm(a, b, SELECTOR);
}

// The 32 bits from `shift` on of the 64 that high:low are.
__device__ inline uint32_t funnel(uint32_t low, uint32_t high, uint32_t shift) {
    return __funnelshift_r(low, high, shift);
}

// (word & mask) | bits, in one operation.
__device__ inline uint32_t masked_or(uint32_t word, uint32_t mask, uint32_t bits) {
    uint32_t result;
    asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(result) : "r"(word), "r"(mask), "r"(bits));
    return result;
}

// Products of two pairs, rounded once.
template <bool BF16>
__device__ inline uint32_t multiply_pairs(uint32_t a, uint32_t b) {
    uint32_t result;
    if constexpr (BF16)
        asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(b), "r"(0x80008000u));
    else
        asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(result) : "r"(a), "r"(b));
    return result;
}

// Differences of two pairs, rounded once.
template <bool BF16>
__device__ inline uint32_t subtract_pairs(uint32_t a, uint32_t b) {
    uint32_t result;
    if constexpr (BF16)
        asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(result) : "r"(b), "r"(0xBF80BF80u), "r"(a));
    else
        asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(result) : "r"(a), "r"(b));
    return result;
}

__device__ inline float from_half(bool bf16, uint32_t bits) {
    if (bf16) return __uint_as_float(bits << 16);
    float result;
    asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(static_cast<uint16_t>(bits)));
    return result;
}

template <bool BF16>
__device__ inline uint16_t to_half(float value) {
    uint16_t result;
    if constexpr (BF16)
        asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(result) : "f"(value));
    else
        asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result) : "f"(value));
    return result;
}

// d += a b of a warp: a is 16 × 16, b 16 × 8, d 16 × 8 in float32 (mma.m16n8k16; its tables say which lane holds what).
template <bool BF16>
__device__ inline void multiply_tile(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                     uint32_t b1) {
    if constexpr (BF16)
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
    else
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// Counts one more and tells how many there were; what this thread wrote before is seen by who acquires the count.
__device__ inline int32_t count_released(int32_t* counter) {
    int32_t before;
    asm volatile("atom.add.acq_rel.gpu.global.s32 %0, [%1], 1;" : "=r"(before) : "l"(counter) : "memory");
    return before;
}

__device__ inline int32_t acquired(const int32_t* counter) {
    int32_t count;
    asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(count) : "l"(counter) : "memory");
    return count;
}

__device__ inline float read_from_l2(const float* place) { return __ldcg(place); }

__device__ inline float4 read_from_l2(const float4* place) { return __ldcg(place); }

// Hopper's products of a warpgroup (wgmma), which run beside it. Between begin_products and end_products they are started,
// and wait_products waits for all of them; what they read or add to must not be touched in between.
__device__ inline void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void end_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
__device__ inline void wait_products() { asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory"); }

// Tells the compiler that registers are read or written here: it does not know that the products use them until they are
// waited for, and might give them to something else, or copy a sum too early.
__device__ inline void hold(const uint32_t& value) { asm volatile("" ::"r"(value) : "memory"); }
__device__ inline void hold(float& value) { asm volatile("" : "+f"(value)::"memory"); }

// Makes what this thread wrote to shared memory, or waited for, visible to these products of others behind a barrier.
__device__ inline void publish_shared() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// How the products find their right operand: rows of 128 bytes, eight rows (1024 bytes) to a pattern, in which 16-byte
// pieces are exchanged by the row's number (PTX's "128-byte swizzle").
__device__ inline uint64_t operand(const void* place) {
    return (shared_address(place) & 0x3FFFF) >> 4 | uint64_t{1024 >> 4} << 32 | uint64_t{1} << 62;
}

#define EORA_FLOATS_8(d, i) \
    "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define EORA_PRODUCT_64(kind) \
    asm volatile("{.reg .pred add; setp.ne.b32 add, 1, 0; wgmma.mma_async.sync.aligned.m64n64k16.f32." kind "." kind " {" \
        "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15," \
        "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31" \
        "}, {%32,%33,%34,%35}, %36, add, 1, 1, 0;}" \
        : EORA_FLOATS_8(d, 0), EORA_FLOATS_8(d, 8), EORA_FLOATS_8(d, 16), EORA_FLOATS_8(d, 24) \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(operand(b)))
#define EORA_PRODUCT_128(kind) \
    asm volatile("{.reg .pred add; setp.ne.b32 add, 1, 0; wgmma.mma_async.sync.aligned.m64n128k16.f32." kind "." kind " {" \
        "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15," \
        "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31," \
        "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47," \
        "%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63" \
        "}, {%64,%65,%66,%67}, %68, add, 1, 1, 0;}" \
        : EORA_FLOATS_8(d, 0), EORA_FLOATS_8(d, 8), EORA_FLOATS_8(d, 16), EORA_FLOATS_8(d, 24), EORA_FLOATS_8(d, 32), EORA_FLOATS_8(d, 40), EORA_FLOATS_8(d, 48), EORA_FLOATS_8(d, 56) \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(operand(b)))

// d += a bᵀ: a is 64 × 16 in registers, b ROWS × 16 in shared memory; a lane holds of d what it would of ROWS / 8 tiles of
// multiply_tile, of 16 rows of a for each warp.
template <bool BF16, int ROWS>
__device__ inline void multiply_group(float (&d)[ROWS / 2], const uint32_t (&a)[4], const void* b) {
    if constexpr (ROWS == 64) {
        if constexpr (BF16) EORA_PRODUCT_64("bf16");
        else EORA_PRODUCT_64("f16");
    } else {
        if constexpr (BF16) EORA_PRODUCT_128("bf16");
        else EORA_PRODUCT_128("f16");
    }
}

}  // namespace eora

#endif
