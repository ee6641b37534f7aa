// The outer family's operators: which kernel serves a call, and its memory.
#include "outer.h"

#include <vector>

#include "../outer_problem.h"
#include "entry.h"

namespace fastfisher::cuda {
namespace {

using Launcher = int (*)(const OuterTask*, void*);

// Chooses the kernel for a task and plans it.
Launcher plan(OuterTask& task, ScalarType operands, int64_t out_bytes, bool allow_tf32) {
  if (operands == ScalarType::Double) {
    if (plan_depthwise(task, out_bytes)) return ff_outer_depthwise_double;
    plan_outer(task, kSimtDoubleTiles, kSimtDoubleKernel, out_bytes);
    return ff_outer_simt_double;
  }
  if (plan_depthwise(task, out_bytes)) {
    return operands == ScalarType::Float ? ff_outer_depthwise_float : ff_outer_depthwise_bfloat16;
  }
  if (operands == ScalarType::Float && !allow_tf32) {
    plan_outer(task, kSimtTiles, kSimtKernel, out_bytes);
    return ff_outer_simt_float;
  }
  if (operands == ScalarType::Float) {
    plan_outer(task, kMmaTiles, kMmaTf32Kernel, out_bytes);
    return ff_outer_mma_tf32;
  }
  plan_outer(task, kMmaTiles, kMmaBfloat16Kernel, out_bytes);
  return ff_outer_mma_bfloat16;
}

// Returns a cudaError_t.
int run(const Problem& problem, Tensor& out, const Tensor& grad, const Tensor& input, double alpha,
        bool allow_tf32) {
  const auto out_bytes = static_cast<int64_t>(out.element_size());
  OuterTask task =
      outer_task(problem, grad.const_data_ptr(), input.const_data_ptr(), out.mutable_data_ptr(),
                 alpha, static_cast<int64_t>(grad.element_size()), out_bytes);
  if (problem.samples == 0 || task.positions == 0 || task.entries == 0) return 0;
  const OnDevice device(out);
  const Launcher launch = plan(task, grad.scalar_type(), out_bytes, allow_tf32);
  const Tensor workspace =
      torch::stable::new_empty(out, {task.workspace_elements()}, out.scalar_type());
  task.workspace = workspace.mutable_data_ptr();
  const int error = launch(&task, device.stream());
  if (error != 0 || task.splits == 1) return error;
  const Launcher reduce =
      out.scalar_type() == ScalarType::Double ? ff_outer_reduce_double : ff_outer_reduce_float;
  return reduce(&task, device.stream());
}

}  // namespace

#define FF_CHECK_OUTER(op, problem, out, grad, input)                                          \
  FF_CHECK(op, "grad, input", are_together(out, {grad, input}), "expected the device of out"); \
  FF_CHECK(op, "grad, input", outer_countable(problem),                                        \
           "expected fewer than 2^30 positions, rows and columns in a sample")

void linear_sum_grad_squared_(Tensor out, Tensor grad, Tensor input, double alpha, int64_t power,
                              bool allow_tf32) {
  const Problem problem = linear_problem(out, grad, input, power);
  FF_CHECK_OUTER("linear_sum_grad_squared_", problem, out, grad, input);
  FF_CHECK_LAUNCH("linear_sum_grad_squared_", run(problem, out, grad, input, alpha, allow_tf32));
}

void conv2d_sum_grad_squared_(Tensor out, Tensor grad, Tensor input, std::vector<int64_t> stride,
                              std::vector<int64_t> padding, std::vector<int64_t> dilation,
                              int64_t groups, double alpha, int64_t power, bool allow_tf32) {
  const Problem problem =
      conv2d_problem(out, grad, input, stride, padding, dilation, groups, power);
  FF_CHECK_OUTER("conv2d_sum_grad_squared_", problem, out, grad, input);
  FF_CHECK_LAUNCH("conv2d_sum_grad_squared_", run(problem, out, grad, input, alpha, allow_tf32));
}

FF_REGISTER(m) {
  m.impl("linear_sum_grad_squared_", TORCH_BOX(&linear_sum_grad_squared_));
  m.impl("conv2d_sum_grad_squared_", TORCH_BOX(&conv2d_sum_grad_squared_));
}

}  // namespace fastfisher::cuda
