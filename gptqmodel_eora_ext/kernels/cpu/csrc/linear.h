// A linear layer as the kernels read it, and what they do with it. No dependency but the C++ library, so that the
// build takes seconds and the result does not hang on torch's version.
//
// Outputs lie in vector lanes: a strip is 16 of them. Inputs are sorted by group and cut into segments (a group, or
// 1,024 inputs of one), padded to units of 16, so that a unit of a strip is 16 × 16 codes in 32 · bits bytes:
//
//   codes    strips × units × 32 · bits bytes. A 32-bit lane is an output, its four bytes are four inputs. Input
//            i = 4k + j of the unit lies in byte j, so that one dot product takes four inputs of 16 outputs:
//              2 bits  one vector, input i in the bits [2k, 2k + 2) of its byte
//              4 bits  two vectors of 8 inputs, k even in the low half of the byte
//              8 bits  four vectors of 4 inputs
//              3 bits  a pair of units is three vectors: two as at 2 bits hold the low two bits, the third holds the
//                      high bit of both (see `repack.cpp`); an odd number of units ends in half a pair
//   scales   strips × segments × 16
//   zeros    strips × segments × 16, 4 bits each (8 at 8 bits), or one value for all
//   up       strips × rank × 16, Bᵀ. Codes of 4 bits: strips × blocks of 8 components × 64 bytes, the last block filled
//            up with zeros. A 32-bit lane is an output; its byte j holds component j of the block in the low half, and
//            j + 4 in the high one, so that one dot product takes four components of 16 outputs
//   down     rank × padded_inputs(in), A. Codes of 4 bits: strips of 16 components × groups of 64 inputs × 512 bytes, a
//            lane a component, in blocks of 8 inputs as `up` has blocks of 8 components; scales: strips × groups × 16. Of
//            a last strip that has 8 components at most only the first 8 lanes are there, so that two blocks lie in 64
//            bytes
#pragma once
#include <cstdint>
#include <cstring>
#include <type_traits>

enum Kind : int32_t { F32 = 0, F16 = 1, BF16 = 2, I8 = 3, I4 = 4 };

// Inputs per unit, outputs per strip.
constexpr int LANES = 16;
// Features that share a scale of 8- and 4-bit factors.
constexpr int FACTOR_GROUP = 64;
// Components of Bᵀ of 4 bits that fill a vector, and inputs of A.
constexpr int BLOCK = 8;
// Components of A in a piece of work, multiplied with an input while it is at hand: 12,288 inputs in float32 do not fit
// the first cache. Of A of 4 bits a piece is a strip.
constexpr int COMPONENTS = 4;

struct Linear {
  int32_t bits, in_features, out_features, rank;
  int32_t segments, units, strips, zero;  // zero: the code of all zeros where `zeros` is null
  int32_t scale_kind, down_kind, up_kind, members;  // members: 0 where the components belong to one adapter
  const uint8_t* codes;
  const void* scales;
  const uint8_t* zeros;
  const int32_t* starts;       // segments + 1: first unit of each
  const int32_t* order;        // units · 16: the input at each place, −1 for padding; null where it is the place
  const void* down;
  const uint16_t* down_scales;  // float16, rank × ceil(in / 64), for integer kinds; of 4 bits in strips
  const void* up;
  const uint16_t* up_scales;    // float16, ceil(out / 64) × rank, likewise
  const float* bias;           // strips · 16, or null
  const int32_t* ends;         // members: the component after the last one of each member, ascending to `rank`
  // Bytes of each of these, which every call compares with what it will read.
  int64_t codes_bytes, scales_bytes, zeros_bytes, starts_bytes, order_bytes;
  int64_t down_bytes, down_scales_bytes, up_bytes, up_scales_bytes, bias_bytes, ends_bytes;
};

// Components of one member that a call reads, and the column of the call's weights that they are multiplied by; a
// negative member has none.
struct Range { int first, last, member; };

// What a call reads of a layer's components: whole members, and how many components these are.
struct Active {
  const Range* ranges;
  int count, rank;
};

// The members that some row gives a weight to; without weights, all components. `ranges` has room for each member.
inline Active active_of(const Linear& l, const float* weights, int rows, Range* ranges) {
  if (!weights || !l.members) {
    ranges[0] = {0, l.rank, -1};
    return {ranges, l.rank > 0, l.rank};
  }
  Active active = {ranges, 0, 0};
  for (int member = 0; member < l.members; ++member) {
    const int first = member ? l.ends[member - 1] : 0, last = l.ends[member];
    bool read = false;
    for (int row = 0; row < rows && !read; ++row) read = weights[int64_t(row) * l.members + member] != 0.0f;
    if (!read || first == last) continue;
    ranges[active.count++] = {first, last, member};
    active.rank += last - first;
  }
  return active;
}

constexpr int64_t strip_bytes(int bits, int units) {
  return bits == 3 ? (units + 1) / 2 * int64_t(192) : units * int64_t(32) * bits;
}

// Rows of A, and of x beside them, end in zeros.
constexpr int padded_inputs(int in_features) { return (in_features + FACTOR_GROUP - 1) / FACTOR_GROUP * FACTOR_GROUP; }

// Bytes of a factor's values of any kind.
constexpr int64_t factor_bytes(int kind, int64_t values) {
  return values * (kind == F32 ? 8 : kind == I8 ? 2 : kind == I4 ? 1 : 4) / 2;
}

// Components of factors of 4 bits, filled up to whole blocks.
constexpr int64_t in_blocks(int64_t components) { return (components + BLOCK - 1) / BLOCK * BLOCK; }

// Bytes of a strip's columns of Bᵀ, of so many components.
constexpr int64_t up_bytes(int kind, int64_t components) {
  return factor_bytes(kind, (kind == I4 ? in_blocks(components) : components) * LANES);
}

// Components of Bᵀ of 4 bits, filled up to whole vectors of t.
constexpr int up_places(int rank) { return (rank + LANES - 1) / LANES * LANES; }

static inline float half_to_float(uint16_t half) {
  uint32_t sign = uint32_t(half & 0x8000) << 16, rest = half & 0x7FFF, bits;
  // Shifted into a float's place the exponent is 112 too small, subnormal or not.
  const float rebias = 5192296858534827628530496329220096.0f;
  float value;
  bits = rest << 13;
  std::memcpy(&value, &bits, 4);
  value *= rebias;
  std::memcpy(&bits, &value, 4);
  if (rest >= 0x7C00) bits = 0x7F800000 | (rest & 0x3FF) << 13;
  bits |= sign;
  std::memcpy(&value, &bits, 4);
  return value;
}

// x in the forms that the kernels read; each has the rows one after the other.
struct Input {
  int rows, slices;
  float* wide;      // padded_inputs values a row
  // Inputs at their places as integers: x ≈ step · Σ digit · 256^slice, per segment.
  int8_t* digits;   // units · 16 · slices a row
  int32_t* sums;    // segments × slices a row: of the digits
  float* steps;     // segments a row
  // The same for A of 4 bits, in their own order and groups of 64; those above where the weight has the same.
  int8_t* down_digits;   // padded_inputs · slices a row
  int32_t* down_sums;    // groups × slices a row
  float* down_steps;     // groups a row
};

// For Bᵀ of 4 bits: what t times the scales of its columns is multiplied by to become integers, and memory of a thread
// for a group of outputs.
struct UpInput {
  const float* scales;  // one a row
  const float* steps;   // 1 over it
  float* scaled;        // `up_places` and a vector: a row at a time
  int8_t* digits;       // `up_places` · slices a row: of 16 components one slice after the other
  int32_t* sums;        // slices a row: of the digits
};

// One instruction set's kernels.
struct Kernels {
  // t = x Aᵀ, rows × rank, for the components [first, last).
  void (*down)(const Linear&, const Input& x, int first, int last, float* t);
  // One row as integers, in segments that begin at the units `starts`, or in groups of 64 where that is null.
  void (*quantize)(const float* x, const int32_t* starts, int segments, int slices, int8_t* digits, int32_t* sums,
                   float* steps);
  // One row of any floating kind in float32, filled up with zeros to `padded_inputs`.
  void (*widen)(const void* x, int kind, int in_features, float* out);
  // What t is multiplied by for Bᵀ of 4 bits, and 1 over it, of each row.
  void (*scale_up)(const Linear&, const Active& active, const float* t, int rows, int slices, float* scales,
                   float* steps);
  // y of the strips [first, last); a row of y begins `stride` values after the one before.
  void (*strips)(const Linear&, const Input& x, const float* t, const UpInput& up, const Active& active, int first,
                 int last, void* y, int64_t stride, int kind);
  // Ŵᵀ of a strip to a matrix in × stride, a row to an input.
  void (*dequantize)(const Linear&, int strip, float* out, int64_t stride);
};

// y = x Ŵᵀ + t Bᵀ + bias for many rows of bfloat16, t rows × the components that are active.
struct Matmul {
  void (*pack)(const Linear&, const Active&, const uint16_t* x, const uint16_t* t, int rows, int block,
               uint16_t* panel);
  void (*outputs)(const Linear&, const Active&, int pair, const uint16_t* panels, int rows, uint16_t* weights,
                  uint16_t* y, int64_t stride);
};
// Rows of x that are multiplied at a time.
constexpr int BLOCK_ROWS = 12;
// Pairs of inputs, the active components of the adapter among them.
inline int64_t input_pairs(const Linear& l, const Active& active) {
  return int64_t(l.units) * (LANES / 2) + (active.rank + 1) / 2;
}

const Kernels* avx512_kernels();  // null where it was not compiled in
const Kernels* avx2_kernels();
const Kernels* portable_kernels();
const Matmul* bf16_matmul();       // likewise
