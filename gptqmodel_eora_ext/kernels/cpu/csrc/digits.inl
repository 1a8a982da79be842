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

// What `count` inputs are multiplied by to become integers of so many bytes, a power of two, and 1 over it: 0 and 0
// where they count as zero, 0 and NaN where one is not finite.
inline float integer_scale(const float* x, int count, int slices, float* step) {
  // The largest integer of balanced digits: 127 · (1 + 256 + …).
  const float highest = slices == 2 ? 32639.0f : 8355711.0f;
  F size = fzero(), poison = fzero();
  for (int i = 0; i < count; i += LANES) {
    size = fmax16(fabs16(fload(x + i)), size);
    poison = fma(fload(x + i), fzero(), poison);
  }
  const float largest_input = largest(size), bad = sum(poison);
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

// The lowest byte of each lane as a signed number, which is taken off what is left.
inline I next_digit(I& rest) {
  I digit = sar<24>(shl<24>(rest));
  rest = sar<8>(isub(rest, digit));
  return digit;
}

void quantize(const Linear& l, const float* x, int slices, int8_t* digits, int32_t* sums, float* steps) {
  for (int segment = 0; segment < l.segments; ++segment) {
    const int begin = l.starts[segment] * LANES, end = l.starts[segment + 1] * LANES;
    const float scale = integer_scale(x + begin, end - begin, slices, steps + segment);
    I total[3] = {izero(), izero(), izero()};
    for (int place = begin; place < end; place += LANES) {
      // A NaN times 0 is NaN, whose integer is arbitrary; the step poisons the sum anyway.
      I rest = to_int(fmul(fload(x + place), fset(scale)));
      int8_t* out = digits + int64_t(place) * slices;
      for (int s = 0; s < slices; ++s) {
        I digit = next_digit(rest);
        store_i8(out + s * LANES, digit);
        total[s] = iadd(total[s], digit);
      }
    }
    for (int s = 0; s < slices; ++s) sums[segment * slices + s] = sum(total[s]);
  }
}

void quantize_down(const float* x, int in_features, int slices, int8_t* digits, int32_t* offsets, float* steps) {
  const int groups = padded_inputs(in_features) / FACTOR_GROUP;
  for (int group = 0; group < groups; ++group, x += FACTOR_GROUP, digits += slices * FACTOR_GROUP, offsets += 8) {
    const float scale = integer_scale(x, FACTOR_GROUP, slices, steps + group);
    for (int v = 0; v < FACTOR_GROUP / LANES; ++v) {
      I rest = to_int(fmul(by_halves(x + v * LANES), fset(scale)));
      for (int s = 0; s < slices; ++s) {
        alignas(16) int8_t sixteen[LANES];
        store_i8(sixteen, next_digit(rest));
        __builtin_memcpy(digits + s * FACTOR_GROUP + v * 8, sixteen, 8);
        __builtin_memcpy(digits + s * FACTOR_GROUP + v * 8 + 32, sixteen + 8, 8);
      }
    }
    I offset = izero();
    for (int s = slices - 1; s >= 0; --s) {
      const int8_t* slice = digits + s * FACTOR_GROUP;
      const I eights = dot4(dot4(izero(), bytes(8), load_twice(slice)), bytes(8), load_twice(slice + 32));
      offset = isub(shl<8>(offset), eights);
    }
    store_low(offsets, offset);
  }
}

}  // namespace
