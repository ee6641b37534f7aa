// How a recurrent step is made of an operator's arguments, which are checked on the way.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <optional>

#include "checks.h"
#include "recurrent_shape.h"

namespace fastfisher {

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

// Whether `tensor` is of the dtype and the rows of `like`, and has `columns` contiguous columns.
inline bool fits(const Tensor& tensor, const Tensor& like, int64_t columns) {
  return tensor.scalar_type() == like.scalar_type() && tensor.dim() == 2 &&
         tensor.size(0) == like.size(0) && tensor.size(1) == columns &&
         (columns < 2 || tensor.stride(1) == 1);
}

inline bool fits(const std::optional<Tensor>& tensor, const Tensor& like, int64_t columns) {
  return !tensor.has_value() || fits(*tensor, like, columns);
}

inline bool is_bias(const std::optional<Tensor>& bias, const Tensor& like, int64_t columns) {
  return !bias.has_value() || (bias->scalar_type() == like.scalar_type() && bias->dim() == 1 &&
                               bias->size(0) == columns && (columns < 2 || bias->stride(0) == 1));
}

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

template <typename T>
LstmStep<T> lstm_step_of(const Tensor& gates, const std::optional<Tensor>& bias, const Tensor& cell,
                         const Tensor& next_cell, const Tensor& hidden) {
  FF_CHECK_STATE("lstm_step_", "cell", cell);
  const int64_t units = cell.size(1);
  FF_CHECK_ROWS("lstm_step_", "cell", cell, cell, units);
  FF_CHECK_ROWS("lstm_step_", "gates", gates, cell, 4 * units);
  FF_CHECK_BIAS("lstm_step_", bias, cell, 4 * units);
  FF_CHECK_ROWS("lstm_step_", "next_cell", next_cell, cell, units);
  FF_CHECK_ROWS("lstm_step_", "hidden", hidden, cell, units);
  return {cell.size(0),     units,          writes<T>(gates),
          bias_of<T>(bias), reads<T>(cell), writes<T>(next_cell),
          writes<T>(hidden)};
}

template <typename T>
LstmStepBackward<T> lstm_step_backward_of(const Tensor& grad_gates, const Tensor& grad_cell,
                                          const std::optional<Tensor>& grad_output,
                                          const std::optional<Tensor>& grad_hidden,
                                          const Tensor& gates, const Tensor& cell,
                                          const Tensor& next_cell) {
  FF_CHECK_STATE("lstm_step_backward_", "cell", cell);
  const int64_t units = cell.size(1);
  FF_CHECK_ROWS("lstm_step_backward_", "cell", cell, cell, units);
  FF_CHECK_ROWS("lstm_step_backward_", "grad_gates", grad_gates, cell, 4 * units);
  FF_CHECK_ROWS("lstm_step_backward_", "grad_cell", grad_cell, cell, units);
  FF_CHECK_ROWS("lstm_step_backward_", "grad_output", grad_output, cell, units);
  FF_CHECK_ROWS("lstm_step_backward_", "grad_hidden", grad_hidden, cell, units);
  FF_CHECK_ROWS("lstm_step_backward_", "gates", gates, cell, 4 * units);
  FF_CHECK_ROWS("lstm_step_backward_", "next_cell", next_cell, cell, units);
  return {cell.size(0),          units,
          writes<T>(grad_gates), writes<T>(grad_cell),
          reads<T>(grad_output), reads<T>(grad_hidden),
          reads<T>(gates),       reads<T>(cell),
          reads<T>(next_cell)};
}

template <typename T>
GruStep<T> gru_step_of(const Tensor& gates, const Tensor& product,
                       const std::optional<Tensor>& bias, const Tensor& hidden,
                       const Tensor& candidate, const Tensor& next_hidden) {
  FF_CHECK_STATE("gru_step_", "hidden", hidden);
  const int64_t units = hidden.size(1);
  FF_CHECK_ROWS("gru_step_", "hidden", hidden, hidden, units);
  FF_CHECK_ROWS("gru_step_", "gates", gates, hidden, 3 * units);
  FF_CHECK_ROWS("gru_step_", "product", product, hidden, 3 * units);
  FF_CHECK_BIAS("gru_step_", bias, hidden, 3 * units);
  FF_CHECK_ROWS("gru_step_", "candidate", candidate, hidden, units);
  FF_CHECK_ROWS("gru_step_", "next_hidden", next_hidden, hidden, units);
  return {hidden.size(0),       units,
          writes<T>(gates),     reads<T>(product),
          bias_of<T>(bias),     reads<T>(hidden),
          writes<T>(candidate), writes<T>(next_hidden)};
}

template <typename T>
GruStepBackward<T> gru_step_backward_of(const Tensor& grad_gates, const Tensor& grad_product,
                                        const Tensor& grad_hidden,
                                        const std::optional<Tensor>& grad_output,
                                        const Tensor& gates, const Tensor& candidate,
                                        const Tensor& hidden) {
  FF_CHECK_STATE("gru_step_backward_", "hidden", hidden);
  const int64_t units = hidden.size(1);
  FF_CHECK_ROWS("gru_step_backward_", "hidden", hidden, hidden, units);
  FF_CHECK_ROWS("gru_step_backward_", "grad_gates", grad_gates, hidden, 3 * units);
  FF_CHECK_ROWS("gru_step_backward_", "grad_product", grad_product, hidden, 3 * units);
  FF_CHECK_ROWS("gru_step_backward_", "grad_hidden", grad_hidden, hidden, units);
  FF_CHECK_ROWS("gru_step_backward_", "grad_output", grad_output, hidden, units);
  FF_CHECK_ROWS("gru_step_backward_", "gates", gates, hidden, 3 * units);
  FF_CHECK_ROWS("gru_step_backward_", "candidate", candidate, hidden, units);
  return {hidden.size(0),         units,
          writes<T>(grad_gates),  writes<T>(grad_product),
          writes<T>(grad_hidden), reads<T>(grad_output),
          reads<T>(gates),        reads<T>(candidate),
          reads<T>(hidden)};
}

#undef FF_CHECK_STATE
#undef FF_CHECK_ROWS
#undef FF_CHECK_BIAS

}  // namespace fastfisher
