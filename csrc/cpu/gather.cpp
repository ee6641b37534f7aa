// The gather family: out[v, :] += alpha * sum_n (sum_{t: index[n, t] = v} g[n, t, :])^2.
// The positions of a sample are ordered by token once; then every run of equal tokens is summed,
// squared and added, without anything of the size of the vocabulary beside out.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <numeric>
#include <vector>

#include "../gather_problem.h"
#include "dispatch.h"

namespace fastfisher::cpu {
namespace {

// Columns that one task owns: no two tasks write the same entry of out.
constexpr int64_t kColumns = 64;

template <typename T>
void run(const Tensor& out, const Tensor& grad, const Tensor& index, int64_t padding_index, T alpha,
         bool absolute) {
  const Kernels<T>& k = kernels().of<T>();
  const int64_t samples = grad.size(0), positions = grad.size(1), columns = grad.size(2);
  const auto* tokens = static_cast<const int64_t*>(index.const_data_ptr());
  const auto token = [&](int64_t n, int64_t t) {
    return tokens[n * index.stride(0) + t * index.stride(1)];
  };

  std::vector<int64_t> order(samples * positions);
  torch::stable::parallel_for(0, samples, 1, [&](int64_t from, int64_t to) {
    for (int64_t n = from; n < to; ++n) {
      const auto begin = order.begin() + n * positions;
      std::iota(begin, begin + positions, int64_t{0});
      std::stable_sort(begin, begin + positions,
                       [&](int64_t a, int64_t b) { return token(n, a) < token(n, b); });
    }
  });

  const auto* g = static_cast<const T*>(grad.const_data_ptr());
  auto* to_out = static_cast<T*>(out.mutable_data_ptr());
  const int64_t tasks = (columns + kColumns - 1) / kColumns;
  torch::stable::parallel_for(0, tasks, 1, [&](int64_t from, int64_t to) {
    T sum[kColumns];
    for (int64_t task = from; task < to; ++task) {
      const int64_t first = task * kColumns;
      const int64_t count = std::min(kColumns, columns - first);
      for (int64_t n = 0; n < samples; ++n) {
        const int64_t* sorted = order.data() + n * positions;
        for (int64_t i = 0; i < positions;) {
          const int64_t v = token(n, sorted[i]);
          std::fill(sum, sum + count, T(0));
          for (; i < positions && token(n, sorted[i]) == v; ++i) {
            const T* row =
                g + n * grad.stride(0) + sorted[i] * grad.stride(1) + first * grad.stride(2);
            if (grad.stride(2) == 1) {
              k.add(sum, row, count);
            } else {
              for (int64_t c = 0; c < count; ++c) sum[c] += row[c * grad.stride(2)];
            }
          }
          if (v == padding_index) continue;
          T* row = to_out + v * out.stride(0) + first * out.stride(1);
          if (out.stride(1) == 1) {
            k.add_powers(row, sum, alpha, absolute, count);
          } else {
            for (int64_t c = 0; c < count; ++c) {
              k.add_powers(row + c * out.stride(1), sum + c, alpha, absolute, 1);
            }
          }
        }
      }
    }
  });
}

}  // namespace

void embedding_sum_grad_squared_(Tensor out, Tensor grad, Tensor index, int64_t padding_index,
                                 double alpha, int64_t power) {
  check_gather(out, grad, index, power);
  const auto* tokens = static_cast<const int64_t*>(index.const_data_ptr());
  for (int64_t n = 0; n < index.size(0); ++n) {
    for (int64_t t = 0; t < index.size(1); ++t) {
      const int64_t token = tokens[n * index.stride(0) + t * index.stride(1)];
      FF_CHECK("embedding_sum_grad_squared_", "index", token >= 0 && token < out.size(0),
               "expected 0 <= index < ", out.size(0), ", got ", token);
    }
  }
  if (out.scalar_type() == ScalarType::Float) {
    run<float>(out, grad, index, padding_index, static_cast<float>(alpha), power == 1);
  } else {
    run<double>(out, grad, index, padding_index, alpha, power == 1);
  }
}

}  // namespace fastfisher::cpu
