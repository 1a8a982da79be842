// The kernels, written once for the lanes of any instruction set. Included after one of the `vec_*.h`.
//
// Each row of x becomes integers of `slices` signed bytes with a power of two per segment, so that the sum over a
// segment of (code − zero) · x is an exact integer, taken by byte products straight from the packed codes. Two slices
// (an error of some 2^-15 of the segment's largest input) serve 16-bit inputs, three (2^-23) float32.
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

// Bytes ahead of each component of A that are asked for, as `AHEAD` is of codes.
constexpr int DOWN_AHEAD = 2048;

// Of C components from `first` on.
template <int KIND, int C>
void dots(const Linear& l, const float* x, int first, float* t) {
  const int inputs = padded_inputs(l.in_features);
  const int64_t base = int64_t(first) * inputs;
  F total[C][2];
  for (int c = 0; c < C; ++c) total[c][0] = total[c][1] = fzero();
  for (int i = 0; i < inputs; i += FACTOR_GROUP) {
    F xs[4];
    for (int v = 0; v < 4; ++v) xs[v] = fload(x + i + v * LANES);
    for (int c = 0; c < C; ++c) {
      const int64_t begin = base + int64_t(c) * inputs + i;
      const char* ahead = (const char*)l.down + factor_bytes(KIND, begin) + DOWN_AHEAD;
      for (int byte = 0; byte < factor_bytes(KIND, FACTOR_GROUP); byte += 64) __builtin_prefetch(ahead + byte);
      if (KIND == I8 || KIND == I4) {
        F group = fmul(load16(l.down, KIND, begin), xs[0]);
        for (int v = 1; v < 4; ++v) group = fma(load16(l.down, KIND, begin + v * LANES), xs[v], group);
        total[c][0] = fma(group, fset(half_to_float(l.down_scales[begin / FACTOR_GROUP])), total[c][0]);
      } else {
        for (int v = 0; v < 4; ++v) {
          total[c][v % 2] = fma(load16(l.down, KIND, begin + v * LANES), xs[v], total[c][v % 2]);
        }
      }
    }
  }
  for (int c = 0; c < C; ++c) t[first + c] = sum(fadd(total[c][0], total[c][1]));
}

template <int KIND>
void down_of(const Linear& l, const float* x, int rows, int first, int last, float* t) {
  for (int c = first; c < last;) {
    const bool all = c + COMPONENTS <= last;
    for (int row = 0; row < rows; ++row) {
      (all ? dots<KIND, COMPONENTS> : dots<KIND, 1>)(l, x + int64_t(row) * padded_inputs(l.in_features), c,
                                                   t + int64_t(row) * l.rank);
    }
    c += all ? COMPONENTS : 1;
  }
}

void down(const Linear& l, const float* x, int rows, int first, int last, float* t) {
  auto* run = l.down_kind == F16 ? down_of<F16> : l.down_kind == BF16 ? down_of<BF16> : l.down_kind == I8 ? down_of<I8>
            : l.down_kind == I4 ? down_of<I4> : down_of<F32>;
  run(l, x, rows, first, last, t);
}

// Inputs below this in a whole segment count as zero: their reciprocal step would leave float32.
constexpr float TINY = 0x1p-100f;

void quantize(const Linear& l, const float* x, int slices, int8_t* digits, int32_t* sums, float* steps) {
  // The largest integer of balanced digits: 127 · (1 + 256 + …).
  const float highest = slices == 2 ? 32639.0f : 8355711.0f;
  for (int segment = 0; segment < l.segments; ++segment) {
    const int begin = l.starts[segment] * LANES, end = l.starts[segment + 1] * LANES;
    F size = fzero(), poison = fzero();
    for (int place = begin; place < end; place += LANES) {
      size = fmax16(fabs16(fload(x + place)), size);
      poison = fma(fload(x + place), fzero(), poison);
    }
    const float largest_input = largest(size), bad = sum(poison);
    float scale = 0.0f;
    steps[segment] = bad;  // 0, or NaN where an input is not finite
    if (bad == 0.0f && largest_input >= TINY) {
      uint32_t bits;
      __builtin_memcpy(&bits, &largest_input, 4);
      uint32_t exponent = 127 + (8 * slices - 2) + 127 - (bits >> 23);
      bits = exponent << 23;
      __builtin_memcpy(&scale, &bits, 4);
      if (largest_input * scale > highest) scale *= 0.5f;
      steps[segment] = 1.0f / scale;
    }
    I total[3] = {izero(), izero(), izero()};
    for (int place = begin; place < end; place += LANES) {
      // A NaN times 0 is NaN, whose integer is arbitrary; the step poisons the sum anyway.
      I rest = to_int(fmul(fload(x + place), fset(scale)));
      int8_t* out = digits + int64_t(place) * slices;
      for (int s = 0; s < slices; ++s) {
        I digit = sar<24>(shl<24>(rest));
        store_i8(out + s * LANES, digit);
        total[s] = iadd(total[s], digit);
        rest = sar<8>(isub(rest, digit));
      }
    }
    for (int s = 0; s < slices; ++s) sums[segment * slices + s] = sum(total[s]);
  }
}

using Even = std::integral_constant<int, 0>;
using Odd = std::integral_constant<int, 1>;

// Dot products of the four codes in each lane's bytes with the digits of four inputs, for all rows and slices.
template <int S, int R>
inline void take(I (&sums)[R][S], I codes, const int8_t* digits, int64_t row_stride) {
  for (int r = 0; r < R; ++r) {
    for (int s = 0; s < S; ++s) sums[r][s] = dot4(sums[r][s], codes, digits + r * row_stride + s * LANES);
  }
}

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
      I v = load(strip + unit * 128 + half * 64);
      take<S, R>(once, iand(v, bytes(0x0F)), d + half * 8, rs);
      if constexpr (WIDE_CODES) take<S, R>(shifted, iand(v, bytes(0xF0)), d + half * 8 + 4, rs);
      else take<S, R>(once, iand(shr<4>(v), bytes(0x0F)), d + half * 8 + 4, rs);
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
  if constexpr (B == 4) return WIDE_CODES ? iadd(once, sar<4>(shifted)) : once;
  return WIDE_CODES ? once : iadd(once, shl<4>(shifted));
}

// Asks for a strip's columns of Bᵀ, which are too short a run for the processor to foresee, and needed last: some with
// each segment, all by the middle of the strip. All at once, they would keep the codes waiting.
struct UpAhead {
  const char *strip_begin, *next, *end;
  const Range *range, *last_range;
  int64_t step;
  int kind;

  UpAhead(const Linear& l, const Active& active, int strip) : kind(l.up_kind) {
    strip_begin = (const char*)l.up + strip * bytes(l.rank);
    range = active.ranges, last_range = range + active.count;
    next = end = nullptr;
    if (range < last_range) enter();
    step = (2 * bytes(active.rank) / l.segments + 63) / 64 * 64;
  }
  int64_t bytes(int components) const { return factor_bytes(kind, int64_t(components) * LANES); }
  void enter() { next = strip_begin + bytes(range->first), end = strip_begin + bytes(range->last); }
  void fetch() {
    for (int64_t left = step; left > 0 && next < end; left -= 64) {
      __builtin_prefetch(next);
      next += 64;
      if (next >= end && ++range < last_range) enter();
    }
  }
};

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

template <int KIND, int R>
void add_up(const Linear& l, int strip, const Rows& x, F (&y)[R]) {
  const int64_t base = int64_t(strip) * l.rank * LANES;
  const uint16_t* scales = l.up_scales + int64_t(strip * LANES / FACTOR_GROUP) * l.rank;
  // Sums that do not wait for each other: one row alone would have each product wait for the one before.
  constexpr int CHAINS = R == 1 ? 4 : 1;
  F sums[CHAINS][R];
  for (int chain = 0; chain < CHAINS; ++chain) {
    for (int r = 0; r < R; ++r) sums[chain][r] = fzero();
  }
  auto add = [&](int c, F (&to)[R]) {
    F column = load16(l.up, KIND, base + int64_t(c) * LANES);
    const float scale = KIND == I8 || KIND == I4 ? half_to_float(scales[c]) : 1.0f;
    for (int r = 0; r < R; ++r) to[r] = fma(column, fset(scale * x.t[r * l.rank + c]), to[r]);
  };
  for (int i = 0; i < x.active.count; ++i) {
    const int last = x.active.ranges[i].last;
    int c = x.active.ranges[i].first;
    for (; c + CHAINS <= last; c += CHAINS) {
      for (int chain = 0; chain < CHAINS; ++chain) add(c + chain, sums[chain]);
    }
    for (; c < last; ++c) add(c, sums[0]);
  }
  for (int chain = 0; chain < CHAINS; ++chain) {
    for (int r = 0; r < R; ++r) y[r] = fadd(y[r], sums[chain][r]);
  }
}

template <int R>
void add_adapter(const Linear& l, int strip, const Rows& x, F (&y)[R]) {
  switch (l.up_kind) {
    case F16: return add_up<F16, R>(l, strip, x, y);
    case BF16: return add_up<BF16, R>(l, strip, x, y);
    case I8: return add_up<I8, R>(l, strip, x, y);
    case I4: return add_up<I4, R>(l, strip, x, y);
    default: return add_up<F32, R>(l, strip, x, y);
  }
}

template <int B, int S, int R>
void some_rows(const Linear& l, int strip, const Rows& x, int row, void* y, int64_t stride, int kind) {
  const Rows from = {x.digits + int64_t(row) * l.units * LANES * S, x.sums + int64_t(row) * l.segments * S,
                     x.steps + int64_t(row) * l.segments, x.t + int64_t(row) * l.rank, x.active};
  F out[R];
  strip_of_rows<B, S, R>(l, strip, from, out);
  if (x.active.rank) add_adapter<R>(l, strip, from, out);
  for (int r = 0; r < R; ++r) {
    store_some(y, kind, int64_t(row + r) * stride + strip * LANES, out[r], l.out_features - strip * LANES);
  }
}

template <int B, int S>
void strips_of(const Linear& l, const Rows& x, int rows, int first, int last, void* y, int64_t stride, int kind) {
  for (int strip = first; strip < last; ++strip) {
    int row = 0;
    for (; row + 4 <= rows; row += 4) some_rows<B, S, 4>(l, strip, x, row, y, stride, kind);
    for (; row < rows; ++row) some_rows<B, S, 1>(l, strip, x, row, y, stride, kind);
  }
}

void strips(const Linear& l, int slices, const int8_t* digits, const int32_t* sums, const float* steps, const float* t,
            const Active& active, int rows, int first, int last, void* y, int64_t stride, int kind) {
  const Rows x = {digits, sums, steps, t, active};
  auto* run = l.bits == 2   ? (slices == 2 ? strips_of<2, 2> : strips_of<2, 3>)
              : l.bits == 3 ? (slices == 2 ? strips_of<3, 2> : strips_of<3, 3>)
              : l.bits == 4 ? (slices == 2 ? strips_of<4, 2> : strips_of<4, 3>)
                            : (slices == 2 ? strips_of<8, 2> : strips_of<8, 3>);
  run(l, x, rows, first, last, y, stride, kind);
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

const Kernels table = {down, quantize, widen, strips, dequantize};

}  // namespace
