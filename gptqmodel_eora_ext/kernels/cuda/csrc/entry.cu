// What Python calls, by ctypes. Each returns 0, or CUDA's number of what went wrong.
#include <algorithm>
#include <type_traits>

#include "few_rows.cuh"
#include "many_rows.cuh"

#ifdef __CUDACC__
#include <cuda_runtime_api.h>
using Stream = cudaStream_t;
#else
using Stream = void*;
#endif

namespace eora {

template <int VALUE>
using Constant = std::integral_constant<int, VALUE>;

// A kernel may take more shared memory than 48 KiB only after it was told so, once on every device.
template <typename Kernel>
int allow_memory([[maybe_unused]] Kernel kernel, [[maybe_unused]] int bytes) {
#ifdef __CUDACC__
    return static_cast<int>(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
#else
    return 0;
#endif
}

// Launches go to the current device: makes it another one while it lives.
struct OnDevice {
    explicit OnDevice([[maybe_unused]] int device) {
#ifdef __CUDACC__
        int current = device;
        cudaGetDevice(&current);
        if (current != device) before = current, cudaSetDevice(device);
#endif
    }
    ~OnDevice() {
#ifdef __CUDACC__
        if (before >= 0) cudaSetDevice(before);
#endif
    }
    int before = -1;
};

inline int launched() {
#ifdef __CUDACC__
    return static_cast<int>(cudaPeekAtLastError());
#else
    return 0;
#endif
}

// Calls `use` with the kernel's template arguments as constants: bits, steps of a chunk, whether x is bfloat16, most rows.
template <typename Use>
int with_instance(int bits, int steps, bool bf16, int rows, Use use) {
    auto by_rows = [&](auto width, auto chunk, auto kind) {
        if (rows == 1) return use(width, chunk, kind, Constant<1>());
        return rows <= 8 ? use(width, chunk, kind, Constant<8>()) : use(width, chunk, kind, Constant<16>());
    };
    auto by_kind = [&](auto width, auto chunk) {
        return bf16 ? by_rows(width, chunk, std::true_type()) : by_rows(width, chunk, std::false_type());
    };
    switch (10 * bits + steps) {
        case 21: return by_kind(Constant<2>(), Constant<1>());
        case 22: return by_kind(Constant<2>(), Constant<2>());
        case 31: return by_kind(Constant<3>(), Constant<1>());
        case 41: return by_kind(Constant<4>(), Constant<1>());
        case 42: return by_kind(Constant<4>(), Constant<2>());
        case 44: return by_kind(Constant<4>(), Constant<4>());
        default: return -1;
    }
}

// Likewise for many_rows: bits, whether x is bfloat16, rows of a tile.
template <typename Use>
int with_many_rows(int bits, bool bf16, int rows, Use use) {
    auto by_rows = [&](auto width, auto kind) {
        return rows == 64 ? use(width, kind, Constant<64>()) : use(width, kind, Constant<128>());
    };
    auto by_kind = [&](auto width) {
        return bf16 ? by_rows(width, std::true_type()) : by_rows(width, std::false_type());
    };
    switch (bits) {
        case 2: return by_kind(Constant<2>());
        case 3: return by_kind(Constant<3>());
        case 4: return by_kind(Constant<4>());
        default: return -1;
    }
}

}  // namespace eora

// Instances are called by the types of constants, since a lambda's arguments are no constants themselves.
#define EORA_MANY_ROWS eora::many_rows<decltype(width)::value, decltype(kind)::value, decltype(tile)::value>
#define EORA_FEW_ROWS eora::few_rows<decltype(width)::value, decltype(steps)::value, decltype(kind)::value, decltype(most)::value>

extern "C" {

// What a launch of few_rows is besides its operands.
struct FewRows {
    eora::Cut cut;
    int32_t bits, steps, bf16, rows, blocks, warps, bytes;
};

// Bytes of shared memory of a block; negative without such an instance.
int eora_few_rows_bytes(const FewRows* plan) {
    return eora::with_instance(plan->bits, plan->steps, true, plan->rows, [&](auto width, auto steps, auto, auto most) {
        constexpr int BITS = decltype(width)::value, STEPS = decltype(steps)::value;
        const int ring = eora::AHEAD<BITS, STEPS, decltype(most)::value> * eora::chunk_bytes<BITS, STEPS>(plan->rows);
        const int of_warp = plan->rows * eora::COLUMNS * 4;
        return std::max(plan->warps * ring, (plan->warps + 1) * of_warp) +
               (plan->cut.adapter_warps > 0 ? eora::adapter_bytes(plan->rows) : 0) + plan->cut.adapter_warps * of_warp;
    });
}

// Lets all instances on the current device have so many bytes.
int eora_allow_memory(int bytes, int with_many_rows) {
    int result = 0;
    for (int instance : {21, 22, 31, 41, 42, 44})
        for (int bf16 : {0, 1})
            for (int rows : {1, 8, 16})
                if (result == 0)
                    result = eora::with_instance(instance / 10, instance % 10, bf16 != 0, rows,
                                                 [&](auto width, auto steps, auto kind, auto most) {
                                                     return eora::allow_memory(EORA_FEW_ROWS, bytes);
                                                 });
    for (int bits : {2, 3, 4})
        for (int bf16 : {0, 1})
            for (int rows : {64, 128})
                if (result == 0 && with_many_rows)
                    result = eora::with_many_rows(bits, bf16 != 0, rows, [&](auto width, auto kind, auto tile) {
                        return eora::allow_memory(EORA_MANY_ROWS, bytes);
                    });
    return result;
}

// All that a launch needs but x, weights and y.
struct FewRowsBound {
    const eora::Linears* linears;
    FewRows plan;
    int32_t* workspace;  // counters, then room for x Aᵀ in parts
    Stream stream;
    int32_t device;
};

static int few_rows(const FewRowsBound* bound, const uint16_t* x, const float* weights, eora::Call call) {
    const FewRows& plan = bound->plan;
    call.x = x, call.weights = weights, call.rows = plan.rows;
    call.counters = bound->workspace, call.parts = reinterpret_cast<float*>(bound->workspace + eora::COUNTERS);
    const eora::OnDevice guard(bound->device);
    return eora::with_instance(
        plan.bits, plan.steps, plan.bf16 != 0, plan.rows, [&](auto width, auto steps, auto kind, auto most) {
            EORA_LAUNCH((EORA_FEW_ROWS), dim3(plan.blocks), (plan.warps + plan.cut.adapter_warps) * eora::WARP,
                        plan.bytes, bound->stream, *bound->linears, call, plan.cut);
            return eora::launched();
        });
}

// One function for each number of modules: every argument takes Python time.
#define EORA_ENTRY(modules, ...)                                                                                   \
    int eora_few_rows_##modules(const FewRowsBound* bound, const uint16_t* x, const float* weights, __VA_ARGS__)
using Y = uint16_t*;
EORA_ENTRY(1, Y a) { return few_rows(bound, x, weights, {nullptr, {a}}); }
EORA_ENTRY(2, Y a, Y b) { return few_rows(bound, x, weights, {nullptr, {a, b}}); }
EORA_ENTRY(3, Y a, Y b, Y c) { return few_rows(bound, x, weights, {nullptr, {a, b, c}}); }
EORA_ENTRY(4, Y a, Y b, Y c, Y d) { return few_rows(bound, x, weights, {nullptr, {a, b, c, d}}); }

// What a launch of many_rows is besides its operands.
struct ManyRowsPlan {
    eora::ManyRowsCut cut;
    int32_t bits, bf16, rows_of_tile, output_tiles;
};

int eora_many_rows(const eora::Linears* all, const ManyRowsPlan* plan, const uint16_t* x, const uint16_t* t, int rows,
                   float* partials, int32_t* counters, Stream stream, uint16_t* const* ys) {
    eora::ManyRowsCall call = {x, t, {}, partials, counters, rows};
    std::copy(ys, ys + all->module_count, call.ys);
    return eora::with_many_rows(plan->bits, plan->bf16 != 0, plan->rows_of_tile, [&](auto width, auto kind, auto tile) {
        constexpr int BITS = decltype(width)::value, ROWS = decltype(tile)::value;
        const dim3 grid(plan->output_tiles, (rows + ROWS - 1) / ROWS, plan->cut.splits);
        EORA_LAUNCH((EORA_MANY_ROWS), grid, eora::BLOCK_THREADS, (eora::many_rows_bytes<BITS, ROWS>()), stream, *all, call,
                    plan->cut);
        return eora::launched();
    });
}
}
