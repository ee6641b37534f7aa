// How a task of the channel family is made of an operator's arguments, which are checked on the
// way.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <optional>

#include "channel_shape.h"
#include "checks.h"

namespace fastfisher {

inline ChannelProblem channel_problem(const std::optional<Tensor>& weight,
                                      const std::optional<Tensor>& bias, const Tensor& grad,
                                      const std::optional<Tensor>& input,
                                      const std::optional<Tensor>& mean,
                                      const std::optional<Tensor>& scale,
                                      const std::optional<Tensor>& grad_input,
                                      const std::optional<Tensor>& factor, int64_t power) {
#define FF_CHECK_CHANNEL(argument, condition, ...) \
  FF_CHECK("channel_sum_grad_squared_", argument, condition, __VA_ARGS__)
  FF_CHECK_CHANNEL("grad", is_floating(grad) && grad.dim() == 3,
                   "expected float32 or float64 [N, T, C]");
  FF_CHECK_CHANNEL("weight, bias", weight.has_value() || bias.has_value(),
                   "expected at least one of them");
  FF_CHECK_CHANNEL(
      "input, scale",
      weight.has_value() == input.has_value() && weight.has_value() == scale.has_value(),
      "expected with weight, and only with it");
  const auto same_shape = [&](const std::optional<Tensor>& tensor) {
    return !tensor.has_value() ||
           (tensor->scalar_type() == grad.scalar_type() && tensor->dim() == 3 &&
            tensor->size(0) == grad.size(0) && tensor->size(1) == grad.size(1) &&
            tensor->size(2) == grad.size(2));
  };
  const auto is_output = [&](const std::optional<Tensor>& tensor) {
    return !tensor.has_value() || (tensor->scalar_type() == grad.scalar_type() &&
                                   tensor->dim() == 1 && tensor->size(0) == grad.size(2));
  };
  FF_CHECK_CHANNEL("input", same_shape(input), "expected the dtype and [N, T, C] of grad");
  FF_CHECK_CHANNEL("mean", same_shape(mean), "expected the dtype and [N, T, C] of grad");
  FF_CHECK_CHANNEL("scale", same_shape(scale), "expected the dtype and [N, T, C] of grad");
  FF_CHECK_CHANNEL("weight", is_output(weight), "expected [C] of the dtype of grad");
  FF_CHECK_CHANNEL("bias", is_output(bias), "expected [C] of the dtype of grad");
  FF_CHECK_CHANNEL("grad_input", grad_input.has_value() == factor.has_value(),
                   "expected with factor, and only with it");
  FF_CHECK_CHANNEL("grad_input",
                   same_shape(grad_input) &&
                       (!grad_input.has_value() || (grad_input->stride(0) == grad.stride(0) &&
                                                    grad_input->stride(1) == grad.stride(1) &&
                                                    grad_input->stride(2) == grad.stride(2))),
                   "expected the dtype, [N, T, C] and strides of grad");
  FF_CHECK_CHANNEL("factor", is_output(factor) && (!factor.has_value() || factor->stride(0) == 1),
                   "expected contiguous [C] of the dtype of grad");
  FF_CHECK_CHANNEL("power", is_power(power), "expected 1 or 2");
#undef FF_CHECK_CHANNEL
  ChannelProblem p{};
  p.samples = grad.size(0);
  p.positions = grad.size(1);
  p.channels = grad.size(2);
  for (int i = 0; i < 3; ++i) {
    p.g_stride[i] = grad.stride(i);
    p.x_stride[i] = input.has_value() ? input->stride(i) : 0;
    p.mean_stride[i] = mean.has_value() ? mean->stride(i) : 0;
    p.scale_stride[i] = scale.has_value() ? scale->stride(i) : 0;
  }
  p.weight_stride = weight.has_value() ? weight->stride(0) : 0;
  p.bias_stride = bias.has_value() ? bias->stride(0) : 0;
  p.absolute = power == 1;
  return p;
}

}  // namespace fastfisher
