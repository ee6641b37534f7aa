// The outer family on processors with a matrix unit, in float32.
#pragma once

#include "../outer_shape.h"
#include "matrix_kernels.h"

namespace fastfisher::cpu {

// out[o, i] += alpha * sum_n (sum_t g[n, t, o] * x[n, t, i])^2 of float32 or bfloat16 operands,
// summed in float32. False, and nothing done, where the vector kernels are expected to be faster or
// the problem is not one for this unit.
bool run_matrix(const MatrixKernels& kernels, const Problem& problem, const void* g, const void* x,
                bool is_bfloat16, float* out, float alpha);

}  // namespace fastfisher::cpu
