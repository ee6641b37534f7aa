// A task of the outer family in plain numbers.
#pragma once

#include <algorithm>
#include <cstdint>

namespace fastfisher {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// g [N, groups * rows, OH, OW] with x [N, groups * columns, H, W]; a linear layer with positions is
// a 1 x 1 convolution of a single line.
struct Problem {
  int64_t samples, groups, rows, columns;
  int64_t height, width, out_height, out_width;
  int64_t kernel_height, kernel_width;
  int64_t stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
  // Strides of g and x over (sample, channel, line, position), in elements.
  int64_t g_stride[4];
  int64_t x_stride[4];
  // Strides of out over (row, column, kernel line, kernel position).
  int64_t out_stride[4];
  bool absolute;
};

}  // namespace fastfisher
