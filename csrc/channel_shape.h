// A task of the channel family in plain numbers.
#pragma once

#include <cstdint>

namespace fastfisher {

// Strides are over (sample, position, channel), in elements; those of what is absent are zeros.
struct ChannelProblem {
  int64_t samples, positions, channels;
  int64_t g_stride[3], x_stride[3], mean_stride[3], scale_stride[3];
  int64_t weight_stride, bias_stride;
  bool absolute;
};

}  // namespace fastfisher
