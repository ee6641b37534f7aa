// How the tensor-core kernel brings g and x to shared memory.
//
// An operand is a matrix [positions, features] of a sample: a feature of g is a row of out, one of
// x a column of out, which is a channel at one tap of the convolution's kernel. Where an element
// lies is the sum of what its position and its feature add; it is zero where the tap falls outside
// of the image. What depends on the feature is the same for all samples: a block keeps it in a
// table.
#pragma once

#include "device.h"
#include "outer_device.h"
#include "ptx.h"

namespace fastfisher::cuda {

// g or x. Strides are in bytes, those of lines and positions from one output to the next.
struct Operand {
  const void* data;
  int64_t sample, line, position;
  int positions;           // of a sample
  int height, width;       // of the image
  int step_h, step_w;      // in the image, from one output to the next
  Divider line_length{1};  // positions of a line of outputs
  bool simple;             // one line, all of which is read by its one tap
  int copy_bytes;          // of a copy, whose elements are all inside of the image, or none
};

// Where a feature lies from a sample's first element, in bytes, and the line and position that its
// tap adds.
struct alignas(16) Feature {
  int64_t offset;
  int line, position;
};

__device__ inline Feature feature_of_g(const OuterTask& task, int64_t group, int64_t row,
                                       int64_t size) {
  const Problem& p = task.problem;
  if (row >= p.rows) return {0, kOutside, 0};
  return {(group * p.rows + row) * p.g_stride[1] * size, 0, 0};
}

__device__ inline Feature feature_of_x(const OuterTask& task, int64_t group, int64_t column,
                                       int64_t size) {
  const Problem& p = task.problem;
  if (column >= task.matrix_columns) return {0, kOutside, 0};
  const Tap tap = tap_of(task, static_cast<int>(column));
  const int64_t line = tap.line * p.dilation_h - p.pad_h;
  const int64_t position = tap.position * p.dilation_w - p.pad_w;
  const int64_t offset = (group * p.columns + tap.channel) * p.x_stride[1] + line * p.x_stride[2] +
                         position * p.x_stride[3];
  return {offset * size, static_cast<int>(line), static_cast<int>(position)};
}

// Where an output position reads the image, taps apart; `offset` is from the sample's beginning.
struct Position {
  int64_t offset;
  int line, position;
};

__device__ __forceinline__ Position position_at(const Operand& op, int t) {
  int line, position;
  op.line_length.divide(t, line, position);
  return {static_cast<unsigned>(line) * op.line + static_cast<unsigned>(position) * op.position,
          t < op.positions ? line * op.step_h : kOutside, position * op.step_w};
}

__device__ __forceinline__ bool is_inside(const Operand& op, const Position& at,
                                          const Feature& feature) {
  return static_cast<unsigned>(at.line + feature.line) < static_cast<unsigned>(op.height) &&
         static_cast<unsigned>(at.position + feature.position) < static_cast<unsigned>(op.width);
}

// The piece of an operand that a block holds: `tile` features at 64 bytes' worth of positions. It
// lies in shared memory as in global memory, features or positions innermost, so that copies are
// wide. The rows are padded so that the 8 rows that ldmatrix reads, or the 4 positions at 8
// features that tf32 fragments are made of, lie in different banks.
template <class T, bool positions_innermost, int tile>
struct Tile {
  static constexpr int threads = 2 * tile;
  static constexpr int size = sizeof(T);
  static constexpr int positions = 64 / size;
  static constexpr int row_bytes = positions_innermost ? 64 : tile * size;
  static constexpr int rows = positions_innermost ? tile : positions;
  static constexpr int pitch = row_bytes + (positions_innermost || size == 2 ? 16 : 32);
  static constexpr int bytes = rows * pitch;

  // Where a table has a feature. Threads whose copies take 8 features each look up every eighth
  // one: a gap after each eight keeps the banks apart.
  __host__ __device__ static constexpr int slot(int feature) {
    return positions_innermost ? feature : feature + feature / 8;
  }

  // The copies that a thread makes of a tile, where one takes `width` bytes: all in one column.
  template <int width>
  static constexpr int copies = rows * row_bytes / width / threads;
  template <int width>
  static constexpr int per_row = row_bytes / width;
  template <int width>
  __device__ static __forceinline__ int column() {
    return static_cast<int>(threadIdx.x) % per_row<width>;
  }
  template <int width>
  __device__ static __forceinline__ int row(int i) {
    const int q = static_cast<int>(threadIdx.x) / per_row<width> + i * (threads / per_row<width>);
    // Short rows share a warp: 4 apart they are in other banks, neighbours are not.
    return positions_innermost ? q % 2 * 4 + q / 2 % 4 + q / 8 * 8 : q;
  }

  // Where the i-th of them goes.
  template <int width>
  __device__ static __forceinline__ unsigned char* place(unsigned char* memory, int i) {
    return memory + row<width>(i) * pitch + column<width>() * width;
  }

  // Calls each(i, from, inside) for each of them. A source outside of the image may be anywhere.
  template <int width, class Each>
  __device__ static __forceinline__ void for_each(const Feature* table, const Operand& op,
                                                  const char* sample, int t0, const Each& each) {
    const int first = t0 + (positions_innermost ? column<width>() * (width / size) : row<width>(0));
    const Feature feature = table[slot(positions_innermost ? 0 : column<width>() * (width / size))];
    const auto feature_of = [&](int i) {
      return positions_innermost ? table[slot(row<width>(i))] : feature;
    };
    // How far the i-th one's position is from the first one's.
    constexpr int step = positions_innermost ? 0 : threads / per_row<width>;
    if (width == 16 && op.simple) {
      const char* const from = sample + static_cast<unsigned>(first) * op.position;
#pragma unroll
      for (int i = 0; i < copies<width>; ++i) {
        const Feature at = feature_of(i);
        each(i, from + i * step * op.position + at.offset,
             at.line == 0 && first + i * step < op.positions);
      }
      return;
    }
    Position position = position_at(op, first);
#pragma unroll
    for (int i = 0; i < copies<width>; ++i) {
      if (step > 0 && i > 0) position = position_at(op, first + i * step);
      const Feature at = feature_of(i);
      each(i, sample + (position.offset + at.offset), is_inside(op, position, at));
    }
  }

  // Single elements of 2 bytes are too small for a copy in the background: they wait in registers.
  static constexpr int staged = size == 2 ? copies<2> : 1;

  // Begins to bring a sample's positions t0 and on. What comes in the background is there after
  // ff_cp_wait, the rest after `end`.
  __device__ static __forceinline__ void begin(unsigned char* memory, const Feature* table,
                                               const Operand& op, const char* sample, int t0,
                                               uint16_t* stage) {
    if (op.copy_bytes == 16) {
      copy<16>(memory, table, op, sample, t0);
    } else if (op.copy_bytes == 8) {
      copy<8>(memory, table, op, sample, t0);
    } else if (size == 4 || op.copy_bytes == 4) {
      copy<4>(memory, table, op, sample, t0);
    } else if constexpr (size == 2) {
      for_each<2>(table, op, sample, t0, [&](int i, const char* from, bool inside) {
        stage[i] = inside ? *reinterpret_cast<const uint16_t*>(from) : uint16_t{0};
      });
    }
  }

  __device__ static __forceinline__ void end(unsigned char* memory, const Operand& op,
                                             const uint16_t* stage) {
    if constexpr (size == 2) {
      if (op.copy_bytes != 2) return;
#pragma unroll
      for (int i = 0; i < copies<2>; ++i) {
        *reinterpret_cast<uint16_t*>(place<2>(memory, i)) = stage[i];
      }
    }
  }

  // Rounds to tf32 what this thread copied: tensor cores drop the bits that tf32 lacks, which would
  // bias every product towards zero.
  __device__ static __forceinline__ void round(unsigned char* memory, const Operand& op) {
    if (op.copy_bytes == 16) {
      round_copies<16>(memory);
    } else if (op.copy_bytes == 8) {
      round_copies<8>(memory);
    } else {
      round_copies<4>(memory);
    }
  }

 private:
  template <int width>
  __device__ static __forceinline__ void copy(unsigned char* memory, const Feature* table,
                                              const Operand& op, const char* sample, int t0) {
    for_each<width>(table, op, sample, t0, [&](int i, const char* from, bool inside) {
      ff_cp_async<width>(place<width>(memory, i), from, inside);
    });
  }

  template <int width>
  __device__ static __forceinline__ void round_copies(unsigned char* memory) {
#pragma unroll
    for (int i = 0; i < copies<width>; ++i) {
      auto& numbers = *reinterpret_cast<Pack<float, width / 4>*>(place<width>(memory, i));
      Pack<float, width / 4> rounded = numbers;
#pragma unroll
      for (float& number : rounded.at) number = __uint_as_float(ff_tf32(number));
      numbers = rounded;
    }
  }
};

}  // namespace fastfisher::cuda
