// Launchers of the outer family: out += alpha * sum_n (sum_t g[n, t, o] x[n, t, i])^2. Each returns
// a cudaError_t; the pointers in a task are the device's.
#pragma once

#include "outer_plan.h"

namespace fastfisher::cuda {

constexpr OuterTile kSimtTiles[] = {{128, 128, 256, 1.0}, {128, 64, 128, 1.01}, {64, 64, 64, 1.02},
                                    {64, 64, 128, 1.09},  kSmallestTile,        {16, 64, 64, 1.27}};
constexpr OuterTile kSimtDoubleTiles[] = {{64, 64, 256, 1.0}, {32, 32, 64, 1.1}};
constexpr OuterKernel kSimtKernel{4, 4, 2, 12, 96}, kSimtDoubleKernel{8, 4, 2, 12, 48};
// Of both kernels on tensor cores.
constexpr OuterTile kMmaTiles[] = {{128, 128, 256, 1.0}, {64, 64, 128, 1.6}};
constexpr OuterKernel kMmaBfloat16Kernel{2, 16, 4, 100, 840}, kMmaTf32Kernel{4, 8, 2, 50, 420};

}  // namespace fastfisher::cuda

extern "C" {
int ff_outer_simt_float(const fastfisher::cuda::OuterTask* task, void* stream);
int ff_outer_simt_double(const fastfisher::cuda::OuterTask* task, void* stream);
// On tensor cores, into float32: bfloat16 operands, and float32 ones rounded to tf32.
int ff_outer_mma_bfloat16(const fastfisher::cuda::OuterTask* task, void* stream);
int ff_outer_mma_tf32(const fastfisher::cuda::OuterTask* task, void* stream);
// For groups of few rows and columns.
int ff_outer_depthwise_float(const fastfisher::cuda::OuterTask* task, void* stream);
int ff_outer_depthwise_double(const fastfisher::cuda::OuterTask* task, void* stream);
int ff_outer_depthwise_bfloat16(const fastfisher::cuda::OuterTask* task, void* stream);
// Adds the splits' sums up, in order, and to out.
int ff_outer_reduce_float(const fastfisher::cuda::OuterTask* task, void* stream);
int ff_outer_reduce_double(const fastfisher::cuda::OuterTask* task, void* stream);
}
