// The channel family: weight[c] += alpha * sum_n (sum_t g[n, t, c] * (x - mean) * scale)^2 and
// bias[c] += alpha * sum_n (sum_t g[n, t, c])^2, in one pass over g and x, which may write the
// gradient of the layer's input too.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <optional>

#include "../channel_problem.h"
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
void run(const ChannelProblem& p, const std::optional<Tensor>& weight,
         const std::optional<Tensor>& bias, const Tensor& grad, const std::optional<Tensor>& input,
         const std::optional<Tensor>& mean, const std::optional<Tensor>& scale,
         const std::optional<Tensor>& grad_input, const std::optional<Tensor>& factor, T alpha) {
  const Kernels<T>& k = kernels().of<T>();
  const int64_t samples = p.samples, positions = p.positions, channels = p.channels;
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
        add_powers(k, *weight, sums, sample_sums, count, alpha, p.absolute, from, to);
      }
      if (bias.has_value()) {
        add_powers(k, *bias, sums + bias_at, sample_sums, count, alpha, p.absolute, from, to);
      }
    });
  }
}

}  // namespace

void channel_sum_grad_squared_(std::optional<Tensor> weight, std::optional<Tensor> bias,
                               Tensor grad, std::optional<Tensor> input, std::optional<Tensor> mean,
                               std::optional<Tensor> scale, std::optional<Tensor> grad_input,
                               std::optional<Tensor> factor, double alpha, int64_t power) {
  const ChannelProblem p =
      channel_problem(weight, bias, grad, input, mean, scale, grad_input, factor, power);
  if (grad.scalar_type() == ScalarType::Float) {
    run<float>(p, weight, bias, grad, input, mean, scale, grad_input, factor,
               static_cast<float>(alpha));
  } else {
    run<double>(p, weight, bias, grad, input, mean, scale, grad_input, factor, alpha);
  }
}

}  // namespace fastfisher::cpu
