// Raw-pointer kernels of the recurrent steps: the part of kernels.h that recurrent.cpp uses. No
// torch header here, for the reason given in kernels.h.
#pragma once

#include <cstdint>

#include "../recurrent_shape.h"

namespace fastfisher::cpu {

// Each for the rows from `begin` to `end`.
template <typename T>
struct RecurrentKernels {
  void (*lstm)(const LstmStep<T>&, int64_t begin, int64_t end);
  void (*lstm_backward)(const LstmStepBackward<T>&, int64_t begin, int64_t end);
  void (*gru)(const GruStep<T>&, int64_t begin, int64_t end);
  void (*gru_backward)(const GruStepBackward<T>&, int64_t begin, int64_t end);
};

}  // namespace fastfisher::cpu
