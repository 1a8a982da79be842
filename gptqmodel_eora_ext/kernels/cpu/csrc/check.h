// Whether what Python handed over has the sizes that the kernels read and write. Python builds all of it from checked
// tensors; this is the last look before memory is touched, and it costs some comparisons a call.
#pragma once
#include "linear.h"

namespace {

// What is wrong; `FAULTS` of kernels/cpu/build.py says it in words.
enum Fault : int {
  FINE = 0, BAD_BITS, BAD_SIZES, BAD_KINDS, BAD_CODES, BAD_SCALES, BAD_ZEROS, BAD_STARTS, BAD_ORDER, BAD_DOWN,
  BAD_DOWN_SCALES, BAD_UP, BAD_UP_SCALES, BAD_BIAS, BAD_INPUT, BAD_OUTPUT, BAD_COMPONENTS, BAD_LAYERS, BAD_ISA,
  BAD_THREADS, BAD_PLACES, BAD_MEMBERS, BAD_WEIGHTS
};

// Features, and places of inputs, are counted in `int` and padded to 64: this many leave room for that.
constexpr int64_t MOST_FEATURES = 1 << 30;

// Members of an ensemble: more would want another way to choose among them.
constexpr int MOST_MEMBERS = 1 << 10;

inline bool readable_bits(int bits) { return bits == 2 || bits == 3 || bits == 4 || bits == 8; }
inline bool floating(int kind) { return kind == F32 || kind == F16 || kind == BF16; }
inline bool integer(int kind) { return kind == I8 || kind == I4; }
inline int64_t bytes_of(int kind) { return kind == F32 ? 4 : 2; }
// Whether there are exactly so many bytes.
inline bool holds(const void* memory, int64_t bytes, int64_t expected) { return memory && bytes == expected; }
// Words of 32 bits that a stream of so many codes takes.
inline int64_t stream_words(int64_t codes, int bits) { return (codes * bits + 31) / 32; }

inline Fault check_factor(const void* values, int64_t bytes, int64_t expected, const uint16_t* scales,
                          int64_t scale_bytes, int kind, int64_t scale_count, Fault bad_values, Fault bad_scales) {
  if (!holds(values, bytes, expected)) return bad_values;
  if (integer(kind) && !holds(scales, scale_bytes, scale_count * 2)) return bad_scales;
  return FINE;
}

inline Fault check_adapter(const Linear& l) {
  if (l.members < 0 || l.members > MOST_MEMBERS) return BAD_MEMBERS;
  if (l.members && !holds(l.ends, l.ends_bytes, int64_t(l.members) * 4)) return BAD_MEMBERS;
  if (l.rank == 0) return l.members ? BAD_MEMBERS : FINE;
  if (!(floating(l.down_kind) || integer(l.down_kind)) || !(floating(l.up_kind) || integer(l.up_kind)))
    return BAD_KINDS;
  const int64_t inputs = padded_inputs(l.in_features), outputs = int64_t(l.strips) * LANES;
  const int64_t down_rank = l.down_kind == I4 ? in_blocks(l.rank) : l.rank;
  if (Fault fault = check_factor(l.down, l.down_bytes, factor_bytes(l.down_kind, down_rank * inputs), l.down_scales,
                                 l.down_scales_bytes, l.down_kind, down_rank * (inputs / FACTOR_GROUP), BAD_DOWN,
                                 BAD_DOWN_SCALES))
    return fault;
  return check_factor(l.up, l.up_bytes, l.strips * up_bytes(l.up_kind, l.rank), l.up_scales, l.up_scales_bytes,
                      l.up_kind, l.rank * ((outputs + FACTOR_GROUP - 1) / FACTOR_GROUP), BAD_UP, BAD_UP_SCALES);
}

// Sizes alone.
inline Fault check_sizes(const Linear& l) {
  if (!readable_bits(l.bits)) return BAD_BITS;
  if (l.in_features < 1 || l.in_features > MOST_FEATURES || l.out_features < 1 || l.out_features > MOST_FEATURES ||
      l.rank < 0 || l.rank > MOST_FEATURES || l.segments < 1 || l.units < 1 || l.units > MOST_FEATURES / LANES ||
      l.strips != (l.out_features + LANES - 1) / LANES || l.zero < 0 || l.zero >= 1 << l.bits)
    return BAD_SIZES;
  if (!floating(l.scale_kind)) return BAD_KINDS;
  const int64_t scales = int64_t(l.strips) * l.segments * LANES, places = int64_t(l.units) * LANES;
  if (!holds(l.codes, l.codes_bytes, l.strips * strip_bytes(l.bits, l.units))) return BAD_CODES;
  if (!holds(l.scales, l.scales_bytes, scales * bytes_of(l.scale_kind))) return BAD_SCALES;
  if (l.zeros && l.zeros_bytes != (l.bits == 8 ? scales : scales / 2)) return BAD_ZEROS;
  if (!holds(l.starts, l.starts_bytes, (int64_t(l.segments) + 1) * 4)) return BAD_STARTS;
  if (l.order ? l.order_bytes != places * 4 : places != l.in_features) return BAD_ORDER;
  if (l.bias && l.bias_bytes != int64_t(l.strips) * LANES * 4) return BAD_BIAS;
  return check_adapter(l);
}

// What is read as an index: once for a layer, since nothing writes to it afterwards.
inline Fault check_indices(const Linear& l) {
  if (l.starts[0] != 0 || l.starts[l.segments] != l.units) return BAD_STARTS;
  for (int segment = 0; segment < l.segments; ++segment) {
    if (l.starts[segment] > l.starts[segment + 1]) return BAD_STARTS;
  }
  for (int64_t place = 0; l.order && place < int64_t(l.units) * LANES; ++place) {
    if (l.order[place] < -1 || l.order[place] >= l.in_features) return BAD_ORDER;
  }
  for (int member = 0; member < l.members; ++member) {
    if (l.ends[member] < (member ? l.ends[member - 1] : 0) || l.ends[member] > l.rank) return BAD_MEMBERS;
  }
  if (l.members && l.ends[l.members - 1] != l.rank) return BAD_MEMBERS;
  return FINE;
}

// Weights of a call, rows × members, null for none; a layer without an adapter has no members.
inline Fault check_weights(const Linear& l, const float* weights, int64_t weights_bytes, int rows) {
  if (!weights) return weights_bytes ? BAD_WEIGHTS : FINE;
  return !l.members || weights_bytes == int64_t(rows) * l.members * 4 ? FINE : BAD_WEIGHTS;
}

// Layers that are to read one x have to read it alike.
inline Fault check_together(const Linear* const* linears, int count) {
  if (count < 1) return BAD_LAYERS;
  const Linear& first = *linears[0];
  for (int i = 0; i < count; ++i) {
    const Linear& l = *linears[i];
    if (Fault fault = check_sizes(l)) return fault;
    if (l.in_features != first.in_features || l.segments != first.segments || l.units != first.units ||
        !l.order != !first.order)
      return BAD_LAYERS;
  }
  return FINE;
}

}  // namespace
