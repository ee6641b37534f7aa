// The outer family for groups of few rows and columns, such as depthwise convolutions, of whose
// matrix a tile would mostly be empty. It is bound by memory, so it multiplies what it reads
// straight from there.
//
// A warp goes over the positions of one sample with its lanes and keeps kEntries consecutive
// columns of one row in registers, of one group, or of neighbouring groups where those neighbour in
// memory.
#include "outer.h"
#include "outer_device.h"

namespace fastfisher::cuda {
namespace {

// Columns that a thread sums: those of a 3 x 3 kernel.
constexpr int kEntries = kDepthwiseColumns;
constexpr int kWarps = kDepthwiseThreads / 32;

// `lanes`, a power of two, is how many groups a warp has; the others of its lanes share positions.
template <typename In, typename T>
__global__ void __launch_bounds__(kDepthwiseThreads)
    outer_depthwise(const OuterTask task, const Windows windows, const int lanes) {
  FF_SHARED(T, shared, [kWarps][kEntries][32]);
  const Problem& p = task.problem;
  const int positions = static_cast<int>(task.positions);
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const auto column_tiles = static_cast<unsigned>(task.column_tiles);
  const auto rows = static_cast<unsigned>(p.rows);
  const int first_column = static_cast<int>(blockIdx.x % column_tiles) * kEntries;
  const int64_t row = blockIdx.x / column_tiles % rows;
  const int64_t first_group = int64_t{blockIdx.x / column_tiles / rows} * lanes;
  // Lanes past the last group compute it as well, and are not asked for it.
  const int64_t group = min(first_group + lane % lanes, p.groups - 1);
  const int64_t first_sample = blockIdx.y * task.split_samples;
  const int64_t end_sample = min(first_sample + task.split_samples, p.samples);

  Column column[kEntries];
#pragma unroll
  for (int k = 0; k < kEntries; ++k) column[k] = column_of<In>(task, first_column + k);
  T sum[kEntries] = {};
  for (int64_t n = first_sample + warp; n < end_sample; n += kWarps) {
    const In* const g =
        static_cast<const In*>(task.g) + n * p.g_stride[0] + (group * p.rows + row) * p.g_stride[1];
    const In* const x = static_cast<const In*>(task.x) + n * p.x_stride[0] +
                        group * p.columns * p.x_stride[1] + windows.x_first;
    T product[kEntries] = {};
    for (int at = lane / lanes; at < positions; at += 32 / lanes) {
      const Window window = window_at(p, windows, at, true);
      const T value = static_cast<T>(g[window.g]);
      const In* const from = x + window.x;
#pragma unroll
      for (int k = 0; k < kEntries; ++k) {
        // Padding is a zero that is multiplied: an infinite or NaN gradient does not vanish there.
        const T of_image = in_image(p, window, column[k])
                               ? static_cast<T>(*offset_bytes(from, column[k].bytes))
                               : T{0};
        product[k] += value * of_image;
      }
    }
    for (int distance = lanes; distance < 32; distance *= 2) {
#pragma unroll
      for (int k = 0; k < kEntries; ++k) {
        product[k] += __shfl_xor_sync(0xffffffffu, product[k], distance);
      }
    }
#pragma unroll
    for (int k = 0; k < kEntries; ++k) {
      sum[k] += product[k] * (p.absolute ? copysign(T{1}, product[k]) : product[k]);
    }
  }

  if (lane < lanes) {
#pragma unroll
    for (int k = 0; k < kEntries; ++k) shared[warp][k][lane] = sum[k];
  }
  __syncthreads();
  for (int i = static_cast<int>(threadIdx.x); i < kEntries * lanes; i += kDepthwiseThreads) {
    const int k = i % kEntries;
    T total = 0;
#pragma unroll
    for (int each = 0; each < kWarps; ++each) total += shared[each][k][i / kEntries];
    const int64_t of_group = first_group + i / kEntries;
    if (of_group >= p.groups || first_column + k >= task.matrix_columns) continue;
    const int64_t group_row = of_group * p.rows + row;
    if (task.splits > 1) {
      put_in_workspace<1>(task, blockIdx.y, group_row, first_column + k, &total);
    } else {
      OutColumns<1, T>(task, first_column + k).add(group_row, &total);
    }
  }
}

template <typename In, typename T>
int launch(const OuterTask& task, void* stream) {
  const int lanes = depthwise_lanes(task);
  const dim3 grid(static_cast<unsigned>(depthwise_blocks(task)),
                  static_cast<unsigned>(task.splits));
  return FF_LAUNCH((outer_depthwise<In, T>), grid, dim3(kDepthwiseThreads), 0, stream, task,
                   Windows(task.problem), lanes);
}

}  // namespace
}  // namespace fastfisher::cuda

extern "C" int ff_outer_depthwise_float(const fastfisher::cuda::OuterTask* task, void* stream) {
  return fastfisher::cuda::launch<float, float>(*task, stream);
}

extern "C" int ff_outer_depthwise_double(const fastfisher::cuda::OuterTask* task, void* stream) {
  return fastfisher::cuda::launch<double, double>(*task, stream);
}

extern "C" int ff_outer_depthwise_bfloat16(const fastfisher::cuda::OuterTask* task, void* stream) {
  return fastfisher::cuda::launch<__nv_bfloat16, float>(*task, stream);
}
