// CUDA's kernels on the CPU: what the compiler is given before their sources, in place of NVIDIA's headers and of
// csrc/primitives.cuh. Blocks run one after the other, the threads of a block as contexts that take turns; whoever waits
// for its warp or its block lets the next one run. Asynchronous copies are made no earlier than somebody waits for them,
// so that a wait too few shows.
#pragma once
#include <ucontext.h>

#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define EORA_PRIMITIVES
#define __device__
#define __host__
#define __global__
#define __shared__
#define __grid_constant__
#define __align__(n) alignas(n)
#define __launch_bounds__(...)
#define EORA_SHARED_MEMORY(name) unsigned char* name = eora::shared_memory
#define EORA_LAUNCH(kernel, blocks, threads, bytes, stream, ...) \
    emulated::launch(blocks, threads, bytes, [=] { kernel(__VA_ARGS__); })

struct Place {
    int x, y, z;
    Place(int x = 1, int y = 1, int z = 1) : x(x), y(y), z(z) {}
};
using dim3 = Place;
struct uint2 {
    uint32_t x, y;
};
struct uint4 {
    uint32_t x, y, z, w;
};
struct float4 {
    float x, y, z, w;
};

inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }

namespace eora {
inline unsigned char* shared_memory = nullptr;
}

namespace emulated {

constexpr int WARP = 32, GROUP = 128, STACK = 96 << 10, MOST = 256;

struct Copy {
    void* to;
    const void* from;
    int bytes;
    bool live;
};

struct Thread {
    ucontext_t context;
    std::unique_ptr<char[]> stack;
    bool over = false;
    std::vector<Copy> open;
    std::vector<std::vector<Copy>> groups;
    // How often this thread met its warp, its warpgroup and its block.
    int met[3] = {};
};

// Threads that meet, and what each lays down for the others; two sets, since one may be ahead by one meeting.
struct Meeting {
    int arrived = 0, held = 0;
    unsigned char slots[2][GROUP][MOST];
};

inline std::vector<Thread> threads;
inline std::vector<Meeting> warps, groups, whole;
inline int current = 0;
inline ucontext_t outside;
inline Place thread, block, block_size, grid_size;

inline void pause() { swapcontext(&threads[current].context, &outside); }

inline int meet(int which, Meeting& meeting, int size, const void* mine, int bytes, int seat) {
    const int turn = threads[current].met[which]++;
    if (mine != nullptr) std::memcpy(meeting.slots[turn % 2][seat], mine, bytes);
    if (++meeting.arrived == size) {
        meeting.arrived = 0;
        ++meeting.held;
    }
    while (meeting.held <= turn) pause();
    return turn % 2;
}

inline Meeting& my_warp() { return warps[current / WARP]; }
inline int meet_warp(const void* mine = nullptr, int bytes = 0) {
    return meet(0, my_warp(), WARP, mine, bytes, current % WARP);
}
template <typename T>
T from_lane(int turn, int lane) {
    T value;
    std::memcpy(&value, my_warp().slots[turn][lane], sizeof(T));
    return value;
}

inline void finish(const Copy& copy) {
    if (copy.live)
        std::memcpy(copy.to, copy.from, copy.bytes);
    else
        std::memset(copy.to, 0, copy.bytes);
}

inline std::function<void()> body;
inline void entry() {
    body();
    threads[current].over = true;
    swapcontext(&threads[current].context, &outside);
}

inline void launch(dim3 blocks, int count, int bytes, std::function<void()> kernel) {
    body = kernel;
    // A margin that nobody may write to is looked at afterwards.
    std::vector<unsigned char> memory(bytes + 1280, 0xEE);
    unsigned char* aligned = memory.data() + (1024 - reinterpret_cast<uintptr_t>(memory.data()) % 1024);
    eora::shared_memory = aligned;
    block_size.x = count, grid_size = blocks;
    for (int number = 0; number < blocks.x * blocks.y * blocks.z; ++number) {
        block = {number % blocks.x, number / blocks.x % blocks.y, number / blocks.x / blocks.y};
        std::memset(aligned, 0xEE, bytes);
        threads.clear();
        threads.resize(count);
        warps.assign((count + WARP - 1) / WARP, {});
        groups.assign((count + GROUP - 1) / GROUP, {});
        whole.assign(1, {});
        for (Thread& one : threads) {
            one.stack.reset(new char[STACK]);
            getcontext(&one.context);
            one.context.uc_stack.ss_sp = one.stack.get();
            one.context.uc_stack.ss_size = STACK;
            one.context.uc_link = nullptr;
            makecontext(&one.context, entry, 0);
        }
        for (bool running = true; running;) {
            running = false;
            for (current = 0; current < count; ++current) {
                if (threads[current].over) continue;
                running = true;
                thread.x = current;
                swapcontext(&outside, &threads[current].context);
            }
        }
        for (int at = 0; at < 64; ++at)
            if (aligned[bytes + at] != 0xEE) __builtin_trap();
    }
}

inline float half_value(bool bf16, uint16_t bits) {
    if (bf16) {
        const uint32_t wide = static_cast<uint32_t>(bits) << 16;
        float value;
        std::memcpy(&value, &wide, 4);
        return value;
    }
    _Float16 value;
    std::memcpy(&value, &bits, 2);
    return static_cast<float>(value);
}

inline uint16_t half_bits(bool bf16, float value) {
    uint16_t bits;
    if (bf16) {
        uint32_t wide;
        std::memcpy(&wide, &value, 4);
        wide += 0x7FFF + ((wide >> 16) & 1);
        return static_cast<uint16_t>(wide >> 16);
    }
    const _Float16 narrow = static_cast<_Float16>(value);
    std::memcpy(&bits, &narrow, 2);
    return bits;
}

}  // namespace emulated

#define threadIdx emulated::thread
#define blockIdx emulated::block
#define blockDim emulated::block_size
#define gridDim emulated::grid_size

inline void __syncwarp() { emulated::meet_warp(); }
inline void __syncthreads() {
    emulated::meet(2, emulated::whole[0], static_cast<int>(emulated::threads.size()), nullptr, 0, 0);
}
template <typename T>
T __shfl_sync(unsigned, T value, int lane) {
    return emulated::from_lane<T>(emulated::meet_warp(&value, sizeof(T)), lane);
}
template <typename T>
T __shfl_xor_sync(unsigned, T value, int apart) {
    return emulated::from_lane<T>(emulated::meet_warp(&value, sizeof(T)), emulated::current % emulated::WARP ^ apart);
}
inline void __threadfence() {}
inline int atomicAdd(int32_t* place, int32_t value) {
    const int before = *place;
    *place += value;
    return before;
}

namespace eora {

template <int BYTES>
void copy_async(void* to, const void* from, bool live) {
    if (reinterpret_cast<uintptr_t>(to) % BYTES || (live && reinterpret_cast<uintptr_t>(from) % BYTES)) __builtin_trap();
    emulated::threads[emulated::current].open.push_back({to, from, BYTES, live});
}
inline void close_group() {
    auto& mine = emulated::threads[emulated::current];
    mine.groups.push_back(std::move(mine.open));
    mine.open.clear();
}
template <int PENDING>
void wait_groups() {
    auto& mine = emulated::threads[emulated::current];
    while (static_cast<int>(mine.groups.size()) > PENDING) {
        for (const auto& copy : mine.groups.front()) emulated::finish(copy);
        mine.groups.erase(mine.groups.begin());
    }
}
template <uint32_t SELECTOR>
uint32_t halves(uint32_t a, uint32_t b) {
    const uint64_t both = static_cast<uint64_t>(b) << 32 | a;
    uint32_t result = 0;
    for (int i = 0; i < 4; ++i) result |= static_cast<uint32_t>(both >> (8 * ((SELECTOR >> (4 * i)) & 7)) & 0xFF) << (8 * i);
    return result;
}
inline uint32_t funnel(uint32_t low, uint32_t high, uint32_t shift) {
    return static_cast<uint32_t>((static_cast<uint64_t>(high) << 32 | low) >> (shift % 32));
}
inline uint32_t masked_or(uint32_t word, uint32_t mask, uint32_t bits) { return (word & mask) | bits; }
template <bool BF16, typename Operation>
uint32_t each_half(uint32_t a, uint32_t b, Operation operation) {
    uint32_t result = 0;
    for (int shift = 0; shift < 32; shift += 16) {
        const float value = operation(emulated::half_value(BF16, static_cast<uint16_t>(a >> shift)),
                                      emulated::half_value(BF16, static_cast<uint16_t>(b >> shift)));
        result |= static_cast<uint32_t>(emulated::half_bits(BF16, value)) << shift;
    }
    return result;
}
template <bool BF16>
uint32_t multiply_pairs(uint32_t a, uint32_t b) {
    return each_half<BF16>(a, b, [](float x, float y) { return x * y; });
}
template <bool BF16>
uint32_t subtract_pairs(uint32_t a, uint32_t b) {
    return each_half<BF16>(a, b, [](float x, float y) { return x - y; });
}
inline float from_half(bool bf16, uint32_t bits) { return emulated::half_value(bf16, static_cast<uint16_t>(bits)); }
template <bool BF16>
uint16_t to_half(float value) {
    return emulated::half_bits(BF16, value);
}
template <bool BF16>
void multiply_tile(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
    struct {
        uint32_t a[4], b[2];
    } mine = {{a0, a1, a2, a3}, {b0, b1}};
    const int turn = emulated::meet_warp(&mine, sizeof(mine));
    const int lane = emulated::current % emulated::WARP;
    auto value = [](uint32_t pair, int which) {
        return emulated::half_value(BF16, static_cast<uint16_t>(pair >> (16 * which)));
    };
    for (int at = 0; at < 4; ++at) {
        const int row = lane / 4 + 8 * (at / 2), column = 2 * (lane % 4) + at % 2;
        for (int k = 0; k < 16; ++k) {
            const auto left = emulated::from_lane<decltype(mine)>(turn, row % 8 * 4 + k % 8 / 2);
            const auto right = emulated::from_lane<decltype(mine)>(turn, column * 4 + k % 8 / 2);
            d[at] += value(left.a[row / 8 + 2 * (k / 8)], k % 2) * value(right.b[k / 8], k % 2);
        }
    }
}
inline int32_t count_released(int32_t* counter) { return atomicAdd(counter, 1); }
inline int32_t acquired(const int32_t* counter) {
    emulated::pause();
    return *counter;
}
template <typename T>
T read_from_l2(const T* place) {
    return *place;
}

inline void begin_products() {}
inline void end_products() {}
inline void wait_products() {}
inline void hold(const uint32_t&) {}
inline void hold(float&) {}
inline void publish_shared() {}

// Of the right operand, the 16-byte piece of a row is found as the instruction does: by exchanging bits of the address.
template <bool BF16, int ROWS>
void multiply_group(float (&d)[ROWS / 2], const uint32_t (&a)[4], const void* b) {
    using namespace emulated;
    Meeting& meeting = groups[current / GROUP];
    const int turn = meet(1, meeting, GROUP, a, sizeof(a), current % GROUP);
    const int lane = current % WARP, warp = current % GROUP / WARP;
    const uint64_t start = static_cast<uint64_t>(static_cast<const unsigned char*>(b) - shared_memory);
    auto right = [&](int row, int k) {
        uint64_t address = start + row / 8 * 1024 + row % 8 * 128 + 2 * k;
        address ^= (address >> 7 & 7) << 4;
        uint16_t bits;
        std::memcpy(&bits, shared_memory + address, 2);
        return half_value(BF16, bits);
    };
    for (int half = 0; half < 2; ++half) {
        float left[16];
        for (int k = 0; k < 16; ++k) {
            uint32_t registers[4];
            std::memcpy(registers, meeting.slots[turn][warp * WARP + lane / 4 * 4 + k % 8 / 2], sizeof(registers));
            left[k] = half_value(BF16, static_cast<uint16_t>(registers[half + 2 * (k / 8)] >> (16 * (k % 2))));
        }
        for (int i = 0; i < ROWS / 8; ++i)
            for (int k = 0; k < 2; ++k)
                for (int depth = 0; depth < 16; ++depth)
                    d[4 * i + 2 * half + k] += left[depth] * right(8 * i + 2 * (lane % 4) + k, depth);
    }
}

}  // namespace eora
