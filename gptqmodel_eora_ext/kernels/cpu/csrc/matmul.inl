// Many rows of bfloat16: Ŵᵀ of two strips is dequantised into cache, and blocks of rows are multiplied with it, all
// sums in registers. The adapter's components stand after the inputs: x is followed by x Aᵀ, Ŵᵀ by Bᵀ.
//
//   panel    pairs of inputs × 12 rows × 2
//   weights  pairs of inputs × 32 outputs × 2
#include "codes.inl"

namespace {

void pack(const Linear& l, const Active& active, const uint16_t* x, const uint16_t* t, int rows, int block,
          uint16_t* panel) {
  const int64_t places = int64_t(l.units) * LANES, pairs = input_pairs(l, active);
  if (rows - block * BLOCK_ROWS < BLOCK_ROWS) __builtin_memset(panel, 0, pairs * BLOCK_ROWS * 4);
  for (int r = 0; r < BLOCK_ROWS; ++r) {
    const int64_t row = int64_t(block) * BLOCK_ROWS + r;
    if (row >= rows) break;
    const uint16_t* from = x + row * l.in_features;
    auto* to = (uint16_t(*)[BLOCK_ROWS][2])panel;
    if (!l.order) {
      for (int64_t pair = 0; pair < places / 2; ++pair) __builtin_memcpy(to[pair][r], from + 2 * pair, 4);
    } else {
      for (int64_t place = 0; place < places; ++place) {
        to[place / 2][r][place % 2] = l.order[place] < 0 ? 0 : from[l.order[place]];
      }
    }
    for (int c = 0; c < active.rank + active.rank % 2; ++c) {
      to[(places + c) / 2][r][c % 2] = c < active.rank ? t[row * active.rank + c] : 0;
    }
  }
}

inline I rounded_bits(F a) {
  I bits = _mm512_castps_si512(a);
  return iadd(bits, iadd(iand(shr<16>(bits), iset(1)), iset(0x7FFF)));
}

// Two inputs of 16 outputs in bfloat16, side by side in each lane.
inline void store_pair(uint16_t* weights, int64_t pair, int half, F even, F odd) {
  I both = _mm512_or_si512(shr<16>(rounded_bits(even)), iand(rounded_bits(odd), iset(int32_t(0xFFFF0000))));
  _mm512_storeu_si512(weights + (pair * 2 + half) * LANES * 2, both);
}

// A component of 16 outputs, from codes of 4 bits.
inline F column_of_block(const char* columns, int component) {
  const int place = component % BLOCK;
  const I block = load((const uint8_t*)columns + component / BLOCK * 64);
  const I code = _mm512_srlv_epi32(block, iset(place % 4 * 8 + place / 4 * 4));
  return to_float(isub(iand(code, iset(15)), iset(8)));
}

template <int B>
void dequantize_strip(const Linear& l, const Active& active, int strip, int half, uint16_t* weights) {
  const uint8_t* codes = l.codes + strip * strip_bytes(B, l.units);
  for (int segment = 0; segment < l.segments; ++segment) {
    const int64_t index = int64_t(strip) * l.segments + segment;
    const F scale = load16(l.scales, l.scale_kind, index * LANES);
    const F offset = fmul(to_float(zeros_of(l, index)), fmul(scale, fset(-1.0f)));
    auto value = [&](I byte) { return fma(to_float(iand(byte, iset(255))), scale, offset); };
    for (int unit = l.starts[segment]; unit < l.starts[segment + 1]; ++unit) {
      I four[4];
      unpack_unit<B>(codes, unit, four);
      for (int k = 0; k < 4; ++k) {
        const int64_t pair = int64_t(unit) * (LANES / 2) + 2 * k;
        store_pair(weights, pair, half, value(four[k]), value(shr<8>(four[k])));
        store_pair(weights, pair + 1, half, value(shr<16>(four[k])), value(shr<24>(four[k])));
      }
    }
  }
  const Range* range = active.ranges;
  int next = active.count ? range->first : 0;
  // The next active component's column of Bᵀ, zero after the last.
  auto column = [&]() {
    if (range == active.ranges + active.count) return fzero();
    const int component = next++;
    if (next == range->last && ++range < active.ranges + active.count) next = range->first;
    const char* columns = (const char*)l.up + strip * up_bytes(l.up_kind, l.rank);
    const F values = l.up_kind == I4 ? column_of_block(columns, component)
                                     : load16(columns, l.up_kind, int64_t(component) * LANES);
    if (l.up_kind != I8 && l.up_kind != I4) return values;
    return fmul(values, fset(half_to_float(l.up_scales[int64_t(strip * LANES / FACTOR_GROUP) * l.rank + component])));
  };
  for (int c = 0; c < active.rank; c += 2) {
    const F even = column(), odd = column();
    store_pair(weights, int64_t(l.units) * (LANES / 2) + c / 2, half, even, odd);
  }
}

template <int R>
void block_of_rows(const Linear& l, const Active& active, int strip, const uint16_t* panel, int64_t row, int rows,
                   const uint16_t* weights, uint16_t* y, int64_t stride) {
  const bool second = strip + 1 < l.strips;
  F acc[R][2];
  for (int r = 0; r < R; ++r) {
    acc[r][0] = l.bias ? fload(l.bias + strip * LANES) : fzero();
    acc[r][1] = l.bias && second ? fload(l.bias + (strip + 1) * LANES) : fzero();
  }
  const int64_t pairs = input_pairs(l, active);
  for (int64_t pair = 0; pair < pairs; ++pair) {
    const __m512bh w0 = (__m512bh)_mm512_loadu_si512(weights + pair * LANES * 4);
    const __m512bh w1 = (__m512bh)_mm512_loadu_si512(weights + pair * LANES * 4 + LANES * 2);
    for (int r = 0; r < R; ++r) {
      int32_t two;
      __builtin_memcpy(&two, panel + (pair * BLOCK_ROWS + r) * 2, 4);
      const __m512bh x = (__m512bh)_mm512_set1_epi32(two);
      acc[r][0] = _mm512_dpbf16_ps(acc[r][0], w0, x);
      acc[r][1] = _mm512_dpbf16_ps(acc[r][1], w1, x);
    }
  }
  for (int r = 0; r < R && r < rows; ++r) {
    const int64_t begin = (row + r) * stride + strip * LANES;
    const int left = l.out_features - strip * LANES;
    store_some(y, BF16, begin, acc[r][0], left);
    if (second) store_some(y, BF16, begin + LANES, acc[r][1], left - LANES);
  }
}

void outputs(const Linear& l, const Active& active, int pair, const uint16_t* panels, int rows, uint16_t* weights,
             uint16_t* y, int64_t stride) {
  const int strip = 2 * pair;
  auto* dequantize = l.bits == 2 ? dequantize_strip<2> : l.bits == 3 ? dequantize_strip<3>
                   : l.bits == 4 ? dequantize_strip<4> : dequantize_strip<8>;
  for (int half = 0; half < 2 && strip + half < l.strips; ++half) dequantize(l, active, strip + half, half, weights);
  const int64_t block_size = input_pairs(l, active) * BLOCK_ROWS * 2;
  for (int64_t row = 0; row < rows; row += BLOCK_ROWS) {
    const int left = rows - row;
    auto* run = left > 8 ? block_of_rows<12> : left > 4 ? block_of_rows<8> : block_of_rows<4>;
    run(l, active, strip, panels + row / BLOCK_ROWS * block_size, row, left, weights, y, stride);
  }
}

const Matmul matmul = {pack, outputs};

}  // namespace
