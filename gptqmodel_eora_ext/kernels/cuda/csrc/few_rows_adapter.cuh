// The adapter's part of few_rows.cuh: ((x Aᵀ) ∘ g) Bᵀ of a block's outputs, by some of its warps while the others wait for
// memory.
//
// Shares of x Aᵀ are drawn as tickets: who draws one makes it before it waits for anything, so that all drawn shares get
// done however few blocks run at once. When no ticket is left a warp waits until all shares are counted, and multiplies by
// the block's columns of B. The last to pass sets the counters back for the next launch.
#pragma once
#include "codes.cuh"

namespace eora {

// Outputs of a block.
constexpr int COLUMNS = 32;
// Components whose B a block's adapter warps fetch at a time, all together.
constexpr int RANKS = 64;
constexpr int WARP = 32;
// Inputs of a share of x Aᵀ that a lane reads at a time, and a warp.
constexpr int SHARE_LANE = 8;
constexpr int SHARE_STEP = WARP * SHARE_LANE;
// Where in `Call::counters` each count stands.
enum Counter { DRAWN = 0, DONE = 1, PASSED = 2, COUNTERS = 4 };

// How the inputs are cut.
struct Cut {
    int32_t chunks;           // of all inputs; the last may go past their end
    int32_t group_shift;      // a chunk's group is its number shifted to the right by this
    int32_t parts;            // of the inputs for x Aᵀ
    int32_t inputs_per_part;  // a multiple of SHARE_STEP
    int32_t adapter_warps;    // of a block, beside those that multiply: a power of two; 0 without an adapter
};

__host__ __device__ constexpr int adapter_bytes(int rows) { return RANKS * COLUMNS * 2 + rows * RANKS * 4; }

// Eight values of a factor's row from `at` on, a multiple of eight within a row of `features`.
__device__ inline void factor_values(int kind, const void* factor, const uint16_t* scales, int64_t row, int at,
                                     int features, float (&values)[8]) {
    if (kind == FLOAT16 || kind == BFLOAT16) {
        const uint4 eight = *reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(factor) + row * features + at);
        const uint32_t pairs[4] = {eight.x, eight.y, eight.z, eight.w};
#pragma unroll
        for (int i = 0; i < 8; ++i)
            values[i] = from_half(kind == BFLOAT16, i % 2 ? pairs[i / 2] >> 16 : pairs[i / 2] & 0xFFFF);
        return;
    }
    const float scale = factor_scale(scales, row, at, features);
    if (kind == CODES8) {
        const uint2 eight = *reinterpret_cast<const uint2*>(static_cast<const int8_t*>(factor) + row * features + at);
#pragma unroll
        for (int i = 0; i < 8; ++i)
            values[i] = scale * static_cast<float>(static_cast<int8_t>((i < 4 ? eight.x : eight.y) >> (8 * (i % 4))));
    } else {
        const uint32_t eight =
            *reinterpret_cast<const uint32_t*>(static_cast<const uint8_t*>(factor) + row * (features / 2) + at / 2);
#pragma unroll
        for (int i = 0; i < 8; ++i)
            values[i] = scale * static_cast<float>(static_cast<int>((eight >> (4 * i)) & 15) - 8);
    }
}

__device__ inline void unpack_inputs(bool bf16, const uint16_t* x, float (&values)[8]) {
    const uint4 eight = *reinterpret_cast<const uint4*>(x);
    const uint32_t pairs[4] = {eight.x, eight.y, eight.z, eight.w};
#pragma unroll
    for (int i = 0; i < 8; ++i) values[i] = from_half(bf16, i % 2 ? pairs[i / 2] >> 16 : pairs[i / 2] & 0xFFFF);
}

// The weight of a component in a row.
__device__ inline float weight_of(const Linears& all, const Call& call, int which, int component) {
    return call.weights == nullptr ? 1.0f : call.weights[which * all.members + all.member_of[component]];
}

template <bool BF16, int MOST_ROWS>
struct AdapterWarp {
    const Linears& all;
    const Module& one;
    const Call& call;
    const Cut& cut;
    unsigned char* memory;  // adapter_bytes
    int lane, tile, helper;

    // Components of a block of RANKS that this warp multiplies by.
    __device__ int mine() const { return RANKS / cut.adapter_warps; }
    __device__ uint16_t* b() const { return reinterpret_cast<uint16_t*>(memory) + helper * mine() * COLUMNS; }
    __device__ float* t() const {
        return reinterpret_cast<float*>(memory + RANKS * COLUMNS * 2) + helper * mine() * call.rows;
    }

    // One component of x Aᵀ over one part of the inputs, of all rows.
    __device__ void make_share(int share) const {
        const int component = share % all.components, part = share / all.components;
        const int begin = part * cut.inputs_per_part, end = min(begin + cut.inputs_per_part, all.in_features);
        bool read = call.weights == nullptr;
        for (int which = 0; which < call.rows && !read; ++which) read = weight_of(all, call, which, component) != 0.0f;
        float sums[MOST_ROWS] = {};
        if (read && call.rows == 1) {
#pragma unroll 4
            for (int at = begin + SHARE_LANE * lane; at < end; at += SHARE_STEP) {
                float a[8], x[8];
                factor_values(all.factor_kind, all.down, all.down_scales, component, at, all.in_features, a);
                unpack_inputs(BF16, call.x + at, x);
#pragma unroll
                for (int i = 0; i < 8; ++i) sums[0] += a[i] * x[i];
            }
        } else if (read) {
            for (int at = begin + SHARE_LANE * lane; at < end; at += SHARE_STEP) {
                float a[8];
                factor_values(all.factor_kind, all.down, all.down_scales, component, at, all.in_features, a);
#pragma unroll
                for (int which = 0; which < MOST_ROWS; ++which)
                    if (which < call.rows) {
                        float x[8];
                        unpack_inputs(BF16, call.x + static_cast<int64_t>(which) * all.in_features + at, x);
#pragma unroll
                        for (int i = 0; i < 8; ++i) sums[which] += a[i] * x[i];
                    }
            }
        }
#pragma unroll
        for (int which = 0; which < MOST_ROWS; ++which)
            if (which < call.rows) {
                float sum = sums[which];
#pragma unroll
                for (int apart = WARP / 2; apart > 0; apart /= 2) sum += __shfl_xor_sync(~0u, sum, apart);
                if (lane == 0)
                    call.parts[(static_cast<int64_t>(part) * call.rows + which) * all.components + component] =
                        sum * weight_of(all, call, which, component);
            }
    }

    __device__ int draw() const {
        int ticket = 0;
        if (lane == 0) ticket = atomicAdd(call.counters + DRAWN, 1);
        return ticket;
    }

    __device__ void make_shares() const {
        const int shares = all.components * cut.parts;
        int ticket = __shfl_sync(~0u, draw(), 0);
        while (ticket < shares) {
            // Asked for now, so that its way to memory and back is over when this share is made.
            const int next = draw();
            make_share(ticket);
            if (lane == 0) count_released(call.counters + DONE);
            ticket = __shfl_sync(~0u, next, 0);
        }
    }

    // Bᵀ of components `first` and on, as it is stored or, for codes, as float16.
    __device__ void fetch_up(int first) const {
        const int count = min(mine(), one.rank - first);
        for (int chunk = lane; chunk < count * (COLUMNS / 8); chunk += WARP) {
            const int r = chunk / (COLUMNS / 8), column = tile * COLUMNS + 8 * (chunk % (COLUMNS / 8));
            uint16_t* to = b() + r * COLUMNS + 8 * (chunk % (COLUMNS / 8));
            const bool live = column < one.columns;
            if (all.factor_kind == FLOAT16 || all.factor_kind == BFLOAT16) {
                const uint16_t* up = static_cast<const uint16_t*>(one.up);
                copy_async<16>(to, up + (live ? static_cast<int64_t>(first + r) * one.columns + column : 0), live);
            } else {
                float values[8] = {};
                if (live) factor_values(all.factor_kind, one.up, one.up_scales, first + r, column, one.columns, values);
#pragma unroll
                for (int i = 0; i < 8; ++i) to[i] = to_half<false>(values[i]);
            }
        }
        close_group();
    }

    __device__ void fetch_t(int first) const {
        const int count = min(mine(), one.rank - first);
        for (int at = lane; at < count * call.rows; at += WARP) {
            const int r = at % count, which = at / count;
            const float* place = call.parts + which * all.components + one.first_rank + first + r;
            float sum = 0.0f;
#pragma unroll 4
            for (int part = 0; part < cut.parts; ++part)
                sum += read_from_l2(place + part * call.rows * all.components);
            t()[which * mine() + r] = sum;
        }
    }

    // t Bᵀ of the block's columns into `sums` (rows × COLUMNS): a lane has two columns and every other component.
    __device__ void run(float* sums) const {
        const bool bf16 = all.factor_kind == BFLOAT16;
        const int column = 2 * (lane % (COLUMNS / 2)), odd = lane / (COLUMNS / 2);
        const int begin = helper * mine();
        if (begin < one.rank) fetch_up(begin);
        make_shares();
        if (lane == 0) {
            while (acquired(call.counters + DONE) < all.components * cut.parts) {
            }
            if (count_released(call.counters + PASSED) == static_cast<int>(gridDim.x) * cut.adapter_warps - 1)
                call.counters[DRAWN] = call.counters[DONE] = call.counters[PASSED] = 0;
        }
        __syncwarp();
        float y[MOST_ROWS][2] = {};
        for (int first = begin; first < one.rank; first += RANKS) {
            if (first > begin) fetch_up(first);
            fetch_t(first);
            wait_groups<0>();
            __syncwarp();
            const int count = min(mine(), one.rank - first);
#pragma unroll 4
            for (int r = odd; r < count; r += 2) {
                const uint32_t pair = *reinterpret_cast<const uint32_t*>(b() + r * COLUMNS + column);
                const float low = from_half(bf16, pair & 0xFFFF), high = from_half(bf16, pair >> 16);
#pragma unroll
                for (int which = 0; which < MOST_ROWS; ++which)
                    if (which < call.rows) {
                        const float component = t()[which * mine() + r];
                        // B of a member without weight is not to count, whatever it holds.
                        if (component != 0.0f) y[which][0] += component * low, y[which][1] += component * high;
                    }
            }
            __syncwarp();
        }
#pragma unroll
        for (int which = 0; which < MOST_ROWS; ++which)
            if (which < call.rows)
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    const float other = __shfl_xor_sync(~0u, y[which][i], COLUMNS / 2);
                    if (odd == 0) sums[which * COLUMNS + column + i] = y[which][i] + other;
                }
    }
};

}  // namespace eora
