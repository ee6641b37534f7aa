// Raw-pointer kernels of the top-R selection: the part of kernels.h that topr_*.cpp uses. No torch
// header here, and no function with external linkage, for the reason given in kernels.h.
#pragma once

#include <cstdint>

namespace fastfisher::cpu {

// Scores are compared as ordered integer keys: larger score, larger key; -0.0 has the key of +0.0,
// and NaN the lowest of all. Integers, because comparing floats is not exact for denormals where
// the processor is told to flush them to zero.
template <typename T>
struct KeyOf;
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

struct KeyCounts {
  int32_t above = 0;   // keys above the bracket
  int32_t inside = 0;  // keys within it
  bool finite = true;  // no score is NaN or infinite
};

template <typename T>
struct TopKernels {
  // Counts the keys above `high` and those in [low, high]; the latter are written to `inside`, in
  // any order, unless that is nullptr. `inside` has room for `count` keys.
  KeyCounts (*filter)(Key<T>* inside, const T* score, int64_t count, Key<T> low, Key<T> high);
  // Bit i of `bits`, lowest first, is key(score[i]) >= least; bits past `count` of the last word
  // are 0. Returns how many are set.
  int64_t (*mark)(uint64_t* bits, const T* score, int64_t count, Key<T> least);
};

}  // namespace fastfisher::cpu
