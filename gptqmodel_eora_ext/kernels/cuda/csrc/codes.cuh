// Codes out of words in pairs, as the tensor cores take them, without a conversion.
//
// A unit is the shortest run of codes of one output that fills whole words: one word at 2 and 4 bits, three at 3. A pair
// is two codes of a unit put into the mantissas of two 16-bit numbers whose exponents make them
//
//     BASE + code · 2^p,        BASE = 128 in bfloat16, 1024 in float16,
//
// one shift (often shared by two pairs) and one logical operation for two codes. Which two, and p of each, is chosen so
// that both lie 16 bits apart. p is undone by multiplying x by 2^−p, which is exact; BASE and the zero are subtracted
// from sums (few_rows.cuh).
#pragma once
#include "linears.h"
#include "primitives.cuh"

namespace eora {

template <int BITS>
struct Unit {
    static constexpr int WORDS = BITS == 3 ? 3 : 1;
    static constexpr int CODES = WORDS * 32 / BITS;
    static constexpr int PAIRS = CODES / 2;
};

// A pair: its inputs within the unit and the p of both.
struct Pair {
    int low, high, low_p, high_p;
};

// At 3 bits: where 16 pairs lie, by word and by how far it is shifted to the right. The last pair's codes straddle words.
//     word 0: 1 (to the left), 2, 8    word 1: 0, 6, 12    word 2: 1, 7, 13
constexpr Pair PAIRS_OF_3[16] = {
    {0, 5, 1, 0},   {1, 6, 1, 0},   {2, 7, 4, 3},   {3, 8, 1, 0},   {4, 9, 4, 3},   {11, 16, 1, 0},
    {12, 17, 4, 3}, {13, 18, 1, 0}, {14, 19, 4, 3}, {15, 20, 1, 0}, {22, 27, 1, 0}, {23, 28, 4, 3},
    {24, 29, 1, 0}, {25, 30, 4, 3}, {26, 31, 1, 0}, {10, 21, 0, 0},
};

template <int BITS>
__host__ __device__ constexpr Pair pair_at(int index) {
    if (BITS == 2) return {index, index + 8, 2 * (index % 2), 2 * (index % 2)};
    if (BITS == 4) return {index, index + 4, 0, 0};
    return PAIRS_OF_3[index];
}

template <bool BF16>
constexpr uint32_t BASES = BF16 ? 0x43004300u : 0x64006400u;
template <bool BF16>
constexpr float BASE = BF16 ? 128.0f : 1024.0f;

// 2^p as a 16-bit number, p from −4 to 4.
template <bool BF16>
__host__ __device__ constexpr uint32_t power(int p) {
    return BF16 ? static_cast<uint32_t>(127 + p) << 7 : static_cast<uint32_t>(15 + p) << 10;
}

// BASE + code · 2^p of the pair at INDEX of a unit.
template <int BITS, bool BF16, int INDEX>
__device__ inline uint32_t code_pair(const uint32_t (&words)[Unit<BITS>::WORDS]) {
    constexpr Pair pair = pair_at<BITS>(INDEX);
    constexpr uint32_t code = (1u << BITS) - 1;
    constexpr uint32_t mask = code << pair.low_p | code << (16 + pair.high_p);
    if constexpr (BITS == 3) {
        if constexpr (INDEX == 15) {
            const uint32_t low = funnel(words[0], words[1], 30), high = funnel(words[1], words[2], 15);
            return masked_or(high, code << 16, masked_or(low, code, BASES<BF16>));
        } else {
            constexpr int word = INDEX < 5 ? 0 : INDEX < 10 ? 1 : 2;
            constexpr int start = 3 * pair.low - 32 * word - pair.low_p;
            const uint32_t shifted = start < 0 ? words[word] << 1 : words[word] >> (start < 0 ? 0 : start);
            return masked_or(shifted, mask, BASES<BF16>);
        }
    } else {
        constexpr int start = BITS * pair.low - pair.low_p;
        return masked_or(words[0] >> start, mask, BASES<BF16>);
    }
}

// Values of x for the pair at INDEX, each times 2^−p; `x` holds the inputs of the unit, two to a register.
template <int BITS, bool BF16, int INDEX>
__device__ inline uint32_t input_pair(const uint32_t (&x)[Unit<BITS>::PAIRS]) {
    constexpr Pair pair = pair_at<BITS>(INDEX);
    constexpr uint32_t selector = (pair.high % 2 ? 0x7600u : 0x5400u) | (pair.low % 2 ? 0x32u : 0x10u);
    const uint32_t both = halves<selector>(x[pair.low / 2], x[pair.high / 2]);
    if constexpr (pair.low_p == 0 && pair.high_p == 0)
        return both;
    else
        return multiply_pairs<BF16>(both, power<BF16>(-pair.low_p) | power<BF16>(-pair.high_p) << 16);
}

// The zero of a column whose bits begin at `start` of a row of words.
template <int BITS>
__device__ inline float zero_at(const uint32_t* words, int start) {
    const uint32_t first = words[start / 32];
    const uint32_t second = BITS == 3 && start % 32 > 29 ? words[start / 32 + 1] : 0;
    return static_cast<float>(funnel(first, second, start % 32) & ((1u << BITS) - 1));
}

// The scale of a packed factor's value: `at` of a row of `features`.
__device__ inline float factor_scale(const uint16_t* scales, int64_t row, int at, int features) {
    return from_half(false, scales[row * ((features + FACTOR_GROUP - 1) / FACTOR_GROUP) + at / FACTOR_GROUP]);
}

__device__ inline float bias_at(int kind, const void* bias, int column) {
    if (kind == FLOAT32) return static_cast<const float*>(bias)[column];
    return from_half(kind == BFLOAT16, static_cast<const uint16_t*>(bias)[column]);
}

}  // namespace eora
