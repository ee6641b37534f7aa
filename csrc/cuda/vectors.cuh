// Loads and stores of 16 bytes, and of as many elements where alignment does not allow them.
#pragma once

#include "device.h"
#include "ptx.h"
#include "vectors.h"

namespace fastfisher::cuda {

// A thread's elements of a line: neighbours where `vector`, else `apart` from each other. Those
// from `left` on are not there; of a vector all are or none.
template <bool vector, typename T>
__device__ __forceinline__ void load(Vector<T>& to, const T* from, int64_t stride, int apart,
                                     int64_t left) {
  if constexpr (vector) {
    to = left > 0 ? *reinterpret_cast<const Vector<T>*>(from) : Vector<T>{};
  } else {
#pragma unroll
    for (int k = 0; k < Vector<T>::size; ++k) {
      to.lanes[k] = k * apart < left ? from[k * apart * stride] : T(0);
    }
  }
}

template <bool vector, typename T>
__device__ __forceinline__ void store(T* to, const Vector<T>& from, int64_t stride, int apart,
                                      int64_t left) {
  if constexpr (vector) {
    if (left > 0) ff_store(to, from.lanes);
  } else {
#pragma unroll
    for (int k = 0; k < Vector<T>::size; ++k) {
      if (k * apart < left) to[k * apart * stride] = from.lanes[k];
    }
  }
}

template <typename T>
__device__ __forceinline__ T power_of(T value, bool absolute) {
  return absolute ? fabs(value) : value * value;
}

}  // namespace fastfisher::cuda
