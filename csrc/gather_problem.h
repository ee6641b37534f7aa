// Checks of the gather family's arguments, but for the values of the index.
#pragma once

#include <torch/csrc/stable/ops.h>

#include "checks.h"

namespace fastfisher {

inline void check_gather(const Tensor& out, const Tensor& grad, const Tensor& index,
                         int64_t power) {
#define FF_CHECK_GATHER(argument, condition, ...) \
  FF_CHECK("embedding_sum_grad_squared_", argument, condition, __VA_ARGS__)
  FF_CHECK_GATHER("out", is_floating(out) && out.dim() == 2, "expected float32 or float64 [V, D]");
  FF_CHECK_GATHER(
      "grad",
      grad.scalar_type() == out.scalar_type() && grad.dim() == 3 && grad.size(2) == out.size(1),
      "expected [N, T, D] of the dtype of out");
  FF_CHECK_GATHER("index",
                  index.scalar_type() == ScalarType::Long && index.dim() == 2 &&
                      index.size(0) == grad.size(0) && index.size(1) == grad.size(1),
                  "expected int64 [N, T]");
  FF_CHECK_GATHER("power", is_power(power), "expected 1 or 2");
#undef FF_CHECK_GATHER
}

}  // namespace fastfisher
