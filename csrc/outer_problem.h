// What the outer family contracts, as its drivers see it, and how it is made of an operator's
// arguments, which are checked on the way. The kernels' own files include neither torch nor this.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <vector>

#include "checks.h"
#include "outer_shape.h"

namespace fastfisher {

inline bool are_operands(const Tensor& grad, const Tensor& input, const Tensor& out) {
  const ScalarType type = grad.scalar_type();
  return input.scalar_type() == type &&
         (type == out.scalar_type() ||
          (type == ScalarType::BFloat16 && out.scalar_type() == ScalarType::Float));
}

#define FF_CHECK_OPERANDS(op)                                           \
  FF_CHECK(op, "out", is_floating(out), "expected float32 or float64"); \
  FF_CHECK(op, "grad, input", are_operands(grad, input, out),           \
           "expected the dtype of out, or bfloat16 both where out is float32")

inline Problem linear_problem(const Tensor& out, const Tensor& grad, const Tensor& input,
                              int64_t power) {
  FF_CHECK_OPERANDS("linear_sum_grad_squared_");
  FF_CHECK("linear_sum_grad_squared_", "grad", grad.dim() == 3, "expected [N, T, O]");
  FF_CHECK("linear_sum_grad_squared_", "input",
           input.dim() == 3 && input.size(0) == grad.size(0) && input.size(1) == grad.size(1),
           "expected [N, T, I] with the N and T of grad");
  FF_CHECK("linear_sum_grad_squared_", "out",
           out.dim() == 2 && out.size(0) == grad.size(2) && out.size(1) == input.size(2),
           "expected [O, I]");
  FF_CHECK("linear_sum_grad_squared_", "power", is_power(power), "expected 1 or 2");
  Problem p{};
  p.absolute = power == 1;
  p.samples = grad.size(0);
  p.groups = 1;
  p.rows = out.size(0);
  p.columns = out.size(1);
  p.height = p.out_height = 1;
  p.width = p.out_width = grad.size(1);
  p.kernel_height = p.kernel_width = 1;
  p.stride_h = p.stride_w = p.dilation_h = p.dilation_w = 1;
  const int64_t g_stride[4] = {grad.stride(0), grad.stride(2), 0, grad.stride(1)};
  const int64_t x_stride[4] = {input.stride(0), input.stride(2), 0, input.stride(1)};
  const int64_t out_stride[4] = {out.stride(0), out.stride(1), 0, 0};
  std::copy_n(g_stride, 4, p.g_stride);
  std::copy_n(x_stride, 4, p.x_stride);
  std::copy_n(out_stride, 4, p.out_stride);
  return p;
}

inline Problem conv2d_problem(const Tensor& out, const Tensor& grad, const Tensor& input,
                              const std::vector<int64_t>& stride,
                              const std::vector<int64_t>& padding,
                              const std::vector<int64_t>& dilation, int64_t groups, int64_t power) {
  FF_CHECK_OPERANDS("conv2d_sum_grad_squared_");
  FF_CHECK("conv2d_sum_grad_squared_", "grad", grad.dim() == 4, "expected [N, O, OH, OW]");
  FF_CHECK("conv2d_sum_grad_squared_", "input", input.dim() == 4 && input.size(0) == grad.size(0),
           "expected [N, C, H, W]");
  FF_CHECK("conv2d_sum_grad_squared_", "stride, padding, dilation",
           stride.size() == 2 && padding.size() == 2 && dilation.size() == 2,
           "expected two numbers each");
  FF_CHECK("conv2d_sum_grad_squared_", "stride, padding, dilation",
           stride[0] > 0 && stride[1] > 0 && dilation[0] > 0 && dilation[1] > 0 &&
               padding[0] >= 0 && padding[1] >= 0,
           "expected stride > 0, dilation > 0, padding >= 0");
  FF_CHECK("conv2d_sum_grad_squared_", "groups",
           groups > 0 && input.size(1) % groups == 0 && grad.size(1) % groups == 0,
           "expected a divisor of the channels of input and grad");
  FF_CHECK("conv2d_sum_grad_squared_", "out",
           out.dim() == 4 && out.size(0) == grad.size(1) && out.size(1) == input.size(1) / groups,
           "expected [O, C / groups, KH, KW]");
  FF_CHECK("conv2d_sum_grad_squared_", "power", is_power(power), "expected 1 or 2");
  Problem p{};
  p.absolute = power == 1;
  p.samples = grad.size(0);
  p.groups = groups;
  p.rows = out.size(0) / groups;
  p.columns = out.size(1);
  p.height = input.size(2);
  p.width = input.size(3);
  p.out_height = grad.size(2);
  p.out_width = grad.size(3);
  p.kernel_height = out.size(2);
  p.kernel_width = out.size(3);
  p.stride_h = stride[0];
  p.stride_w = stride[1];
  p.pad_h = padding[0];
  p.pad_w = padding[1];
  p.dilation_h = dilation[0];
  p.dilation_w = dilation[1];
  const int64_t room_h = p.height + 2 * p.pad_h - p.dilation_h * (p.kernel_height - 1) - 1;
  const int64_t room_w = p.width + 2 * p.pad_w - p.dilation_w * (p.kernel_width - 1) - 1;
  FF_CHECK("conv2d_sum_grad_squared_", "grad",
           room_h >= 0 && room_w >= 0 && room_h / p.stride_h + 1 == p.out_height &&
               room_w / p.stride_w + 1 == p.out_width,
           "its height and width do not follow from input, stride, padding and dilation");
  for (int i = 0; i < 4; ++i) {
    p.g_stride[i] = grad.stride(i);
    p.x_stride[i] = input.stride(i);
    p.out_stride[i] = out.stride(i);
  }
  return p;
}

}  // namespace fastfisher
