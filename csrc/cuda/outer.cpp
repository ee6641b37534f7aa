// The outer family's operators: which kernel serves a call, and its memory.
#include "outer.h"

#include "../outer_problem.h"
#include "entry.h"

namespace fastfisher::cuda {

void linear_sum_grad_squared_(Tensor out, Tensor grad, Tensor input, double alpha, int64_t power,
                              bool allow_tf32) {
  const Problem p = linear_problem(out, grad, input, power);
  const OnDevice device(out);
  FF_CHECK_LAUNCH("linear_sum_grad_squared_",
                  ff_outer_simt_float(&p, static_cast<float*>(out.mutable_data_ptr()),
                                      static_cast<const float*>(grad.const_data_ptr()),
                                      static_cast<const float*>(input.const_data_ptr()), alpha,
                                      device.stream()));
}

FF_REGISTER(m) { m.impl("linear_sum_grad_squared_", TORCH_BOX(&linear_sum_grad_squared_)); }

}  // namespace fastfisher::cuda
