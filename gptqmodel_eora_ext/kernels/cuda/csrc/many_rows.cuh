// y = x Ŵᵀ + t Bᵀ + bias, t = (x Aᵀ) ∘ g, for many rows of x on Hopper: bound by its tensor cores (wgmma).
//
// A block makes 128 outputs of ROWS rows. Its two warpgroups have 64 outputs each and all the rows: codes are unpacked into
// registers as the left operand, x is the right one, in shared memory in the order that the instruction wants (rows of
// 64 inputs, 16-byte pieces exchanged by the row's number). While the tensor cores multiply 64 inputs, the warps unpack
// the next 64 and later ones are on their way to shared memory. Ŵ is rounded to x's kind for the product as a dense weight
// would be; sums are float32. The adapter is more inputs: t in the place of x, B in the place of Ŵ.
//
// Where tiles are too few for the device, blocks share the inputs of a tile; the last to finish adds their sums in order.
#pragma once
#include "codes.cuh"
#include "linears.h"

namespace eora {

constexpr int OUTPUTS = 128;
// Inputs of a step, one row of which are the 128 bytes over which the instruction exchanges pieces.
constexpr int DEPTH = 64;
constexpr int STAGES = 4;
constexpr int BLOCK_THREADS = 256;
// Groups that a step may hold, of 16 inputs and more.
constexpr int STEP_GROUPS = 4;

struct ManyRowsCut {
    int32_t steps;            // of all inputs
    int32_t steps_per_split;
    int32_t splits;
    int32_t group_shift;      // of groups of 64 inputs and more: a step's number shifted to the right is its group
    int32_t groups_per_step;  // 1; of smaller groups 2 or 4
};

struct ManyRowsCall {
    const uint16_t* x;   // rows × in_features
    const uint16_t* t;   // rows × components, of x's kind
    uint16_t* ys[MOST_MODULES];
    float* partials;     // of splits
    int32_t* counters;   // a tile's each; zero before and after every launch
    int32_t rows;
};

template <int BITS>
constexpr int WORD_ROWS = DEPTH * BITS / 32;

template <int BITS, int ROWS>
struct Stage {
    alignas(1024) unsigned char x[ROWS * DEPTH * 2];
    alignas(16) uint32_t words[WORD_ROWS<BITS>][OUTPUTS];
    uint16_t scales[STEP_GROUPS][OUTPUTS];
    uint32_t zeros[STEP_GROUPS][OUTPUTS * BITS / 32];
};

// The outputs of a tile, turned, take the stages' place in the end; eight more to a row, so that neighbouring lanes write
// to other banks.
constexpr int TURNED_PITCH = OUTPUTS + 8;
template <int BITS, int ROWS>
constexpr int many_rows_bytes() {
    constexpr int stages = STAGES * sizeof(Stage<BITS, ROWS>), turned = ROWS * TURNED_PITCH * 2;
    return stages > turned ? stages : turned;
}

// Where 16 bytes of a row's inputs stand in a stage.
__device__ inline int exchanged(int row, int piece) { return row * 2 * DEPTH + ((piece ^ (row % 8)) << 4); }

// Two neighbouring codes, the lowest bits of `field`, as BASE + code each.
template <int BITS, bool BF16>
__device__ inline uint32_t neighbours(uint32_t field) {
    constexpr uint32_t code = (1u << BITS) - 1;
    return masked_or(masked_or(field, code, (field << (16 - BITS)) & (code << 16)), code | code << 16, BASES<BF16>);
}

template <int BITS, bool BF16, int ROWS>
struct ManyRows {
    using Memory = Stage<BITS, ROWS>;

    const Linears& all;
    const Module& one;
    const ManyRowsCall& call;
    const ManyRowsCut& cut;
    Memory* stages;
    int first_column, first_row;

    __device__ int lane() const { return threadIdx.x % 32; }
    // The lane's outputs within the block's are this one and the eighth after it.
    __device__ int output() const { return threadIdx.x / 32 * 16 + lane() / 4; }

    // What a thread copies of every step: its pieces of x, of words, of scales and of zeros. Pointers move on from step to
    // step, and what does not change is looked at once: to compute all of it anew took more than to unpack.
    static constexpr int PIECES = 2 * DEPTH / 16, X_COPIES = ROWS * PIECES / BLOCK_THREADS;
    static constexpr int ROWS_APART = BLOCK_THREADS / PIECES, ZERO_WORDS = OUTPUTS * BITS / 32;
    struct Source {
        const unsigned char* x;
        const unsigned char* words;
        const unsigned char* scales;
        const unsigned char* zeros;
        int input, word_row, step;
        uint32_t live_rows;  // a bit for each copy of x
        bool live_words, live_scales, live_zeros;
    };

    __device__ Source source(int step) const {
        const int thread = threadIdx.x, row = thread / PIECES, piece = thread % PIECES;
        const int word_row = step * WORD_ROWS<BITS> + thread / (OUTPUTS / 4);
        const int word_column = first_column + 4 * (thread % (OUTPUTS / 4));
        const int scale_column = first_column + 8 * (thread % (OUTPUTS / 8));
        const int row_words = (one.columns * BITS + 31) / 32, zero_word = first_column * BITS / 32 + thread % ZERO_WORDS;
        Source from;
        from.input = step * DEPTH + 8 * piece;
        from.word_row = word_row;
        from.step = step;
        from.x = reinterpret_cast<const unsigned char*>(
            call.x + static_cast<int64_t>(first_row + row) * all.in_features + from.input);
        from.words = reinterpret_cast<const unsigned char*>(
            one.qweight + static_cast<int64_t>(word_row) * one.columns + word_column);
        from.scales = reinterpret_cast<const unsigned char*>(
            one.scales + static_cast<int64_t>(thread / (OUTPUTS / 8)) * one.columns + scale_column);
        from.zeros = reinterpret_cast<const unsigned char*>(
            one.qzeros + static_cast<int64_t>(thread / ZERO_WORDS) * row_words + zero_word);
        from.live_rows = 0;
#pragma unroll
        for (int i = 0; i < X_COPIES; ++i)
            from.live_rows |= static_cast<uint32_t>(first_row + row + i * ROWS_APART < call.rows) << i;
        from.live_words = thread < WORD_ROWS<BITS> * OUTPUTS / 4 && word_column < one.columns;
        from.live_scales = thread < cut.groups_per_step * OUTPUTS / 8 && scale_column < one.columns;
        from.live_zeros = one.qzeros != nullptr && thread < cut.groups_per_step * ZERO_WORDS && zero_word < row_words;
        return from;
    }

    // Sends for the next step. What is dead and not copied stays in shared memory as it was, and is multiplied by zeros of
    // x or makes outputs that nobody stores.
    __device__ void fetch(Memory& to, Source& from) const {
        const int thread = threadIdx.x;
        const bool live_input = from.input < all.in_features;
        unsigned char* place = to.x + exchanged(thread / PIECES, thread % PIECES);
#pragma unroll
        for (int i = 0; i < X_COPIES; ++i)
            copy_async<16>(place + i * ROWS_APART * 2 * DEPTH,
                           from.x + static_cast<int64_t>(i) * (ROWS_APART * 2) * all.in_features,
                           live_input && (from.live_rows >> i & 1));
        if (from.live_words)
            copy_async<16>(&to.words[0][0] + 4 * thread, from.words, from.word_row * 32 < all.in_features * BITS);
        const int group = from.step * cut.groups_per_step >> cut.group_shift;
        if (from.live_scales)
            copy_async<16>(&to.scales[0][0] + 8 * thread, from.scales + static_cast<int64_t>(group) * 2 * one.columns,
                           (group + thread / (OUTPUTS / 8)) * all.group_size < all.in_features);
        if (from.live_zeros)
            copy_async<4>(&to.zeros[0][0] + thread,
                          from.zeros + static_cast<int64_t>(group) * ((one.columns * BITS + 31) / 32 * 4),
                          (group + thread / ZERO_WORDS) * all.group_size < all.in_features);
        from.x += 2 * DEPTH;
        from.words += static_cast<int64_t>(4 * WORD_ROWS<BITS>) * one.columns;
        from.input += DEPTH;
        from.word_row += WORD_ROWS<BITS>;
        ++from.step;
    }

    // Of one output: pairs of neighbouring inputs of a step of 16, from the lane's place on and 8 further.
    template <int T>
    __device__ void fields(const Memory& from, int column, uint32_t& near, uint32_t& far) const {
        const int shift = 2 * BITS * (lane() % 4);
        if constexpr (BITS == 2) {
            const uint32_t word = from.words[T][column] >> shift;
            near = word, far = word >> 16;
        } else if constexpr (BITS == 4) {
            near = from.words[2 * T][column] >> shift, far = from.words[2 * T + 1][column] >> shift;
        } else {
            constexpr int first = T / 2 * 3;
            const uint32_t middle = from.words[first + 1][column];
            if constexpr (T % 2 == 0) {
                const uint32_t low = from.words[first][column];
                near = low >> shift, far = funnel(low, middle, 24) >> shift;
            } else {
                const uint32_t high = from.words[first + 2][column];
                near = funnel(middle, high, 16) >> shift, far = high >> (8 + shift);
            }
        }
    }

    __device__ uint32_t scale_pair(uint16_t bits) const {
        const bool bf16 = all.scale_kind == BFLOAT16;
        const uint32_t scale = bf16 == BF16 ? bits : to_half<BF16>(from_half(bf16, bits));
        return scale | scale << 16;
    }
    __device__ uint32_t zero_pair(const Memory& from, int group, int column) const {
        const float zero = one.qzeros == nullptr ? static_cast<float>(1 << (BITS - 1))
                                                 : zero_at<BITS>(from.zeros[group], column * BITS);
        const uint32_t pair = to_half<BF16>(BASE<BF16> + zero);
        return pair | pair << 16;
    }

    // The left operand of 64 inputs: (code − zero) · scale of 16 inputs after the other.
    template <int T>
    __device__ void unpack(const Memory& from, uint32_t (&scale)[2], uint32_t (&zero)[2], uint32_t (&a)[4][4]) const {
        if constexpr (T < 4) {
            if (T == 0 || cut.groups_per_step == 4 || (T == 2 && cut.groups_per_step == 2)) {
                const int group = T * cut.groups_per_step / 4;
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    scale[half] = scale_pair(from.scales[group][output() + 8 * half]);
                    zero[half] = zero_pair(from, group, output() + 8 * half);
                }
            }
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                uint32_t near, far;
                fields<T>(from, output() + 8 * half, near, far);
                a[T][half] =
                    multiply_pairs<BF16>(subtract_pairs<BF16>(neighbours<BITS, BF16>(near), zero[half]), scale[half]);
                a[T][2 + half] =
                    multiply_pairs<BF16>(subtract_pairs<BF16>(neighbours<BITS, BF16>(far), zero[half]), scale[half]);
            }
            unpack<T + 1>(from, scale, zero, a);
        }
    }

    __device__ void multiply(const Memory& from, const uint32_t (&a)[4][4], float (&sums)[ROWS / 2]) const {
        begin_products();
        // The next 16 inputs of a row are 32 bytes further, which the exchange of pieces leaves as they are.
#pragma unroll
        for (int t = 0; t < 4; ++t) multiply_group<BF16, ROWS>(sums, a[t], from.x + 32 * t);
        end_products();
    }

    __device__ void wait(const uint32_t (&a)[4][4], float (&sums)[ROWS / 2]) const {
        wait_products();
#pragma unroll
        for (int t = 0; t < 4; ++t)
#pragma unroll
            for (int i = 0; i < 4; ++i) hold(a[t][i]);
#pragma unroll
        for (int i = 0; i < ROWS / 2; ++i) hold(sums[i]);
    }

    // t Bᵀ: components in the place of inputs, 64 at a time, through a stage that nothing is on its way to.
    __device__ void add_adapter(Memory& free, float (&sums)[ROWS / 2]) const {
        for (int first = 0; first < one.rank; first += DEPTH) {
            for (int at = threadIdx.x; at < ROWS * DEPTH; at += BLOCK_THREADS) {
                const int row = at / DEPTH, r = at % DEPTH;
                const bool live = first_row + row < call.rows && first + r < one.rank;
                const uint16_t value =
                    live ? call.t[static_cast<int64_t>(first_row + row) * all.components + one.first_rank + first + r] : 0;
                *reinterpret_cast<uint16_t*>(free.x + exchanged(row, r / 8) + 2 * (r % 8)) = value;
            }
            uint32_t a[4][4];
#pragma unroll
            for (int t = 0; t < 4; ++t)
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const int column = first_column + output() + 8 * (i % 2);
                    const int r = first + 16 * t + 2 * (lane() % 4) + 8 * (i / 2);
                    uint32_t pair = 0;
                    for (int k = 0; k < 2; ++k)
                        if (r + k < one.rank && column < one.columns)
                            pair |= static_cast<uint32_t>(to_half<BF16>(factor_value(r + k, column))) << (16 * k);
                    a[t][i] = pair;
                }
            publish_shared();
            __syncthreads();
            multiply(free, a, sums);
            wait(a, sums);
            __syncthreads();
        }
    }

    __device__ float factor_value(int r, int column) const {
        const int64_t at = static_cast<int64_t>(r) * one.columns + column;
        if (all.factor_kind == FLOAT16 || all.factor_kind == BFLOAT16)
            return from_half(all.factor_kind == BFLOAT16, static_cast<const uint16_t*>(one.up)[at]);
        const float scale = factor_scale(one.up_scales, r, column, one.columns);
        if (all.factor_kind == CODES8) return scale * static_cast<float>(static_cast<const int8_t*>(one.up)[at]);
        const int byte = static_cast<const uint8_t*>(one.up)[static_cast<int64_t>(r) * (one.columns / 2) + column / 2];
        return scale * static_cast<float>((byte >> (4 * (column % 2)) & 15) - 8);
    }

    __device__ void run(float (&sums)[ROWS / 2], int begin, int end) const {
        Source from = source(begin);
#pragma unroll 1
        for (int stage = 0; stage < STAGES - 1; ++stage) {
            if (begin + stage < end) fetch(stages[stage], from);
            close_group();
        }
        if (begin == 0) add_adapter(stages[STAGES - 1], sums);
        uint32_t a[4][4], scale[2], zero[2];
        wait_groups<STAGES - 2>();
        publish_shared();
        __syncthreads();
        unpack<0>(stages[0], scale, zero, a);
        int stage = 0;
#pragma unroll 1
        for (int step = begin; step < end; ++step) {
            multiply(stages[stage], a, sums);
            const int following = stage + 1 == STAGES ? 0 : stage + 1;
            uint32_t next[4][4];
            wait_groups<STAGES - 3>();
            publish_shared();
            __syncthreads();
            // All warps have waited for the products before the last, which read the stage that is filled now.
            if (step + STAGES - 1 < end) fetch(stages[stage == 0 ? STAGES - 1 : stage - 1], from);
            close_group();
            if (step + 1 < end) unpack<0>(stages[following], scale, zero, next);
            wait(a, sums);
#pragma unroll
            for (int t = 0; t < 4; ++t)
#pragma unroll
                for (int i = 0; i < 4; ++i) a[t][i] = next[t][i];
            stage = following;
        }
        wait_groups<0>();
        __syncthreads();
    }

    // Adds the sums of all splits in order, if this block is the last of its tile; whether it is.
    __device__ bool add_splits(float (&sums)[ROWS / 2], int tile, int tiles, int32_t* arrived) const {
        float4* mine = reinterpret_cast<float4*>(call.partials) + threadIdx.x;
        constexpr int each = ROWS / 8;
        auto place = [&](int split, int i) {
            return mine + ((static_cast<int64_t>(split) * tiles + tile) * each + i) * BLOCK_THREADS;
        };
#pragma unroll
        for (int i = 0; i < each; ++i)
            *place(blockIdx.z, i) = {sums[4 * i], sums[4 * i + 1], sums[4 * i + 2], sums[4 * i + 3]};
        __threadfence();
        __syncthreads();
        if (threadIdx.x == 0) *arrived = count_released(call.counters + tile);
        __syncthreads();
        if (*arrived != cut.splits - 1) return false;
        if (threadIdx.x == 0) call.counters[tile] = 0;
        __threadfence();
#pragma unroll
        for (int i = 0; i < each; ++i) {
            float4 sum = {0.0f, 0.0f, 0.0f, 0.0f};
            for (int split = 0; split < cut.splits; ++split) {
                const float4 part = read_from_l2(place(split, i));
                sum.x += part.x, sum.y += part.y, sum.z += part.z, sum.w += part.w;
            }
            sums[4 * i] = sum.x, sums[4 * i + 1] = sum.y, sums[4 * i + 2] = sum.z, sums[4 * i + 3] = sum.w;
        }
        return true;
    }

    // Rounds sums, turns them in shared memory, so that a row's outputs stand beside each other, and stores them.
    __device__ void store(const float (&sums)[ROWS / 2], uint16_t* y) const {
        uint16_t* turned = reinterpret_cast<uint16_t*>(stages);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int column = output() + 8 * half;
            const float bias = one.bias != nullptr && first_column + column < one.columns
                                   ? bias_at(all.bias_kind, one.bias, first_column + column)
                                   : 0.0f;
#pragma unroll
            for (int i = 0; i < ROWS / 8; ++i)
#pragma unroll
                for (int k = 0; k < 2; ++k)
                    turned[(8 * i + 2 * (lane() % 4) + k) * TURNED_PITCH + column] = to_half<BF16>(sums[4 * i + 2 * half + k] + bias);
        }
        __syncthreads();
        for (int at = threadIdx.x; at < ROWS * OUTPUTS / 8; at += BLOCK_THREADS) {
            const int row = at / (OUTPUTS / 8), column = 8 * (at % (OUTPUTS / 8));
            if (first_row + row < call.rows && first_column + column < one.columns)
                *reinterpret_cast<uint4*>(y + static_cast<int64_t>(first_row + row) * one.columns + first_column + column) =
                    *reinterpret_cast<const uint4*>(turned + row * TURNED_PITCH + column);
        }
    }
};

// Grid: tiles of outputs, module after module × tiles of rows × splits.
template <int BITS, bool BF16, int ROWS>
__global__ void __launch_bounds__(BLOCK_THREADS, 1) many_rows(const __grid_constant__ Linears all,
                                                              const __grid_constant__ ManyRowsCall call,
                                                              const __grid_constant__ ManyRowsCut cut) {
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
    EORA_SHARED_MEMORY(memory);
    int j = 0, tile = blockIdx.x;
    for (; j + 1 < all.module_count; ++j) {
        const int tiles = (all.modules[j].columns + OUTPUTS - 1) / OUTPUTS;
        if (tile < tiles) break;
        tile -= tiles;
    }
    auto* stages = reinterpret_cast<Stage<BITS, ROWS>*>(memory);
    const ManyRows<BITS, BF16, ROWS> work{all, all.modules[j], call, cut, stages, tile * OUTPUTS,
                                          static_cast<int>(blockIdx.y) * ROWS};
    float sums[ROWS / 2] = {};
    const int begin = blockIdx.z * cut.steps_per_split;
    work.run(sums, begin, min(begin + cut.steps_per_split, cut.steps));
    if (cut.splits > 1) {
        int32_t* arrived = reinterpret_cast<int32_t*>(stages);
        if (!work.add_splits(sums, blockIdx.y * gridDim.x + blockIdx.x, gridDim.x * gridDim.y, arrived)) return;
        __syncthreads();
    }
    work.store(sums, call.ys[j]);
#endif
}

}  // namespace eora
