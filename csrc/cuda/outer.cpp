// The outer family's operators: which kernel serves a call, and its memory.
#include "outer.h"

#include <vector>

#include "../outer_problem.h"
#include "entry.h"

namespace fastfisher::cuda {
namespace {

// The kernels for one type of out.
struct Kernels {
  int (*simt)(const OuterTask*, void*);
  int (*reduce)(const OuterTask*, void*);
};

constexpr Kernels kFloat{ff_outer_simt_float, ff_outer_reduce_float};
constexpr Kernels kDouble{ff_outer_simt_double, ff_outer_reduce_double};

bool has_work(const OuterTask& task) {
  return task.problem.samples > 0 && task.positions > 0 && task.entries > 0;
}

int run(const Problem& problem, Tensor& out, const Tensor& grad, const Tensor& input, double alpha) {
  const bool is_double = out.scalar_type() == ScalarType::Double;
  const int64_t out_bytes = is_double ? sizeof(double) : sizeof(float);
  OuterTask task =
      outer_task(problem, grad.const_data_ptr(), input.const_data_ptr(), out.mutable_data_ptr(),
                 alpha, is_double ? sizeof(double) : sizeof(float), out_bytes);
  if (!has_work(task)) return 0;
  const OnDevice device(out);
  if (is_double) {
    plan_outer(task, kSimtDoubleTiles, out_bytes);
  } else {
    plan_outer(task, kSimtTiles, out_bytes);
  }
  const Tensor workspace =
      torch::stable::new_empty(out, {task.workspace_elements()}, out.scalar_type());
  task.workspace = workspace.mutable_data_ptr();
  const Kernels& kernels = is_double ? kDouble : kFloat;
  const int error = kernels.simt(&task, device.stream());
  if (error != 0 || task.splits == 1) return error;
  return kernels.reduce(&task, device.stream());
}

}  // namespace

void linear_sum_grad_squared_(Tensor out, Tensor grad, Tensor input, double alpha, int64_t power,
                              bool allow_tf32) {
  const Problem problem = linear_problem(out, grad, input, power);
  FF_CHECK_LAUNCH("linear_sum_grad_squared_", run(problem, out, grad, input, alpha));
}

void conv2d_sum_grad_squared_(Tensor out, Tensor grad, Tensor input, std::vector<int64_t> stride,
                              std::vector<int64_t> padding, std::vector<int64_t> dilation,
                              int64_t groups, double alpha, int64_t power, bool allow_tf32) {
  const Problem problem =
      conv2d_problem(out, grad, input, stride, padding, dilation, groups, power);
  FF_CHECK_LAUNCH("conv2d_sum_grad_squared_", run(problem, out, grad, input, alpha));
}

FF_REGISTER(m) {
  m.impl("linear_sum_grad_squared_", TORCH_BOX(&linear_sum_grad_squared_));
  m.impl("conv2d_sum_grad_squared_", TORCH_BOX(&conv2d_sum_grad_squared_));
}

}  // namespace fastfisher::cuda
