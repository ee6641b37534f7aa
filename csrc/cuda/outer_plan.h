// How a task of the outer family is cut for the device. A group's gradient of one sample is a
// matrix [rows, matrix_columns]; a thread block computes one tile of it for a split of the samples,
// and adds its squares up. Plain numbers of the shape alone decide, never the device, so the bits
// of a result do not depend on where it is computed.
#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>

#include "../outer_shape.h"

namespace fastfisher::cuda {

// A tile that a kernel offers.
struct OuterTile {
  int rows, columns;
  int threads;
  // Time of a multiply-add in a full tile, relative to the kernel's best tile.
  double cost;
};

// What the plan knows of a kernel.
struct OuterKernel {
  int element;  // bytes of an operand's
  int step;     // positions are multiplied by so many
  // Time of a sample's end, and of a block's begin and end, as if they were so many positions.
  double sample, block;
  double rate;  // multiply-adds a cycle of a multiprocessor
};

// What a launcher is given.
struct OuterTask {
  Problem problem;
  const void* g;
  const void* x;
  void* out;
  double alpha;
  int tile;  // index of the chosen OuterTile
  // A column is (kernel line, kernel position, channel) if so, else (channel, line, position).
  bool channels_innermost;
  // Positions are nearer in memory than channels, in x.
  bool positions_fast;
  // 16 bytes of consecutive rows (columns) of g (x) can be read at once, wherever they begin at a
  // multiple of as many elements.
  bool g_vector, x_vector;
  // 16 bytes of a row of out, its columns in our order, can be written at once.
  bool out_vector;
  int64_t positions;  // out_height * out_width
  int64_t matrix_columns;
  int64_t entries;  // groups * rows * matrix_columns
  int64_t row_tiles, column_tiles;
  // Split s has samples [s * split_samples, (s + 1) * split_samples).
  int64_t splits, split_samples;
  // [splits, groups, rows, matrix_columns] of the type of out, where splits > 1.
  void* workspace;

  int64_t blocks() const { return problem.groups * row_tiles * column_tiles; }
  int64_t workspace_elements() const { return splits > 1 ? splits * entries : 0; }
};

// The devices that a plan is made for, whatever the one it runs on: their multiprocessors (of the
// A100, the H100 and the B200), and bytes that each has of memory and of L2 in a cycle. For kernels
// whose blocks are no tiles: threads that keep a device busy, and positions that a split should
// have for its sums to cost little.
#if defined(FASTFISHER_EMULATED) && !defined(FASTFISHER_PLAN_FOR_DEVICE)
// Of a device so small that shapes quick to emulate come to every tile and to splits.
constexpr int kMultiprocessors[] = {2};
constexpr int64_t kBusyThreads = 512;
constexpr int64_t kSplitPositions = 16;
constexpr int64_t kWavePositions = 64;
#else
constexpr int kMultiprocessors[] = {108, 132, 148};
constexpr int64_t kBusyThreads = 1 << 15;
constexpr int64_t kSplitPositions = 256;
constexpr int64_t kWavePositions = 256;
#endif
// So many times as many are launched, for the last ones to end together, where a split still has
// kWavePositions.
constexpr int64_t kWaves = 4;
constexpr double kMemoryBytes = 13, kCacheBytes = 30;
// More blocks for each multiprocessor are not tried: the last ones then hardly matter.
constexpr int64_t kMostTurns = 32;
constexpr int64_t kWorkspaceBytes = int64_t{64} << 20;
// What is still in L2 when it is read: half of the smallest L2 of the devices above.
constexpr int64_t kCachedWorkspaceBytes = int64_t{20} << 20;
// What the kernels count within a sample in 32 bits stays below, so that sums of two do not
// overflow.
constexpr int64_t kCounterLimit = int64_t{1} << 30;
constexpr int64_t kGridLimit = 65535;  // of blockIdx.y and z

// Whether the sizes within a sample fit the kernels' counters; strides and samples are unlimited.
inline bool outer_countable(const Problem& p) {
  return p.out_height * p.out_width < kCounterLimit && p.rows < kCounterLimit &&
         p.columns * p.kernel_height * p.kernel_width < kCounterLimit &&
         p.height + 2 * p.pad_h < kCounterLimit && p.width + 2 * p.pad_w < kCounterLimit &&
         p.groups * ceil_div(p.rows, 32) * ceil_div(p.columns, 32) * p.kernel_height *
                 p.kernel_width <
             kCounterLimit;
}

inline bool is_multiple(int64_t extent, int64_t stride, int64_t of) {
  return extent <= 1 || stride % of == 0;
}

// The layout of the operands, of `bytes` an element, and of out, of `out_bytes`.
inline OuterTask outer_task(const Problem& p, const void* g, const void* x, void* out, double alpha,
                            int64_t bytes, int64_t out_bytes) {
  OuterTask task{};
  task.problem = p;
  task.g = g;
  task.x = x;
  task.out = out;
  task.alpha = alpha;
  task.positions = p.out_height * p.out_width;
  task.matrix_columns = p.columns * p.kernel_height * p.kernel_width;
  task.entries = p.groups * p.rows * task.matrix_columns;

  const int64_t position =
      p.out_width > 1 ? p.x_stride[3] * p.stride_w : p.x_stride[2] * p.stride_h;
  task.positions_fast =
      task.positions > 1 && (p.columns * p.groups == 1 || position < p.x_stride[1]);
  const int64_t tap =
      p.kernel_width > 1 ? p.x_stride[3] * p.dilation_w : p.x_stride[2] * p.dilation_h;
  task.channels_innermost = p.kernel_height * p.kernel_width == 1 || p.x_stride[1] < tap;

  const auto aligned = [](const void* pointer) {
    return reinterpret_cast<std::uintptr_t>(pointer) % 16 == 0;
  };
  const int64_t lanes = 16 / bytes;
  task.g_vector = aligned(g) && p.g_stride[1] == 1 && p.rows % lanes == 0 &&
                  is_multiple(p.samples, p.g_stride[0], lanes) &&
                  is_multiple(p.out_height, p.g_stride[2], lanes) &&
                  is_multiple(p.out_width, p.g_stride[3], lanes);
  task.x_vector = task.channels_innermost && !task.positions_fast && aligned(x) &&
                  p.x_stride[1] == 1 && p.columns % lanes == 0 &&
                  is_multiple(p.samples, p.x_stride[0], lanes) &&
                  is_multiple(p.height + 2 * p.pad_h, p.x_stride[2], lanes) &&
                  is_multiple(p.width + 2 * p.pad_w, p.x_stride[3], lanes);

  const int64_t kernel = p.kernel_height * p.kernel_width;
  const int64_t want[3] = {
      task.channels_innermost ? 1 : kernel,
      task.channels_innermost ? p.kernel_width * p.columns : p.kernel_width,
      task.channels_innermost ? p.columns : 1,
  };
  const int64_t out_lanes = 16 / out_bytes;
  task.out_vector = aligned(out) && task.matrix_columns % out_lanes == 0 &&
                    is_multiple(p.groups * p.rows, p.out_stride[0], out_lanes) &&
                    (p.columns == 1 || p.out_stride[1] == want[0]) &&
                    (p.kernel_height == 1 || p.out_stride[2] == want[1]) &&
                    (p.kernel_width == 1 || p.out_stride[3] == want[2]);
  return task;
}

// Splits the samples so that `blocks` blocks a split of `threads` keep a device busy; a split has a
// multiple of `unit` samples.
inline void split_samples(OuterTask& task, int64_t blocks, int64_t threads, int64_t out_bytes,
                          int64_t unit = 1) {
  const Problem& p = task.problem;
  const auto splits_of = [&](int64_t waves, int64_t positions) {
    return std::min(ceil_div(waves * kBusyThreads, blocks * threads),
                    ceil_div(p.samples * task.positions, positions));
  };
  const int64_t wanted = std::max(splits_of(1, kSplitPositions), splits_of(kWaves, kWavePositions));
  const int64_t room = kWorkspaceBytes / (task.entries * out_bytes);
  const int64_t most = std::min({wanted, room, p.samples, kGridLimit});
  task.split_samples = ceil_div(ceil_div(p.samples, std::max<int64_t>(most, 1)), unit) * unit;
  task.splits = ceil_div(p.samples, task.split_samples);
}

// Cycles that a task takes on `multiprocessors`, times their number. The busiest one counts, and of
// its four schedulers the one with most warps.
inline double outer_time(const OuterTask& task, const OuterKernel& kernel, const OuterTile& tile,
                         int64_t multiprocessors, int64_t out_bytes) {
  const int64_t blocks = task.blocks() * task.splits;
  const auto samples = double(task.split_samples);
  const double area = double(tile.rows) * tile.columns;
  const double positions = double(ceil_div(task.positions, kernel.step) * kernel.step);
  const double block =
      (samples * (positions + kernel.sample) + kernel.block) * area * tile.cost / kernel.rate;
  const int64_t turns = ceil_div(blocks, multiprocessors), warps = tile.threads / 32;
  const double computed =
      double(multiprocessors * ceil_div(turns * warps, 4)) * 4 / double(warps) * block;
  const double copied = double(blocks) * samples * double(task.positions) *
                        (tile.rows + tile.columns) * kernel.element / kCacheBytes;
  // Writing the sums of a split goes on beside others' arithmetic; reading them is a kernel of its
  // own.
  const int64_t workspace = task.workspace_elements() * out_bytes;
  const double moved =
      double(workspace) / (workspace <= kCachedWorkspaceBytes ? kCacheBytes : kMemoryBytes);
  return std::max(computed, copied) + moved;
}

// Chooses a tile and the splits that take least on all of kMultiprocessors together. Neither
// samples nor sizes may be zero.
template <size_t count>
void plan_outer(OuterTask& task, const OuterTile (&tiles)[count], const OuterKernel& kernel,
                int64_t out_bytes) {
  const Problem& p = task.problem;
  const int64_t room = kWorkspaceBytes / (task.entries * out_bytes);
  const int64_t most = std::max<int64_t>(std::min({p.samples, room, kGridLimit}), 1);
  double best = std::numeric_limits<double>::infinity();
  OuterTask tried = task;
  for (size_t i = 0; i < count; ++i) {
    tried.tile = int(i);
    tried.row_tiles = ceil_div(p.rows, tiles[i].rows);
    tried.column_tiles = ceil_div(task.matrix_columns, tiles[i].columns);
    for (int64_t splits = 1;; splits = std::min(splits + splits / 8 + 1, most)) {
      tried.split_samples = ceil_div(p.samples, splits);
      tried.splits = ceil_div(p.samples, tried.split_samples);
      double time = 0;
      for (const int64_t multiprocessors : kMultiprocessors) {
        time += outer_time(tried, kernel, tiles[i], multiprocessors, out_bytes);
      }
      if (time < best) {
        best = time;
        task = tried;
      }
      if (splits == most || tried.blocks() * splits > kMostTurns * kMultiprocessors[0]) break;
    }
  }
}

// The kernel for groups of few rows and columns: a thread has so many columns of a row.
constexpr int kDepthwiseColumns = 9;
constexpr int kDepthwiseThreads = 128;
// Time of its multiply-adds and of those of a small tile, relative to the best tile.
constexpr double kDepthwiseCost = 6.7;
constexpr OuterTile kSmallestTile{32, 32, 64, 1.25};

// Neighbouring groups that a warp has. Where positions are not what neighbours in memory, groups
// are; and where there are few positions they leave lanes to other groups.
inline int depthwise_lanes(const OuterTask& task) {
  const int64_t groups = task.problem.groups;
  int lanes = 1;
  if (!task.positions_fast) {
    lanes = 32;
    while (lanes > 8 && ceil_div(groups, lanes) * lanes - groups > groups / 4) lanes /= 2;
  }
  while (lanes < 32 && 32 / lanes / 2 >= task.positions) lanes *= 2;
  while (lanes > 1 && lanes / 2 >= groups) lanes /= 2;
  return lanes;
}

inline int64_t depthwise_blocks(const OuterTask& task) {
  return ceil_div(task.problem.groups, depthwise_lanes(task)) * task.row_tiles * task.column_tiles;
}

// Plans for that kernel if it is the faster one.
inline bool plan_depthwise(OuterTask& task, int64_t out_bytes) {
  const Problem& p = task.problem;
  // Of a single group, where positions do not neighbour, every lane would read from elsewhere.
  if (p.groups == 1 && !task.positions_fast) return false;
  const int64_t column_tiles = ceil_div(task.matrix_columns, kDepthwiseColumns);
  const double time = double(p.rows * column_tiles) * kDepthwiseColumns * kDepthwiseCost;
  const double tiles = double(ceil_div(p.rows, kSmallestTile.rows)) *
                       double(ceil_div(task.matrix_columns, kSmallestTile.columns));
  if (time >= tiles * kSmallestTile.rows * kSmallestTile.columns * kSmallestTile.cost) {
    return false;
  }
  task.row_tiles = p.rows;
  task.column_tiles = column_tiles;
  if (depthwise_blocks(task) >= kCounterLimit) return false;
  split_samples(task, depthwise_blocks(task), kDepthwiseThreads, out_bytes, kDepthwiseThreads / 32);
  return true;
}

}  // namespace fastfisher::cuda
