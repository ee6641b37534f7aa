// What the kernels of the outer family share: where a position and a column of a task lie.
#pragma once

#include "device.h"
#include "outer_plan.h"

namespace fastfisher::cuda {

// Divides numbers below 2^31 by one that is fixed before the launch.
class Divider {
 public:
  explicit Divider(int64_t divisor) : divisor_(static_cast<uint32_t>(divisor)) {
    while ((int64_t{1} << (shift_ - 31)) < divisor) ++shift_;
    factor_ = static_cast<uint32_t>(((uint64_t{1} << shift_) + divisor_ - 1) / divisor_);
  }
  __device__ __forceinline__ void divide(int number, int& quotient, int& remainder) const {
    quotient = static_cast<int>((uint64_t{static_cast<uint32_t>(number)} * factor_) >> shift_);
    remainder = number - quotient * static_cast<int>(divisor_);
  }

 private:
  uint32_t divisor_, factor_;
  int shift_ = 31;
};

// A column of a group's matrix. `offset` is where its x lies from the group's first channel, for a
// window at (0, 0); `line` and `position` say how far into the window it reaches.
struct Column {
  int64_t offset;
  int line, position;
};

struct Tap {
  int channel, line, position;
};

__device__ __forceinline__ Tap tap_of(const OuterTask& task, int column) {
  const int channels = static_cast<int>(task.problem.columns);
  const int lines = static_cast<int>(task.problem.kernel_height);
  const int positions = static_cast<int>(task.problem.kernel_width);
  if (task.channels_innermost) {
    const int tap = column / channels;
    return {column % channels, tap / positions, tap % positions};
  }
  const int line = column / positions;
  return {line / lines, line % lines, column % positions};
}

// A column past the last one is in no image, wherever its window is.
__device__ __forceinline__ Column column_of(const OuterTask& task, int column) {
  if (column >= task.matrix_columns) return {0, INT32_MIN, 0};
  const Problem& p = task.problem;
  const Tap tap = tap_of(task, column);
  const int64_t line = tap.line * p.dilation_h;
  const int64_t position = tap.position * p.dilation_w;
  return {tap.channel * p.x_stride[1] + line * p.x_stride[2] + position * p.x_stride[3],
          static_cast<int>(line), static_cast<int>(position)};
}

// Where out has (group, row, column).
__device__ __forceinline__ int64_t out_offset(const OuterTask& task, int64_t row, int column) {
  const int64_t* stride = task.problem.out_stride;
  const Tap tap = tap_of(task, column);
  return row * stride[0] + tap.channel * stride[1] + tap.line * stride[2] +
         tap.position * stride[3];
}

// The window of an output position: its first line and position in the image, either may be in the
// padding, and where g and x have it, from the sample's first element.
struct Window {
  int line, position;
  int64_t g, x;
};

__device__ __forceinline__ Window window_at(const Problem& p, const Divider& width, int at) {
  int line, position;
  width.divide(at, line, position);
  Window window;
  window.g = line * p.g_stride[2] + position * p.g_stride[3];
  window.line = line * static_cast<int>(p.stride_h) - static_cast<int>(p.pad_h);
  window.position = position * static_cast<int>(p.stride_w) - static_cast<int>(p.pad_w);
  window.x = window.line * p.x_stride[2] + window.position * p.x_stride[3];
  return window;
}

__device__ __forceinline__ bool in_image(const Problem& p, const Window& window,
                                         const Column& column) {
  return static_cast<unsigned>(window.line + column.line) < static_cast<unsigned>(p.height) &&
         static_cast<unsigned>(window.position + column.position) < static_cast<unsigned>(p.width);
}

template <typename T>
__device__ __forceinline__ T magnitude(T value, bool absolute) {
  return absolute ? (value < 0 ? -value : value) : value * value;
}

// Elements that are read and written at once.
template <typename T, int count>
struct alignas(sizeof(T) * count) Pack {
  T at[count];
};

// Adds `sums` of (row of all groups, column) and the following columns to out. `count` divides
// column.
template <int count, typename T>
__device__ __forceinline__ void add_to_out(const OuterTask& task, int64_t row, int column,
                                           const T* sums) {
  T* const out = static_cast<T*>(task.out);
  const T alpha = static_cast<T>(task.alpha);
  if (count > 1 && task.out_vector) {
    auto* const to =
        reinterpret_cast<Pack<T, count>*>(out + row * task.problem.out_stride[0] + column);
    Pack<T, count> pack = *to;
#pragma unroll
    for (int i = 0; i < count; ++i) pack.at[i] += alpha * sums[i];
    *to = pack;
    return;
  }
#pragma unroll
  for (int i = 0; i < count; ++i) {
    if (column + i < task.matrix_columns) {
      out[out_offset(task, row, column + i)] += alpha * sums[i];
    }
  }
}

// The same into what `split` has of the workspace, where it replaces what is there.
template <int count, typename T>
__device__ __forceinline__ void put_in_workspace(const OuterTask& task, int64_t split, int64_t row,
                                                 int column, const T* sums) {
  T* const to = static_cast<T*>(task.workspace) + split * task.entries +
                row * task.matrix_columns + column;
  if (task.matrix_columns % count == 0) {
    Pack<T, count> pack;
#pragma unroll
    for (int i = 0; i < count; ++i) pack.at[i] = sums[i];
    *reinterpret_cast<Pack<T, count>*>(to) = pack;
    return;
  }
#pragma unroll
  for (int i = 0; i < count; ++i) {
    if (column + i < task.matrix_columns) to[i] = sums[i];
  }
}

// Where a block's sums go.
template <int count, typename T>
__device__ __forceinline__ void deliver(const OuterTask& task, int64_t split, int64_t row,
                                        int column, const T* sums) {
  if (column >= task.matrix_columns) return;
  if (task.splits > 1) {
    put_in_workspace<count>(task, split, row, column, sums);
  } else {
    add_to_out<count>(task, row, column, sums);
  }
}

}  // namespace fastfisher::cuda
