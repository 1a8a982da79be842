// What Python calls: repacking once, then a linear layer from its codes or as a matrix product, or Ŵᵀ alone. Each
// returns a `Fault`, and has touched nothing where that is not `FINE`.
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "check.h"
#include "multiply.h"

namespace {

enum Isa { PORTABLE = 0, AVX2 = 1, AVX512 = 2, AVX512_BF16 = 3 };

const Kernels& kernels(int isa) {
  return *(isa >= AVX512 ? avx512_kernels() : isa == AVX2 ? avx2_kernels() : portable_kernels());
}

int best_isa() {
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

// A checkpoint's codes beside the memory that they are to be repacked into, or that they were repacked from.
Fault check_stream(const void* qweight, int64_t qweight_bytes, const int32_t* places, int64_t places_bytes, int bits,
                   int in, int out, int units, const void* codes, int64_t codes_bytes, int threads) {
  if (!readable_bits(bits)) return BAD_BITS;
  if (in < 1 || in > MOST_FEATURES || out < 1 || out > MOST_FEATURES || units < 1 || units > MOST_FEATURES / LANES)
    return BAD_SIZES;
  if (threads < 1) return BAD_THREADS;
  if (!holds(qweight, qweight_bytes, stream_words(in, bits) * out * 4)) return BAD_CODES;
  if (!holds(codes, codes_bytes, (out + LANES - 1) / LANES * strip_bytes(bits, units))) return BAD_CODES;
  if (!holds(places, places_bytes, int64_t(units) * LANES * 4)) return BAD_PLACES;
  for (int64_t place = 0; place < int64_t(units) * LANES; ++place) {
    if (places[place] < -1 || places[place] >= in) return BAD_PLACES;
  }
  return FINE;
}

// Whether the processor can run it with so many threads.
Fault check_run(int isa, int threads) {
  static const int best = best_isa();
  return isa < PORTABLE || isa > best ? BAD_ISA : threads < 1 ? BAD_THREADS : FINE;
}

}  // namespace

extern "C" {

int eora_best_isa() { return best_isa(); }

// A layer that was just put together: its sizes, and everything in it that is read as an index.
int eora_check(const Linear* linear) {
  const Fault fault = check_sizes(*linear);
  return fault ? fault : check_indices(*linear);
}

// Asks for large pages for memory that was not touched yet and starts on one; a refusal costs speed alone.
void eora_large_pages(void* memory, int64_t size) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  madvise(memory, size, MADV_HUGEPAGE);
#else
  (void)memory, (void)size;
#endif
}

// The codes of a GPTQ weight in the order of `linear.h`. qweight is words × out, `places` the input at each place, −1
// for padding; codes are zero.
int eora_repack(const uint32_t* qweight, int64_t qweight_bytes, const int32_t* places, int64_t places_bytes, int bits,
                int in, int out, int units, uint8_t* codes, int64_t codes_bytes, int threads) {
  if (const Fault fault = check_stream(qweight, qweight_bytes, places, places_bytes, bits, in, out, units, codes,
                                       codes_bytes, threads))
    return fault;
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
  return FINE;
}

// The inverse of `eora_repack`, into words that are zero. Bits of the last words that belong to no code stay zero.
int eora_unpack(uint32_t* qweight, int64_t qweight_bytes, const int32_t* places, int64_t places_bytes, int bits, int in,
                int out, int units, const uint8_t* codes, int64_t codes_bytes, int threads) {
  if (const Fault fault = check_stream(qweight, qweight_bytes, places, places_bytes, bits, in, out, units, codes,
                                       codes_bytes, threads))
    return fault;
  const int strips = (out + LANES - 1) / LANES;
  const uint32_t mask = (1u << bits) - 1;
#pragma omp parallel for num_threads(threads)
  for (int strip = 0; strip < strips; ++strip) {
    const uint32_t* from = (const uint32_t*)(codes + strip * strip_bytes(bits, units));
    const int lanes = out - strip * LANES < LANES ? out - strip * LANES : LANES;
    for (int64_t place = 0; place < int64_t(units) * LANES; ++place) {
      if (places[place] < 0) continue;
      const int64_t unit = place / LANES, bit = int64_t(places[place]) * bits;
      const int i = place % LANES, j = i % 4, k = i / 4, shift = bit % 32;
      uint32_t* to = qweight + bit / 32 * out + strip * LANES;
      for (int lane = 0; lane < lanes; ++lane) {
        uint32_t code;
        if (bits == 2) {
          code = from[unit * 16 + lane] >> (8 * j + 2 * k);
        } else if (bits == 4) {
          code = from[unit * 32 + k / 2 * 16 + lane] >> (8 * j + 4 * (k % 2));
        } else if (bits == 8) {
          code = from[unit * 64 + k * 16 + lane] >> (8 * j);
        } else {
          const uint32_t* pair = from + unit / 2 * 48;
          const uint32_t low = pair[unit % 2 * 16 + lane] >> (8 * j + 2 * k);
          code = (low & 3) | (pair[32 + lane] >> ((8 * j + 2 * (k + 1) + unit % 2) % 32) & 1) << 2;
        }
        code &= mask;
        to[lane] |= code << shift;
        if (shift + bits > 32) to[lane + out] |= code >> (32 - shift);
      }
    }
  }
  return FINE;
}

// y = x Ŵᵀ + (x Aᵀ) Bᵀ + bias from the codes, of layers that read the same x with the same segments and order of inputs.
// y is rows × the outputs of all layers, side by side. With weights, rows × members, the components of each member are
// multiplied by its weight of the row: y = x Ŵᵀ + ((x Aᵀ) ∘ g) Bᵀ + bias. A member whose weight is 0 in every row is not
// read.
int eora_linears(const Linear* const* linears, int count, const char* x, int64_t x_bytes, int kind, int rows,
                 const float* weights, int64_t weights_bytes, char* y, int64_t y_bytes, int isa, int threads) {
  if (const Fault fault = check_together(linears, count)) return fault;
  if (const Fault fault = check_run(isa, threads)) return fault;
  if (!floating(kind)) return BAD_KINDS;
  if (rows < 1 || x_bytes != int64_t(rows) * linears[0]->in_features * bytes_of(kind)) return BAD_INPUT;
  int64_t outputs = 0;
  for (int i = 0; i < count; ++i) {
    if (const Fault fault = check_weights(*linears[i], weights, weights_bytes, rows)) return fault;
    outputs += linears[i]->out_features;
  }
  if (y_bytes != rows * outputs * bytes_of(kind)) return BAD_OUTPUT;
  multiply({linears, count, x, kind, rows, weights, y, outputs, kernels(isa)}, threads);
  return FINE;
}

// t = x Aᵀ in float32 of layers as `eora_linears` takes them, without weights: rows × rank of each, one after the other.
int eora_components(const Linear* const* linears, int count, const char* x, int64_t x_bytes, int kind, int rows, float* t,
                    int64_t t_bytes, int isa, int threads) {
  if (const Fault fault = check_together(linears, count)) return fault;
  if (const Fault fault = check_run(isa, threads)) return fault;
  if (!floating(kind)) return BAD_KINDS;
  if (rows < 1 || x_bytes != int64_t(rows) * linears[0]->in_features * bytes_of(kind)) return BAD_INPUT;
  int64_t rank = 0;
  for (int i = 0; i < count; ++i) rank += linears[i]->rank;
  if (!rank || !holds(t, t_bytes, rows * rank * 4)) return BAD_COMPONENTS;
  multiply_components({linears, count, x, kind, rows, nullptr, nullptr, 0, kernels(isa), t}, threads);
  return FINE;
}

// Ŵᵀ of the strips [first, last) in float32, in × stride; padded outputs are written too.
int eora_dequantize(const Linear* linear, int first, int last, float* out, int64_t out_bytes, int64_t stride, int isa,
                    int threads) {
  if (const Fault fault = check_sizes(*linear)) return fault;
  if (const Fault fault = check_run(isa, threads)) return fault;
  if (first < 0 || last <= first || last > linear->strips || stride < int64_t(last - first) * LANES ||
      out_bytes < linear->in_features * stride * 4)
    return BAD_OUTPUT;
  const Kernels& k = kernels(isa);
#pragma omp parallel for num_threads(threads)
  for (int strip = first; strip < last; ++strip) {
    k.dequantize(*linear, strip, out + int64_t(strip - first) * LANES, stride);
  }
  return FINE;
}

// y = x Ŵᵀ + t Bᵀ + bias for many rows of bfloat16; on processors of AVX512_BF16 only. t is rows × the components that
// are active, weighed already. `read` holds a number for each member, 0 for those whose components are not among them;
// null where all are. A row of y begins `stride` values after the one before.
int eora_matmul(const Linear* linear, const uint16_t* x, int64_t x_bytes, const uint16_t* t, int64_t t_bytes, int rows,
                const float* read, int64_t read_bytes, uint16_t* y, int64_t y_bytes, int64_t stride, int threads) {
  const Linear& l = *linear;
  if (const Fault fault = check_sizes(l)) return fault;
  if (const Fault fault = check_run(AVX512_BF16, threads)) return fault;
  if (rows < 1 || x_bytes != int64_t(rows) * l.in_features * 2) return BAD_INPUT;
  if (const Fault fault = check_weights(l, read, read_bytes, 1)) return fault;
  const Active active = active_of(l, read, 1, scratch<Range, 10>(l.members > 0 ? l.members : 1));
  if (active.rank && !holds(t, t_bytes, int64_t(rows) * active.rank * 2)) return BAD_COMPONENTS;
  if (stride < l.out_features || y_bytes != ((rows - 1) * stride + l.out_features) * 2) return BAD_OUTPUT;
  const Matmul& m = *bf16_matmul();
  const int64_t block_size = input_pairs(l, active) * BLOCK_ROWS * 2;
  const int blocks = (rows + BLOCK_ROWS - 1) / BLOCK_ROWS;
  uint16_t* panels = scratch<uint16_t, 5>(blocks * block_size);
#pragma omp parallel num_threads(threads)
  {
#pragma omp for
    for (int block = 0; block < blocks; ++block) m.pack(l, active, x, t, rows, block, panels + block * block_size);
    uint16_t* weights = scratch<uint16_t, 6>(input_pairs(l, active) * LANES * 4);
#pragma omp for schedule(dynamic, 1)
    for (int pair = 0; pair < (l.strips + 1) / 2; ++pair) m.outputs(l, active, pair, panels, rows, weights, y, stride);
  }
  return FINE;
}

}  // extern "C"
