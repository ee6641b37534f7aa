// The outer family on the ordinary arithmetic units: float32 as exact as it gets, and float64.
//
// A thread block computes a tile of one group's gradient matrix, one sample after another. Positions
// arrive in steps of kSteps through two buffers of shared memory, the next step's in the background
// while the current one is multiplied, across samples too. The products of a sample stay in
// registers, are squared there, and added to sums that stay in registers as well.
#include "outer_device.h"
#include "outer.h"
#include "ptx.h"

namespace fastfisher::cuda {
namespace {

// Positions of a step; and those multiplied between two looks at how many are left, which is what a
// sample's last step may waste.
constexpr int kSteps = 16;
constexpr int kUnrolled = 4;

// A square tile of `side`, of which a thread has kRows x kColumns.
template <typename Number, int side, int thread_rows, int thread_columns, int blocks_per_unit>
struct Tile {
  using T = Number;
  static constexpr int kSide = side, kRows = thread_rows, kColumns = thread_columns;
  static constexpr int kAcross = side / thread_columns;
  static constexpr int kThreads = kAcross * (side / thread_rows);
  static constexpr int kBlocksPerUnit = blocks_per_unit;
  static constexpr int kLanes = 16 / sizeof(T);  // elements of 16 bytes
  // One vector more than the tile: a warp that writes 8 positions of 4 rows meets every bank once.
  static constexpr int kPitch = side / kLanes + 1;
  // Threads cover a patch of (kPositionLanes positions, kFeatureLanes rows or columns) at once.
  static constexpr int kFeatureLanes = side / kLanes;
  static constexpr int kPositionLanes = kThreads / kFeatureLanes;
};

// `vector` copies 16 bytes at a time, of consecutive rows and columns; else single elements.
template <class Tile, bool vector>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocksPerUnit)
    outer_simt(const OuterTask task, const Divider width) {
  using T = typename Tile::T;
  constexpr int kLanes = Tile::kLanes;
  using Vector = Pack<T, kLanes>;
  constexpr int kCopied = vector ? kLanes : 1;
  constexpr int kFeatureCopies = kLanes / kCopied;
  constexpr int kPositionCopies = kSteps / Tile::kPositionLanes;
  constexpr int kBytes = kCopied * sizeof(T);
  FF_SHARED(Vector, shared_g, [2][kSteps][Tile::kPitch]);
  FF_SHARED(Vector, shared_x, [2][kSteps][Tile::kPitch]);
  FF_SHARED(Column, columns, [Tile::kSide / kCopied]);

  const Problem& p = task.problem;
  const int positions = static_cast<int>(task.positions);
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t column_tile = blockIdx.x % task.column_tiles;
  const int64_t row_tile = blockIdx.x / task.column_tiles % task.row_tiles;
  const int64_t group = blockIdx.x / task.column_tiles / task.row_tiles;
  const int first_column = static_cast<int>(column_tile) * Tile::kSide;
  const int first_row = static_cast<int>(row_tile) * Tile::kSide;
  const int64_t first_sample = blockIdx.y * task.split_samples;
  const int64_t samples = min(task.split_samples, p.samples - first_sample);

  for (int i = thread; i < Tile::kSide / kCopied; i += Tile::kThreads) {
    columns[i] = column_of(task, first_column + i * kCopied);
  }
  __syncthreads();

  // Neighbouring threads copy what neighbours in memory.
  const bool positions_fast = !vector && task.positions_fast;
  const int feature = positions_fast ? thread / Tile::kPositionLanes : thread % Tile::kFeatureLanes;
  const int lane = positions_fast ? thread % Tile::kPositionLanes : thread / Tile::kFeatureLanes;
  const T* g = static_cast<const T*>(task.g) + first_sample * p.g_stride[0] +
               (group * p.rows + first_row + feature * kCopied) * p.g_stride[1];
  const T* x = static_cast<const T*>(task.x) + first_sample * p.x_stride[0] +
               group * p.columns * p.x_stride[1];
  const int rows_left = static_cast<int>(p.rows) - first_row - feature * kCopied;
  int copied = 0;  // positions of the sample that g and x point to
  const auto copy_step = [&](int stage) {
#pragma unroll
    for (int i = 0; i < kPositionCopies; ++i) {
      const int step = lane + i * Tile::kPositionLanes;
      const bool exists = copied + step < positions;
      const Window window = window_at(p, width, copied + step);
      T* const to_g = reinterpret_cast<T*>(shared_g[stage][step]);
      T* const to_x = reinterpret_cast<T*>(shared_x[stage][step]);
#pragma unroll
      for (int k = 0; k < kFeatureCopies; ++k) {
        const int skipped = k * Tile::kFeatureLanes;
        ff_cp_async<kBytes>(to_g + feature * kCopied + skipped,
                            g + window.g + skipped * p.g_stride[1], exists && skipped < rows_left);
      }
#pragma unroll
      for (int k = 0; k < kFeatureCopies; ++k) {
        const int at = feature + k * Tile::kFeatureLanes;
        const Column column = columns[at];
        ff_cp_async<kBytes>(to_x + at * kCopied, x + window.x + column.offset,
                            exists && in_image(p, window, column));
      }
    }
    ff_cp_commit();
    copied += kSteps;
    if (copied >= positions) {
      copied = 0;
      g += p.g_stride[0];
      x += p.x_stride[0];
    }
  };

  // A warp has 8 x 4 threads: it reads 8 and 4 vectors of a row, in one go each.
  constexpr int kWarpsAcross = Tile::kAcross / 8;
  const int warp = thread / 32;
  const int across = thread % 8 + 8 * (warp % kWarpsAcross);
  const int down = thread % 32 / 8 + 4 * (warp / kWarpsAcross);
  constexpr int kDown = Tile::kThreads / Tile::kAcross;
  constexpr int kRowVectors = Tile::kRows / kLanes;
  constexpr int kColumnVectors = Tile::kColumns / kLanes;

  T sum[Tile::kRows][Tile::kColumns] = {};
  T product[Tile::kRows][Tile::kColumns] = {};
  int stage = 0;
  copy_step(stage);
  for (int64_t left = samples; left > 0; --left) {
    for (int at = 0; at < positions; at += kSteps) {
      // This step has arrived, for all threads, and none still reads the buffer that is filled next.
      ff_cp_wait<0>();
      __syncthreads();
      if (left > 1 || at + kSteps < positions) copy_step(stage ^ 1);
      // Positions past the sample's last one are zeros.
      const int end = min(kSteps, positions - at);
      for (int begin = 0; begin < end; begin += kUnrolled) {
#pragma unroll
        for (int i = 0; i < kUnrolled; ++i) {
          Vector row[kRowVectors], column[kColumnVectors];
#pragma unroll
          for (int k = 0; k < kRowVectors; ++k) {
            row[k] = shared_g[stage][begin + i][down + k * kDown];
          }
#pragma unroll
          for (int k = 0; k < kColumnVectors; ++k) {
            column[k] = shared_x[stage][begin + i][across + k * Tile::kAcross];
          }
#pragma unroll
          for (int r = 0; r < Tile::kRows; ++r) {
#pragma unroll
            for (int c = 0; c < Tile::kColumns; ++c) {
              product[r][c] += row[r / kLanes].at[r % kLanes] *
                               column[c / kLanes].at[c % kLanes];
            }
          }
        }
      }
      stage ^= 1;
    }
#pragma unroll
    for (int r = 0; r < Tile::kRows; ++r) {
#pragma unroll
      for (int c = 0; c < Tile::kColumns; ++c) {
        sum[r][c] += magnitude(product[r][c], p.absolute);
        product[r][c] = 0;
      }
    }
  }

#pragma unroll
  for (int r = 0; r < Tile::kRows; ++r) {
    const int row = first_row + (r / kLanes * kDown + down) * kLanes + r % kLanes;
    if (row >= p.rows) continue;
#pragma unroll
    for (int k = 0; k < kColumnVectors; ++k) {
      deliver<kLanes>(task, blockIdx.y, group * p.rows + row,
                      first_column + (k * Tile::kAcross + across) * kLanes, &sum[r][k * kLanes]);
    }
  }
}

template <class Tile>
int launch(const OuterTask& task, void* stream) {
  const dim3 grid(static_cast<unsigned>(task.blocks()), static_cast<unsigned>(task.splits));
  const Divider width(task.problem.out_width);
  if (task.g_vector && task.x_vector) {
    return FF_LAUNCH((outer_simt<Tile, true>), grid, dim3(Tile::kThreads), 0, stream, task, width);
  }
  return FF_LAUNCH((outer_simt<Tile, false>), grid, dim3(Tile::kThreads), 0, stream, task, width);
}

template <typename Number, int side, int rows, int columns, int blocks>
constexpr bool is(const OuterTile& offered, Tile<Number, side, rows, columns, blocks>) {
  return offered.rows == side && offered.columns == side &&
         offered.threads == Tile<Number, side, rows, columns, blocks>::kThreads;
}

// In the order of the plan's lists.
using Large = Tile<float, 128, 8, 8, 1>;
using Medium = Tile<float, 64, 8, 4, 4>;
using Small = Tile<float, 32, 4, 4, 8>;
using DoubleLarge = Tile<double, 64, 4, 4, 1>;
using DoubleSmall = Tile<double, 32, 4, 4, 4>;
static_assert(is(kSimtTiles[0], Large{}) && is(kSimtTiles[1], Medium{}) &&
              is(kSimtTiles[2], Small{}));
static_assert(is(kSimtDoubleTiles[0], DoubleLarge{}) && is(kSimtDoubleTiles[1], DoubleSmall{}));

}  // namespace
}  // namespace fastfisher::cuda

extern "C" int ff_outer_simt_float(const fastfisher::cuda::OuterTask* task, void* stream) {
  using namespace fastfisher::cuda;
  if (task->tile == 0) return launch<Large>(*task, stream);
  if (task->tile == 1) return launch<Medium>(*task, stream);
  return launch<Small>(*task, stream);
}

extern "C" int ff_outer_simt_double(const fastfisher::cuda::OuterTask* task, void* stream) {
  using namespace fastfisher::cuda;
  if (task->tile == 0) return launch<DoubleLarge>(*task, stream);
  return launch<DoubleSmall>(*task, stream);
}
