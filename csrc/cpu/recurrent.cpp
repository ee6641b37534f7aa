// One time step of a recurrent layer, forward and backward: everything but the matrix products.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <optional>

#include "../recurrent_problem.h"
#include "dispatch.h"

namespace fastfisher::cpu {
namespace {

// Fewer hidden units are done before another thread has heard of them.
constexpr int64_t kLeastUnits = 2048;

template <typename Step>
void run(void (*kernel)(const Step&, int64_t, int64_t), const Step& step) {
  const int64_t grain = std::max<int64_t>(1, kLeastUnits / std::max<int64_t>(1, step.units));
  torch::stable::parallel_for(0, step.rows, grain,
                              [&](int64_t begin, int64_t end) { kernel(step, begin, end); });
}

}  // namespace

void lstm_step_(Tensor gates, std::optional<Tensor> bias, Tensor cell, Tensor next_cell,
                Tensor hidden) {
  if (cell.scalar_type() == ScalarType::Float) {
    run(kernels().recurrent<float>().lstm,
        lstm_step_of<float>(gates, bias, cell, next_cell, hidden));
  } else {
    run(kernels().recurrent<double>().lstm,
        lstm_step_of<double>(gates, bias, cell, next_cell, hidden));
  }
}

void lstm_step_backward_(Tensor grad_gates, Tensor grad_cell, std::optional<Tensor> grad_output,
                         std::optional<Tensor> grad_hidden, Tensor gates, Tensor cell,
                         Tensor next_cell) {
  if (cell.scalar_type() == ScalarType::Float) {
    run(kernels().recurrent<float>().lstm_backward,
        lstm_step_backward_of<float>(grad_gates, grad_cell, grad_output, grad_hidden, gates, cell,
                                     next_cell));
  } else {
    run(kernels().recurrent<double>().lstm_backward,
        lstm_step_backward_of<double>(grad_gates, grad_cell, grad_output, grad_hidden, gates, cell,
                                      next_cell));
  }
}

void gru_step_(Tensor gates, Tensor product, std::optional<Tensor> bias, Tensor hidden,
               Tensor candidate, Tensor next_hidden) {
  if (hidden.scalar_type() == ScalarType::Float) {
    run(kernels().recurrent<float>().gru,
        gru_step_of<float>(gates, product, bias, hidden, candidate, next_hidden));
  } else {
    run(kernels().recurrent<double>().gru,
        gru_step_of<double>(gates, product, bias, hidden, candidate, next_hidden));
  }
}

void gru_step_backward_(Tensor grad_gates, Tensor grad_product, Tensor grad_hidden,
                        std::optional<Tensor> grad_output, Tensor gates, Tensor candidate,
                        Tensor hidden) {
  if (hidden.scalar_type() == ScalarType::Float) {
    run(kernels().recurrent<float>().gru_backward,
        gru_step_backward_of<float>(grad_gates, grad_product, grad_hidden, grad_output, gates,
                                    candidate, hidden));
  } else {
    run(kernels().recurrent<double>().gru_backward,
        gru_step_backward_of<double>(grad_gates, grad_product, grad_hidden, grad_output, gates,
                                     candidate, hidden));
  }
}

}  // namespace fastfisher::cpu
