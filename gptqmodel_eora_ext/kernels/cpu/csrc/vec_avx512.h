// 16 lanes in one AVX-512 register.
#pragma once
#include <immintrin.h>
#include <cstdint>

namespace {

using I = __m512i;
using F = __m512;

// The dot product of bytes takes codes up to 255.
constexpr bool WIDE_CODES = true;

inline I load(const uint8_t* p) { return _mm512_loadu_si512(p); }
inline I izero() { return _mm512_setzero_si512(); }
inline I iset(int32_t v) { return _mm512_set1_epi32(v); }
inline I iand(I a, I b) { return _mm512_and_si512(a, b); }
inline I iadd(I a, I b) { return _mm512_add_epi32(a, b); }
inline I isub(I a, I b) { return _mm512_sub_epi32(a, b); }
inline I imul(I a, I b) { return _mm512_mullo_epi32(a, b); }
template <int N> inline I shr(I a) { return _mm512_srli_epi32(a, N); }
template <int N> inline I shl(I a) { return _mm512_slli_epi32(a, N); }
template <int N> inline I sar(I a) { return _mm512_srai_epi32(a, N); }
template <int N> inline I ror(I a) { return _mm512_ror_epi32(a, N); }
// mask ? a : b, bit by bit.
inline I select(I mask, I a, I b) { return _mm512_ternarylogic_epi32(mask, a, b, 0xCA); }
// Adds four products of unsigned code and signed digit to each lane; all lanes share the four digits.
inline I dot4(I sum, I codes, const int8_t* digits) {
  int32_t four;
  __builtin_memcpy(&four, digits, 4);
  return _mm512_dpbusd_epi32(sum, codes, _mm512_set1_epi32(four));
}

// The same with other digits in the high eight lanes.
inline I dot4(I sum, I codes, const int8_t* low, const int8_t* high) {
  int32_t four, other;
  __builtin_memcpy(&four, low, 4);
  __builtin_memcpy(&other, high, 4);
  return _mm512_dpbusd_epi32(sum, codes, _mm512_mask_set1_epi32(_mm512_set1_epi32(four), 0xFF00, other));
}

// The low eight lanes in place of the high ones, and the other way round.
inline I swap_halves(I a) { return _mm512_shuffle_i64x2(a, a, 0x4E); }

inline F fzero() { return _mm512_setzero_ps(); }
inline F fset(float v) { return _mm512_set1_ps(v); }
inline F fadd(F a, F b) { return _mm512_add_ps(a, b); }
inline F fmul(F a, F b) { return _mm512_mul_ps(a, b); }
inline F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
inline F fabs16(F a) { return _mm512_abs_ps(a); }
inline F fmax16(F a, F b) { return _mm512_max_ps(a, b); }
inline F to_float(I a) { return _mm512_cvtepi32_ps(a); }
inline I to_int(F a) { return _mm512_cvtps_epi32(a); }
inline float sum(F a) { return _mm512_reduce_add_ps(a); }
inline float largest(F a) { return _mm512_reduce_max_ps(a); }
inline int32_t sum(I a) { return _mm512_reduce_add_epi32(a); }
inline F fload(const float* p) { return _mm512_loadu_ps(p); }
inline void fstore(float* p, F a) { _mm512_storeu_ps(p, a); }
inline F load_f16(const uint16_t* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
inline F load_bf16(const uint16_t* p) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16));
}
inline F load_i8(const int8_t* p) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p))); }
inline I load_u8(const uint8_t* p) { return _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p)); }
// The first of 16 values, zeros after them.
inline F fload(const float* p, int count) { return _mm512_maskz_loadu_ps((1u << count) - 1, p); }
inline F load_f16(const uint16_t* p, int count) {
  return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16((1u << count) - 1, p));
}
// One float16 in all lanes.
inline F fset_f16(const uint16_t* p) {
  uint16_t half;
  __builtin_memcpy(&half, p, 2);
  return _mm512_cvtph_ps(_mm256_set1_epi16(half));
}
// 16 values of 4 bits: even lanes in the first four bytes, odd lanes in the next.
inline I load_u4(const uint8_t* p) {
  const I shifts = _mm512_set_epi32(28, 28, 24, 24, 20, 20, 16, 16, 12, 12, 8, 8, 4, 4, 0, 0);
  int64_t both;
  __builtin_memcpy(&both, p, 8);
  return _mm512_and_si512(_mm512_srlv_epi32(_mm512_set1_epi64(both), shifts), _mm512_set1_epi32(15));
}
inline void store_i8(int8_t* p, I a) { _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8(a)); }
inline void store_f16(uint16_t* p, F a) {
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
// Rounded to nearest even; a NaN keeps its quiet bit.
inline void store_bf16(uint16_t* p, F a) {
  I bits = _mm512_castps_si512(a);
  I odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  I rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)));
  __mmask16 nan = _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q);
  rounded = _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x400000));
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16)));
}

}  // namespace
