// The operands of the recurrent steps, as kernels of every device see them.
#pragma once

#include <cstdint>

namespace fastfisher {

// A matrix whose rows are contiguous.
template <typename T>
struct Rows {
  T* data = nullptr;  // nullptr where an optional operand is absent
  int64_t stride = 0;

  T* operator[](int64_t row) const { return data + row * stride; }
};

// One time step of an LSTM of `units` hidden units, a sample a row. A row of `gates` holds the
// input gates of all units, then the forget gates, the cell's and the output gates: before
// activation on entry, but for `bias`, and after it on return.
template <typename T>
struct LstmStep {
  int64_t rows, units;
  Rows<T> gates;
  const T* bias;  // [4 * units] or nullptr
  Rows<const T> cell;
  Rows<T> next_cell, hidden;
};

// Its backward pass: `grad_gates` is with respect to the gates before activation, and may be
// `gates`; `grad_cell` is with respect to the next cell on entry, to the previous one on return.
// The gradient at the hidden state is the sum of `grad_output` and `grad_hidden`, each optional.
template <typename T>
struct LstmStepBackward {
  int64_t rows, units;
  Rows<T> grad_gates, grad_cell;
  Rows<const T> grad_output, grad_hidden, gates, cell, next_cell;
};

// One time step of a GRU: reset gates, update gates and candidates, the input's share in `gates`,
// which gets them after activation, the hidden state's in `product`. `candidate` gets the latter's
// share of the candidates, with its bias.
template <typename T>
struct GruStep {
  int64_t rows, units;
  Rows<T> gates;
  Rows<const T> product;
  const T* bias;  // [3 * units] or nullptr
  Rows<const T> hidden;
  Rows<T> candidate, next_hidden;
};

// Its backward pass: `grad_gates` and `grad_product` are with respect to the two shares, and the
// former may be `gates`; `grad_hidden` is with respect to the next hidden state, less
// `grad_output`, on entry. On return it is what reaches the previous one past the product.
template <typename T>
struct GruStepBackward {
  int64_t rows, units;
  Rows<T> grad_gates, grad_product, grad_hidden;
  Rows<const T> grad_output, gates, candidate, hidden;
};

}  // namespace fastfisher
