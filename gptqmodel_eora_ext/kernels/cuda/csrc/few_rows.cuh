// y = x Ŵᵀ + ((x Aᵀ) ∘ g) Bᵀ + bias for up to 16 rows of x, in one launch: bound by memory.
//
// A block makes 32 outputs of one module. Its warps share the inputs; each goes through its own in chunks of one group, of
// some steps of four units, whose words, scales and x are on their way to shared memory several chunks ahead. Tensor cores
// multiply: a step's codes are rows of one operand (code_pair), x the columns of the other, and sums are exact products in
// float32. With S₁ the sum of x · 2^−p and S₀ that of x, made by one more product with a constant operand,
//
//     y = Σ over groups  s · (d − BASE · S₁ − zero · S₀).
//
// Some more warps of each block serve the adapter (few_rows_adapter.cuh). Sums are added in a fixed order: the same call
// gives the same bits.
#pragma once
#include "codes.cuh"
#include "few_rows_adapter.cuh"
#include "linears.h"

namespace eora {

// Chunks on their way to shared memory: 4 KB of words a warp and more, so that few warps keep memory busy.
template <int BITS, int STEPS, int MOST_ROWS>
constexpr int AHEAD = (BITS != 3 && STEPS == 1 ? 8 : 4) / (MOST_ROWS > 8 ? 2 : 1);

// Threads that a block may have, which is what decides how many registers one of them gets: 72 for one row, so that three
// blocks of nine warps run at once on a multiprocessor (96 from Blackwell on, whose assembler spills with fewer); 96 up to
// 8 rows; 168 beyond.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr int ONE_ROW_WARPS = 21;
#else
constexpr int ONE_ROW_WARPS = 28;
#endif
template <int MOST_ROWS>
constexpr int MOST_THREADS = MOST_ROWS == 1 ? ONE_ROW_WARPS * WARP : MOST_ROWS == 8 ? 17 * WARP : 9 * WARP;

// Bytes of a row of a chunk's x in shared memory, shifted by 16 against bank conflicts, and of all of the chunk: words, x,
// scales, zeros.
template <int BITS, int STEPS>
constexpr int X_BYTES = 8 * STEPS * Unit<BITS>::CODES + 16;
template <int BITS, int STEPS>
__host__ __device__ constexpr int chunk_bytes(int rows) {
    return 512 * STEPS * Unit<BITS>::WORDS + rows * X_BYTES<BITS, STEPS> + 2 * COLUMNS + 16;
}

template <int BITS, int STEPS, bool BF16, int MOST_ROWS>
struct Warp {
    static constexpr int ROW_TILES = (MOST_ROWS + 7) / 8;
    // A lane holds two neighbouring rows of a tile, of which one row needs the first alone.
    static constexpr int HELD = MOST_ROWS == 1 ? 1 : 2;
    static constexpr int CODES = Unit<BITS>::CODES, WORDS = Unit<BITS>::WORDS, PAIRS = Unit<BITS>::PAIRS;
    static constexpr int STEP_INPUTS = 4 * CODES, INPUTS = STEPS * STEP_INPUTS;

    const Linears& all;
    const Module& one;
    const Call& call;
    unsigned char* ring;
    int lane, tile;

    __device__ int quad() const { return lane % 4; }
    __device__ int row() const { return lane / 4; }
    __device__ unsigned char* x_of(unsigned char* slot, int which) const {
        return slot + 512 * STEPS * WORDS + which * X_BYTES<BITS, STEPS>;
    }
    __device__ unsigned char* scales_of(unsigned char* slot) const { return x_of(slot, call.rows); }

    // Where the lane's share of the next chunk lies; moved on from chunk to chunk, since to compute it anew for each took
    // more instructions than to multiply.
    struct Source {
        const unsigned char* words;
        const unsigned char* x;
        int unit_input, x_input;  // first inputs of both; past the end zeros are fetched
    };
    static constexpr int X_COPIES = 2 * INPUTS / 16;

    __device__ Source source(int chunk) const {
        const int64_t word = static_cast<int64_t>(4 * STEPS * chunk + quad()) * WORDS * one.columns + tile * COLUMNS + 4 * row();
        const int x_input = chunk * INPUTS + 8 * (lane % X_COPIES);
        return {reinterpret_cast<const unsigned char*>(one.qweight + word),
                reinterpret_cast<const unsigned char*>(call.x + (lane / X_COPIES) * all.in_features + x_input),
                chunk * INPUTS + CODES * quad(), x_input};
    }
    __device__ void advance(Source& source, int chunks) const {
        source.words += static_cast<int64_t>(chunks) * (16 * STEPS * WORDS * one.columns);
        source.x += static_cast<int64_t>(chunks) * (2 * INPUTS);
        source.unit_input += chunks * INPUTS;
        source.x_input += chunks * INPUTS;
    }

    // Sends for a chunk.
    __device__ void fetch(unsigned char* slot, const Source& from, int group, bool live_column) const {
#pragma unroll
        for (int step = 0; step < STEPS; ++step) {
            const bool live = live_column && from.unit_input + step * STEP_INPUTS < all.in_features;
#pragma unroll
            for (int word = 0; word < WORDS; ++word)
                copy_async<16>(slot + 512 * (step * WORDS + word) + 16 * lane,
                               from.words + (4 * step * WORDS + word) * (4 * one.columns), live);
        }
        const bool live_x = from.x_input < all.in_features;
        unsigned char* to = x_of(slot, lane / X_COPIES) + 16 * (lane % X_COPIES);
#pragma unroll
        for (int first = 0; first < X_COPIES * MOST_ROWS; first += WARP) {
            constexpr int apart = WARP / X_COPIES;
            const int before = first / WARP * apart;
            if (before + lane / X_COPIES < call.rows)
                copy_async<16>(to + before * X_BYTES<BITS, STEPS>, from.x + before * (2 * all.in_features), live_x);
        }
        if (quad() == 0)
            copy_async<8>(scales_of(slot) + 8 * row(),
                          one.scales + static_cast<int64_t>(group) * one.columns + tile * COLUMNS + 4 * row(),
                          live_column);
        if (one.qzeros != nullptr && lane < BITS) {
            const int row_words = (one.columns * BITS + 31) / 32, word = tile * BITS + lane;
            copy_async<4>(scales_of(slot) + 2 * COLUMNS + 4 * lane,
                          one.qzeros + static_cast<int64_t>(group) * row_words + word, word < row_words);
        }
    }

    // d of four columns and the sums of x; [.][0] and [1] of one column, [2] and [3] of the next.
    struct Sums {
        float d[2][ROW_TILES][4], x[ROW_TILES][4];
    };

    template <int T>
    __device__ void multiply(const uint32_t (&words)[4][WORDS], const uint32_t (&x)[ROW_TILES][PAIRS],
                             Sums& sums) const {
        if constexpr (T < PAIRS / 2) {
            constexpr Pair first = pair_at<BITS>(2 * T), second = pair_at<BITS>(2 * T + 1);
            constexpr uint32_t ones = power<BF16>(0) | power<BF16>(0) << 16;
            uint32_t b[ROW_TILES][2];
#pragma unroll
            for (int i = 0; i < ROW_TILES; ++i) {
                b[i][0] = input_pair<BITS, BF16, 2 * T>(x[i]);
                b[i][1] = input_pair<BITS, BF16, 2 * T + 1>(x[i]);
                multiply_tile<BF16>(sums.x[i], ones, power<BF16>(first.low_p) | power<BF16>(first.high_p) << 16, ones,
                                    power<BF16>(second.low_p) | power<BF16>(second.high_p) << 16, b[i][0], b[i][1]);
            }
#pragma unroll
            for (int c = 0; c < 2; ++c) {
                const uint32_t a0 = code_pair<BITS, BF16, 2 * T>(words[2 * c]);
                const uint32_t a1 = code_pair<BITS, BF16, 2 * T>(words[2 * c + 1]);
                const uint32_t a2 = code_pair<BITS, BF16, 2 * T + 1>(words[2 * c]);
                const uint32_t a3 = code_pair<BITS, BF16, 2 * T + 1>(words[2 * c + 1]);
#pragma unroll
                for (int i = 0; i < ROW_TILES; ++i) multiply_tile<BF16>(sums.d[c][i], a0, a1, a2, a3, b[i][0], b[i][1]);
            }
            multiply<T + 1>(words, x, sums);
        }
    }

    __device__ void add_step(unsigned char* slot, int step, Sums& sums) const {
        uint32_t words[4][WORDS], x[ROW_TILES][PAIRS];
#pragma unroll
        for (int word = 0; word < WORDS; ++word) {
            const uint4 four = *reinterpret_cast<const uint4*>(slot + 512 * (step * WORDS + word) + 16 * lane);
            words[0][word] = four.x, words[1][word] = four.y, words[2][word] = four.z, words[3][word] = four.w;
        }
#pragma unroll
        for (int i = 0; i < ROW_TILES; ++i) {
            // Columns of the product past the rows hold what nobody reads.
            const int which = MOST_ROWS == 1 ? 0 : min(8 * i + row(), call.rows - 1);
            const uint4* place =
                reinterpret_cast<const uint4*>(x_of(slot, which) + 2 * (step * STEP_INPUTS + CODES * quad()));
#pragma unroll
            for (int at = 0; at < PAIRS / 4; ++at) {
                const uint4 four = place[at];
                x[i][4 * at] = four.x, x[i][4 * at + 1] = four.y, x[i][4 * at + 2] = four.z, x[i][4 * at + 3] = four.w;
            }
        }
        multiply<0>(words, x, sums);
    }

    // y += s · (d − BASE · S₁ − zero · S₀) of a chunk: y[column][row tile][row].
    __device__ void apply_scales(unsigned char* slot, const Sums& sums, float (&y)[4][ROW_TILES][HELD]) const {
        const uint2 pairs = *reinterpret_cast<const uint2*>(scales_of(slot) + 8 * row());
        float scale[4], zero[4];
        const uint32_t bits[4] = {pairs.x & 0xFFFF, pairs.x >> 16, pairs.y & 0xFFFF, pairs.y >> 16};
        if (all.scale_kind == BFLOAT16) {
#pragma unroll
            for (int c = 0; c < 4; ++c) scale[c] = from_half(true, bits[c]);
        } else {
#pragma unroll
            for (int c = 0; c < 4; ++c) scale[c] = from_half(false, bits[c]);
        }
        if (one.qzeros == nullptr) {
#pragma unroll
            for (int i = 0; i < ROW_TILES; ++i)
#pragma unroll
                for (int j = 0; j < HELD; ++j) {
                    const float offset = BASE<BF16> * sums.x[i][j] + (1 << (BITS - 1)) * sums.x[i][2 + j];
#pragma unroll
                    for (int c = 0; c < 4; ++c) y[c][i][j] += scale[c] * (sums.d[c / 2][i][2 * (c % 2) + j] - offset);
                }
            return;
        }
#pragma unroll
        for (int c = 0; c < 4; ++c)
            zero[c] = zero_at<BITS>(reinterpret_cast<const uint32_t*>(scales_of(slot) + 2 * COLUMNS), (4 * row() + c) * BITS);
#pragma unroll
        for (int i = 0; i < ROW_TILES; ++i)
#pragma unroll
            for (int j = 0; j < HELD; ++j)
#pragma unroll
                for (int c = 0; c < 4; ++c) {
                    const float offset = BASE<BF16> * sums.x[i][j] + zero[c] * sums.x[i][2 + j];
                    y[c][i][j] += scale[c] * (sums.d[c / 2][i][2 * (c % 2) + j] - offset);
                }
    }

    // The warp's share of x Ŵᵀ: chunks `warp`, `warp` + `warps` and so on.
    __device__ void run(int warp, int warps, const Cut& cut, float (&y)[4][ROW_TILES][HELD]) const {
        constexpr int ahead = AHEAD<BITS, STEPS, MOST_ROWS>;
        const int bytes = chunk_bytes<BITS, STEPS>(call.rows);
        unsigned char* const end = ring + ahead * bytes;
        const bool live_column = tile * COLUMNS + 4 * row() < one.columns;
        Source from = source(warp);
        int fetched = warp;
        unsigned char* free_slot = ring;
        auto fetch_next = [&] {
            if (fetched < cut.chunks) {
                fetch(free_slot, from, fetched >> cut.group_shift, live_column);
                advance(from, warps);
                fetched += warps;
            }
            close_group();
            free_slot += bytes;
            if (free_slot == end) free_slot = ring;
        };
#pragma unroll 1
        for (int i = 0; i < ahead - 1; ++i) fetch_next();
        unsigned char* slot = ring;
#pragma unroll 1
        for (int chunk = warp; chunk < cut.chunks; chunk += warps) {
            fetch_next();
            wait_groups<ahead - 1>();
            __syncwarp();
            Sums sums = {};
#pragma unroll
            for (int step = 0; step < STEPS; ++step) add_step(slot, step, sums);
            apply_scales(slot, sums, y);
            __syncwarp();
            slot += bytes;
            if (slot == end) slot = ring;
        }
    }
};

// Grid: tiles of outputs, module after module. A block's last warps serve the adapter, where there is one.
template <int BITS, int STEPS, bool BF16, int MOST_ROWS>
__global__ void __launch_bounds__(MOST_THREADS<MOST_ROWS>, 1) few_rows(const __grid_constant__ Linears all,
                                                      const __grid_constant__ Call call,
                                                      const __grid_constant__ Cut cut) {
    EORA_SHARED_MEMORY(memory);
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const int warps = blockDim.x / WARP - cut.adapter_warps;
    int j = 0;
    while (j + 1 < all.module_count && static_cast<int>(blockIdx.x) >= all.modules[j + 1].first_tile) ++j;
    const Module& one = all.modules[j];
    const int tile = blockIdx.x - one.first_tile;
    const int ring = AHEAD<BITS, STEPS, MOST_ROWS> * chunk_bytes<BITS, STEPS>(call.rows);
    float* sums = reinterpret_cast<float*>(memory);
    using Weight = Warp<BITS, STEPS, BF16, MOST_ROWS>;
    float y[4][Weight::ROW_TILES][Weight::HELD] = {};
    if (warp < warps)
        Weight{all, one, call, memory + warp * ring, lane, tile}.run(warp, warps, cut, y);
    // Sums take the place of the steps, once all warps are through with these.
    const int of_warp = call.rows * COLUMNS;
    unsigned char* adapter = memory + max(warps * ring, (warps + 1) * of_warp * 4);
    float* corrections = reinterpret_cast<float*>(adapter + adapter_bytes(call.rows));
    if (warp >= warps)
        AdapterWarp<BF16, MOST_ROWS>{all, one, call, cut, adapter, lane, tile, warp - warps}.run(
            corrections + (warp - warps) * of_warp);
    wait_groups<0>();
    __syncthreads();
    if (warp < warps) {
        const int first_row = 2 * (lane % 4);
#pragma unroll
        for (int c = 0; c < 4; ++c)
#pragma unroll
            for (int i = 0; i < Weight::ROW_TILES; ++i)
#pragma unroll
                for (int k = 0; k < Weight::HELD; ++k)
                    if (8 * i + first_row + k < call.rows)
                        sums[warp * of_warp + (8 * i + first_row + k) * COLUMNS + 4 * (lane / 4) + c] = y[c][i][k];
    }
    __syncthreads();
    for (int at = threadIdx.x; at < of_warp; at += blockDim.x) {
        const int which = at / COLUMNS, column = tile * COLUMNS + at % COLUMNS;
        if (column >= one.columns) continue;
        float sum = 0.0f;
        for (int other = 0; other < warps; ++other) sum += sums[other * of_warp + at];
        for (int other = 0; other < cut.adapter_warps; ++other) sum += corrections[other * of_warp + at];
        if (one.bias != nullptr) sum += bias_at(all.bias_kind, one.bias, column);
        call.ys[j][static_cast<int64_t>(which) * one.columns + column] = to_half<BF16>(sum);
    }
}

}  // namespace eora
