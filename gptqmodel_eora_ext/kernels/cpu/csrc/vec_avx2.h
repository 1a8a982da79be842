// 16 lanes in two AVX2 registers.
#pragma once
#include <immintrin.h>
#include <cstdint>

namespace {

struct I { __m256i a, b; };
struct F { __m256 a, b; };

// Products of bytes are summed in pairs of 16 bits, which codes above 63 would overflow.
constexpr bool WIDE_CODES = false;

inline I load(const uint8_t* p) { return {_mm256_loadu_si256((const __m256i*)p), _mm256_loadu_si256((const __m256i*)(p + 32))}; }
inline I izero() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
inline I iset(int32_t v) { __m256i x = _mm256_set1_epi32(v); return {x, x}; }
inline I iand(I x, I y) { return {_mm256_and_si256(x.a, y.a), _mm256_and_si256(x.b, y.b)}; }
inline I ior(I x, I y) { return {_mm256_or_si256(x.a, y.a), _mm256_or_si256(x.b, y.b)}; }
inline I iadd(I x, I y) { return {_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)}; }
inline I isub(I x, I y) { return {_mm256_sub_epi32(x.a, y.a), _mm256_sub_epi32(x.b, y.b)}; }
inline I imul(I x, I y) { return {_mm256_mullo_epi32(x.a, y.a), _mm256_mullo_epi32(x.b, y.b)}; }
template <int N> inline I shr(I x) { return {_mm256_srli_epi32(x.a, N), _mm256_srli_epi32(x.b, N)}; }
template <int N> inline I shl(I x) { return {_mm256_slli_epi32(x.a, N), _mm256_slli_epi32(x.b, N)}; }
template <int N> inline I sar(I x) { return {_mm256_srai_epi32(x.a, N), _mm256_srai_epi32(x.b, N)}; }
template <int N> inline I ror(I x) { return ior(shr<N>(x), shl<32 - N>(x)); }
inline I select(I mask, I x, I y) {
  return {_mm256_or_si256(_mm256_and_si256(mask.a, x.a), _mm256_andnot_si256(mask.a, y.a)),
          _mm256_or_si256(_mm256_and_si256(mask.b, x.b), _mm256_andnot_si256(mask.b, y.b))};
}
inline __m256i dot4(__m256i sum, __m256i codes, __m256i digits) {
  return _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(codes, digits), _mm256_set1_epi16(1)));
}
inline __m256i four_digits(const int8_t* digits) {
  int32_t four;
  __builtin_memcpy(&four, digits, 4);
  return _mm256_set1_epi32(four);
}
inline I dot4(I sum, I codes, const int8_t* low, const int8_t* high) {
  return {dot4(sum.a, codes.a, four_digits(low)), dot4(sum.b, codes.b, four_digits(high))};
}
inline I dot4(I sum, I codes, const int8_t* digits) { return dot4(sum, codes, digits, digits); }
inline I swap_halves(I x) { return {x.b, x.a}; }

inline F fzero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
inline F fset(float v) { __m256 x = _mm256_set1_ps(v); return {x, x}; }
inline F fadd(F x, F y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
inline F fmul(F x, F y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
inline F fma(F x, F y, F z) { return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)}; }
inline F fabs16(F x) { __m256 s = _mm256_set1_ps(-0.0f); return {_mm256_andnot_ps(s, x.a), _mm256_andnot_ps(s, x.b)}; }
inline F fmax16(F x, F y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
inline F to_float(I x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
inline I to_int(F x) { return {_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b)}; }
inline F fload(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline void fstore(float* p, F x) { _mm256_storeu_ps(p, x.a); _mm256_storeu_ps(p + 8, x.b); }
inline float sum(F x) {
  float v[16], total = 0;
  fstore(v, x);
  for (float lane : v) total += lane;
  return total;
}
inline float largest(F x) {
  float v[16], best = 0;
  fstore(v, x);
  for (float lane : v) best = best > lane ? best : lane;
  return best;
}
inline int32_t sum(I x) {
  int32_t v[8], total = 0;
  _mm256_storeu_si256((__m256i*)v, _mm256_add_epi32(x.a, x.b));
  for (int32_t lane : v) total += lane;
  return total;
}
inline F load_f16(const uint16_t* p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)), _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(p + 8)))};
}
inline __m256 bf16_8(const uint16_t* p) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16));
}
inline F load_bf16(const uint16_t* p) { return {bf16_8(p), bf16_8(p + 8)}; }
inline F load_i8(const int8_t* p) {
  return to_float({_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)), _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)(p + 8)))});
}
inline I load_u8(const uint8_t* p) {
  return {_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p)), _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)(p + 8)))};
}
inline I load_u4(const uint8_t* p) {
  __m256i both = _mm256_broadcastq_epi64(_mm_loadl_epi64((const __m128i*)p)), mask = _mm256_set1_epi32(15);
  __m256i low = _mm256_srlv_epi32(both, _mm256_set_epi32(12, 12, 8, 8, 4, 4, 0, 0));
  __m256i high = _mm256_srlv_epi32(both, _mm256_set_epi32(28, 28, 24, 24, 20, 20, 16, 16));
  return {_mm256_and_si256(low, mask), _mm256_and_si256(high, mask)};
}
// The first of 16 values, zeros after them.
inline F fload(const float* p, int count) {
  float lanes[16] = {};
  __builtin_memcpy(lanes, p, count * 4);
  return fload(lanes);
}
inline F load_f16(const uint16_t* p, int count) {
  uint16_t lanes[16] = {};
  __builtin_memcpy(lanes, p, count * 2);
  return load_f16(lanes);
}
// One float16 in all lanes.
inline F fset_f16(const uint16_t* p) {
  __m256 x = _mm256_cvtph_ps(_mm_set1_epi16(*(const int16_t*)p));
  return {x, x};
}
// The low halves of 16 lanes, in order.
inline __m256i low_halves(I x) {
  return _mm256_permute4x64_epi64(_mm256_packus_epi32(x.a, x.b), 0xD8);
}
inline void store_i8(int8_t* p, I x) {
  __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(x.a, x.b), 0xD8);
  _mm_storeu_si128((__m128i*)p, _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1)));
}
inline void store_f16(uint16_t* p, F x) {
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(x.a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  _mm_storeu_si128((__m128i*)(p + 8), _mm256_cvtps_ph(x.b, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
inline __m256i round_bf16(__m256 x) {
  __m256i bits = _mm256_castps_si256(x), odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF)));
  __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
  __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  return _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
}
inline void store_bf16(uint16_t* p, F x) {
  _mm256_storeu_si256((__m256i*)p, low_halves({round_bf16(x.a), round_bf16(x.b)}));
}

}  // namespace
