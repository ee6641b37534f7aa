// Sums over positions, their squares, and the sums of those, each in an order that depends on the
// shapes alone.
#include "channel.h"

#include <algorithm>

#include "device.h"
#include "vectors.cuh"

namespace fastfisher::cuda {
namespace {

constexpr int kWarp = 32;
constexpr int kSumWarps = 4;     // of a block; each works alone
constexpr int kSquareWarps = 8;  // of a block
constexpr int kBatch = 4;        // vector loads of a thread under way
constexpr int kBlocks = 4;       // of a multiprocessor, at least

template <typename T>
struct Operand {
  const T* data;
  int64_t sample, position, channel;  // strides
};

template <typename T>
Operand<T> operand(const T* data, const int64_t (&stride)[3]) {
  return {data, stride[0], stride[1], stride[2]};
}

// What mean and scale depend on besides the sample.
enum class Statistics { kNone, kOfChannel, kOfPosition, kOfBoth };

// Fewer loads are under way where each costs more registers for its addresses.
template <Statistics kind, bool vector>
constexpr int kSumBatch = kind == Statistics::kOfBoth ? 1
                          : vector                    ? kBatch
                                                      : kBatch / 2;

template <typename T>
struct Sums {
  Operand<T> g, x, mean, scale;
  T* grad_input;
  const T* factor;
  T *weight, *bias;  // [samples, pieces, channels]
  int64_t positions, channels, pieces, piece, groups, units;
  int shift;  // 1 << shift lanes are along the innermost dimension
};

// Of one sample, one piece of its positions and one group of channels: what a warp does at once.
struct Unit {
  int64_t sample, piece, group;
};

template <typename T>
__device__ __forceinline__ Unit unit_at(const Sums<T>& s, int64_t index) {
  const int64_t rest = index / s.groups;
  return {rest / s.pieces, rest % s.pieces, index % s.groups};
}

template <typename T>
__device__ __forceinline__ T statistic(const Operand<T>& of, int64_t at, T absent) {
  return of.data == nullptr ? absent : of.data[at];
}

// Adds up a warp's values over the lanes whose numbers differ in bits from `from` to `to`.
template <typename T>
__device__ __forceinline__ T sum_lanes(T value, int from, int to) {
  for (int bit = from; bit < to; bit <<= 1) value += __shfl_xor_sync(0xffffffffu, value, bit);
  return value;
}

// Channels innermost: a thread has neighbouring channels, or some that lie `lanes` apart. Lanes
// that are not needed for these take other positions.
template <Statistics kind, bool vector, typename T>
__device__ __forceinline__ void sum_last(const Sums<T>& s, const Unit& unit) {
  constexpr int K = Vector<T>::size;
  constexpr int batch = kSumBatch<kind, vector>;
  const int lane = threadIdx.x % kWarp;
  const int lanes = 1 << s.shift, row = lane >> s.shift, rows = kWarp >> s.shift;
  const int across = lane & (lanes - 1);
  const int apart = vector ? 1 : lanes;
  const int64_t c = unit.group * (lanes * K) + across * (vector ? K : 1);
  const int64_t left = s.channels - c;
  const T* const g = s.g.data + unit.sample * s.g.sample + c * s.g.channel;
  const T* const x =
      kind == Statistics::kNone ? nullptr : s.x.data + unit.sample * s.x.sample + c * s.x.channel;
  const int64_t mean_at = unit.sample * s.mean.sample + c * s.mean.channel;
  const int64_t scale_at = unit.sample * s.scale.sample + c * s.scale.channel;
  T* const to_input =
      s.grad_input == nullptr ? nullptr : s.grad_input + unit.sample * s.g.sample + c * s.g.channel;
  Vector<T> factor{}, mean{}, weight{}, bias{};
  if (to_input != nullptr) load<false>(factor, s.factor + c, 1, apart, left);
  if (kind == Statistics::kOfChannel && s.mean.data != nullptr) {
    load<false>(mean, s.mean.data + mean_at, s.mean.channel, apart, left);
  }

  const int64_t end = min((unit.piece + 1) * s.piece, s.positions);
  for (int64_t first = unit.piece * s.piece + row; first < end; first += batch * rows) {
    Vector<T> gs[batch], xs[batch];
    T means[batch], scales[batch];
#pragma unroll
    for (int u = 0; u < batch; ++u) {
      const int64_t t = first + u * rows;
      const int64_t there = t < end ? left : 0;
      load<vector>(gs[u], g + t * s.g.position, s.g.channel, apart, there);
      if constexpr (kind != Statistics::kNone) {
        load<vector>(xs[u], x + t * s.x.position, s.x.channel, apart, there);
      }
      if constexpr (kind == Statistics::kOfPosition) {
        means[u] = t < end ? statistic(s.mean, mean_at + t * s.mean.position, T(0)) : T(0);
        scales[u] = t < end ? statistic(s.scale, scale_at + t * s.scale.position, T(1)) : T(0);
      }
    }
#pragma unroll
    for (int u = 0; u < batch; ++u) {
      const int64_t t = first + u * rows;
      if (t >= end) break;
#pragma unroll
      for (int k = 0; k < K; ++k) {
        const T value = gs[u].lanes[k];
        bias.lanes[k] += value;
        if constexpr (kind == Statistics::kOfChannel) {
          weight.lanes[k] += value * (xs[u].lanes[k] - mean.lanes[k]);
        } else if constexpr (kind == Statistics::kOfPosition) {
          weight.lanes[k] += value * ((xs[u].lanes[k] - means[u]) * scales[u]);
        } else if constexpr (kind == Statistics::kOfBoth) {
          if (k * apart < left) {
            const int64_t m = mean_at + t * s.mean.position + k * apart * s.mean.channel;
            const int64_t r = scale_at + t * s.scale.position + k * apart * s.scale.channel;
            weight.lanes[k] += value * ((xs[u].lanes[k] - statistic(s.mean, m, T(0))) *
                                        statistic(s.scale, r, T(1)));
          }
        }
        gs[u].lanes[k] *= factor.lanes[k];
      }
      if (to_input != nullptr) {
        store<vector>(to_input + t * s.g.position, gs[u], s.g.channel, apart, left);
      }
    }
  }

#pragma unroll
  for (int k = 0; k < K; ++k) {
    bias.lanes[k] = sum_lanes(bias.lanes[k], lanes, kWarp);
    if constexpr (kind != Statistics::kNone) {
      weight.lanes[k] = sum_lanes(weight.lanes[k], lanes, kWarp);
    }
  }
  if (row != 0) return;
  const int64_t to = (unit.sample * s.pieces + unit.piece) * s.channels + c;
  if (s.bias != nullptr) store<vector>(s.bias + to, bias, 1, apart, left);
  if constexpr (kind != Statistics::kNone) {
    if constexpr (kind == Statistics::kOfChannel) {
      Vector<T> scale{};
      load<false>(scale, s.scale.data + scale_at, s.scale.channel, apart, left);
#pragma unroll
      for (int k = 0; k < K; ++k) weight.lanes[k] *= scale.lanes[k];
    }
    store<vector>(s.weight + to, weight, 1, apart, left);
  }
}

// Positions innermost: a thread has one channel and neighbouring positions, or some that lie
// `lanes` apart. Lanes that are not needed for these take other channels.
template <Statistics kind, bool vector, typename T>
__device__ __forceinline__ void sum_first(const Sums<T>& s, const Unit& unit) {
  constexpr int K = Vector<T>::size;
  constexpr int batch = kSumBatch<kind, vector>;
  const int lane = threadIdx.x % kWarp;
  const int lanes = 1 << s.shift;
  const int along = lane & (lanes - 1);
  const int apart = vector ? 1 : lanes;
  const int64_t c = unit.group * (kWarp >> s.shift) + (lane >> s.shift);
  // Lanes without a channel have no positions; what follows needs all lanes of the warp.
  const bool is_channel = c < s.channels;
  const T* const g = s.g.data + unit.sample * s.g.sample + c * s.g.channel;
  const T* const x =
      kind == Statistics::kNone ? nullptr : s.x.data + unit.sample * s.x.sample + c * s.x.channel;
  const int64_t mean_at = unit.sample * s.mean.sample + c * s.mean.channel;
  const int64_t scale_at = unit.sample * s.scale.sample + c * s.scale.channel;
  T* const to_input =
      s.grad_input == nullptr ? nullptr : s.grad_input + unit.sample * s.g.sample + c * s.g.channel;
  const T factor = to_input != nullptr && is_channel ? s.factor[c] : T(0);
  T mean = 0, weight = 0, bias = 0;
  if (kind == Statistics::kOfChannel && is_channel) mean = statistic(s.mean, mean_at, T(0));

  const int64_t begin = unit.piece * s.piece + along * (vector ? K : 1);
  const int64_t end = is_channel ? min((unit.piece + 1) * s.piece, s.positions) : 0;
  for (int64_t first = begin; first < end; first += batch * K * lanes) {
    Vector<T> gs[batch], xs[batch];
#pragma unroll
    for (int u = 0; u < batch; ++u) {
      const int64_t t = first + u * K * lanes;
      load<vector>(gs[u], g + t * s.g.position, s.g.position, apart, end - t);
      if constexpr (kind != Statistics::kNone) {
        load<vector>(xs[u], x + t * s.x.position, s.x.position, apart, end - t);
      }
    }
#pragma unroll
    for (int u = 0; u < batch; ++u) {
      const int64_t t = first + u * K * lanes;
#pragma unroll
      for (int k = 0; k < K; ++k) {
        const T value = gs[u].lanes[k];
        bias += value;
        if constexpr (kind == Statistics::kOfChannel) {
          weight += t + k * apart < end ? value * (xs[u].lanes[k] - mean) : T(0);
        } else if constexpr (kind != Statistics::kNone) {
          if (t + k * apart < end) {
            const int64_t m = mean_at + (t + k * apart) * s.mean.position;
            const int64_t r = scale_at + (t + k * apart) * s.scale.position;
            weight += value *
                      ((xs[u].lanes[k] - statistic(s.mean, m, T(0))) * statistic(s.scale, r, T(1)));
          }
        }
        gs[u].lanes[k] = value * factor;
      }
      if (to_input != nullptr) {
        store<vector>(to_input + t * s.g.position, gs[u], s.g.position, apart, end - t);
      }
    }
  }

  bias = sum_lanes(bias, 1, lanes);
  if constexpr (kind != Statistics::kNone) weight = sum_lanes(weight, 1, lanes);
  if (along != 0 || !is_channel) return;
  const int64_t to = (unit.sample * s.pieces + unit.piece) * s.channels + c;
  if (s.bias != nullptr) s.bias[to] = bias;
  if constexpr (kind == Statistics::kOfChannel) weight *= statistic(s.scale, scale_at, T(1));
  if constexpr (kind != Statistics::kNone) s.weight[to] = weight;
}

template <bool positions_innermost, bool vector, typename T>
__global__ void __launch_bounds__(kSumWarps* kWarp, kBlocks) channel_sums(const Sums<T> s) {
  const int64_t index = int64_t{blockIdx.x} * kSumWarps + threadIdx.x / kWarp;
  if (index >= s.units) return;
  const Unit unit = unit_at(s, index);
  const bool of_channel = s.mean.position == 0 && s.scale.position == 0;
  if constexpr (positions_innermost) {
    if (s.x.data == nullptr) {
      sum_first<Statistics::kNone, vector>(s, unit);
    } else if (of_channel) {
      sum_first<Statistics::kOfChannel, vector>(s, unit);
    } else {
      sum_first<Statistics::kOfBoth, vector>(s, unit);
    }
  } else {
    if (s.x.data == nullptr) {
      sum_last<Statistics::kNone, vector>(s, unit);
    } else if (of_channel) {
      sum_last<Statistics::kOfChannel, vector>(s, unit);
    } else if (s.mean.channel == 0 && s.scale.channel == 0) {
      sum_last<Statistics::kOfPosition, vector>(s, unit);
    } else {
      sum_last<Statistics::kOfBoth, vector>(s, unit);
    }
  }
}

// The values of one or two outputs, and where the sums of their squares go.
template <typename T>
struct Squares {
  const T* values;
  int64_t sample, piece, channel;  // strides
  int64_t samples, pieces, channels;
  int64_t between, split;
  T *out, *other_out;
  int64_t out_stride, other_stride;
  T* parts;  // [outputs, splits, channels], or null where there is one split
  T alpha;
  bool absolute;
  int shift;
};

template <typename T>
__device__ __forceinline__ T* output_at(const Squares<T>& s, int64_t c) {
  return blockIdx.z == 0 ? s.out + c * s.out_stride : s.other_out + c * s.other_stride;
}

// A block adds up the squares of a group of channels over one split of the samples.
template <bool vector, typename T>
__global__ void __launch_bounds__(kSquareWarps* kWarp, kBlocks / 2)
    channel_squares(const Squares<T> s) {
  constexpr int K = Vector<T>::size;
  FF_SHARED(Vector<T>, of_warp, [kSquareWarps][kWarp]);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int lanes = 1 << s.shift, rows = kSquareWarps * (kWarp >> s.shift);
  const int across = lane & (lanes - 1);
  const int row = warp * (kWarp >> s.shift) + (lane >> s.shift);
  const int apart = vector ? 1 : lanes;
  const int64_t c = int64_t{blockIdx.x} * (lanes * K) + across * (vector ? K : 1);
  const int64_t left = s.channels - c;
  const T* const values = s.values + blockIdx.z * s.between + c * s.channel;
  Vector<T> sum{};
  const int64_t end = min((blockIdx.y + int64_t{1}) * s.split, s.samples);
  for (int64_t first = blockIdx.y * s.split + row; first < end; first += kBatch * rows) {
    Vector<T> of_sample[kBatch] = {};
    for (int64_t piece = 0; piece < s.pieces; ++piece) {
      Vector<T> more[kBatch];
#pragma unroll
      for (int u = 0; u < kBatch; ++u) {
        const int64_t n = first + u * rows;
        load<vector>(more[u], values + n * s.sample + piece * s.piece, s.channel, apart,
                     n < end ? left : 0);
      }
#pragma unroll
      for (int u = 0; u < kBatch; ++u) {
#pragma unroll
        for (int k = 0; k < K; ++k) of_sample[u].lanes[k] += more[u].lanes[k];
      }
    }
#pragma unroll
    for (int u = 0; u < kBatch; ++u) {
#pragma unroll
      for (int k = 0; k < K; ++k) sum.lanes[k] += power_of(of_sample[u].lanes[k], s.absolute);
    }
  }
#pragma unroll
  for (int k = 0; k < K; ++k) sum.lanes[k] = sum_lanes(sum.lanes[k], lanes, kWarp);
  of_warp[warp][lane] = sum;
  __syncthreads();
  if (row != 0) return;
  for (int other = 1; other < kSquareWarps; ++other) {
#pragma unroll
    for (int k = 0; k < K; ++k) sum.lanes[k] += of_warp[other][lane].lanes[k];
  }
  if (s.parts != nullptr) {
    T* const part = s.parts + (blockIdx.z * int64_t{gridDim.y} + blockIdx.y) * s.channels + c;
    store<false>(part, sum, 1, apart, left);
    return;
  }
#pragma unroll
  for (int k = 0; k < K; ++k) {
    if (k * apart < left) *output_at(s, c + k * apart) += s.alpha * sum.lanes[k];
  }
}

template <typename T>
__global__ void __launch_bounds__(kSquareWarps* kWarp)
    channel_parts(const Squares<T> s, int64_t splits) {
  const int64_t c = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (c >= s.channels) return;
  const T* const parts = s.parts + blockIdx.z * splits * s.channels + c;
  T sum = 0;
#pragma unroll 4
  for (int64_t split = 0; split < splits; ++split) sum += parts[split * s.channels];
  *output_at(s, c) += s.alpha * sum;
}

unsigned blocks(int64_t work, int64_t of_block) {
  return static_cast<unsigned>(ceil_div(work, of_block));
}

template <typename T>
int launch_sums(const ChannelProblem& p, const ChannelPlan& plan, const ChannelOperands<T>& o,
                void* stream) {
  const int64_t each = p.samples * plan.pieces * p.channels;
  const int64_t covered =
      plan.positions_innermost ? kWarp / plan.sum_lanes : plan.sum_lanes * Vector<T>::size;
  const int64_t groups = ceil_div(p.channels, covered);
  const int64_t units = p.samples * plan.pieces * groups;
  const Sums<T> s = {operand(o.g, p.g_stride),
                     operand(o.x, p.x_stride),
                     operand(o.mean, p.mean_stride),
                     operand(o.scale, p.scale_stride),
                     o.grad_input,
                     o.factor,
                     o.weight == nullptr ? nullptr : o.sums,
                     o.bias == nullptr ? nullptr : o.sums + (o.weight == nullptr ? 0 : each),
                     p.positions,
                     p.channels,
                     plan.pieces,
                     plan.piece,
                     groups,
                     units,
                     log2_of(plan.sum_lanes)};
  const dim3 grid(blocks(units, kSumWarps)), block(kSumWarps * kWarp);
  if (plan.positions_innermost && plan.vector_sums) {
    return FF_LAUNCH((channel_sums<true, true, T>), grid, block, 0, stream, s);
  }
  if (plan.positions_innermost) {
    return FF_LAUNCH((channel_sums<true, false, T>), grid, block, 0, stream, s);
  }
  if (plan.vector_sums) {
    return FF_LAUNCH((channel_sums<false, true, T>), grid, block, 0, stream, s);
  }
  return FF_LAUNCH((channel_sums<false, false, T>), grid, block, 0, stream, s);
}

template <typename T>
int launch(const ChannelProblem& p, const ChannelPlan& plan, const ChannelOperands<T>& o,
           double alpha, void* stream) {
  if (plan.needs_sums) {
    const int error = launch_sums(p, plan, o, stream);
    if (error != 0) return error;
  }
  const bool both = o.weight != nullptr && o.bias != nullptr;
  Squares<T> s{};
  s.values = plan.needs_sums ? o.sums : o.g;
  s.sample = plan.needs_sums ? plan.pieces * p.channels : p.g_stride[0];
  s.piece = p.channels;
  s.channel = plan.needs_sums ? 1 : p.g_stride[2];
  s.samples = p.samples;
  s.pieces = plan.pieces;
  s.channels = p.channels;
  s.between = p.samples * plan.pieces * p.channels;
  s.split = plan.split;
  s.out = o.weight == nullptr ? o.bias : o.weight;
  s.out_stride = o.weight == nullptr ? p.bias_stride : p.weight_stride;
  s.other_out = o.bias;
  s.other_stride = p.bias_stride;
  s.parts = plan.splits == 1 ? nullptr : o.parts;
  s.alpha = static_cast<T>(alpha);
  s.absolute = p.absolute;
  s.shift = log2_of(plan.square_lanes);
  const unsigned outputs = both ? 2 : 1;
  const dim3 grid(blocks(p.channels, plan.square_lanes * Vector<T>::size),
                  static_cast<unsigned>(plan.splits), outputs);
  const dim3 block(kSquareWarps * kWarp);
  const int error = plan.vector_squares
                        ? FF_LAUNCH((channel_squares<true, T>), grid, block, 0, stream, s)
                        : FF_LAUNCH((channel_squares<false, T>), grid, block, 0, stream, s);
  if (error != 0 || plan.splits == 1) return error;
  return FF_LAUNCH((channel_parts<T>), dim3(blocks(p.channels, block.x), 1, outputs), block, 0,
                   stream, s, plan.splits);
}

}  // namespace
}  // namespace fastfisher::cuda

extern "C" int ff_channel_float(const fastfisher::ChannelProblem* p,
                                const fastfisher::cuda::ChannelPlan* plan,
                                const fastfisher::cuda::ChannelOperands<float>* operands,
                                double alpha, void* stream) {
  return fastfisher::cuda::launch(*p, *plan, *operands, alpha, stream);
}

extern "C" int ff_channel_double(const fastfisher::ChannelProblem* p,
                                 const fastfisher::cuda::ChannelPlan* plan,
                                 const fastfisher::cuda::ChannelOperands<double>* operands,
                                 double alpha, void* stream) {
  return fastfisher::cuda::launch(*p, *plan, *operands, alpha, stream);
}
