// Launchers of the outer family: out += alpha * sum_n (sum_t g[n, t, o] x[n, t, i])^2. Each returns
// a cudaError_t; the pointers in a task are the device's.
#pragma once

#include "outer_plan.h"

namespace fastfisher::cuda {

constexpr OuterTile kSimtTiles[] = {{128, 128, 256, 1.0}, {64, 64, 128, 1.15}, kSmallestTile};
constexpr OuterTile kSimtDoubleTiles[] = {{64, 64, 256, 1.0}, {32, 32, 64, 1.1}};

}  // namespace fastfisher::cuda

extern "C" {
int ff_outer_simt_float(const fastfisher::cuda::OuterTask* task, void* stream);
int ff_outer_simt_double(const fastfisher::cuda::OuterTask* task, void* stream);
// For groups of few rows and columns.
int ff_outer_depthwise_float(const fastfisher::cuda::OuterTask* task, void* stream);
int ff_outer_depthwise_double(const fastfisher::cuda::OuterTask* task, void* stream);
int ff_outer_depthwise_bfloat16(const fastfisher::cuda::OuterTask* task, void* stream);
// Adds the splits' sums up, in order, and to out.
int ff_outer_reduce_float(const fastfisher::cuda::OuterTask* task, void* stream);
int ff_outer_reduce_double(const fastfisher::cuda::OuterTask* task, void* stream);
}
