// Raw-pointer CPU kernels. One source (kernels_impl.h) is compiled once per instruction set; this
// header is the only thing the entry files and the variants share. No torch header may be included
// here: an inline function compiled for AVX-512 could be picked by the linker for every caller.
#pragma once

#include <cstdint>

#include "matrix_kernels.h"
#include "recurrent_kernels.h"
#include "topr_kernels.h"

namespace fastfisher::cpu {

// One tile of the outer family: `rows` x `columns` entries of
//   out[r, c] += alpha * sum_n (sum_t g[n, t, r] * x[n, t, c])^2
// where t runs over a `lines` x `positions` rectangle; `absolute` values in place of the squares
// where that is set, here and in every other kernel. All strides are in elements.
template <typename T>
struct OuterTile {
  const T* g;  // packed [samples][...][rows], rows innermost
  int64_t g_sample, g_line, g_position;
  const T* x;  // columns innermost, readable up to a whole vector past the end
  int64_t x_sample, x_line, x_position;
  int64_t samples, lines, positions;
  int64_t rows, columns;
  T* out;
  int64_t out_row;
  const int64_t* out_column;  // offset of each column, or nullptr where they are contiguous
  T alpha;
  bool absolute;
};

// One tile of the outer family with one input channel per output channel (depthwise convolution):
//   out[c, k] += alpha * sum_n (sum_t g[n, t, c] * x[n, t + k, c])^2   for `taps` values of k.
template <typename T>
struct DepthwiseTile {
  const T* g;  // packed, channels innermost
  int64_t g_sample, g_line, g_position;
  const T* x;  // packed, channels innermost
  int64_t x_sample, x_line, x_position;
  int64_t samples, lines, positions;
  int64_t channels;
  T* out;
  int64_t out_channel;
  T alpha;
  bool absolute;
};

// The channel family for one sample: sums over t of g * (x - mean) * scale, and of g.
//   weight[c] = sum_t g[t, c] * (x[t, c] - mean[t, c]) * scale[t, c];   bias[c] = sum_t g[t, c]
// x is nullptr for a bias alone; weight or bias is nullptr when not wanted. mean is nullptr for 0.
template <typename T>
struct ChannelSums {
  const T* g;
  int64_t g_position, g_channel;
  const T* x;
  int64_t x_position, x_channel;
  const T* mean;
  int64_t mean_position, mean_channel;
  const T* scale;
  int64_t scale_position, scale_channel;
  int64_t positions, channels;
  T* weight;  // [channels], overwritten
  T* bias;    // [channels], overwritten
  // grad_input[t, c] = g[t, c] * factor[c], with the strides of g; nullptr when not wanted.
  T* grad_input;
  const T* factor;
};

template <typename T>
struct Kernels {
  int64_t vector_lanes;
  // Rows of g that one packed panel holds at most; more of them where the columns of each tile fit
  // in one vector.
  int64_t max_rows, max_rows_narrow;
  // dst[t * ld + r] = src[r * row_stride + t * position_stride], r < rows, t < positions. May write
  // whole vectors: up to 2 * vector_lanes elements from dst[(positions - 1) * ld] on.
  void (*pack)(T* dst, int64_t ld, const T* src, int64_t row_stride, int64_t position_stride,
               int64_t rows, int64_t positions);
  // dst[p * panel_stride + t * width + r] = src[t * position_stride + p * width + r], a position
  // after the other, for the panels p of `width` that `channels` take; the last may be narrower.
  // Writes no element that is not there.
  void (*pack_across)(T* dst, int64_t panel_stride, int64_t width, const T* src,
                      int64_t position_stride, int64_t channels, int64_t positions);
  void (*outer_tile)(const OuterTile<T>&);
  void (*depthwise_tile)(const DepthwiseTile<T>&);
  void (*channel_sums)(const ChannelSums<T>&);
  // out[i] += alpha * value[i]^2, or alpha * |value[i]|
  void (*add_powers)(T* out, const T* value, T alpha, bool absolute, int64_t count);
  // sum[i] += value[i]
  void (*add)(T* sum, const T* value, int64_t count);
};

struct KernelTable {
  const char* name;
  Kernels<float> f32;
  Kernels<double> f64;
  TopKernels<float> top_f32;
  TopKernels<double> top_f64;
  TopKernels<Half> top_f16;
  TopKernels<BFloat16> top_bf16;
  GroupKernels groups;
  RecurrentKernels<float> recurrent_f32;
  RecurrentKernels<double> recurrent_f64;
  const MatrixKernels* matrix;  // nullptr without a matrix unit

  template <typename T>
  const Kernels<T>& of() const {
    if constexpr (sizeof(T) == sizeof(float)) {
      return f32;
    } else {
      return f64;
    }
  }

  const TopKernels<float>& top(float) const { return top_f32; }
  const TopKernels<double>& top(double) const { return top_f64; }
  const TopKernels<Half>& top(Half) const { return top_f16; }
  const TopKernels<BFloat16>& top(BFloat16) const { return top_bf16; }

  template <typename T>
  const RecurrentKernels<T>& recurrent() const {
    if constexpr (sizeof(T) == sizeof(float)) {
      return recurrent_f32;
    } else {
      return recurrent_f64;
    }
  }
};

const KernelTable& kernels_baseline();
const KernelTable& kernels_avx2();
const KernelTable& kernels_avx512();

}  // namespace fastfisher::cpu
