// The top-R operators as torch's dispatcher calls them.
#include <torch/csrc/stable/ops.h>

#include "../checks.h"
#include "ops.h"
#include "topr.h"

namespace fastfisher::cpu {
namespace {

using topr::View;

View view_of(const Tensor& tensor, void* data) {
  return {data,
          tensor.sizes().data(),
          tensor.strides().data(),
          tensor.dim(),
          static_cast<int64_t>(tensor.element_size()),
          tensor.scalar_type()};
}

View reading(const Tensor& tensor) {
  return view_of(tensor, const_cast<void*>(tensor.const_data_ptr()));
}

std::vector<View> reading(const std::vector<Tensor>& tensors) {
  std::vector<View> views;
  views.reserve(tensors.size());
  for (const Tensor& tensor : tensors) views.push_back(reading(tensor));
  return views;
}

topr::Allocate allocate_into(std::vector<Tensor>& results) {
  return [&results](ScalarType dtype, const std::vector<int64_t>& sizes) {
    return results.emplace_back(torch::stable::empty(sizes, dtype)).mutable_data_ptr();
  };
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> select_top(std::vector<Tensor> scores,
                                                      std::vector<Tensor> remain, double weight,
                                                      std::vector<int64_t> counts) {
  std::vector<Tensor> results;
  topr::select(reading(scores), reading(remain), weight, counts, allocate_into(results));
  return {results[0], results[1], results[2], results[3]};
}

std::tuple<Tensor, Tensor> zero_selected_(std::vector<Tensor> parameters,
                                          std::vector<Tensor> scores, std::vector<Tensor> remain,
                                          double weight, Tensor key, Tensor selected,
                                          Tensor candidates, int64_t count, bool record) {
  std::vector<View> targets;
  targets.reserve(parameters.size());
  for (const Tensor& parameter : parameters) {
    targets.push_back(view_of(parameter, parameter.mutable_data_ptr()));
  }
  std::vector<Tensor> results;
  topr::zero(targets, reading(scores), reading(remain), weight, reading(key), reading(selected),
             reading(candidates), count, record, allocate_into(results));
  return {results[0], results[1]};
}

}  // namespace fastfisher::cpu
