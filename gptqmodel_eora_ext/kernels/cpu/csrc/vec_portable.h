// 16 lanes in plain C++, for any processor.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

struct I { int32_t v[16]; };
struct F { float v[16]; };

constexpr bool WIDE_CODES = true;

#define LANEWISE(T, ...) T r; for (int l = 0; l < 16; ++l) r.v[l] = (__VA_ARGS__); return r

inline I load(const uint8_t* p) { I r; std::memcpy(r.v, p, 64); return r; }
inline I iset(int32_t x) { LANEWISE(I, x); }
inline I izero() { return iset(0); }
inline I iand(I a, I b) { LANEWISE(I, a.v[l] & b.v[l]); }
inline I iadd(I a, I b) { LANEWISE(I, a.v[l] + b.v[l]); }
inline I isub(I a, I b) { LANEWISE(I, a.v[l] - b.v[l]); }
inline I imul(I a, I b) { LANEWISE(I, a.v[l] * b.v[l]); }
template <int N> inline I shr(I a) { LANEWISE(I, int32_t(uint32_t(a.v[l]) >> N)); }
template <int N> inline I shl(I a) { LANEWISE(I, int32_t(uint32_t(a.v[l]) << N)); }
template <int N> inline I sar(I a) { LANEWISE(I, a.v[l] >> N); }
template <int N> inline I ror(I a) { LANEWISE(I, int32_t(uint32_t(a.v[l]) >> N | uint32_t(a.v[l]) << (32 - N))); }
inline I select(I mask, I a, I b) { LANEWISE(I, (mask.v[l] & a.v[l]) | (~mask.v[l] & b.v[l])); }
inline int32_t dot4(int32_t codes, const int8_t* digits) {
  return (codes & 255) * digits[0] + (codes >> 8 & 255) * digits[1] + (codes >> 16 & 255) * digits[2] +
         (codes >> 24 & 255) * digits[3];
}
inline I dot4(I sum, I codes, const int8_t* low, const int8_t* high) {
  LANEWISE(I, sum.v[l] + dot4(codes.v[l], l < 8 ? low : high));
}
inline I dot4(I sum, I codes, const int8_t* digits) { return dot4(sum, codes, digits, digits); }
inline I swap_halves(I a) { LANEWISE(I, a.v[l ^ 8]); }

inline F fset(float x) { LANEWISE(F, x); }
inline F fzero() { return fset(0); }
inline F fadd(F a, F b) { LANEWISE(F, a.v[l] + b.v[l]); }
inline F fmul(F a, F b) { LANEWISE(F, a.v[l] * b.v[l]); }
inline F fma(F a, F b, F c) { LANEWISE(F, a.v[l] * b.v[l] + c.v[l]); }
inline F fabs16(F a) { LANEWISE(F, std::fabs(a.v[l])); }
inline F fmax16(F a, F b) { LANEWISE(F, a.v[l] > b.v[l] ? a.v[l] : b.v[l]); }
inline F to_float(I a) { LANEWISE(F, float(a.v[l])); }
inline I to_int(F a) { LANEWISE(I, int32_t(std::nearbyint(a.v[l]))); }
inline F fload(const float* p) { LANEWISE(F, p[l]); }
inline void fstore(float* p, F a) { std::memcpy(p, a.v, 64); }
inline float sum(F a) { float t = 0; for (float x : a.v) t += x; return t; }
inline int32_t sum(I a) { int32_t t = 0; for (int32_t x : a.v) t += x; return t; }
inline float largest(F a) { float t = 0; for (float x : a.v) t = x > t ? x : t; return t; }
inline float from_bits(uint32_t bits) { float x; std::memcpy(&x, &bits, 4); return x; }
inline uint32_t to_bits(float x) { uint32_t bits; std::memcpy(&bits, &x, 4); return bits; }
inline uint16_t to_f16(float x) {
  uint32_t bits = to_bits(x), sign = bits >> 16 & 0x8000, size = bits & 0x7FFFFFFF;
  if (size > 0x7F800000) return uint16_t(sign | 0x7E00);
  if (size >= 0x477FF000) return uint16_t(sign | 0x7C00);
  // A subnormal result is rounded where the float's own last place is 2^-24.
  if (size < 0x38800000) return uint16_t(sign | (to_bits(from_bits(size) + 0.5f) - 0x3F000000));
  return uint16_t(sign | (size - 0x38000000 + 0xFFF + (size >> 13 & 1)) >> 13);
}
inline F load_f16(const uint16_t* p) { LANEWISE(F, half_to_float(p[l])); }
inline F load_bf16(const uint16_t* p) { LANEWISE(F, from_bits(uint32_t(p[l]) << 16)); }
inline F load_i8(const int8_t* p) { LANEWISE(F, float(p[l])); }
inline I load_u8(const uint8_t* p) { LANEWISE(I, p[l]); }
inline I load_u4(const uint8_t* p) { LANEWISE(I, p[l % 2 * 4 + l / 4] >> (l / 2 % 2 * 4) & 15); }
// The first of 16 values, zeros after them.
inline F fload(const float* p, int count) { LANEWISE(F, l < count ? p[l] : 0.0f); }
inline F load_f16(const uint16_t* p, int count) { LANEWISE(F, l < count ? half_to_float(p[l]) : 0.0f); }
inline F fset_f16(const uint16_t* p) { return fset(half_to_float(*p)); }
inline void store_i8(int8_t* p, I a) { for (int l = 0; l < 16; ++l) p[l] = int8_t(a.v[l]); }
inline void store_f16(uint16_t* p, F a) { for (int l = 0; l < 16; ++l) p[l] = to_f16(a.v[l]); }
inline void store_bf16(uint16_t* p, F a) {
  for (int l = 0; l < 16; ++l) {
    uint32_t bits = to_bits(a.v[l]);
    p[l] = uint16_t((a.v[l] != a.v[l] ? bits | 0x400000 : bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
  }
}

#undef LANEWISE

}  // namespace
