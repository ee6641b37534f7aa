// The outer family on tensor cores. A block computes a square tile of out: for each of its samples
// it multiplies g^T by x in the fragments of mma.sync, and where the sample ends adds the products'
// powers to a second set of registers. Copies to shared memory run ahead of the products by two
// steps, across the samples' ends.
#include <initializer_list>

#include "outer.h"
#include "outer_load.cuh"

namespace fastfisher::cuda {
namespace {

__device__ __forceinline__ void multiply(float (&d)[4], const unsigned (&a)[4],
                                         const unsigned (&b)[2], __nv_bfloat16) {
  ff_mma_bf16(d, a, b);
}
__device__ __forceinline__ void multiply(float (&d)[4], const unsigned (&a)[4],
                                         const unsigned (&b)[2], float) {
  ff_mma_tf32(d, a, b);
}

// What one warp reads of g (16 rows a fragment) and x (8 columns a fragment) for a step of 32
// bytes' worth of positions: 16 of bfloat16, 8 of float32.
template <class T, bool positions_innermost, int tile>
struct Fragments {
  using Memory = Tile<T, positions_innermost, tile>;
  static constexpr int rows = tile / 2, columns = 32;  // of a warp
  static constexpr int row_fragments = rows / 16, column_fragments = columns / 8;
  // Of float32 features that lie side by side no ldmatrix gives a thread what it needs, but two of
  // them are the two rows that a thread has of a fragment.
  static constexpr bool paired = sizeof(T) == 4 && !positions_innermost;

  unsigned a[row_fragments][4], b[column_fragments][2];

  // The row, in the warp's part of the tile, that is `half` of the `r`-th pair of a fragment's
  // rows.
  __device__ static __forceinline__ int row_at(int fragment, int half, int r) {
    return fragment * 16 + (paired ? r * 2 + half : r + half * 8);
  }

  __device__ __forceinline__ void load(const unsigned char* g, const unsigned char* x, int step,
                                       int first_row, int first_column) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    constexpr int size = sizeof(T);
    if constexpr (paired) {
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        const int offset = (step * 8 + k * 4 + lane % 4) * Memory::pitch;
        const unsigned char* row = g + offset + (first_row + lane / 4 * 2) * size;
#pragma unroll
        for (int f = 0; f < row_fragments; ++f) {
          const uint2 pair = *reinterpret_cast<const uint2*>(row + f * 16 * size);
          a[f][k * 2] = pair.x;
          a[f][k * 2 + 1] = pair.y;
        }
        const unsigned char* other = x + offset + (first_column + lane / 4) * size;
#pragma unroll
        for (int f = 0; f < column_fragments; ++f) {
          b[f][k] = *reinterpret_cast<const unsigned*>(other + f * 8 * size);
        }
      }
    } else if constexpr (positions_innermost) {
      const unsigned char* row =
          g + (first_row + lane % 16) * Memory::pitch + step * 32 + lane / 16 * 16;
#pragma unroll
      for (int f = 0; f < row_fragments; ++f) ff_ldmatrix(a[f], row + f * 16 * Memory::pitch);
      const int column = first_column + lane % 8 + lane / 16 * 8;
      const unsigned char* other = x + column * Memory::pitch + step * 32 + lane / 8 % 2 * 16;
#pragma unroll
      for (int f = 0; f < column_fragments; f += 2) {
        unsigned both[4];
        ff_ldmatrix(both, other + f * 8 * Memory::pitch);
        split(f, both);
      }
    } else {
      const unsigned char* row = g + (step * 16 + lane % 8 + lane / 16 * 8) * Memory::pitch +
                                 (first_row + lane / 8 % 2 * 8) * size;
#pragma unroll
      for (int f = 0; f < row_fragments; ++f) ff_ldmatrix_trans(a[f], row + f * 16 * size);
      const unsigned char* other =
          x + (step * 16 + lane % 16) * Memory::pitch + (first_column + lane / 16 * 8) * size;
#pragma unroll
      for (int f = 0; f < column_fragments; f += 2) {
        unsigned both[4];
        ff_ldmatrix_trans(both, other + f * 8 * size);
        split(f, both);
      }
    }
  }

 private:
  __device__ __forceinline__ void split(int fragment, const unsigned (&both)[4]) {
    b[fragment][0] = both[0];
    b[fragment][1] = both[1];
    b[fragment + 1][0] = both[2];
    b[fragment + 1][1] = both[3];
  }
};

// float32 is rounded, one step before it is multiplied.
template <class T>
constexpr bool kRounds = sizeof(T) == 4;
// Tiles of g and x in shared memory: one is multiplied, one may be rounded, two are under way.
template <class T>
constexpr int kStages = kRounds<T> ? 4 : 3;

template <class T, bool positions_innermost, int tile>
__global__ void __launch_bounds__(2 * tile)
    outer_mma(const OuterTask task, const Operand g, const Operand x) {
  using Memory = Tile<T, positions_innermost, tile>;
  using Operands = Fragments<T, positions_innermost, tile>;
  constexpr int stages = kStages<T>;
  constexpr int kStepPositions = Memory::positions / 2;
  FF_DYNAMIC_SHARED(unsigned char, shared);
  Feature* const g_table = reinterpret_cast<Feature*>(shared + stages * 2 * Memory::bytes);
  Feature* const x_table = g_table + Memory::slot(tile);

  const auto row_tiles = static_cast<unsigned>(task.row_tiles);
  const auto column_tiles = static_cast<unsigned>(task.column_tiles);
  const int64_t row_tile = blockIdx.x % row_tiles;
  const int64_t column_tile = blockIdx.x / row_tiles % column_tiles;
  const int64_t group = blockIdx.x / row_tiles / column_tiles;
  const int64_t split = blockIdx.y;
  if (threadIdx.x < tile) {
    const int row = static_cast<int>(threadIdx.x);
    g_table[Memory::slot(row)] = feature_of_g(task, group, row_tile * tile + row, sizeof(T));
  } else {
    const int column = static_cast<int>(threadIdx.x) - tile;
    x_table[Memory::slot(column)] =
        feature_of_x(task, group, column_tile * tile + column, sizeof(T));
  }
  __syncthreads();

  const int64_t first_sample = split * task.split_samples;
  int64_t samples = min(task.split_samples, task.problem.samples - first_sample);  // to begin
  int start = 0;                                                                   // in the first
  const char* g_sample = static_cast<const char*>(g.data) + first_sample * g.sample;
  const char* x_sample = static_cast<const char*>(x.data) + first_sample * x.sample;
  uint16_t g_stage[Memory::staged], x_stage[Memory::staged];
  const auto g_tile = [&](int stage) { return shared + stage * 2 * Memory::bytes; };
  const auto x_tile = [&](int stage) { return shared + (stage * 2 + 1) * Memory::bytes; };
  const auto begin = [&](int stage) {
    Memory::begin(g_tile(stage), g_table, g, g_sample, start, g_stage);
    Memory::begin(x_tile(stage), x_table, x, x_sample, start, x_stage);
  };
  const auto end = [&](int stage) {
    Memory::end(g_tile(stage), g, g_stage);
    Memory::end(x_tile(stage), x, x_stage);
    start += Memory::positions;
    if (start < g.positions) return;
    start = 0;
    --samples;
    g_sample += g.sample;
    x_sample += x.sample;
  };
  const auto round = [&](int stage) {
    Memory::round(g_tile(stage), g);
    Memory::round(x_tile(stage), x);
  };
  int begun = 0;
#pragma unroll 1
  for (int stage = 0; stage < stages - 1; ++stage) {
    if (samples > 0) {
      begin(stage);
      end(stage);
      ++begun;
    }
    ff_cp_commit();
  }
  if constexpr (kRounds<T>) {
    ff_cp_wait<stages - 2>();
    round(0);
  }

  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int first_row = warp / (tile / 32) * Operands::rows;
  const int first_column = warp % (tile / 32) * Operands::columns;
  float dot[Operands::row_fragments][Operands::column_fragments][4] = {};
  float sum[Operands::row_fragments][Operands::column_fragments][4] = {};
  const auto for_all = [&](const auto& each) {
#pragma unroll
    for (int i = 0; i < Operands::row_fragments; ++i) {
#pragma unroll
      for (int j = 0; j < Operands::column_fragments; ++j) {
#pragma unroll
        for (int k = 0; k < 4; ++k) each(i, j, k);
      }
    }
  };
  int stage = 0, left = g.positions;
#pragma unroll 1
  while (begun > 0) {
    // This step's tile is there, and none reads the one that is filled now: it was the last step's.
    ff_cp_wait<1>();
    __syncthreads();
    const int filled = stage == 0 ? stages - 1 : stage - 1;
    const bool fills = samples > 0;
    if (fills) begin(filled);
    ff_cp_commit();
    if constexpr (kRounds<T>) {
      if (begun > 1) round(stage == stages - 1 ? 0 : stage + 1);
    }
#pragma unroll
    for (int step = 0; step < 2; ++step) {
      if (step * kStepPositions >= left) break;
      Operands operands;
      operands.load(g_tile(stage), x_tile(stage), step, first_row, first_column);
#pragma unroll
      for (int i = 0; i < Operands::row_fragments; ++i) {
#pragma unroll
        for (int j = 0; j < Operands::column_fragments; ++j) {
          multiply(dot[i][j], operands.a[i], operands.b[j], T{});
        }
      }
    }
    if (fills) {
      end(filled);
    } else {
      --begun;
    }
    left -= Memory::positions;
    if (left <= 0) {
      left = g.positions;
      if (task.problem.absolute) {
        for_all([&](int i, int j, int k) { sum[i][j][k] += fabsf(dot[i][j][k]); });
      } else {
        for_all([&](int i, int j, int k) {
          sum[i][j][k] = fmaf(dot[i][j][k], dot[i][j][k], sum[i][j][k]);
        });
      }
      for_all([&](int i, int j, int k) { dot[i][j][k] = 0; });
    }
    stage = stage == stages - 1 ? 0 : stage + 1;
  }

  const int lane = static_cast<int>(threadIdx.x) % 32;
  const bool splits = task.splits > 1;
#pragma unroll
  for (int j = 0; j < Operands::column_fragments; ++j) {
    const int column = static_cast<int>(column_tile) * tile + first_column + j * 8 + lane % 4 * 2;
    if (column >= task.matrix_columns) continue;
    const OutColumns<2, float> out(task, column);
#pragma unroll
    for (int i = 0; i < Operands::row_fragments * 2; ++i) {
      const int64_t row = row_tile * tile + first_row + Operands::row_at(i / 2, i % 2, lane / 4);
      if (row >= task.problem.rows) continue;
      const float* const sums = &sum[i / 2][j][i % 2 * 2];
      const int64_t group_row = group * task.problem.rows + row;
      if (splits) {
        put_in_workspace<2>(task, split, group_row, column, sums);
      } else {
        out.add(group_row, sums);
      }
    }
  }
}

// What the host knows of an operand, too.
struct Layout {
  Operand op;
  int64_t channel;   // stride, in bytes
  int64_t channels;  // of a group
  int element;       // bytes of one
  // Whether each position is read once, at the place of its number; whether consecutive features
  // are consecutive channels, as long as they are of the same `channels`.
  bool plain, channels_innermost;

  // The widest copies that the layout allows, in bytes.
  int copy_bytes(bool positions_innermost) const {
    const bool consecutive = positions_innermost ? plain && op.position == element
                                                 : channels_innermost && channel == element;
    for (int bytes = 16; consecutive && bytes > element; bytes /= 2) {
      const auto whole = [&](std::initializer_list<int64_t> values) {
        return std::all_of(values.begin(), values.end(),
                           [&](int64_t value) { return value % bytes == 0; });
      };
      if (reinterpret_cast<uintptr_t>(op.data) % bytes != 0 || !whole({op.sample, op.line})) {
        continue;
      }
      if (positions_innermost ? whole({channel, op.width * int64_t{element}})
                              : whole({op.position, channels * element})) {
        return bytes;
      }
    }
    return element;
  }

  // What a tile takes to copy: narrow copies more instructions, scattered ones more sectors.
  int copy_cost(bool positions_innermost) const {
    const int64_t inner = positions_innermost ? op.position : channel;
    return 16 / copy_bytes(positions_innermost) * (inner <= 2 * element ? 1 : 4);
  }
};

// Strides that lead nowhere are taken as 0: they may be anything. Lines that follow one another
// become one, where the positions are plain.
Layout make_layout(const OuterTask& task, const void* data, const int64_t (&stride)[4], int element,
                   int64_t channels, int64_t height, int64_t width, bool plain) {
  const Problem& p = task.problem;
  Layout layout{};
  layout.channel = p.groups * channels > 1 ? stride[1] * element : 0;
  layout.channels = channels;
  layout.element = element;
  layout.plain = plain;
  layout.channels_innermost = true;
  Operand& op = layout.op;
  op.data = data;
  op.sample = p.samples > 1 ? stride[0] * element : 0;
  op.line = height > 1 ? stride[2] * element : 0;
  op.position = width > 1 ? stride[3] * element : 0;
  op.positions = static_cast<int>(task.positions);
  op.height = static_cast<int>(height);
  op.width = static_cast<int>(width);
  op.step_h = op.step_w = 1;
  if (plain && width > 1 && (height == 1 || op.line == width * op.position)) {
    op.width = op.positions;
    op.height = 1;
    op.line = 0;
  }
  const int64_t line_length = plain ? op.width : p.out_width;
  op.simple = plain && op.height == 1;
  op.line_length = Divider(line_length);
  return layout;
}

Layout layout_of_g(const OuterTask& task, int element) {
  const Problem& p = task.problem;
  return make_layout(task, task.g, p.g_stride, element, p.rows, p.out_height, p.out_width, true);
}

Layout layout_of_x(const OuterTask& task, int element) {
  const Problem& p = task.problem;
  const int64_t taps = p.kernel_height * p.kernel_width;
  const bool plain = taps == 1 && p.out_height == p.height && p.out_width == p.width &&
                     p.pad_h == 0 && p.pad_w == 0;
  Layout layout =
      make_layout(task, task.x, p.x_stride, element, p.columns, p.height, p.width, plain);
  layout.channels_innermost = task.channels_innermost || taps == 1;
  if (!plain) {
    layout.op.step_h = static_cast<int>(p.stride_h);
    layout.op.step_w = static_cast<int>(p.stride_w);
    layout.op.line *= p.stride_h;
    layout.op.position *= p.stride_w;
  }
  return layout;
}

template <class T, bool positions_innermost, int tile>
int launch(const OuterTask& task, Layout g, Layout x, void* stream) {
  using Memory = Tile<T, positions_innermost, tile>;
  g.op.copy_bytes = g.copy_bytes(positions_innermost);
  x.op.copy_bytes = x.copy_bytes(positions_innermost);
  constexpr int shared =
      kStages<T> * 2 * Memory::bytes + 2 * Memory::slot(tile) * static_cast<int>(sizeof(Feature));
  const auto kernel = outer_mma<T, positions_innermost, tile>;
  if (const int error = FF_ALLOW_SHARED(kernel, shared)) return error;
  const dim3 grid(static_cast<unsigned>(task.blocks()), static_cast<unsigned>(task.splits));
  return FF_LAUNCH(kernel, grid, dim3(Memory::threads), shared, stream, task, g.op, x.op);
}

template <class T>
int launch(const OuterTask& task, void* stream) {
  const Layout g = layout_of_g(task, sizeof(T)), x = layout_of_x(task, sizeof(T));
  const auto cost = [&](bool positions_innermost) {
    return g.copy_cost(positions_innermost) + x.copy_cost(positions_innermost);
  };
  const bool large = kMmaTiles[task.tile].rows == 128;
  if (cost(true) < cost(false)) {
    return large ? launch<T, true, 128>(task, g, x, stream)
                 : launch<T, true, 64>(task, g, x, stream);
  }
  return large ? launch<T, false, 128>(task, g, x, stream)
               : launch<T, false, 64>(task, g, x, stream);
}

}  // namespace
}  // namespace fastfisher::cuda

extern "C" int ff_outer_mma_bfloat16(const fastfisher::cuda::OuterTask* task, void* stream) {
  return fastfisher::cuda::launch<__nv_bfloat16>(*task, stream);
}

extern "C" int ff_outer_mma_tf32(const fastfisher::cuda::OuterTask* task, void* stream) {
  return fastfisher::cuda::launch<float>(*task, stream);
}
