// The channel family: weight[c] += alpha * sum_n (sum_t g[n, t, c] * (x - mean) * scale)^2 and
// bias[c] += alpha * sum_n (sum_t g[n, t, c])^2, in one pass over g and x, which may write the
// gradient of the layer's input too.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <optional>

#include "../checks.h"
#include "dispatch.h"
#include "workspace.h"

namespace fastfisher::cpu {
namespace {

// Samples whose sums are held at once, at most; a constant, never the number of threads.
constexpr int64_t kBlockElements = int64_t{1} << 20;

template <typename T>
struct Operand {
  const T* data = nullptr;
  int64_t sample = 0, position = 0, channel = 0;

  Operand() = default;
  explicit Operand(const Tensor& tensor)
      : data(static_cast<const T*>(tensor.const_data_ptr())),
        sample(tensor.stride(0)),
        position(tensor.stride(1)),
        channel(tensor.stride(2)) {}
  explicit Operand(const std::optional<Tensor>& tensor)
      : Operand(tensor.has_value() ? Operand(*tensor) : Operand()) {}
};

template <typename T>
void add_powers(const Kernels<T>& k, const Tensor& out, const T* sums, int64_t sample_stride,
                int64_t samples, T alpha, bool absolute, int64_t from, int64_t to) {
  T* data = static_cast<T*>(out.mutable_data_ptr());
  const int64_t stride = out.stride(0);
  for (int64_t n = 0; n < samples; ++n) {
    const T* sum = sums + n * sample_stride;
    if (stride == 1) {
      k.add_powers(data + from, sum + from, alpha, absolute, to - from);
    } else {
      for (int64_t c = from; c < to; ++c) {
        k.add_powers(data + c * stride, sum + c, alpha, absolute, 1);
      }
    }
  }
}

template <typename T>
void run(const std::optional<Tensor>& weight, const std::optional<Tensor>& bias, const Tensor& grad,
         const std::optional<Tensor>& input, const std::optional<Tensor>& mean,
         const std::optional<Tensor>& scale, const std::optional<Tensor>& grad_input,
         const std::optional<Tensor>& factor, T alpha, bool absolute) {
  const Kernels<T>& k = kernels().of<T>();
  const int64_t samples = grad.size(0), positions = grad.size(1), channels = grad.size(2);
  if (samples == 0 || positions == 0 || channels == 0) return;
  const Operand<T> g(grad), x(input), m(mean), s(scale);
  T* const to_input =
      grad_input.has_value() ? static_cast<T*>(grad_input->mutable_data_ptr()) : nullptr;
  const T* const factors =
      factor.has_value() ? static_cast<const T*>(factor->const_data_ptr()) : nullptr;
  const int64_t outputs = int64_t(weight.has_value()) + int64_t(bias.has_value());
  const int64_t sample_sums = outputs * channels;
  const int64_t block =
      std::clamp<int64_t>(kBlockElements / sample_sums, 1, std::min<int64_t>(samples, 256));
  T* sums = static_cast<T*>(Workspace::get(block * sample_sums * sizeof(T)));
  const int64_t bias_at = weight.has_value() ? channels : 0;

  for (int64_t begin = 0; begin < samples; begin += block) {
    const int64_t count = std::min(block, samples - begin);
    torch::stable::parallel_for(0, count, 1, [&](int64_t from, int64_t to) {
      for (int64_t i = from; i < to; ++i) {
        const int64_t n = begin + i;
        T* sum = sums + i * sample_sums;
        k.channel_sums({g.data + n * g.sample, g.position, g.channel,
                        x.data == nullptr ? nullptr : x.data + n * x.sample, x.position, x.channel,
                        m.data == nullptr ? nullptr : m.data + n * m.sample, m.position, m.channel,
                        s.data == nullptr ? nullptr : s.data + n * s.sample, s.position, s.channel,
                        positions, channels, weight.has_value() ? sum : nullptr,
                        bias.has_value() ? sum + bias_at : nullptr,
                        to_input == nullptr ? nullptr : to_input + n * g.sample, factors});
      }
    });
    torch::stable::parallel_for(0, channels, 1024, [&](int64_t from, int64_t to) {
      if (weight.has_value()) {
        add_powers(k, *weight, sums, sample_sums, count, alpha, absolute, from, to);
      }
      if (bias.has_value()) {
        add_powers(k, *bias, sums + bias_at, sample_sums, count, alpha, absolute, from, to);
      }
    });
  }
}

}  // namespace

void channel_sum_grad_squared_(std::optional<Tensor> weight, std::optional<Tensor> bias,
                               Tensor grad, std::optional<Tensor> input, std::optional<Tensor> mean,
                               std::optional<Tensor> scale, std::optional<Tensor> grad_input,
                               std::optional<Tensor> factor, double alpha, int64_t power) {
#define FF_CHECK_CHANNEL(argument, condition, ...) \
  FF_CHECK("channel_sum_grad_squared_", argument, condition, __VA_ARGS__)
  FF_CHECK_CHANNEL("grad", is_floating(grad) && grad.dim() == 3,
                   "expected float32 or float64 [N, T, C]");
  FF_CHECK_CHANNEL("weight, bias", weight.has_value() || bias.has_value(),
                   "expected at least one of them");
  FF_CHECK_CHANNEL(
      "input, scale",
      weight.has_value() == input.has_value() && weight.has_value() == scale.has_value(),
      "expected with weight, and only with it");
  const auto same_shape = [&](const std::optional<Tensor>& tensor) {
    return !tensor.has_value() ||
           (tensor->scalar_type() == grad.scalar_type() && tensor->dim() == 3 &&
            tensor->size(0) == grad.size(0) && tensor->size(1) == grad.size(1) &&
            tensor->size(2) == grad.size(2));
  };
  const auto is_output = [&](const std::optional<Tensor>& tensor) {
    return !tensor.has_value() || (tensor->scalar_type() == grad.scalar_type() &&
                                   tensor->dim() == 1 && tensor->size(0) == grad.size(2));
  };
  FF_CHECK_CHANNEL("input", same_shape(input), "expected the dtype and [N, T, C] of grad");
  FF_CHECK_CHANNEL("mean", same_shape(mean), "expected the dtype and [N, T, C] of grad");
  FF_CHECK_CHANNEL("scale", same_shape(scale), "expected the dtype and [N, T, C] of grad");
  FF_CHECK_CHANNEL("weight", is_output(weight), "expected [C] of the dtype of grad");
  FF_CHECK_CHANNEL("bias", is_output(bias), "expected [C] of the dtype of grad");
  FF_CHECK_CHANNEL("grad_input", grad_input.has_value() == factor.has_value(),
                   "expected with factor, and only with it");
  FF_CHECK_CHANNEL("grad_input",
                   same_shape(grad_input) &&
                       (!grad_input.has_value() || (grad_input->stride(0) == grad.stride(0) &&
                                                    grad_input->stride(1) == grad.stride(1) &&
                                                    grad_input->stride(2) == grad.stride(2))),
                   "expected the dtype, [N, T, C] and strides of grad");
  FF_CHECK_CHANNEL("factor", is_output(factor) && (!factor.has_value() || factor->stride(0) == 1),
                   "expected contiguous [C] of the dtype of grad");
  FF_CHECK_CHANNEL("power", is_power(power), "expected 1 or 2");
#undef FF_CHECK_CHANNEL
  if (grad.scalar_type() == ScalarType::Float) {
    run<float>(weight, bias, grad, input, mean, scale, grad_input, factor,
               static_cast<float>(alpha), power == 1);
  } else {
    run<double>(weight, bias, grad, input, mean, scale, grad_input, factor, alpha, power == 1);
  }
}

}  // namespace fastfisher::cpu
