// What Python calls: repacking once, then a linear layer from its codes or as a matrix product, or Ŵᵀ alone.
#include <memory>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "linear.h"

namespace {

enum Isa { PORTABLE = 0, AVX2 = 1, AVX512 = 2, AVX512_BF16 = 3 };

const Kernels& kernels(int isa) {
  return *(isa >= AVX512 ? avx512_kernels() : isa == AVX2 ? avx2_kernels() : portable_kernels());
}

// Pieces per thread that the strips are cut into, so that a thread that is held up leaves its rest to others.
constexpr int PIECES = 8;

// Memory of the calling thread, kept from call to call.
template <typename T, int USE>
T* scratch(int64_t count) {
  thread_local std::unique_ptr<char[]> memory;
  thread_local int64_t size = 0;
  if (size < count * int64_t(sizeof(T)) + 64) {
    size = count * int64_t(sizeof(T)) + 64;
    memory.reset(new char[size]);
  }
  return (T*)((uintptr_t(memory.get()) + 63) & ~uintptr_t(63));
}

// The inputs of a row at their places.
const float* in_order(const Linear& l, const float* x, float* out) {
  for (int64_t place = 0; place < int64_t(l.units) * LANES; ++place) {
    out[place] = l.order[place] < 0 ? 0.0f : x[l.order[place]];
  }
  return out;
}

}  // namespace

extern "C" {

int eora_best_isa() {
#if defined(__x86_64__) && defined(__GNUC__)
  __builtin_cpu_init();
  const bool f16 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (avx512_kernels() && f16 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni"))
    return bf16_matmul() && __builtin_cpu_supports("avx512bf16") ? AVX512_BF16 : AVX512;
  if (avx2_kernels() && f16) return AVX2;
#endif
  return PORTABLE;
}

// Asks for large pages for memory that was not touched yet and starts on one; a refusal costs speed alone.
void eora_large_pages(void* memory, int64_t size) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  madvise(memory, size, MADV_HUGEPAGE);
#else
  (void)memory, (void)size;
#endif
}

// The codes of a GPTQ weight in the order of `linear.h`. qweight is words × out, `places` the input at each place.
void eora_repack(const uint32_t* qweight, const int32_t* places, int bits, int out, int units, uint8_t* codes,
                 int threads) {
  const int strips = (out + LANES - 1) / LANES;
  const uint32_t mask = (1u << bits) - 1;
#pragma omp parallel for num_threads(threads)
  for (int strip = 0; strip < strips; ++strip) {
    uint32_t* to = (uint32_t*)(codes + strip * strip_bytes(bits, units));
    const int lanes = out - strip * LANES < LANES ? out - strip * LANES : LANES;
    for (int64_t place = 0; place < int64_t(units) * LANES; ++place) {
      if (places[place] < 0) continue;
      const int64_t unit = place / LANES, bit = int64_t(places[place]) * bits;
      const int i = place % LANES, j = i % 4, k = i / 4, shift = bit % 32;
      const uint32_t* from = qweight + bit / 32 * out + strip * LANES;
      for (int lane = 0; lane < lanes; ++lane) {
        uint32_t code = from[lane] >> shift;
        if (shift + bits > 32) code |= from[lane + out] << (32 - shift);
        code &= mask;
        if (bits == 2) {
          to[unit * 16 + lane] |= code << (8 * j + 2 * k);
        } else if (bits == 4) {
          to[unit * 32 + k / 2 * 16 + lane] |= code << (8 * j + 4 * (k % 2));
        } else if (bits == 8) {
          to[unit * 64 + k * 16 + lane] |= code << (8 * j);
        } else {
          uint32_t* pair = to + unit / 2 * 48;
          pair[unit % 2 * 16 + lane] |= (code & 3) << (8 * j + 2 * k);
          // After a rotation by one for the odd unit, and by four for k ≥ 2, the high bit lies above the low two.
          pair[32 + lane] |= (code >> 2) << ((8 * j + 2 * (k + 1) + unit % 2) % 32);
        }
      }
    }
  }
}

// y = x Ŵᵀ + (x Aᵀ) Bᵀ + bias from the codes, of layers that read the same x with the same segments and order of inputs:
// x becomes integers once, and the components of all their A are one row of work.
void eora_linears(const Linear* const* linears, int count, const char* x, int kind, int rows, void* const* ys, int isa,
                  int threads) {
  const Linear& l = *linears[0];
  const Kernels& k = kernels(isa);
  const int slices = kind == F32 ? 3 : 2;
  const int64_t inputs = padded_inputs(l.in_features), places = int64_t(l.units) * LANES;
  const int64_t row_bytes = int64_t(l.in_features) * (kind == F32 ? 4 : 2);
  float* wide = scratch<float, 0>(rows * inputs);
  int8_t* digits = scratch<int8_t, 1>(rows * places * slices);
  int32_t* sums = scratch<int32_t, 2>(int64_t(rows) * l.segments * slices);
  float* steps = scratch<float, 3>(int64_t(rows) * l.segments);
  int64_t strips = 0, rank = 0;
  for (int i = 0; i < count; ++i) strips += linears[i]->strips, rank += linears[i]->rank;
  float* all_t = scratch<float, 4>(rows * rank);
  const int chunk = strips / (threads * PIECES) > 0 ? int(strips / (threads * PIECES)) : 1;
  // Pieces of work of each layer, and where its share of t begins.
  struct Share { int downs, pieces; float* t; };
  Share* shares = scratch<Share, 8>(count);
  int downs = 0, pieces = 0;
  for (int i = 0; i < count; ++i) {
    shares[i] = {(linears[i]->rank + COMPONENTS - 1) / COMPONENTS, (linears[i]->strips + chunk - 1) / chunk, all_t};
    downs += shares[i].downs, pieces += shares[i].pieces, all_t += int64_t(rows) * linears[i]->rank;
  }
  for (int row = 0; row < rows; ++row) k.widen(x + row * row_bytes, kind, l.in_features, wide + row * inputs);
#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(dynamic, 1)
    for (int work = 0; work < rows + downs; ++work) {
      if (work < rows) {
        const float* row = wide + work * inputs;
        if (l.order) row = in_order(l, row, scratch<float, 7>(places));
        k.quantize(l, row, slices, digits + work * places * slices,
                   sums + int64_t(work) * l.segments * slices, steps + int64_t(work) * l.segments);
      } else {
        int i = 0, first = work - rows;
        for (; first >= shares[i].downs; ++i) first -= shares[i].downs;
        first *= COMPONENTS;
        const int end = first + COMPONENTS, most = linears[i]->rank;
        k.down(*linears[i], wide, rows, first, end < most ? end : most, shares[i].t);
      }
    }
#pragma omp for schedule(dynamic, 1)
    for (int piece = 0; piece < pieces; ++piece) {
      int i = 0, first = piece;
      for (; first >= shares[i].pieces; ++i) first -= shares[i].pieces;
      first *= chunk;
      const int end = first + chunk, most = linears[i]->strips;
      k.strips(*linears[i], slices, digits, sums, steps, shares[i].t, rows, first, end < most ? end : most, ys[i],
               kind);
    }
  }
}

// Ŵᵀ of the strips [first, last) in float32, in × stride; padded outputs are written too.
void eora_dequantize(const Linear* linear, int first, int last, float* out, int64_t stride, int isa, int threads) {
  const Kernels& k = kernels(isa);
#pragma omp parallel for num_threads(threads)
  for (int strip = first; strip < last; ++strip) {
    k.dequantize(*linear, strip, out + int64_t(strip - first) * LANES, stride);
  }
}

// y = x Ŵᵀ + t Bᵀ + bias for many rows of bfloat16, t rows × rank; on processors of AVX512_BF16 only.
void eora_matmul(const Linear* linear, const uint16_t* x, const uint16_t* t, int rows, uint16_t* y, int threads) {
  const Linear& l = *linear;
  const Matmul& m = *bf16_matmul();
  const int64_t block_size = input_pairs(l) * BLOCK_ROWS * 2;
  const int blocks = (rows + BLOCK_ROWS - 1) / BLOCK_ROWS;
  uint16_t* panels = scratch<uint16_t, 5>(blocks * block_size);
#pragma omp parallel num_threads(threads)
  {
#pragma omp for
    for (int block = 0; block < blocks; ++block) m.pack(l, x, t, rows, block, panels + block * block_size);
    uint16_t* weights = scratch<uint16_t, 6>(input_pairs(l) * LANES * 4);
#pragma omp for schedule(dynamic, 1)
    for (int pair = 0; pair < (l.strips + 1) / 2; ++pair) m.outputs(l, pair, panels, rows, weights, y);
  }
}

}  // extern "C"
