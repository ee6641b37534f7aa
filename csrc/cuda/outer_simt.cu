// The outer family on the ordinary arithmetic units: float32 as exact as it gets, and float64.
//
// A thread block computes a tile of one group's gradient matrix, one sample after another.
// Positions arrive in steps of kSteps through two buffers of shared memory, the next step's in the
// background while the current one is multiplied, across samples too. The products of a sample stay
// in registers, are squared there, and added to sums that stay in registers as well.
#include "outer.h"
#include "outer_device.h"
#include "ptx.h"

namespace fastfisher::cuda {
namespace {

// Positions of a step; and those multiplied between two looks at how many are left, which is what a
// sample's last step may waste.
constexpr int kSteps = 16;
constexpr int kUnrolled = 4;

// A tile of `rows` x `columns`, of which a thread has kRows x kColumns.
template <typename Number, int rows, int columns, int thread_rows, int thread_columns,
          int blocks_per_unit>
struct Tile {
  using T = Number;
  static constexpr int kTileRows = rows, kTileColumns = columns;
  static constexpr int kNarrowSide = rows < columns ? rows : columns;
  static constexpr int kRows = thread_rows, kColumns = thread_columns;
  static constexpr int kAcross = columns / thread_columns, kDown = rows / thread_rows;
  static constexpr int kThreads = kAcross * kDown;
  static constexpr int kBlocksPerUnit = blocks_per_unit;
  static constexpr int kLanes = 16 / sizeof(T);  // elements of 16 bytes
};

// The smallest number from `vectors` on that is `pad` more than a multiple of 8.
__host__ __device__ constexpr int pitch(int vectors, int pad) {
  return vectors + (8 + pad - vectors % 8) % 8;
}

// g, and x, are copied 16 bytes of consecutive rows, or columns, at a time, or by single elements.
template <class Tile, bool g_vector, bool x_vector>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocksPerUnit)
    outer_simt(const OuterTask task, const Windows windows) {
  using T = typename Tile::T;
  constexpr int kLanes = Tile::kLanes;
  using Vector = Pack<T, kLanes>;
  constexpr int kCopiedRows = g_vector ? kLanes : 1, kCopiedColumns = x_vector ? kLanes : 1;
  // Threads cover a patch of (kPositionLanes positions, kFeatureLanes pieces of rows or columns) at
  // once. Of few pieces a thread has several at one position, for finding that takes longest; of
  // single elements, neighbours have to be many for what they read to be whole lines of memory.
  constexpr int kFeatureLanes =
      g_vector && x_vector ? Tile::kThreads / kSteps : Tile::kNarrowSide / kLanes;
  constexpr int kPositionLanes = Tile::kThreads / kFeatureLanes;
  constexpr int kCopiesOfG = Tile::kTileRows / kCopiedRows / kFeatureLanes;
  constexpr int kCopiesOfX = Tile::kTileColumns / kCopiedColumns / kFeatureLanes;
  constexpr int kPositionCopies = kSteps / kPositionLanes;
  static_assert(kPositionCopies * kPositionLanes == kSteps && kCopiesOfG > 0 && kCopiesOfX > 0);
  // Rows of shared memory, in vectors. Eight lanes that write two positions, or lanes that write an
  // element of 8 positions and 4 rows, meet every bank once.
  constexpr int kPad = g_vector && x_vector ? kFeatureLanes % 8 : 1;
  constexpr int kPitchOfG = pitch(Tile::kTileRows / kLanes, kPad);
  constexpr int kPitchOfX = pitch(Tile::kTileColumns / kLanes, kPad);
  FF_SHARED(Vector, shared_g, [2][kSteps][kPitchOfG]);
  FF_SHARED(Vector, shared_x, [2][kSteps][kPitchOfX]);
  FF_SHARED(Column, columns, [Tile::kTileColumns / kCopiedColumns]);

  const Problem& p = task.problem;
  const int positions = static_cast<int>(task.positions);
  const int thread = static_cast<int>(threadIdx.x);
  const auto column_tiles = static_cast<unsigned>(task.column_tiles);
  const auto row_tiles = static_cast<unsigned>(task.row_tiles);
  const int first_column = static_cast<int>(blockIdx.x % column_tiles) * Tile::kTileColumns;
  const int first_row = static_cast<int>(blockIdx.x / column_tiles % row_tiles) * Tile::kTileRows;
  const int64_t group = blockIdx.x / column_tiles / row_tiles;
  const int64_t first_sample = blockIdx.y * task.split_samples;
  const int64_t samples = min(task.split_samples, p.samples - first_sample);

  for (int i = thread; i < Tile::kTileColumns / kCopiedColumns; i += Tile::kThreads) {
    columns[i] = column_of<T>(task, first_column + i * kCopiedColumns);
  }
  __syncthreads();

  // Neighbouring threads copy what neighbours in memory.
  const bool positions_fast = !g_vector && !x_vector && task.positions_fast;
  const int feature = positions_fast ? thread / kPositionLanes : thread % kFeatureLanes;
  const int lane = positions_fast ? thread % kPositionLanes : thread / kFeatureLanes;
  const T* g = static_cast<const T*>(task.g) + first_sample * p.g_stride[0] +
               (group * p.rows + first_row + feature * kCopiedRows) * p.g_stride[1];
  const T* x = static_cast<const T*>(task.x) + first_sample * p.x_stride[0] +
               group * p.columns * p.x_stride[1] + windows.x_first;
  constexpr int kRowOfG = kPitchOfG * kLanes, kRowOfX = kPitchOfX * kLanes;
  T* const to_g = reinterpret_cast<T*>(shared_g[0][lane]) + feature * kCopiedRows;
  T* const to_x = reinterpret_cast<T*>(shared_x[0][lane]) + feature * kCopiedColumns;
  const int rows_left = static_cast<int>(p.rows) - first_row - feature * kCopiedRows;
  int copied = 0;  // positions of the sample that g and x point to
  const auto copy_step = [&](int stage) {
    const T *from_g[kPositionCopies], *from_x[kPositionCopies];
    Window window[kPositionCopies];
    int rows[kPositionCopies];
#pragma unroll
    for (int i = 0; i < kPositionCopies; ++i) {
      const int at = copied + lane + i * kPositionLanes;
      // Where no position is left, an address is that of the last one: it has to be aligned even if
      // nothing is read there.
      window[i] = window_at(p, windows, min(at, positions - 1), at < positions);
      rows[i] = at < positions ? rows_left : 0;
      from_g[i] = g + window[i].g;
      from_x[i] = x + window[i].x;
    }
    // All before the first copy: ptxas separates reads of shared memory from copies to it.
    Column column[kCopiesOfX];
#pragma unroll
    for (int k = 0; k < kCopiesOfX; ++k) column[k] = columns[feature + k * kFeatureLanes];
#pragma unroll
    for (int i = 0; i < kPositionCopies; ++i) {
      const int to = stage * kSteps + i * kPositionLanes;
#pragma unroll
      for (int k = 0; k < kCopiesOfG; ++k) {
        const int skipped = k * kFeatureLanes * kCopiedRows;
        ff_cp_async<kCopiedRows * sizeof(T)>(to_g + to * kRowOfG + skipped,
                                             from_g[i] + (g_vector ? 1 : p.g_stride[1]) * skipped,
                                             skipped < rows[i]);
      }
#pragma unroll
      for (int k = 0; k < kCopiesOfX; ++k) {
        ff_cp_async<kCopiedColumns * sizeof(T)>(
            to_x + to * kRowOfX + k * kFeatureLanes * kCopiedColumns,
            offset_bytes(from_x[i], column[k].bytes), in_image(p, window[i], column[k]));
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

  // A warp has 8 x 4 threads: it reads 8 and 4 vectors of a row. Neighbours read the same row, and
  // lanes two apart the same column: shared memory serves such pairs at once, 16 lanes in one go.
  constexpr int kWarpsAcross = Tile::kAcross / 8;
  const int warp = thread / 32, in_warp = thread % 32;
  const int across = in_warp % 2 + in_warp / 4 % 4 * 2 + 8 * (warp % kWarpsAcross);
  const int down = in_warp / 2 % 2 + in_warp / 16 * 2 + 4 * (warp / kWarpsAcross);
  constexpr int kRowVectors = Tile::kRows / kLanes;
  constexpr int kColumnVectors = Tile::kColumns / kLanes;

  T sum[Tile::kRows][Tile::kColumns] = {};
  T product[Tile::kRows][Tile::kColumns] = {};
  const auto for_all = [](const auto& each) {
#pragma unroll
    for (int r = 0; r < Tile::kRows; ++r) {
#pragma unroll
      for (int c = 0; c < Tile::kColumns; ++c) each(r, c);
    }
  };
  int stage = 0;
  copy_step(stage);
  for (int64_t left = samples; left > 0; --left) {
    for (int at = 0; at < positions; at += kSteps) {
      // This step has arrived, for all threads, and none still reads the buffer that is filled
      // next.
      ff_cp_wait<0>();
      __syncthreads();
      if (left > 1 || at + kSteps < positions) copy_step(stage ^ 1);
      // Positions past the sample's last one are zeros.
      const Vector* g_row = &shared_g[stage][0][down];
      const Vector* x_row = &shared_x[stage][0][across];
      for (int left_here = min(kSteps, positions - at); left_here > 0; left_here -= kUnrolled) {
#pragma unroll
        for (int i = 0; i < kUnrolled; ++i) {
          Vector row[kRowVectors], column[kColumnVectors];
#pragma unroll
          for (int k = 0; k < kRowVectors; ++k) {
            row[k] = g_row[i * kPitchOfG + k * Tile::kDown];
          }
#pragma unroll
          for (int k = 0; k < kColumnVectors; ++k) {
            column[k] = x_row[i * kPitchOfX + k * Tile::kAcross];
          }
#pragma unroll
          for (int r = 0; r < Tile::kRows; ++r) {
#pragma unroll
            for (int c = 0; c < Tile::kColumns; ++c) {
              product[r][c] += row[r / kLanes].at[r % kLanes] * column[c / kLanes].at[c % kLanes];
            }
          }
        }
        g_row += kUnrolled * kPitchOfG;
        x_row += kUnrolled * kPitchOfX;
      }
      stage ^= 1;
    }
    // Not a choice for each product, which would take as long as squaring it.
    if (p.absolute) {
      for_all([&](int r, int c) { sum[r][c] += fabs(product[r][c]); });
    } else {
      for_all([&](int r, int c) { sum[r][c] = fma(product[r][c], product[r][c], sum[r][c]); });
    }
    for_all([&](int r, int c) { product[r][c] = 0; });
  }

#pragma unroll
  for (int k = 0; k < kColumnVectors; ++k) {
    const int first = first_column + (k * Tile::kAcross + across) * kLanes;
    if (first >= task.matrix_columns) continue;
    const OutColumns<kLanes, T> out(task, first);
#pragma unroll
    for (int r = 0; r < Tile::kRows; ++r) {
      const int row = first_row + (r / kLanes * Tile::kDown + down) * kLanes + r % kLanes;
      if (row >= p.rows) continue;
      const int64_t group_row = group * p.rows + row;
      if (task.splits > 1) {
        put_in_workspace<kLanes>(task, blockIdx.y, group_row, first, &sum[r][k * kLanes]);
      } else {
        out.add(group_row, &sum[r][k * kLanes]);
      }
    }
  }
}

template <class Tile, bool g_vector, bool x_vector>
int launch_for(const OuterTask& task, void* stream) {
  const dim3 grid(static_cast<unsigned>(task.blocks()), static_cast<unsigned>(task.splits));
  return FF_LAUNCH((outer_simt<Tile, g_vector, x_vector>), grid, dim3(Tile::kThreads), 0, stream,
                   task, Windows(task.problem));
}

template <class Tile>
int launch(const OuterTask& task, void* stream) {
  if (task.g_vector && task.x_vector) return launch_for<Tile, true, true>(task, stream);
  // Threads that copy vectors of one operand neighbour each other in features, in both.
  if (task.g_vector && !task.positions_fast) return launch_for<Tile, true, false>(task, stream);
  if (task.x_vector) return launch_for<Tile, false, true>(task, stream);
  return launch_for<Tile, false, false>(task, stream);
}

template <class Tile>
constexpr bool is(const OuterTile& offered) {
  return offered.rows == Tile::kTileRows && offered.columns == Tile::kTileColumns &&
         offered.threads == Tile::kThreads;
}

// In the order of the plan's lists.
using Large = Tile<float, 128, 128, 8, 8, 1>;
using Tall = Tile<float, 128, 64, 8, 8, 2>;
using Medium = Tile<float, 64, 64, 8, 8, 4>;
using Finer = Tile<float, 64, 64, 8, 4, 4>;
using Small = Tile<float, 32, 32, 4, 4, 8>;
using Flat = Tile<float, 16, 64, 4, 4, 8>;
using DoubleLarge = Tile<double, 64, 64, 4, 4, 1>;
using DoubleSmall = Tile<double, 32, 32, 4, 4, 4>;
static_assert(is<Large>(kSimtTiles[0]) && is<Tall>(kSimtTiles[1]) && is<Medium>(kSimtTiles[2]) &&
              is<Finer>(kSimtTiles[3]) && is<Small>(kSimtTiles[4]) && is<Flat>(kSimtTiles[5]));
static_assert(is<DoubleLarge>(kSimtDoubleTiles[0]) && is<DoubleSmall>(kSimtDoubleTiles[1]));

}  // namespace
}  // namespace fastfisher::cuda

extern "C" int ff_outer_simt_float(const fastfisher::cuda::OuterTask* task, void* stream) {
  using namespace fastfisher::cuda;
  if (task->tile == 0) return launch<Large>(*task, stream);
  if (task->tile == 1) return launch<Tall>(*task, stream);
  if (task->tile == 2) return launch<Medium>(*task, stream);
  if (task->tile == 3) return launch<Finer>(*task, stream);
  if (task->tile == 4) return launch<Small>(*task, stream);
  return launch<Flat>(*task, stream);
}

extern "C" int ff_outer_simt_double(const fastfisher::cuda::OuterTask* task, void* stream) {
  using namespace fastfisher::cuda;
  if (task->tile == 0) return launch<DoubleLarge>(*task, stream);
  return launch<DoubleSmall>(*task, stream);
}
