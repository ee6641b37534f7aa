// Vectors of 16 bytes: where memory allows them, and who of a warp gets which.
#pragma once

#include <cstdint>

#include "../outer_shape.h"

namespace fastfisher::cuda {

template <typename T>
struct alignas(16) Vector {
  static constexpr int size = 16 / sizeof(T);
  T lanes[size];
};

// Whether a pointer (which may be null) and strides allow vectors of a contiguous dimension.
template <typename T, typename... Strides>
bool is_aligned(const T* data, Strides... strides) {
  return (reinterpret_cast<uintptr_t>(data) % 16 == 0) &&
         ((strides % Vector<T>::size == 0) && ... && true);
}

// Lanes of a warp, a power of two, that a line of so many elements is given to.
template <typename T>
int lanes_for(int64_t elements) {
  int lanes = 1;
  while (lanes < 32 && lanes * Vector<T>::size < elements) lanes *= 2;
  return lanes;
}

inline int log2_of(int power_of_two) {
  int log = 0;
  while (power_of_two >> (log + 1) != 0) ++log;
  return log;
}

}  // namespace fastfisher::cuda
