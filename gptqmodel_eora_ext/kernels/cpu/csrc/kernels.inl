// The kernels, written once for the lanes of any instruction set. Included after one of the `vec_*.h`.
//
// The sum over a segment of (code − zero) · x is an exact integer, taken by byte products straight from the packed
// codes with the digits of x (`digits.inl`).
#include "adapter.inl"
#include "codes.inl"
#include "digits.inl"

namespace {

using Even = std::integral_constant<int, 0>;
using Odd = std::integral_constant<int, 1>;

// The unit's share of the sums: `once` for codes that stand in place, `shifted` for those that stand higher (`together`).
template <int B, int S, int R, int ODD>
inline void take_unit(I (&once)[R][S], I (&shifted)[R][S], const uint8_t* strip, int unit, const int8_t* d, int64_t rs) {
  if constexpr (B == 2) {
    I v = load(strip + unit * 64), w = shr<4>(v);
    take<S, R>(once, iand(v, bytes(0x03)), d, rs);
    take<S, R>(shifted, iand(v, bytes(0x0C)), d + 4, rs);
    take<S, R>(once, iand(w, bytes(0x03)), d + 8, rs);
    take<S, R>(shifted, iand(w, bytes(0x0C)), d + 12, rs);
  } else if constexpr (B == 3) {
    const uint8_t* pair = strip + unit / 2 * 192;
    I low = load(pair + ODD * 64), high = load(pair + 128);
    if constexpr (ODD) high = ror<1>(high);
    take<S, R>(once, three(low, high, 0x03, 0x07), d, rs);
    take<S, R>(shifted, three(low, high, 0x0C, 0x1C), d + 4, rs);
    low = shr<4>(low);
    high = ror<4>(high);
    take<S, R>(once, three(low, high, 0x03, 0x07), d + 8, rs);
    take<S, R>(shifted, three(low, high, 0x0C, 0x1C), d + 12, rs);
  } else if constexpr (B == 4) {
    for (int half = 0; half < 2; ++half) {
      take_halves<S, R>(once, shifted, load(strip + unit * 128 + half * 64), d + half * 8, rs);
    }
  } else {
    for (int quarter = 0; quarter < 4; ++quarter) {
      I v = load(strip + unit * 256 + quarter * 64);
      if constexpr (WIDE_CODES) {
        take<S, R>(once, v, d + quarter * 4, rs);
      } else {
        take<S, R>(once, iand(v, bytes(0x0F)), d + quarter * 4, rs);
        take<S, R>(shifted, iand(shr<4>(v), bytes(0x0F)), d + quarter * 4, rs);
      }
    }
  }
}

// Σ (code · digit) from the two sums of `take_unit`.
template <int B>
inline I together(I once, I shifted) {
  if constexpr (B == 2 || B == 3) return iadd(once, sar<2>(shifted));
  if constexpr (B == 4) return together_of_halves(once, shifted);
  return WIDE_CODES ? once : iadd(once, shl<4>(shifted));
}

// Bytes ahead of the codes being read that are asked for, since the processor's own prefetching ends with a 4 KiB page:
// 0.21 ms instead of 0.24 for 4096 × 4096 at 2 bits; 1, 4 and 8 KiB do no better.
constexpr int AHEAD = 2048;

template <int B>
inline void fetch_ahead(const uint8_t* strip, int unit) {
  const uint8_t* codes = strip + unit * (32 * B) + AHEAD;
  for (int byte = 0; byte < 32 * B; byte += 64) __builtin_prefetch(codes + byte);
}

struct Rows {
  const int8_t* digits;
  const int32_t* sums;
  const float* steps;
  const float* t;
  const UpInput& up;
  const Active& active;
};

template <int B, int S, int R>
void strip_of_rows(const Linear& l, int strip, const Rows& x, F (&y)[R]) {
  const uint8_t* codes = l.codes + strip * strip_bytes(B, l.units);
  const int64_t row_stride = int64_t(l.units) * LANES * S;
  UpAhead up(l, x.active, strip);
  for (int r = 0; r < R; ++r) y[r] = l.bias ? fload(l.bias + strip * LANES) : fzero();
  for (int segment = 0; segment < l.segments; ++segment) {
    up.fetch();
    I once[R][S], shifted[R][S];
    for (int r = 0; r < R; ++r) {
      for (int s = 0; s < S; ++s) once[r][s] = shifted[r][s] = izero();
    }
    const int end = l.starts[segment + 1];
    int unit = l.starts[segment];
    auto next = [&](auto odd) {
      fetch_ahead<B>(codes, unit);
      take_unit<B, S, R, odd>(once, shifted, codes, unit, x.digits + int64_t(unit) * LANES * S, row_stride);
      ++unit;
    };
    if (unit % 2 && unit < end) next(Odd{});
    while (unit + 1 < end) next(Even{}), next(Odd{});
    if (unit < end) next(Even{});
    const int64_t index = int64_t(strip) * l.segments + segment;
    const I zero = zeros_of(l, index);
    const F scale = load16(l.scales, l.scale_kind, index * LANES);
    for (int r = 0; r < R; ++r) {
      F value = fzero();
      for (int s = S - 1; s >= 0; --s) {
        I digit_sum = iset(x.sums[(r * l.segments + segment) * S + s]);
        I exact = isub(together<B>(once[r][s], shifted[r][s]), imul(zero, digit_sum));
        value = fma(value, fset(256.0f), to_float(exact));
      }
      y[r] = fma(value, fmul(scale, fset(x.steps[r * l.segments + segment])), y[r]);
    }
  }
}

template <int B, int S, int R>
void some_rows(const Linear& l, int strip, const Rows& x, int row, void* y, int64_t stride, int kind) {
  const Rows from = {x.digits + int64_t(row) * l.units * LANES * S, x.sums + int64_t(row) * l.segments * S,
                     x.steps + int64_t(row) * l.segments, x.t, x.up, x.active};
  F out[R];
  strip_of_rows<B, S, R>(l, strip, from, out);
  if (x.active.rank) add_up<S, R>(l, strip, x.t + int64_t(row) * l.rank, x.up, row, x.active, out);
  for (int r = 0; r < R; ++r) {
    store_some(y, kind, int64_t(row + r) * stride + strip * LANES, out[r], l.out_features - strip * LANES);
  }
}

template <int B, int S>
void strips_of(const Linear& l, const Rows& x, int rows, int first, int last, void* y, int64_t stride, int kind) {
  const bool in_blocks = x.active.rank && l.up_kind == I4;
  for (int strip = first; strip < last; ++strip) {
    if (in_blocks && (strip == first || strip * LANES % FACTOR_GROUP == 0)) {
      for (int row = 0; row < rows; ++row) {
        quantize_up(l, x.active, x.t + int64_t(row) * l.rank, strip * LANES / FACTOR_GROUP, S, x.up, row);
      }
    }
    int row = 0;
    for (; row + 4 <= rows; row += 4) some_rows<B, S, 4>(l, strip, x, row, y, stride, kind);
    for (; row < rows; ++row) some_rows<B, S, 1>(l, strip, x, row, y, stride, kind);
  }
}

void strips(const Linear& l, const Input& x, const float* t, const UpInput& up, const Active& active, int first,
            int last, void* y, int64_t stride, int kind) {
  const Rows rows = {x.digits, x.sums, x.steps, t, up, active};
  auto* run = l.bits == 2   ? (x.slices == 2 ? strips_of<2, 2> : strips_of<2, 3>)
              : l.bits == 3 ? (x.slices == 2 ? strips_of<3, 2> : strips_of<3, 3>)
              : l.bits == 4 ? (x.slices == 2 ? strips_of<4, 2> : strips_of<4, 3>)
                            : (x.slices == 2 ? strips_of<8, 2> : strips_of<8, 3>);
  run(l, rows, x.rows, first, last, y, stride, kind);
}

template <int B>
void dequantize_bits(const Linear& l, int strip, float* out, int64_t stride) {
  const uint8_t* codes = l.codes + strip * strip_bytes(B, l.units);
  for (int segment = 0; segment < l.segments; ++segment) {
    const int64_t index = int64_t(strip) * l.segments + segment;
    const F scale = load16(l.scales, l.scale_kind, index * LANES);
    const F offset = fmul(to_float(zeros_of(l, index)), fmul(scale, fset(-1.0f)));
    for (int unit = l.starts[segment]; unit < l.starts[segment + 1]; ++unit) {
      I four[4];
      unpack_unit<B>(codes, unit, four);
      for (int i = 0; i < LANES; ++i) {
        const int place = unit * LANES + i, input = l.order ? l.order[place] : place;
        if (input < 0) continue;
        const I byte = i % 4 == 0 ? four[i / 4] : i % 4 == 1 ? shr<8>(four[i / 4])
                     : i % 4 == 2 ? shr<16>(four[i / 4]) : shr<24>(four[i / 4]);
        fstore(out + input * stride, fma(to_float(iand(byte, iset(255))), scale, offset));
      }
    }
  }
}

void dequantize(const Linear& l, int strip, float* out, int64_t stride) {
  auto* run = l.bits == 2 ? dequantize_bits<2> : l.bits == 3 ? dequantize_bits<3>
            : l.bits == 4 ? dequantize_bits<4> : dequantize_bits<8>;
  run(l, strip, out, stride);
}

const Kernels table = {down, quantize, widen, scale_up, strips, dequantize};

}  // namespace
