// The outer family on processors with a matrix unit, in float32.
#pragma once

#include "matrix_kernels.h"
#include "problem.h"

namespace fastfisher::cpu {

// out[o, i] += alpha * sum_n (sum_t g[n, t, o] * x[n, t, i])^2 with operands of `terms` bfloat16
// each: 3 for float32's accuracy, or 1 for operands rounded to bfloat16. False, and nothing done,
// where the vector kernels are expected to be faster or the problem is not one for this unit.
bool run_matrix(const MatrixKernels& kernels, const Problem& problem, const float* g,
                const float* x, float* out, float alpha, int64_t terms);

}  // namespace fastfisher::cpu
