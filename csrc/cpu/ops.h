// The CPU entry points: argument checks and threads; the arithmetic is in kernels_impl.h.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <vector>

namespace fastfisher::cpu {

using torch::stable::Tensor;

void linear_sum_grad_squared_(Tensor out, Tensor grad, Tensor input, double alpha, int64_t power);
void conv2d_sum_grad_squared_(Tensor out, Tensor grad, Tensor input, std::vector<int64_t> stride,
                              std::vector<int64_t> padding, std::vector<int64_t> dilation,
                              int64_t groups, double alpha, int64_t power);
void channel_sum_grad_squared_(std::optional<Tensor> weight, std::optional<Tensor> bias,
                               Tensor grad, std::optional<Tensor> input, std::optional<Tensor> mean,
                               std::optional<Tensor> scale, std::optional<Tensor> grad_input,
                               std::optional<Tensor> factor, double alpha, int64_t power);
void embedding_sum_grad_squared_(Tensor out, Tensor grad, Tensor index, int64_t padding_index,
                                 double alpha, int64_t power);

}  // namespace fastfisher::cpu
