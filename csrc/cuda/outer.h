// Launchers of the outer family: out += alpha * sum_n (sum_t g[n, t, o] x[n, t, i])^2.
#pragma once

#include "../outer_shape.h"

extern "C" {
// Returns a cudaError_t. `out`, `g` and `x` are device pointers.
int ff_outer_simt_float(const fastfisher::Problem* problem, float* out, const float* g,
                        const float* x, double alpha, void* stream);
}
