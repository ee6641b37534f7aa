// One time step of a recurrent layer, forward and backward: everything but the matrix products.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <optional>

#include "../checks.h"
#include "dispatch.h"

namespace fastfisher::cpu {
namespace {

// Fewer hidden units are done before another thread has heard of them.
constexpr int64_t kLeastUnits = 2048;

template <typename T>
Rows<T> writes(const Tensor& tensor) {
  return {static_cast<T*>(tensor.mutable_data_ptr()), tensor.stride(0)};
}

template <typename T>
Rows<const T> reads(const Tensor& tensor) {
  return {static_cast<const T*>(tensor.const_data_ptr()), tensor.stride(0)};
}

template <typename T>
Rows<const T> reads(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? reads<T>(*tensor) : Rows<const T>{};
}

template <typename T>
const T* bias_of(const std::optional<Tensor>& bias) {
  return bias.has_value() ? static_cast<const T*>(bias->const_data_ptr()) : nullptr;
}

template <typename Step>
void run(void (*kernel)(const Step&, int64_t, int64_t), const Step& step, int64_t rows) {
  const int64_t grain = std::max<int64_t>(1, kLeastUnits / std::max<int64_t>(1, step.units));
  torch::stable::parallel_for(0, rows, grain,
                              [&](int64_t begin, int64_t end) { kernel(step, begin, end); });
}

// Whether `tensor` is of the dtype and the rows of `like`, and has `columns` contiguous columns.
bool fits(const Tensor& tensor, const Tensor& like, int64_t columns) {
  return tensor.scalar_type() == like.scalar_type() && tensor.dim() == 2 &&
         tensor.size(0) == like.size(0) && tensor.size(1) == columns &&
         (columns < 2 || tensor.stride(1) == 1);
}

bool fits(const std::optional<Tensor>& tensor, const Tensor& like, int64_t columns) {
  return !tensor.has_value() || fits(*tensor, like, columns);
}

bool is_bias(const std::optional<Tensor>& bias, const Tensor& like, int64_t columns) {
  return !bias.has_value() || (bias->scalar_type() == like.scalar_type() && bias->dim() == 1 &&
                               bias->size(0) == columns && (columns < 2 || bias->stride(0) == 1));
}

template <typename T>
void lstm_step(const Tensor& gates, const std::optional<Tensor>& bias, const Tensor& cell,
               const Tensor& next_cell, const Tensor& hidden) {
  const LstmStep<T> step = {cell.size(1),   writes<T>(gates),     bias_of<T>(bias),
                            reads<T>(cell), writes<T>(next_cell), writes<T>(hidden)};
  run(kernels().recurrent<T>().lstm, step, cell.size(0));
}

template <typename T>
void lstm_step_backward(const Tensor& grad_gates, const Tensor& grad_cell,
                        const std::optional<Tensor>& grad_output,
                        const std::optional<Tensor>& grad_hidden, const Tensor& gates,
                        const Tensor& cell, const Tensor& next_cell) {
  const LstmStepBackward<T> step = {
      cell.size(1),          writes<T>(grad_gates), writes<T>(grad_cell), reads<T>(grad_output),
      reads<T>(grad_hidden), reads<T>(gates),       reads<T>(cell),       reads<T>(next_cell)};
  run(kernels().recurrent<T>().lstm_backward, step, cell.size(0));
}

template <typename T>
void gru_step(const Tensor& gates, const Tensor& product, const std::optional<Tensor>& bias,
              const Tensor& hidden, const Tensor& candidate, const Tensor& next_hidden) {
  const GruStep<T> step = {hidden.size(1),        writes<T>(gates), reads<T>(product),
                           bias_of<T>(bias),      reads<T>(hidden), writes<T>(candidate),
                           writes<T>(next_hidden)};
  run(kernels().recurrent<T>().gru, step, hidden.size(0));
}

template <typename T>
void gru_step_backward(const Tensor& grad_gates, const Tensor& grad_product,
                       const Tensor& grad_hidden, const std::optional<Tensor>& grad_output,
                       const Tensor& gates, const Tensor& candidate, const Tensor& hidden) {
  const GruStepBackward<T> step = {
      hidden.size(1),        writes<T>(grad_gates), writes<T>(grad_product), writes<T>(grad_hidden),
      reads<T>(grad_output), reads<T>(gates),       reads<T>(candidate),     reads<T>(hidden)};
  run(kernels().recurrent<T>().gru_backward, step, hidden.size(0));
}

}  // namespace

#define FF_CHECK_STATE(op, argument, state)                        \
  FF_CHECK(op, argument, is_floating(state) && (state).dim() == 2, \
           "expected float32 or float64 [N, H]")
#define FF_CHECK_ROWS(op, argument, tensor, like, columns) \
  FF_CHECK(op, argument, fits(tensor, like, columns),      \
           "expected the rows and the dtype of the "       \
           "state, and ",                                  \
           columns, " contiguous columns")
#define FF_CHECK_BIAS(op, bias, like, columns)                                         \
  FF_CHECK(op, "bias", is_bias(bias, like, columns), "expected contiguous [", columns, \
           "] of the dtype of the state")

void lstm_step_(Tensor gates, std::optional<Tensor> bias, Tensor cell, Tensor next_cell,
                Tensor hidden) {
  FF_CHECK_STATE("lstm_step_", "cell", cell);
  const int64_t units = cell.size(1);
  FF_CHECK_ROWS("lstm_step_", "cell", cell, cell, units);
  FF_CHECK_ROWS("lstm_step_", "gates", gates, cell, 4 * units);
  FF_CHECK_BIAS("lstm_step_", bias, cell, 4 * units);
  FF_CHECK_ROWS("lstm_step_", "next_cell", next_cell, cell, units);
  FF_CHECK_ROWS("lstm_step_", "hidden", hidden, cell, units);
  if (cell.scalar_type() == ScalarType::Float) {
    lstm_step<float>(gates, bias, cell, next_cell, hidden);
  } else {
    lstm_step<double>(gates, bias, cell, next_cell, hidden);
  }
}

void lstm_step_backward_(Tensor grad_gates, Tensor grad_cell, std::optional<Tensor> grad_output,
                         std::optional<Tensor> grad_hidden, Tensor gates, Tensor cell,
                         Tensor next_cell) {
  FF_CHECK_STATE("lstm_step_backward_", "cell", cell);
  const int64_t units = cell.size(1);
  FF_CHECK_ROWS("lstm_step_backward_", "cell", cell, cell, units);
  FF_CHECK_ROWS("lstm_step_backward_", "grad_gates", grad_gates, cell, 4 * units);
  FF_CHECK_ROWS("lstm_step_backward_", "grad_cell", grad_cell, cell, units);
  FF_CHECK_ROWS("lstm_step_backward_", "grad_output", grad_output, cell, units);
  FF_CHECK_ROWS("lstm_step_backward_", "grad_hidden", grad_hidden, cell, units);
  FF_CHECK_ROWS("lstm_step_backward_", "gates", gates, cell, 4 * units);
  FF_CHECK_ROWS("lstm_step_backward_", "next_cell", next_cell, cell, units);
  if (cell.scalar_type() == ScalarType::Float) {
    lstm_step_backward<float>(grad_gates, grad_cell, grad_output, grad_hidden, gates, cell,
                              next_cell);
  } else {
    lstm_step_backward<double>(grad_gates, grad_cell, grad_output, grad_hidden, gates, cell,
                               next_cell);
  }
}

void gru_step_(Tensor gates, Tensor product, std::optional<Tensor> bias, Tensor hidden,
               Tensor candidate, Tensor next_hidden) {
  FF_CHECK_STATE("gru_step_", "hidden", hidden);
  const int64_t units = hidden.size(1);
  FF_CHECK_ROWS("gru_step_", "hidden", hidden, hidden, units);
  FF_CHECK_ROWS("gru_step_", "gates", gates, hidden, 3 * units);
  FF_CHECK_ROWS("gru_step_", "product", product, hidden, 3 * units);
  FF_CHECK_BIAS("gru_step_", bias, hidden, 3 * units);
  FF_CHECK_ROWS("gru_step_", "candidate", candidate, hidden, units);
  FF_CHECK_ROWS("gru_step_", "next_hidden", next_hidden, hidden, units);
  if (hidden.scalar_type() == ScalarType::Float) {
    gru_step<float>(gates, product, bias, hidden, candidate, next_hidden);
  } else {
    gru_step<double>(gates, product, bias, hidden, candidate, next_hidden);
  }
}

void gru_step_backward_(Tensor grad_gates, Tensor grad_product, Tensor grad_hidden,
                        std::optional<Tensor> grad_output, Tensor gates, Tensor candidate,
                        Tensor hidden) {
  FF_CHECK_STATE("gru_step_backward_", "hidden", hidden);
  const int64_t units = hidden.size(1);
  FF_CHECK_ROWS("gru_step_backward_", "hidden", hidden, hidden, units);
  FF_CHECK_ROWS("gru_step_backward_", "grad_gates", grad_gates, hidden, 3 * units);
  FF_CHECK_ROWS("gru_step_backward_", "grad_product", grad_product, hidden, 3 * units);
  FF_CHECK_ROWS("gru_step_backward_", "grad_hidden", grad_hidden, hidden, units);
  FF_CHECK_ROWS("gru_step_backward_", "grad_output", grad_output, hidden, units);
  FF_CHECK_ROWS("gru_step_backward_", "gates", gates, hidden, 3 * units);
  FF_CHECK_ROWS("gru_step_backward_", "candidate", candidate, hidden, units);
  if (hidden.scalar_type() == ScalarType::Float) {
    gru_step_backward<float>(grad_gates, grad_product, grad_hidden, grad_output, gates, candidate,
                             hidden);
  } else {
    gru_step_backward<double>(grad_gates, grad_product, grad_hidden, grad_output, gates, candidate,
                              hidden);
  }
}

}  // namespace fastfisher::cpu
