// Launchers of the channel family: weight[c] += alpha * sum_n (sum_t g * (x - mean) * scale)^2, and
// bias[c] += alpha * sum_n (sum_t g)^2. First the sums over positions, each of a piece of a
// sample's positions, then what squares them and adds them up.
#pragma once

#include "../channel_shape.h"

namespace fastfisher::cuda {

// Device pointers; what is absent is null. `sums` holds the sums of the outputs, the weight's
// first, each [samples, pieces, channels]; `parts` holds those of each split, each [splits,
// channels].
template <typename T>
struct ChannelOperands {
  const T *g, *x, *mean, *scale;
  T* grad_input;
  const T* factor;
  T *weight, *bias;
  T *sums, *parts;
};

// How the work is divided, which depends on shapes and alignment alone.
struct ChannelPlan {
  bool needs_sums;  // or the values to square are those of g
  bool positions_innermost;
  bool vector_sums, vector_squares;
  int sum_lanes, square_lanes;  // of a warp, along the innermost dimension; powers of two
  int64_t pieces, piece;        // of positions, and positions in one
  int64_t splits, split;        // of samples, and samples in one
};

}  // namespace fastfisher::cuda

extern "C" {
// Each returns a cudaError_t.
int ff_channel_float(const fastfisher::ChannelProblem* p, const fastfisher::cuda::ChannelPlan* plan,
                     const fastfisher::cuda::ChannelOperands<float>* operands, double alpha,
                     void* stream);
int ff_channel_double(const fastfisher::ChannelProblem* p,
                      const fastfisher::cuda::ChannelPlan* plan,
                      const fastfisher::cuda::ChannelOperands<double>* operands, double alpha,
                      void* stream);
}
