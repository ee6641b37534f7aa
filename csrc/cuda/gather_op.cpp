// The gather family's operator: the order of the positions, windows of them, and its memory.
#include "gather.h"

#include <array>
#include <utility>

#include "../gather_problem.h"
#include "entry.h"
#include "vectors.h"

namespace fastfisher::cuda {
namespace {

// The tokens in ascending order, and where each was. What is equal stays in the order of samples.
std::pair<Tensor, Tensor> sorted(const Tensor& index) {
  const Tensor flat = torch::stable::reshape(index, {-1});
  std::array<StableIValue, 4> stack{
      torch::stable::detail::from(flat), torch::stable::detail::from(std::optional<bool>(true)),
      torch::stable::detail::from(int64_t{0}), torch::stable::detail::from(false)};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::sort", "stable", stack.data(), TORCH_ABI_VERSION));
  return {torch::stable::detail::to<Tensor>(stack[0]), torch::stable::detail::to<Tensor>(stack[1])};
}

// Positions in a window. As many windows as each has positions: the longest way is short when one
// token is everywhere.
int64_t window_of(int64_t count) {
  int64_t window = 32;
  while (window * window < count) window *= 2;
  return window;
}

int launch(const GatherTask<float>& task, void* stream) { return ff_gather_float(&task, stream); }

int launch(const GatherTask<double>& task, void* stream) { return ff_gather_double(&task, stream); }

template <typename T>
void run(const Tensor& out, const Tensor& grad, const Tensor& index, int64_t padding_index,
         double alpha, bool absolute) {
  if (grad.size(0) == 0 || grad.size(1) == 0 || grad.size(2) == 0) return;
  const OnDevice device(out);
  GatherTask<T> s{};
  s.out = static_cast<T*>(out.mutable_data_ptr());
  s.out_row = out.stride(0);
  s.out_column = out.stride(1);
  s.g = static_cast<const T*>(grad.const_data_ptr());
  s.sample = grad.stride(0);
  s.position = grad.stride(1);
  s.column = grad.stride(2);
  const auto [tokens, order] = sorted(index);
  s.tokens = static_cast<const int64_t*>(tokens.const_data_ptr());
  s.order = static_cast<const int64_t*>(order.const_data_ptr());
  s.positions = grad.size(1);
  s.count = grad.size(0) * s.positions;
  s.vocabulary = out.size(0);
  s.columns = grad.size(2);
  s.padding_index = padding_index;
  s.window = window_of(s.count);
  s.windows = ceil_div(s.count, s.window);
  const int64_t parts = s.windows > 1 ? s.windows * kParts * s.columns : int64_t{0};
  const Tensor workspace = torch::stable::new_empty(grad, {parts});
  s.parts = static_cast<T*>(workspace.mutable_data_ptr());
  s.alpha = static_cast<T>(alpha);
  s.absolute = absolute;
  s.vector = s.columns % Vector<T>::size == 0 && s.column == 1 && s.out_column == 1 &&
             is_aligned(s.g, s.sample, s.position) && is_aligned(s.out, s.out_row);
  FF_CHECK_LAUNCH("embedding_sum_grad_squared_", launch(s, device.stream()));
}

}  // namespace

void embedding_sum_grad_squared_(Tensor out, Tensor grad, Tensor index, int64_t padding_index,
                                 double alpha, int64_t power) {
  check_gather(out, grad, index, power);
  if (out.scalar_type() == ScalarType::Float) {
    run<float>(out, grad, index, padding_index, alpha, power == 1);
  } else {
    run<double>(out, grad, index, padding_index, alpha, power == 1);
  }
}

FF_REGISTER(m) { m.impl("embedding_sum_grad_squared_", TORCH_BOX(&embedding_sum_grad_squared_)); }

}  // namespace fastfisher::cuda
