// The CPU entry points: argument checks and threads; the arithmetic is in kernels_impl.h.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>
#include <vector>

namespace fastfisher::cpu {

using torch::stable::Tensor;

void linear_sum_grad_squared_(Tensor out, Tensor grad, Tensor input, double alpha, int64_t power,
                              bool allow_tf32);
void conv2d_sum_grad_squared_(Tensor out, Tensor grad, Tensor input, std::vector<int64_t> stride,
                              std::vector<int64_t> padding, std::vector<int64_t> dilation,
                              int64_t groups, double alpha, int64_t power, bool allow_tf32);
void channel_sum_grad_squared_(std::optional<Tensor> weight, std::optional<Tensor> bias,
                               Tensor grad, std::optional<Tensor> input, std::optional<Tensor> mean,
                               std::optional<Tensor> scale, std::optional<Tensor> grad_input,
                               std::optional<Tensor> factor, double alpha, int64_t power);
void embedding_sum_grad_squared_(Tensor out, Tensor grad, Tensor index, int64_t padding_index,
                                 double alpha, int64_t power);

// recurrent.cpp
void lstm_step_(Tensor gates, std::optional<Tensor> bias, Tensor cell, Tensor next_cell,
                Tensor hidden);
void lstm_step_backward_(Tensor grad_gates, Tensor grad_cell, std::optional<Tensor> grad_output,
                         std::optional<Tensor> grad_hidden, Tensor gates, Tensor cell,
                         Tensor next_cell);
void gru_step_(Tensor gates, Tensor product, std::optional<Tensor> bias, Tensor hidden,
               Tensor candidate, Tensor next_hidden);
void gru_step_backward_(Tensor grad_gates, Tensor grad_product, Tensor grad_hidden,
                        std::optional<Tensor> grad_output, Tensor gates, Tensor candidate,
                        Tensor hidden);

// topr_op.cpp
std::tuple<Tensor, Tensor, Tensor, Tensor> select_top(std::vector<Tensor> scores,
                                                      std::vector<Tensor> remain, double weight,
                                                      std::vector<int64_t> counts);
std::tuple<Tensor, Tensor> zero_selected_(std::vector<Tensor> parameters,
                                          std::vector<Tensor> scores, std::vector<Tensor> remain,
                                          double weight, Tensor key, Tensor selected,
                                          Tensor candidates, int64_t count, bool record);

}  // namespace fastfisher::cpu
