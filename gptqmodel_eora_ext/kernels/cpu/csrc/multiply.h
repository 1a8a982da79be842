// Layers that read the same x, from their codes: who computes what when.
#pragma once
#include <atomic>
#include <memory>
#include <thread>

#include "check.h"

namespace {

// Pieces per thread that the strips are cut into, so that a thread that is held up leaves its rest to others.
constexpr int PIECES = 8;
// Bytes that a thread reads at least, some 10 µs of work: to wake one and to wait for it takes about as long.
constexpr int64_t LEAST_SHARE = 128 << 10;

// Memory of the calling thread, kept from call to call.
template <typename T, int USE>
T* scratch(int64_t count) {
  thread_local std::unique_ptr<char[]> memory;
  thread_local int64_t size = 0;
  if (size < count * int64_t(sizeof(T)) + 64) {
    size = count * int64_t(sizeof(T)) + 64;
    memory.reset(new char[size]);
  }
  return (T*)((uintptr_t(memory.get()) + 63) & ~uintptr_t(63));
}

// Components [first, last) of t times the rows' weights of their member.
void weigh(const Linear& l, const float* weights, int rows, int first, int last, float* t) {
  for (int row = 0; row < rows; ++row) {
    const float weight = weights[int64_t(row) * l.members];
    if (weight == 1.0f) continue;  // as the shared adapter's always is
    for (int c = first; c < last; ++c) t[int64_t(row) * l.rank + c] *= weight;
  }
}

// The inputs of a row at their places.
const float* in_order(const Linear& l, const float* x, float* out) {
  for (int64_t place = 0; place < int64_t(l.units) * LANES; ++place) {
    out[place] = l.order[place] < 0 ? 0.0f : x[l.order[place]];
  }
  return out;
}

// A call of `eora_linears`, checked. y is rows × `outputs`, the layers' side by side; null where t alone is asked, which
// is then rows × rank of each layer, one after the other.
struct Call {
  const Linear* const* linears;
  int count;
  const char* x;
  int kind, rows;
  const float* weights;
  char* y;
  int64_t outputs;
  const Kernels& kernels;
  float* t = nullptr;
};

// A layer's part of a call: the components that are read, the pieces that its strips are cut into, its t, and its y.
struct Share {
  Active active;
  int pieces;
  float* t;
  char* y;
};

// A piece of the components: of which layer, which ones, and the weights of their member, null for 1.
struct Components { int layer, first, last; const float* weights; };

// All layers' parts together.
struct Work {
  const Call& call;
  const Share* shares;
  const Components* components;
  int chunk, downs, pieces;  // chunk: strips of a piece
};

// Whether the weight reads its inputs in their own order in groups of 64, as A of 4 bits does.
bool in_factor_groups(const Linear& l) {
  if (l.order || l.in_features % FACTOR_GROUP || l.segments != l.in_features / FACTOR_GROUP) return false;
  for (int segment = 0; segment < l.segments; ++segment) {
    if (l.starts[segment] != segment * (FACTOR_GROUP / LANES)) return false;
  }
  return true;
}

// Memory for x of the calling thread; that for A of 4 bits where a layer has one, and that for codes unless A is all.
Input input_of(const Call& c, bool codes = true) {
  const Linear& l = *c.linears[0];
  const int rows = c.rows, slices = c.kind == F32 ? 3 : 2;
  const int64_t inputs = padded_inputs(l.in_features), groups = inputs / FACTOR_GROUP;
  Input input = {rows,
                 slices,
                 scratch<float, 0>(rows * inputs),
                 nullptr, nullptr, nullptr, nullptr, nullptr, nullptr};
  if (codes) {
    input.digits = scratch<int8_t, 1>(int64_t(rows) * l.units * LANES * slices);
    input.sums = scratch<int32_t, 2>(int64_t(rows) * l.segments * slices);
    input.steps = scratch<float, 3>(int64_t(rows) * l.segments);
  }
  bool four_bits = false;
  for (int i = 0; i < c.count; ++i) four_bits |= c.linears[i]->rank && c.linears[i]->down_kind == I4;
  if (four_bits && codes && in_factor_groups(l)) {
    input.down_digits = input.digits, input.down_sums = input.sums, input.down_steps = input.steps;
  } else if (four_bits) {
    input.down_digits = scratch<int8_t, 11>(rows * inputs * slices);
    input.down_sums = scratch<int32_t, 12>(rows * groups * slices);
    input.down_steps = scratch<float, 13>(rows * groups);
  }
  return input;
}

bool has_blocks(const Linear& l) { return l.rank && l.up_kind == I4; }

// Memory of the calling thread for t and Bᵀ of 4 bits; none where no layer has it.
UpInput up_input_of(const Call& c, int slices) {
  int64_t places = 0;
  for (int i = 0; i < c.count; ++i) {
    const Linear& l = *c.linears[i];
    if (has_blocks(l) && up_places(l.rank) > places) places = up_places(l.rank);
  }
  if (!places) return {};
  return {nullptr, nullptr, scratch<float, 14>(places + LANES), scratch<int8_t, 15>(c.rows * places * slices),
          scratch<int32_t, 16>(c.rows * slices)};
}

// A row of x in all forms that are needed.
void read_row(const Call& c, const Input& to, int row) {
  const Linear& l = *c.linears[0];
  const int64_t inputs = padded_inputs(l.in_features), groups = inputs / FACTOR_GROUP;
  const int64_t places = int64_t(l.units) * LANES, row_bytes = int64_t(l.in_features) * (c.kind == F32 ? 4 : 2);
  float* wide = to.wide + row * inputs;
  c.kernels.widen(c.x + row * row_bytes, c.kind, l.in_features, wide);
  if (to.digits) {
    const float* ordered = l.order ? in_order(l, wide, scratch<float, 7>(places)) : wide;
    c.kernels.quantize(ordered, l.starts, l.segments, to.slices, to.digits + row * places * to.slices,
                       to.sums + int64_t(row) * l.segments * to.slices, to.steps + int64_t(row) * l.segments);
  }
  if (!to.down_digits || to.down_digits == to.digits) return;
  c.kernels.quantize(wide, nullptr, groups, to.slices, to.down_digits + row * inputs * to.slices,
                     to.down_sums + row * groups * to.slices, to.down_steps + row * groups);
}

void multiply_down(const Work& w, const Input& x, const Components& some) {
  const Linear& l = *w.call.linears[some.layer];
  float* t = w.shares[some.layer].t;
  w.call.kernels.down(l, x, some.first, some.last, t);
  if (some.weights) weigh(l, some.weights, x.rows, some.first, some.last, t);
}

// A piece of the strips: of which layer, and which ones.
struct Strips { int layer, first, last; };

Strips strips_of(const Work& w, int piece) {
  int i = 0;
  for (; piece >= w.shares[i].pieces; ++i) piece -= w.shares[i].pieces;
  const int first = piece * w.chunk, end = first + w.chunk, most = w.call.linears[i]->strips;
  return {i, first, end < most ? end : most};
}

// Looks that a thread takes at what others are about to finish before it lets them have its processor: some 10 µs.
constexpr int PATIENCE = 1 << 10;

// Waits for the last components that other threads are at. A barrier of OpenMP puts a thread to sleep where processors
// are few, and to wake it takes longer than all of them.
void wait_for(const std::atomic<int>& finished, int pieces) {
  for (int looks = 0; finished.load(std::memory_order_acquire) < pieces; ++looks) {
    if (looks >= PATIENCE) std::this_thread::yield();
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  }
}

// Rows that each thread reads for itself, which takes less than to wait for another that does.
constexpr int FEW_ROWS = 4;

void multiply_all(const Work& w, int threads) {
  const Call& c = w.call;
  const bool few = c.rows <= FEW_ROWS;
  const Input shared = few ? Input{} : input_of(c);
  std::atomic<int> finished{0};
#pragma omp parallel num_threads(threads)
  {
    const Input input = few ? input_of(c) : shared;
    if (few) {
      for (int row = 0; row < c.rows; ++row) read_row(c, input, row);
    } else {
#pragma omp for schedule(dynamic, 1)
      for (int row = 0; row < c.rows; ++row) read_row(c, input, row);
    }
    if (w.downs) {
#pragma omp for schedule(dynamic, 1) nowait
      for (int piece = 0; piece < w.downs; ++piece) {
        multiply_down(w, input, w.components[piece]);
        finished.fetch_add(1, std::memory_order_release);
      }
      wait_for(finished, w.downs);
    }
    UpInput up = up_input_of(c, input.slices);
    float* scales = scratch<float, 17>(int64_t(c.count) * c.rows * 2);
    for (int i = 0; up.digits && i < c.count; ++i) {
      const Linear& l = *c.linears[i];
      float* of_layer = scales + int64_t(i) * c.rows * 2;
      if (has_blocks(l)) {
        c.kernels.scale_up(l, w.shares[i].active, w.shares[i].t, c.rows, input.slices, of_layer, of_layer + c.rows);
      }
    }
#pragma omp for schedule(dynamic, 1)
    for (int piece = 0; piece < w.pieces; ++piece) {
      const Strips some = strips_of(w, piece);
      const Share& share = w.shares[some.layer];
      up.scales = scales + int64_t(some.layer) * c.rows * 2, up.steps = up.scales + c.rows;
      c.kernels.strips(*c.linears[some.layer], input, share.t, up, share.active, some.first, some.last, share.y,
                       c.outputs, c.kind);
    }
  }
}

// A call's parts, with strips in pieces of so many.
Work divided(const Call& c, int chunk) {
  int64_t members = 0, rank = 0, most = 0;
  for (int i = 0; i < c.count; ++i) {
    const Linear& l = *c.linears[i];
    const int ranges = l.members > 0 ? l.members : 1;
    rank += l.rank, members += ranges;
    most += l.rank / COMPONENTS + 2 * ranges;  // a member begins and ends within a piece
  }
  Range* ranges = scratch<Range, 9>(members);
  Share* shares = scratch<Share, 8>(c.count);
  Components* components = scratch<Components, 18>(most);
  float* t = c.t ? c.t : scratch<float, 4>(c.rows * rank);
  char* y = c.y;
  Work work = {c, shares, components, chunk, 0, 0};
  for (int i = 0; i < c.count; ++i) {
    const Linear& l = *c.linears[i];
    const Active active = active_of(l, c.weights, c.rows, ranges);
    shares[i] = {active, (l.strips + chunk - 1) / chunk, t, y};
    const int each = l.down_kind == I4 ? LANES : COMPONENTS;
    for (int r = 0; r < active.count; ++r) {
      const Range& range = active.ranges[r];
      const float* weights = range.member < 0 ? nullptr : c.weights + range.member;
      // Pieces that are strips end where strips do.
      int end = l.down_kind == I4 ? range.first / LANES * LANES : range.first;
      for (int first = range.first; first < range.last; first = end) {
        end = end + each < range.last ? end + each : range.last;
        components[work.downs++] = {i, first, end, weights};
      }
    }
    work.pieces += shares[i].pieces;
    ranges += active.count, t += int64_t(c.rows) * l.rank;
    if (y) y += l.out_features * bytes_of(c.kind);
  }
  return work;
}

// Rows of x that are multiplied with a piece of A at a time.
constexpr int DOWN_ROWS = 32;

// Some rows of x, in the forms that A reads.
Input rows_of(const Linear& l, Input x, int first, int count) {
  const int64_t inputs = padded_inputs(l.in_features), groups = inputs / FACTOR_GROUP;
  x.rows = count, x.wide += first * inputs;
  if (x.down_digits) {
    x.down_digits += first * inputs * x.slices, x.down_sums += first * groups * x.slices;
    x.down_steps += first * groups;
  }
  return x;
}

// t = x Aᵀ alone, of all components.
void multiply_components(const Call& c, int threads) {
  const Work w = divided(c, 1);
  const Input input = input_of(c, false);
  const int blocks = (c.rows + DOWN_ROWS - 1) / DOWN_ROWS;
#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(dynamic, 1)
    for (int row = 0; row < c.rows; ++row) read_row(c, input, row);
#pragma omp for schedule(dynamic, 1)
    for (int piece = 0; piece < w.downs * blocks; ++piece) {
      const Components some = w.components[piece / blocks];
      const Linear& l = *c.linears[some.layer];
      const int first = piece % blocks * DOWN_ROWS, left = c.rows - first;
      c.kernels.down(l, rows_of(l, input, first, left < DOWN_ROWS ? left : DOWN_ROWS), some.first, some.last,
                     w.shares[some.layer].t + int64_t(first) * l.rank);
    }
  }
}

void multiply(const Call& c, int threads) {
  int64_t strips = 0, read = 0;
  for (int i = 0; i < c.count; ++i) {
    const Linear& l = *c.linears[i];
    strips += l.strips;
    read += l.codes_bytes + l.down_bytes + l.up_bytes;
  }
  const int64_t busy = c.rows * read / LEAST_SHARE;
  if (threads > busy) threads = busy > 1 ? int(busy) : 1;
  const int chunk = strips / (threads * PIECES) > 0 ? int(strips / (threads * PIECES)) : 1;
  multiply_all(divided(c, chunk), threads);
}

}  // namespace
