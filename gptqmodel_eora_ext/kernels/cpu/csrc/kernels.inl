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

// Of C components from `first` on, A in floating numbers or in integers of 8 bits.
template <int KIND, int C>
void dots(const Linear& l, const float* x, int first, float* t) {
  const int inputs = padded_inputs(l.in_features);
  const int64_t row_bytes = factor_bytes(KIND, inputs);
  F total[C][2];
  for (int c = 0; c < C; ++c) total[c][0] = total[c][1] = fzero();
  for (int i = 0; i < inputs; i += FACTOR_GROUP) {
    const char* begin = (const char*)l.down + first * row_bytes + factor_bytes(KIND, i);
    F xs[4];
    for (int v = 0; v < 4; ++v) xs[v] = fload(x + i + v * LANES);
    for (int c = 0; c < C; ++c, begin += row_bytes) {
      for (int byte = 0; byte < factor_bytes(KIND, FACTOR_GROUP); byte += 64) {
        __builtin_prefetch(begin + DOWN_AHEAD + byte);
      }
      if constexpr (KIND == I8) {
        F group = fmul(load16(begin, KIND, 0), xs[0]);
        for (int v = 1; v < 4; ++v) group = fma(load16(begin, KIND, v * LANES), xs[v], group);
        const int64_t scale = int64_t(first + c) * (inputs / FACTOR_GROUP) + i / FACTOR_GROUP;
        total[c][0] = fma(group, fset_f16(l.down_scales + scale), total[c][0]);
      } else {
        for (int v = 0; v < 4; ++v) total[c][v % 2] = fma(load16(begin, KIND, v * LANES), xs[v], total[c][v % 2]);
      }
    }
  }
  for (int c = 0; c < C; ++c) t[first + c] = sum(fadd(total[c][0], total[c][1]));
}

// Of C components from `first` on, A in integers of 4 bits: two components share a vector.
template <int S, int C>
void dots_of_digits(const Linear& l, const Input& x, int row, int first, float* t) {
  constexpr int PAIRS = (C + 1) / 2;
  const int groups = padded_inputs(l.in_features) / FACTOR_GROUP;
  const uint8_t* codes[C];
  const uint16_t* scales[C];
  for (int c = 0; c < C; ++c) {
    codes[c] = (const uint8_t*)l.down + int64_t(first + c) * groups * (FACTOR_GROUP / 2);
    scales[c] = l.down_scales + int64_t(first + c) * groups;
  }
  const int8_t* digits = x.down_digits + int64_t(row) * groups * S * FACTOR_GROUP;
  const int32_t* offsets = x.down_offsets + int64_t(row) * groups * 8;
  const float* steps = x.down_steps + int64_t(row) * groups;
  F total[PAIRS];
  for (F& sum : total) sum = fzero();
  for (int group = 0; group < groups; ++group, digits += S * FACTOR_GROUP) {
    I low[S], high[S];
    for (int s = 0; s < S; ++s) {
      low[s] = load_twice(digits + s * FACTOR_GROUP), high[s] = load_twice(digits + s * FACTOR_GROUP + 32);
    }
    const I offset = load_twice(offsets + group * 8);
    for (int pair = 0; pair < PAIRS; ++pair) {
      // A component without another stands in both halves.
      const int one = 2 * pair, other = one + 1 < C ? one + 1 : one;
      const I both = load_both(codes[one] + group * 32, codes[other] + group * 32);
      __builtin_prefetch(codes[one] + group * 32 + DOWN_AHEAD);
      const I even = iand(both, bytes(0x0F)), odd = iand(shr<4>(both), bytes(0x0F));
      // An integer of less than 2^30.
      I exact = dot4(dot4(izero(), even, low[S - 1]), odd, high[S - 1]);
      for (int s = S - 2; s >= 0; --s) {
        exact = dot4(dot4(iadd(shl<8>(exact), s ? izero() : offset), even, low[s]), odd, high[s]);
      }
      const F scale = fmul(fset_f16(scales[one] + group, scales[other] + group), fset(steps[group]));
      total[pair] = fma(to_float(exact), scale, total[pair]);
    }
  }
  for (int c = 0; c < C; ++c) t[first + c] = c % 2 ? sum_high(total[c / 2]) : sum_low(total[c / 2]);
}

// Components [first, last), as many as an input serves while it is at hand.
template <typename Some, typename One>
void by_components(int rows, int first, int last, Some some, One one) {
  for (int c = first; c < last;) {
    const bool all = c + COMPONENTS <= last;
    for (int row = 0; row < rows; ++row) all ? some(row, c) : one(row, c);
    c += all ? COMPONENTS : 1;
  }
}

template <int KIND>
void down_of(const Linear& l, const Input& x, int first, int last, float* t) {
  const int64_t inputs = padded_inputs(l.in_features);
  by_components(
      x.rows, first, last,
      [&](int row, int c) { dots<KIND, COMPONENTS>(l, x.wide + row * inputs, c, t + int64_t(row) * l.rank); },
      [&](int row, int c) { dots<KIND, 1>(l, x.wide + row * inputs, c, t + int64_t(row) * l.rank); });
}

template <int S>
void down_of_digits(const Linear& l, const Input& x, int first, int last, float* t) {
  by_components(
      x.rows, first, last,
      [&](int row, int c) { dots_of_digits<S, COMPONENTS>(l, x, row, c, t + int64_t(row) * l.rank); },
      [&](int row, int c) { dots_of_digits<S, 1>(l, x, row, c, t + int64_t(row) * l.rank); });
}

void down(const Linear& l, const Input& x, int first, int last, float* t) {
  auto* run = l.down_kind == F16 ? down_of<F16> : l.down_kind == BF16 ? down_of<BF16> : l.down_kind == I8 ? down_of<I8>
            : l.down_kind != I4 ? down_of<F32> : x.slices == 2 ? down_of_digits<2> : down_of_digits<3>;
  run(l, x, first, last, t);
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
    if (active.count && (kind == I8 || kind == I4)) {
      const char* scales = (const char*)(l.up_scales + int64_t(strip * LANES / FACTOR_GROUP) * l.rank);
      for (int byte = 0; byte < 2 * l.rank; byte += 64) __builtin_prefetch(scales + byte);
    }
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
void add_up_of(const Linear& l, int strip, const float* all_t, const Active& active, F (&y)[R]) {
  constexpr bool INTEGER = KIND == I8 || KIND == I4;
  const uint16_t* scales = l.up_scales + int64_t(strip * LANES / FACTOR_GROUP) * l.rank;
  // Sums that do not wait for each other: one row alone would have each product wait for the one before.
  constexpr int CHAINS = R == 1 ? 4 : 1;
  F sums[CHAINS][R];
  for (int chain = 0; chain < CHAINS; ++chain) {
    for (int r = 0; r < R; ++r) sums[chain][r] = fzero();
  }
  F all[R];  // in its lanes together: the sum of what columns are multiplied by
  for (int r = 0; r < R; ++r) all[r] = fzero();
  // Components [c, c + count), at most a vector of them.
  auto add = [&](int c, int count) {
    const char* columns = (const char*)l.up + factor_bytes(KIND, (int64_t(strip) * l.rank + c) * LANES);
    alignas(64) float scaled[R][LANES];
    const float* t[R];
    for (int r = 0; r < R; ++r) t[r] = all_t + int64_t(r) * l.rank + c;
    if constexpr (INTEGER) {
      // t takes the scales of B, for all these components at once.
      const F scale = load_some(scales + c, F16, count);
      for (int r = 0; r < R; ++r) {
        const F product = fmul(load_some(t[r], F32, count), scale);
        fstore(scaled[r], product);
        t[r] = scaled[r];
        all[r] = fadd(all[r], product);
      }
    }
    auto one = [&](int i, F (&to)[R]) {
      const char* at = columns + factor_bytes(KIND, LANES) * i;
      const F column = KIND == I4 ? lane_codes((const uint8_t*)at) : load16(at, KIND, 0);
      for (int r = 0; r < R; ++r) to[r] = fma(column, fset(t[r][i]), to[r]);
    };
    int i = 0;
    for (; i + CHAINS <= count; i += CHAINS) {
      for (int chain = 0; chain < CHAINS; ++chain) one(i + chain, sums[chain]);
    }
    for (; i < count; ++i) one(i, sums[0]);
  };
  for (int i = 0; i < active.count; ++i) {
    const int last = active.ranges[i].last;
    for (int c = active.ranges[i].first; c < last; c += LANES) add(c, last - c < LANES ? last - c : LANES);
  }
  for (int r = 0; r < R; ++r) {
    for (int chain = 1; chain < CHAINS; ++chain) sums[0][r] = fadd(sums[0][r], sums[chain][r]);
    // Codes of 4 bits were taken as they stand, 8 too large.
    if constexpr (KIND == I4) y[r] = fma(sums[0][r], lane_units(), fma(fset(sum(all[r])), fset(-8.0f), y[r]));
    else y[r] = fadd(y[r], sums[0][r]);
  }
}

template <int R>
void add_up(const Linear& l, int strip, const float* t, const Active& active, F (&y)[R]) {
  switch (l.up_kind) {
    case F16: return add_up_of<F16, R>(l, strip, t, active, y);
    case BF16: return add_up_of<BF16, R>(l, strip, t, active, y);
    case I8: return add_up_of<I8, R>(l, strip, t, active, y);
    case I4: return add_up_of<I4, R>(l, strip, t, active, y);
    default: return add_up_of<F32, R>(l, strip, t, active, y);
  }
}

template <int B, int S, int R>
void some_rows(const Linear& l, int strip, const Rows& x, int row, void* y, int64_t stride, int kind) {
  const Rows from = {x.digits + int64_t(row) * l.units * LANES * S, x.sums + int64_t(row) * l.segments * S,
                     x.steps + int64_t(row) * l.segments, x.t, x.active};
  F out[R];
  strip_of_rows<B, S, R>(l, strip, from, out);
  if (x.active.rank) add_up<R>(l, strip, x.t + int64_t(row) * l.rank, x.active, out);
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

void strips(const Linear& l, const Input& x, const float* t, const Active& active, int first, int last, void* y,
            int64_t stride, int kind) {
  const Rows rows = {x.digits, x.sums, x.steps, t, active};
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

const Kernels table = {down, quantize, quantize_down, widen, strips, dequantize};

}  // namespace
