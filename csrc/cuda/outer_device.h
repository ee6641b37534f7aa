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

// In no image: a window or a column there adds nothing, nor do both together.
constexpr int kOutside = -kCounterLimit;

// A column of a group's matrix. `bytes` is where its x lies from the group's first channel, for a
// window at (0, 0); line and position say how far into the window it reaches.
struct alignas(16) Column {
  int64_t bytes;
  int64_t place;  // line in the lower half, position in the upper: one load of 16 bytes brings both

  __device__ __forceinline__ int line() const { return static_cast<int>(place); }
  __device__ __forceinline__ int position() const { return static_cast<int>(place >> 32); }
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

template <typename T>
__device__ __forceinline__ Column column_of(const OuterTask& task, int column) {
  if (column >= task.matrix_columns) return {0, static_cast<uint32_t>(kOutside)};
  const Problem& p = task.problem;
  const Tap tap = tap_of(task, column);
  const int64_t line = tap.line * p.dilation_h;
  const int64_t position = tap.position * p.dilation_w;
  const int64_t offset =
      tap.channel * p.x_stride[1] + line * p.x_stride[2] + position * p.x_stride[3];
  return {offset * static_cast<int64_t>(sizeof(T)), position << 32 | line};
}

// Where a row of out has a column.
__device__ __forceinline__ int64_t tap_offset(const OuterTask& task, int column) {
  const int64_t* stride = task.problem.out_stride;
  const Tap tap = tap_of(task, column);
  return tap.channel * stride[1] + tap.line * stride[2] + tap.position * stride[3];
}

// How windows follow each other: from one output line, or position, to the next in x, and where the
// first one begins, which may be in the padding, before the image.
struct Windows {
  explicit Windows(const Problem& p)
      : width(p.out_width),
        x_line(p.stride_h * p.x_stride[2]),
        x_position(p.stride_w * p.x_stride[3]),
        x_first(-p.pad_h * p.x_stride[2] - p.pad_w * p.x_stride[3]) {}
  Divider width;
  int64_t x_line, x_position, x_first;
};

// The window of an output position: its first line and position in the image, and where g and x
// have it, x counted from the first window.
struct Window {
  int line, position;
  int64_t g, x;
};

__device__ __forceinline__ Window window_at(const Problem& p, const Windows& windows, int at,
                                            bool exists) {
  int line, position;
  windows.width.divide(at, line, position);
  const int64_t lines = static_cast<unsigned>(line), positions = static_cast<unsigned>(position);
  Window window;
  window.g = lines * p.g_stride[2] + positions * p.g_stride[3];
  window.x = lines * windows.x_line + positions * windows.x_position;
  window.line = exists ? line * static_cast<int>(p.stride_h) - static_cast<int>(p.pad_h) : kOutside;
  window.position = position * static_cast<int>(p.stride_w) - static_cast<int>(p.pad_w);
  return window;
}

__device__ __forceinline__ bool in_image(const Problem& p, const Window& window,
                                         const Column& column) {
  return static_cast<unsigned>(window.line + column.line()) < static_cast<unsigned>(p.height) &&
         static_cast<unsigned>(window.position + column.position()) <
             static_cast<unsigned>(p.width);
}

template <typename T>
__device__ __forceinline__ const T* offset_bytes(const T* pointer, int64_t bytes) {
  return reinterpret_cast<const T*>(reinterpret_cast<const char*>(pointer) + bytes);
}

// Elements that are read and written at once.
template <typename T, int count>
struct alignas(sizeof(T) * count) Pack {
  T at[count];
};

// `count` consecutive columns of out, from one that `count` divides. Finding them takes divisions,
// so it is done once for all rows.
template <int count, typename T>
class OutColumns {
 public:
  __device__ __forceinline__ OutColumns(const OuterTask& task, int column)
      : task_(task), vector_(count > 1 && task.out_vector) {
#pragma unroll
    for (int i = 0; i < count; ++i) {
      at_[i] = vector_ ? column + i : tap_offset(task, column + i);
    }
    left_ = static_cast<int>(task.matrix_columns) - column;
  }

  // Adds to a row, counted over all groups.
  __device__ __forceinline__ void add(int64_t row, const T* sums) const {
    T* const out = static_cast<T*>(task_.out) + row * task_.problem.out_stride[0];
    const T alpha = static_cast<T>(task_.alpha);
    if (vector_) {
      auto* const to = reinterpret_cast<Pack<T, count>*>(out + at_[0]);
      Pack<T, count> pack = *to;
#pragma unroll
      for (int i = 0; i < count; ++i) pack.at[i] += alpha * sums[i];
      *to = pack;
      return;
    }
#pragma unroll
    for (int i = 0; i < count; ++i) {
      if (i < left_) out[at_[i]] += alpha * sums[i];
    }
  }

 private:
  const OuterTask& task_;
  bool vector_;
  int left_;
  int64_t at_[count];
};

// The same of what `split` has of the workspace, where sums replace what is there.
template <int count, typename T>
__device__ __forceinline__ void put_in_workspace(const OuterTask& task, int64_t split, int64_t row,
                                                 int column, const T* sums) {
  T* const to =
      static_cast<T*>(task.workspace) + split * task.entries + row * task.matrix_columns + column;
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

}  // namespace fastfisher::cuda
