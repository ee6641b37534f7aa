// The operators of the recurrent steps.
#include "recurrent.h"

#include "../recurrent_problem.h"
#include "entry.h"

namespace fastfisher::cuda {

void lstm_step_(Tensor gates, std::optional<Tensor> bias, Tensor cell, Tensor next_cell,
                Tensor hidden) {
  const OnDevice device(cell);
  if (cell.scalar_type() == ScalarType::Float) {
    const auto step = lstm_step_of<float>(gates, bias, cell, next_cell, hidden);
    FF_CHECK_LAUNCH("lstm_step_", ff_lstm_step_float(&step, device.stream()));
  } else {
    const auto step = lstm_step_of<double>(gates, bias, cell, next_cell, hidden);
    FF_CHECK_LAUNCH("lstm_step_", ff_lstm_step_double(&step, device.stream()));
  }
}

void lstm_step_backward_(Tensor grad_gates, Tensor grad_cell, std::optional<Tensor> grad_output,
                         std::optional<Tensor> grad_hidden, Tensor gates, Tensor cell,
                         Tensor next_cell) {
  const OnDevice device(cell);
  if (cell.scalar_type() == ScalarType::Float) {
    const auto step = lstm_step_backward_of<float>(grad_gates, grad_cell, grad_output, grad_hidden,
                                                   gates, cell, next_cell);
    FF_CHECK_LAUNCH("lstm_step_backward_", ff_lstm_step_backward_float(&step, device.stream()));
  } else {
    const auto step = lstm_step_backward_of<double>(grad_gates, grad_cell, grad_output, grad_hidden,
                                                    gates, cell, next_cell);
    FF_CHECK_LAUNCH("lstm_step_backward_", ff_lstm_step_backward_double(&step, device.stream()));
  }
}

void gru_step_(Tensor gates, Tensor product, std::optional<Tensor> bias, Tensor hidden,
               Tensor candidate, Tensor next_hidden) {
  const OnDevice device(hidden);
  if (hidden.scalar_type() == ScalarType::Float) {
    const auto step = gru_step_of<float>(gates, product, bias, hidden, candidate, next_hidden);
    FF_CHECK_LAUNCH("gru_step_", ff_gru_step_float(&step, device.stream()));
  } else {
    const auto step = gru_step_of<double>(gates, product, bias, hidden, candidate, next_hidden);
    FF_CHECK_LAUNCH("gru_step_", ff_gru_step_double(&step, device.stream()));
  }
}

void gru_step_backward_(Tensor grad_gates, Tensor grad_product, Tensor grad_hidden,
                        std::optional<Tensor> grad_output, Tensor gates, Tensor candidate,
                        Tensor hidden) {
  const OnDevice device(hidden);
  if (hidden.scalar_type() == ScalarType::Float) {
    const auto step = gru_step_backward_of<float>(grad_gates, grad_product, grad_hidden,
                                                  grad_output, gates, candidate, hidden);
    FF_CHECK_LAUNCH("gru_step_backward_", ff_gru_step_backward_float(&step, device.stream()));
  } else {
    const auto step = gru_step_backward_of<double>(grad_gates, grad_product, grad_hidden,
                                                   grad_output, gates, candidate, hidden);
    FF_CHECK_LAUNCH("gru_step_backward_", ff_gru_step_backward_double(&step, device.stream()));
  }
}

FF_REGISTER(m) {
  m.impl("lstm_step_", TORCH_BOX(&lstm_step_));
  m.impl("lstm_step_backward_", TORCH_BOX(&lstm_step_backward_));
  m.impl("gru_step_", TORCH_BOX(&gru_step_));
  m.impl("gru_step_backward_", TORCH_BOX(&gru_step_backward_));
}

}  // namespace fastfisher::cuda
