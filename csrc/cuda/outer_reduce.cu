// Adds up what the splits of a task wrote to the workspace, in their order, and adds it to out.
#include "outer.h"
#include "outer_device.h"

namespace fastfisher::cuda {
namespace {

constexpr int kReduceThreads = 256;
// Blocks that keep a device busy; each takes several pieces where there are more.
constexpr int64_t kMostBlocks = 1 << 16;

// A thread adds `count` consecutive columns of a row at once.
template <typename T, int count>
__global__ void __launch_bounds__(kReduceThreads) outer_reduce(const OuterTask task) {
  const T* const partial = static_cast<const T*>(task.workspace);
  const int64_t pieces = task.entries / count;
  const int64_t threads = int64_t{gridDim.x} * kReduceThreads;
  for (int64_t i = int64_t{blockIdx.x} * kReduceThreads + threadIdx.x; i < pieces; i += threads) {
    T sum[count] = {};
    for (int64_t split = 0; split < task.splits; ++split) {
      const auto pack =
          *reinterpret_cast<const Pack<T, count>*>(partial + split * task.entries + i * count);
#pragma unroll
      for (int k = 0; k < count; ++k) sum[k] += pack.at[k];
    }
    const int64_t row = i * count / task.matrix_columns;
    const auto column = static_cast<int>(i * count - row * task.matrix_columns);
    OutColumns<count, T>(task, column).add(row, sum);
  }
}

template <typename T>
int launch(const OuterTask& task, void* stream) {
  constexpr int kLanes = 16 / sizeof(T);
  const bool vector = task.matrix_columns % kLanes == 0;
  const int64_t pieces = task.entries / (vector ? kLanes : 1);
  const dim3 grid(
      static_cast<unsigned>(std::min(kMostBlocks, ceil_div(pieces, int64_t{kReduceThreads}))));
  if (vector) {
    return FF_LAUNCH((outer_reduce<T, kLanes>), grid, dim3(kReduceThreads), 0, stream, task);
  }
  return FF_LAUNCH((outer_reduce<T, 1>), grid, dim3(kReduceThreads), 0, stream, task);
}

}  // namespace
}  // namespace fastfisher::cuda

extern "C" int ff_outer_reduce_float(const fastfisher::cuda::OuterTask* task, void* stream) {
  return fastfisher::cuda::launch<float>(*task, stream);
}

extern "C" int ff_outer_reduce_double(const fastfisher::cuda::OuterTask* task, void* stream) {
  return fastfisher::cuda::launch<double>(*task, stream);
}
