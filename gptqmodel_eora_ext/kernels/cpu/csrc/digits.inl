// A row of x as the kernels read it. Included after one of the `vec_*.h`.
//
// It becomes integers of `slices` signed bytes with a power of two per segment. Two slices (an error of some 2^-15 of
// the segment's largest input) serve 16-bit inputs, three (2^-23) float32.
#pragma once
#include "codes.inl"

namespace {

void widen(const void* x, int kind, int in_features, float* out) {
  int i = 0;
  for (; i + LANES <= in_features; i += LANES) fstore(out + i, load16(x, kind, i));
  alignas(64) char lanes[64] = {};
  __builtin_memcpy(lanes, (const char*)x + int64_t(i) * size_of(kind), (in_features - i) * size_of(kind));
  for (bool first = true; i < padded_inputs(in_features); i += LANES, first = false) {
    fstore(out + i, first ? load16(lanes, kind, 0) : fzero());
  }
}

// Inputs below this in a whole segment count as zero: their reciprocal step would leave float32.
constexpr float TINY = 0x1p-100f;

// How large some numbers are, and whether all are finite.
struct Extent {
  F size = fzero(), poison = fzero();

  void take(F x) {
    size = fmax16(fabs16(x), size);
    poison = fma(x, fzero(), poison);
  }
};

// What numbers are multiplied by to become integers of so many bytes, a power of two, and 1 over it: 0 and 0 where they
// count as zero, 0 and NaN where one is not finite.
inline float integer_scale(const Extent& extent, int slices, float* step) {
  // The largest integer of balanced digits: 127 · (1 + 256 + …).
  const float highest = slices == 2 ? 32639.0f : 8355711.0f;
  const float largest_input = largest(extent.size), bad = sum(extent.poison);
  float scale = 0.0f;
  *step = bad;
  if (bad == 0.0f && largest_input >= TINY) {
    uint32_t bits;
    __builtin_memcpy(&bits, &largest_input, 4);
    uint32_t exponent = 127 + (8 * slices - 2) + 127 - (bits >> 23);
    bits = exponent << 23;
    __builtin_memcpy(&scale, &bits, 4);
    if (largest_input * scale > highest) scale *= 0.5f;
    *step = 1.0f / scale;
  }
  return scale;
}

inline float integer_scale(const float* x, int count, int slices, float* step) {
  Extent extent;
  for (int i = 0; i < count; i += LANES) extent.take(fload(x + i));
  return integer_scale(extent, slices, step);
}

// The lowest byte of each lane as a signed number, which is taken off what is left.
inline I next_digit(I& rest) {
  I digit = sar<24>(shl<24>(rest));
  rest = sar<8>(isub(rest, digit));
  return digit;
}

// Inputs as integers of so many bytes, a multiple of 16 of them: of each 16 one slice after the other, and sums of slices.
inline void write_digits(const float* x, int count, float scale, int slices, int8_t* digits, int32_t* sums) {
  I total[3] = {izero(), izero(), izero()};
  for (int place = 0; place < count; place += LANES) {
    // A NaN times 0 is NaN, whose integer is arbitrary; the step poisons the sum anyway.
    I rest = to_int(fmul(fload(x + place), fset(scale)));
    for (int s = 0; s < slices; ++s) {
      const I digit = next_digit(rest);
      store_i8(digits + place * slices + s * LANES, digit);
      total[s] = iadd(total[s], digit);
    }
  }
  for (int s = 0; s < slices; ++s) sums[s] = sum(total[s]);
}

void quantize(const float* x, const int32_t* starts, int segments, int slices, int8_t* digits, int32_t* sums,
              float* steps) {
  for (int segment = 0; segment < segments; ++segment) {
    const int begin = starts ? starts[segment] * LANES : segment * FACTOR_GROUP;
    const int end = starts ? starts[segment + 1] * LANES : begin + FACTOR_GROUP;
    const float scale = integer_scale(x + begin, end - begin, slices, steps + segment);
    write_digits(x + begin, end - begin, scale, slices, digits + int64_t(begin) * slices, sums + segment * slices);
  }
}

// t times the scales of Bᵀ's active columns in a group of outputs: of each 16, the first component and the products.
template <typename Take>
inline void scaled_by_group(const Linear& l, const Active& active, const float* t, int group, Take take) {
  const uint16_t* scales = l.up_scales + int64_t(group) * l.rank;
  for (int i = 0; i < active.count; ++i) {
    const int last = active.ranges[i].last;
    int c = active.ranges[i].first;
    for (; c + LANES <= last; c += LANES) take(c, fmul(fload(t + c), load_f16(scales + c)));
    if (c < last) take(c, fmul(fload(t + c, last - c), load_f16(scales + c, last - c)));
  }
}

// One scale for all groups of outputs: with one for each, a call took 1 to 3 % longer.
void scale_up(const Linear& l, const Active& active, const float* t, int rows, int slices, float* scales, float* steps) {
  const int groups = (l.strips * LANES + FACTOR_GROUP - 1) / FACTOR_GROUP;
  for (int row = 0; row < rows; ++row, t += l.rank) {
    Extent extent;
    for (int group = 0; group < groups; ++group) {
      scaled_by_group(l, active, t, group, [&](int, F product) { extent.take(product); });
    }
    scales[row] = integer_scale(extent, slices, steps + row);
  }
}

// t times the scales of a group of outputs as integers, 0 for components that are not active.
void quantize_up(const Linear& l, const Active& active, const float* t, int group, int slices, const UpInput& up,
                 int row) {
  const int places = up_places(l.rank);
  if (active.count != 1 || active.rank != places) {
    for (int place = 0; place < places; place += LANES) fstore(up.scaled + place, fzero());
  }
  scaled_by_group(l, active, t, group, [&](int c, F product) { fstore(up.scaled + c, product); });
  write_digits(up.scaled, places, up.scales[row], slices, up.digits + int64_t(row) * places * slices,
               up.sums + row * slices);
}

}  // namespace
