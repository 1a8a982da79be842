// t = x Aᵀ and y += t Bᵀ. Included after one of the `vec_*.h`.
#pragma once
#include "codes.inl"

namespace {

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

// Of a strip's components, A in integers of 4 bits: those of [first, last) to t.
template <int S, int R, bool WHOLE>
void dots_of_strip(const Linear& l, const Input& x, int row, int strip, int first, int last, float* t) {
  constexpr int WIDTH = WHOLE ? LANES : BLOCK, GROUP_BYTES = FACTOR_GROUP / 2 * WIDTH;
  const int groups = padded_inputs(l.in_features) / FACTOR_GROUP;
  const int64_t before = int64_t(strip) * LANES * groups, row_stride = int64_t(groups) * FACTOR_GROUP * S;
  const uint8_t* codes = (const uint8_t*)l.down + before * (FACTOR_GROUP / 2);
  const uint16_t* scales = l.down_scales + before;
  const int8_t* digits = x.down_digits + row * row_stride;
  const int32_t* sums = x.down_sums + int64_t(row) * groups * S;
  const float* steps = x.down_steps + int64_t(row) * groups;
  F total[R];
  for (F& one : total) one = fzero();
  for (int group = 0; group < groups; ++group, codes += GROUP_BYTES, digits += FACTOR_GROUP * S) {
    I once[R][S], shifted[R][S];
    for (int r = 0; r < R; ++r) {
      for (int s = 0; s < S; ++s) once[r][s] = shifted[r][s] = izero();
    }
    for (int vector = 0; vector < GROUP_BYTES / 64; ++vector) {
      __builtin_prefetch(codes + vector * 64 + DOWN_AHEAD);
      const I both = load(codes + vector * 64);
      if constexpr (WHOLE) {
        take_halves<S, R>(once, shifted, both, digits + vector / 2 * LANES * S + vector % 2 * BLOCK, row_stride);
      } else {
        take_halves<S, R, BLOCK>(once, shifted, both, digits + vector * LANES * S, row_stride);
      }
    }
    const F scale = WHOLE ? load_f16(scales + group * WIDTH) : load_f16(scales + group * WIDTH, WIDTH);
    for (int r = 0; r < R; ++r) {
      F value = fzero();
      for (int s = S - 1; s >= 0; --s) {
        I exact = together_of_halves(once[r][s], shifted[r][s]);
        if constexpr (!WHOLE) exact = iadd(exact, swap_halves(exact));
        // Codes are 8 too large.
        exact = isub(exact, iset(8 * sums[(r * groups + group) * S + s]));
        value = fma(value, fset(256.0f), to_float(exact));
      }
      total[r] = fma(value, fmul(scale, fset(steps[r * groups + group])), total[r]);
    }
  }
  const int place = strip * LANES, begin = place > first ? place : first;
  const int end = place + WIDTH < last ? place + WIDTH : last;
  for (int r = 0; r < R; ++r) {
    alignas(64) float lanes[LANES];
    fstore(lanes, total[r]);
    for (int c = begin; c < end; ++c) t[r * int64_t(l.rank) + c] = lanes[c - place];
  }
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
void down_of_strips(const Linear& l, const Input& x, int first, int last, float* t) {
  for (int strip = first / LANES; strip * LANES < last; ++strip) {
    const bool whole = in_blocks(l.rank) >= (strip + 1) * LANES;
    auto* four = whole ? dots_of_strip<S, 4, true> : dots_of_strip<S, 4, false>;
    auto* one = whole ? dots_of_strip<S, 1, true> : dots_of_strip<S, 1, false>;
    for (int row = 0; row < x.rows;) {
      const bool several = row + 4 <= x.rows;
      (several ? four : one)(l, x, row, strip, first, last, t + int64_t(row) * l.rank);
      row += several ? 4 : 1;
    }
  }
}

void down(const Linear& l, const Input& x, int first, int last, float* t) {
  auto* run = l.down_kind == F16 ? down_of<F16> : l.down_kind == BF16 ? down_of<BF16> : l.down_kind == I8 ? down_of<I8>
            : l.down_kind != I4 ? down_of<F32> : x.slices == 2 ? down_of_strips<2> : down_of_strips<3>;
  run(l, x, first, last, t);
}

// Asks for a strip's columns of Bᵀ, which are too short a run for the processor to foresee, and needed last: some with
// each segment, all by the middle of the strip. All at once, they would keep the codes waiting.
struct UpAhead {
  const char *strip_begin, *next, *end;
  const Range *range, *last_range;
  int64_t step;
  int kind;

  UpAhead(const Linear& l, const Active& active, int strip) : kind(l.up_kind) {
    strip_begin = (const char*)l.up + strip * up_bytes(kind, l.rank);
    range = active.ranges, last_range = range + active.count;
    next = end = nullptr;
    if (kind == I4) range = last_range;  // asked for a strip ahead, where it is multiplied
    if (range < last_range) enter();
    step = (2 * up_bytes(kind, active.rank) / l.segments + 63) / 64 * 64;
    if (active.count && kind == I8) {
      const char* scales = (const char*)(l.up_scales + int64_t(strip * LANES / FACTOR_GROUP) * l.rank);
      for (int byte = 0; byte < 2 * l.rank; byte += 64) __builtin_prefetch(scales + byte);
    }
  }
  void enter() { next = strip_begin + up_bytes(kind, range->first), end = strip_begin + up_bytes(kind, range->last); }
  void fetch() {
    for (int64_t left = step; left > 0 && next < end; left -= 64) {
      __builtin_prefetch(next);
      next += 64;
      if (next >= end && ++range < last_range) enter();
    }
  }
};

template <int KIND, int R>
void add_up_of(const Linear& l, int strip, const float* all_t, const Active& active, F (&y)[R]) {
  constexpr bool INTEGER = KIND == I8;
  const uint16_t* scales = l.up_scales + int64_t(strip * LANES / FACTOR_GROUP) * l.rank;
  // Sums that do not wait for each other: one row alone would have each product wait for the one before.
  constexpr int CHAINS = R == 1 ? 4 : 1;
  F sums[CHAINS][R];
  for (int chain = 0; chain < CHAINS; ++chain) {
    for (int r = 0; r < R; ++r) sums[chain][r] = fzero();
  }
  // Components [c, c + count). Of integers at most a vector's, and a whole one is counted when compiled.
  auto add = [&](int c, auto whole, int rest) {
    const int count = whole ? LANES : rest;
    const char* columns = (const char*)l.up + factor_bytes(KIND, (int64_t(strip) * l.rank + c) * LANES);
    alignas(64) float scaled[R][LANES];
    const float* t[R];
    for (int r = 0; r < R; ++r) t[r] = all_t + int64_t(r) * l.rank + c;
    if constexpr (INTEGER) {
      // t takes the scales of B, for all these components at once.
      const F scale = whole ? load_f16(scales + c) : load_f16(scales + c, count);
      for (int r = 0; r < R; ++r) {
        fstore(scaled[r], fmul(whole ? fload(t[r]) : fload(t[r], count), scale));
        t[r] = scaled[r];
      }
    }
    auto one = [&](int i, F (&to)[R]) {
      const F column = load16(columns, KIND, i * LANES);
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
    int c = active.ranges[i].first;
    for (; INTEGER && c + LANES <= last; c += LANES) add(c, std::true_type{}, 0);
    if (c < last) add(c, std::false_type{}, last - c);
  }
  for (int r = 0; r < R; ++r) {
    for (int chain = 1; chain < CHAINS; ++chain) sums[0][r] = fadd(sums[0][r], sums[chain][r]);
    y[r] = fadd(y[r], sums[0][r]);
  }
}

// The same of 4 bits, by byte products with t in integers.
template <int S, int R>
void add_up_of_blocks(const Linear& l, int strip, const UpInput& up, int row, const Active& active, F (&y)[R]) {
  const uint8_t* blocks = (const uint8_t*)l.up + strip * up_bytes(I4, l.rank);
  const int64_t row_stride = int64_t(up_places(l.rank)) * S;
  const int8_t* digits = up.digits + row * row_stride;
  I once[R][S], shifted[R][S];
  for (int r = 0; r < R; ++r) {
    for (int s = 0; s < S; ++s) once[r][s] = shifted[r][s] = izero();
  }
  int block = 0;
  for (int i = 0; i < active.count; ++i) {
    const int first = active.ranges[i].first / BLOCK, end = int(in_blocks(active.ranges[i].last) / BLOCK);
    // A block that two members share is taken once: the digits of both are in it.
    for (block = block > first ? block : first; block < end; ++block) {
      __builtin_prefetch(blocks + block * int64_t(64) + up_bytes(I4, l.rank));
      const int8_t* of_block = digits + block / 2 * LANES * S + block % 2 * BLOCK;
      take_halves<S, R>(once, shifted, load(blocks + block * int64_t(64)), of_block, row_stride);
    }
  }
  for (int r = 0; r < R; ++r) {
    F value = fzero();
    for (int s = S - 1; s >= 0; --s) {
      // Codes are 8 too large.
      const I eights = iset(up.sums[(row + r) * S + s] * 8);
      value = fma(value, fset(256.0f), to_float(isub(together_of_halves(once[r][s], shifted[r][s]), eights)));
    }
    y[r] = fma(value, fset(up.steps[row + r]), y[r]);
  }
}

template <int S, int R>
void add_up(const Linear& l, int strip, const float* t, const UpInput& up, int row, const Active& active, F (&y)[R]) {
  switch (l.up_kind) {
    case F16: return add_up_of<F16, R>(l, strip, t, active, y);
    case BF16: return add_up_of<BF16, R>(l, strip, t, active, y);
    case I8: return add_up_of<I8, R>(l, strip, t, active, y);
    case I4: return add_up_of_blocks<S, R>(l, strip, up, row, active, y);
    default: return add_up_of<F32, R>(l, strip, t, active, y);
  }
}

}  // namespace
