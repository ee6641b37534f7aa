// The channel family's operator: how the work is divided, and its memory.
#include "channel.h"

#include <algorithm>

#include "../channel_problem.h"
#include "entry.h"
#include "vectors.h"

namespace fastfisher::cuda {
namespace {

// Enough to fill the largest device; constants, so that every device adds in the same order.
constexpr int64_t kWarpsOfSums = 4096;
constexpr int64_t kBlocksOfSquares = 1024;
// A thread's share is not cut below this many loads.
constexpr int64_t kLeastLoads = 8;
constexpr int64_t kRowsOfSquares = 8;

template <typename T>
T* pointer(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? static_cast<T*>(tensor->mutable_data_ptr()) : nullptr;
}

template <typename T>
const T* const_pointer(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? static_cast<const T*>(tensor->const_data_ptr()) : nullptr;
}

// Whether an operand can be read in vectors along `inner`. Strides of dimensions of one element say
// nothing.
template <typename T>
bool has_vectors(const ChannelProblem& p, const T* data, const int64_t (&stride)[3], int inner) {
  const int64_t sizes[3] = {p.samples, p.positions, p.channels};
  const int outer = 3 - inner;
  return sizes[inner] % Vector<T>::size == 0 && stride[inner] == 1 &&
         is_aligned(data, sizes[0] > 1 ? stride[0] : 0, sizes[outer] > 1 ? stride[outer] : 0);
}

template <typename T>
ChannelPlan channel_plan(const ChannelProblem& p, const ChannelOperands<T>& o) {
  constexpr int K = Vector<T>::size;
  ChannelPlan plan{};
  plan.needs_sums = p.positions > 1 || o.weight != nullptr || o.grad_input != nullptr;
  plan.pieces = plan.piece = 1;
  if (plan.needs_sums) {
    plan.positions_innermost =
        p.positions > 1 && (p.channels == 1 || p.g_stride[1] < p.g_stride[2]);
    const int inner = plan.positions_innermost ? 1 : 2;
    plan.vector_sums = has_vectors(p, o.g, p.g_stride, inner) &&
                       (o.x == nullptr || has_vectors(p, o.x, p.x_stride, inner)) &&
                       is_aligned(o.grad_input);
    plan.sum_lanes = lanes_for<T>(plan.positions_innermost ? p.positions : p.channels);
    const int rows = 32 / plan.sum_lanes;
    // Positions that a warp loads at once, and channels that it covers.
    const int64_t stride = plan.positions_innermost ? plan.sum_lanes * K : rows;
    const int64_t covered = plan.positions_innermost ? rows : plan.sum_lanes * K;
    const int64_t warps = p.samples * ceil_div(p.channels, covered);
    const int64_t most = ceil_div(p.positions, kLeastLoads * stride);
    plan.pieces = std::clamp<int64_t>(ceil_div(kWarpsOfSums, warps), 1, most);
    plan.piece = ceil_div(ceil_div(p.positions, plan.pieces), stride) * stride;
    plan.pieces = ceil_div(p.positions, plan.piece);
  }
  plan.vector_squares = plan.needs_sums ? p.channels % K == 0 : has_vectors(p, o.g, p.g_stride, 2);
  plan.square_lanes = lanes_for<T>(p.channels);
  const int64_t rows = kRowsOfSquares * (32 / plan.square_lanes);
  const int64_t groups = ceil_div(p.channels, plan.square_lanes * K);
  const int64_t most = std::max<int64_t>(1, kBlocksOfSquares / groups);
  plan.splits = std::clamp<int64_t>(ceil_div(p.samples, rows * kLeastLoads), 1, most);
  plan.split = ceil_div(p.samples, plan.splits);
  plan.splits = ceil_div(p.samples, plan.split);
  return plan;
}

int launch(const ChannelProblem& p, const ChannelPlan& plan, const ChannelOperands<float>& o,
           double alpha, void* stream) {
  return ff_channel_float(&p, &plan, &o, alpha, stream);
}

int launch(const ChannelProblem& p, const ChannelPlan& plan, const ChannelOperands<double>& o,
           double alpha, void* stream) {
  return ff_channel_double(&p, &plan, &o, alpha, stream);
}

template <typename T>
void run(const ChannelProblem& p, const std::optional<Tensor>& weight,
         const std::optional<Tensor>& bias, const Tensor& grad, const std::optional<Tensor>& input,
         const std::optional<Tensor>& mean, const std::optional<Tensor>& scale,
         const std::optional<Tensor>& grad_input, const std::optional<Tensor>& factor,
         double alpha) {
  if (p.samples == 0 || p.positions == 0 || p.channels == 0) return;
  const OnDevice device(grad);
  ChannelOperands<T> o{};
  o.g = static_cast<const T*>(grad.const_data_ptr());
  o.x = const_pointer<T>(input);
  o.mean = const_pointer<T>(mean);
  o.scale = const_pointer<T>(scale);
  o.grad_input = pointer<T>(grad_input);
  o.factor = const_pointer<T>(factor);
  o.weight = pointer<T>(weight);
  o.bias = pointer<T>(bias);
  const ChannelPlan plan = channel_plan(p, o);
  const int64_t outputs = int64_t{weight.has_value()} + int64_t{bias.has_value()};
  const int64_t sums =
      plan.needs_sums ? outputs * p.samples * plan.pieces * p.channels : int64_t{0};
  const int64_t parts = plan.splits > 1 ? outputs * plan.splits * p.channels : int64_t{0};
  const Tensor workspace = torch::stable::new_empty(grad, {sums + parts});
  o.sums = static_cast<T*>(workspace.mutable_data_ptr());
  o.parts = o.sums + sums;
  FF_CHECK_LAUNCH("channel_sum_grad_squared_", launch(p, plan, o, alpha, device.stream()));
}

}  // namespace

void channel_sum_grad_squared_(std::optional<Tensor> weight, std::optional<Tensor> bias,
                               Tensor grad, std::optional<Tensor> input, std::optional<Tensor> mean,
                               std::optional<Tensor> scale, std::optional<Tensor> grad_input,
                               std::optional<Tensor> factor, double alpha, int64_t power) {
  const ChannelProblem p =
      channel_problem(weight, bias, grad, input, mean, scale, grad_input, factor, power);
  if (grad.scalar_type() == ScalarType::Float) {
    run<float>(p, weight, bias, grad, input, mean, scale, grad_input, factor, alpha);
  } else {
    run<double>(p, weight, bias, grad, input, mean, scale, grad_input, factor, alpha);
  }
}

FF_REGISTER(m) { m.impl("channel_sum_grad_squared_", TORCH_BOX(&channel_sum_grad_squared_)); }

}  // namespace fastfisher::cuda
