// Raw-pointer kernels of the top-R selection: the part of kernels.h that topr_*.cpp uses. No torch
// header here, and no function with external linkage, for the reason given in kernels.h.
#pragma once

#include <cstdint>

namespace fastfisher::cpu {

// Stored scores of 16 bits; torch's own types may not be included here.
struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

// Scores are compared as ordered integer keys: larger score, larger key; -0.0 has the key of +0.0,
// and NaN the lowest of all. Integers, because comparing floats is not exact for denormals where
// the processor is told to flush them to zero.
template <typename T>
struct KeyOf;
template <>
struct KeyOf<Half> {
  using type = int16_t;
  static constexpr type infinity = 0x7c00;
};
template <>
struct KeyOf<BFloat16> {
  using type = int16_t;
  static constexpr type infinity = 0x7f80;
};
template <>
struct KeyOf<float> {
  using type = int32_t;
  static constexpr type infinity = 0x7f800000;
};
template <>
struct KeyOf<double> {
  using type = int64_t;
  static constexpr type infinity = 0x7ff0000000000000;
};
template <typename T>
using Key = typename KeyOf<T>::type;

template <typename T>
static constexpr Key<T> lowest_key = -KeyOf<T>::infinity - 1;

template <typename T>
static inline Key<T> key_of(T score) {
  const auto bits = __builtin_bit_cast(Key<T>, score);
  const Key<T> magnitude = bits & ~(Key<T>{1} << (sizeof(T) * 8 - 1));
  if (magnitude > KeyOf<T>::infinity) return lowest_key<T>;
  return bits < 0 ? -magnitude : magnitude;
}

// Without an instruction for it, which the oldest processors lack.
static inline int32_t bit_count(uint64_t word) {
  word -= (word >> 1) & 0x5555555555555555;
  word = (word & 0x3333333333333333) + ((word >> 2) & 0x3333333333333333);
  return (((word + (word >> 4)) & 0x0f0f0f0f0f0f0f0f) * 0x0101010101010101) >> 56;
}

// Scores are set aside, marked and zeroed in groups of this many consecutive ones: those of one
// cache line, where they are floats. The last group of a chunk may be smaller.
constexpr int64_t kGroup = 16;

struct KeyCounts {
  int32_t above = 0;   // keys above the bracket
  int32_t inside = 0;  // keys within it
  bool finite = true;  // no score is NaN or infinite
};

template <typename T>
struct TopKernels {
  // Counts the keys above `high` and those in [low, high], and writes the latter to `inside`, in
  // any order; it has room for `count` keys and 64 more. Bit i of `candidates`, lowest first, is
  // whether group i has a key of `low` or more; bits past the groups of the last word are 0.
  KeyCounts (*filter)(Key<T>* inside, uint64_t* candidates, const T* score, int64_t count,
                      Key<T> low, Key<T> high);
  // Entry j < entries of `at_least` gets the number of keys of low + j or more. Returns whether all
  // scores are finite; `candidates` as above.
  bool (*tally)(int32_t* at_least, int64_t entries, uint64_t* candidates, const T* score,
                int64_t count, Key<T> low);
  // Bit i of `bits` becomes key(score[i]) >= least, in the listed groups; others stay. Returns how
  // many were set.
  int64_t (*mark)(uint16_t* bits, const T* score, int64_t count, const uint16_t* groups,
                  int64_t listed, Key<T> least);
  // out[i] = forget[i] - remain[i] * weight as two operations rounded to T, in the listed groups.
  void (*subtract)(T* out, const T* forget, const T* remain, double weight, int64_t count,
                   const uint16_t* groups, int64_t listed);
};

// What happens to the elements, of 1, 2, 4, 8 or 16 bytes, whose bits are set in the listed groups;
// bits[g] are those of group g.
struct GroupKernels {
  // Copies them to `out`, one after the other.
  void (*take)(char* out, const char* data, int64_t width, const uint16_t* bits,
               const uint16_t* groups, int64_t listed);
  // Writes first + i of each element i to `out`.
  void (*take_indices)(int32_t* out, int32_t first, const uint16_t* bits, const uint16_t* groups,
                       int64_t listed);
  void (*zero)(char* data, int64_t width, const uint16_t* bits, const uint16_t* groups,
               int64_t listed);
};

}  // namespace fastfisher::cpu
