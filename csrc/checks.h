// Argument checks of the operators. Every message names the operator and the argument.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#define FF_CHECK(op, argument, condition, ...) \
  STD_TORCH_CHECK(condition, "fastfisher::" op ": " argument ": ", __VA_ARGS__)

namespace fastfisher {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The operators add |g|^power for these powers.
inline bool is_power(int64_t power) { return power == 1 || power == 2; }

inline bool is_floating(const Tensor& tensor) {
  return tensor.scalar_type() == ScalarType::Float || tensor.scalar_type() == ScalarType::Double;
}

}  // namespace fastfisher
