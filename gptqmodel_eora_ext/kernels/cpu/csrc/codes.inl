// Reading and writing what `linear.h` draws. Included after one of the `vec_*.h`.
#pragma once

namespace {

inline I bytes(int32_t value) { return iset(value * 0x01010101); }

inline F load16(const void* base, int kind, int64_t offset) {
  switch (kind) {
    case F16: return load_f16((const uint16_t*)base + offset);
    case BF16: return load_bf16((const uint16_t*)base + offset);
    case I8: return load_i8((const int8_t*)base + offset);
    default: return fload((const float*)base + offset);
  }
}

inline void store16(void* base, int kind, int64_t offset, F value) {
  if (kind == F16) store_f16((uint16_t*)base + offset, value);
  else if (kind == BF16) store_bf16((uint16_t*)base + offset, value);
  else fstore((float*)base + offset, value);
}

inline int size_of(int kind) { return kind == F32 ? 4 : 2; }

// The first `count` of 16 lanes.
inline void store_some(void* base, int kind, int64_t offset, F value, int count) {
  if (count >= LANES) return store16(base, kind, offset, value);
  alignas(64) char lanes[64];
  store16(lanes, kind, 0, value);
  __builtin_memcpy((char*)base + offset * size_of(kind), lanes, count * size_of(kind));
}

// Three-bit codes from their low two bits and their high bit.
inline I three(I low, I high, int32_t low_mask, int32_t mask) {
  return iand(select(bytes(low_mask), low, high), bytes(mask));
}

inline I zeros_of(const Linear& l, int64_t index) {
  if (!l.zeros) return iset(l.zero);
  return l.bits == 8 ? load_u8(l.zeros + index * LANES) : load_u4(l.zeros + index * LANES / 2);
}

// Dot products of the four codes in each lane's bytes with the digits of four inputs, for all rows and slices. The high
// eight lanes may have inputs of their own, so many further on.
template <int S, int R, int APART = 0>
inline void take(I (&sums)[R][S], I codes, const int8_t* digits, int64_t row_stride) {
  for (int r = 0; r < R; ++r) {
    for (int s = 0; s < S; ++s) {
      const int8_t* four = digits + r * row_stride + s * LANES;
      sums[r][s] = APART ? dot4(sums[r][s], codes, four, four + APART) : dot4(sums[r][s], codes, four);
    }
  }
}

// The same of eight codes of 4 bits, four in the low halves of the bytes and the next four in the high ones; those sums
// that are in `shifted` are 16 times too large.
template <int S, int R, int APART = 0>
inline void take_halves(I (&once)[R][S], I (&shifted)[R][S], I codes, const int8_t* digits, int64_t row_stride) {
  take<S, R, APART>(once, iand(codes, bytes(0x0F)), digits, row_stride);
  if constexpr (WIDE_CODES) take<S, R, APART>(shifted, iand(codes, bytes(0xF0)), digits + 4, row_stride);
  else take<S, R, APART>(once, iand(shr<4>(codes), bytes(0x0F)), digits + 4, row_stride);
}

inline I together_of_halves(I once, I shifted) { return WIDE_CODES ? iadd(once, sar<4>(shifted)) : once; }

// The codes of a unit: four[k] holds in its lanes' bytes the inputs 4k to 4k + 3.
template <int B>
inline void unpack_unit(const uint8_t* strip, int unit, I (&four)[4]) {
  if constexpr (B == 2) {
    I v = load(strip + unit * 64);
    four[0] = iand(v, bytes(0x03));
    four[1] = iand(shr<2>(v), bytes(0x03));
    four[2] = iand(shr<4>(v), bytes(0x03));
    four[3] = iand(shr<6>(v), bytes(0x03));
  } else if constexpr (B == 3) {
    const uint8_t* pair = strip + unit / 2 * 192;
    I low = load(pair + unit % 2 * 64), high = load(pair + 128);
    if (unit % 2) high = ror<1>(high);
    four[0] = three(low, high, 0x03, 0x07);
    four[1] = shr<2>(three(low, high, 0x0C, 0x1C));
    low = shr<4>(low);
    high = ror<4>(high);
    four[2] = three(low, high, 0x03, 0x07);
    four[3] = shr<2>(three(low, high, 0x0C, 0x1C));
  } else if constexpr (B == 4) {
    for (int half = 0; half < 2; ++half) {
      I v = load(strip + unit * 128 + half * 64);
      four[2 * half] = iand(v, bytes(0x0F));
      four[2 * half + 1] = iand(shr<4>(v), bytes(0x0F));
    }
  } else {
    for (int quarter = 0; quarter < 4; ++quarter) four[quarter] = load(strip + unit * 256 + quarter * 64);
  }
}

}  // namespace
