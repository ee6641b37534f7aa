// Kernels of the outer family for processors with a matrix unit (AMX, 16 x 32 by 32 x 16 products
// of bfloat16, summed in float32). Raw pointers only, for the same reason as kernels.h.
//
// A float32 is the sum of three bfloat16 terms of 8 significand bits each, so a product of two is a
// sum of nine products, of which the six largest are taken: what is left out is below 2^-21 of the
// product, and the sum over positions is float32's own. Numbers below 2^-110 lose bits, since the
// unit takes subnormal terms for zero; their squares are below float32's range.
#pragma once

#include <cstdint>

namespace fastfisher::cpu {

// Sides of a tile of the product, and positions that one instruction contracts.
constexpr int64_t kMatrixSide = 16;
constexpr int64_t kMatrixDepth = 32;
constexpr int64_t kMatrixTile = kMatrixSide * kMatrixSide;
// Positions that are looked up together.
constexpr int64_t kMatrixChunk = 16;
// The products of terms that are taken.
constexpr int64_t kMatrixProducts = 6;
// Left and right operands that are multiplied with each other at once, at most.
constexpr int64_t kMatrixPair = 2;

// Where some of the 16 positions of a chunk lie: lane i at data[offset + i * position_stride].
struct MatrixPiece {
  int64_t offset;
  uint16_t lanes;
};

// One operand of one sample. What no piece covers is zero.
struct MatrixOperand {
  const void* data;
  bool is_bfloat16;  // else float32
  int64_t channel_stride, position_stride;
  int64_t channels;  // at most kMatrixSide; the others are zero
  const MatrixPiece* pieces;
  const int32_t* first_piece;  // of each chunk, and one past the last
};

// One or two left operands s with one or two right ones b:
//   sums[b][s][r][c] += sum_n (sum_t left[s][n][r][t] * right[b][n][t][c])^2
// Strides of the operands are in bytes, those of the sums in elements.
struct MatrixTile {
  const char* left[kMatrixPair];
  int64_t left_term, left_row, left_sample;
  const char* right;
  int64_t right_block, right_term, right_sample;
  int64_t sources, blocks;
  int64_t steps, samples;
  // Steps of the tail, a term each: 1 KB of a source and of a block each.
  int64_t tail_steps;
  const char* left_tail[kMatrixPair];
  int64_t left_tail_step;
  const char* right_tail;
  float* sums;
  int64_t sum_block;
  // The sums over one sample's earlier positions, in the order of `sums`; nullptr where all of its
  // positions are here. Where they are not its last ones, the sums go back there, not to `sums`.
  float* partial;
  int64_t partial_block;
  bool first, last;
};

struct MatrixKernels {
  // Each thread calls these before and after its tiles.
  void (*begin)();
  void (*end)();
  // Bytes [term][channel][position], `row` from one channel to the next, `term` from a term to the
  // next, of `chunks` chunks (an even number) from chunk `first` on.
  void (*pack_left)(char* to, int64_t term, int64_t row, const MatrixOperand& operand,
                    int64_t first, int64_t chunks, int64_t terms);
  // Bytes [term][pair of positions][channel][position of the pair].
  void (*pack_right)(char* to, int64_t term, const MatrixOperand& operand, int64_t first,
                     int64_t chunks, int64_t terms);
  // The last positions of a sample, at most 16, in chunk `chunk`. Few positions need no six
  // products of a whole step each: the terms of several products lie side by side, in
  // tail_steps() tiles of 1 KB, `step` bytes apart.
  void (*pack_left_tail)(char* to, int64_t step, const MatrixOperand& operand, int64_t chunk,
                         int64_t positions);
  void (*pack_right_tail)(char* to, const MatrixOperand& operand, int64_t chunk, int64_t positions);
  void (*tile)(const MatrixTile& tile, int64_t terms);
  // out[r * out_row + c] += alpha * sums[r][c]
  void (*add_tile)(float* out, int64_t out_row, int64_t rows, int64_t columns, const float* sums,
                   float alpha);
  // out[r * out_row + c] += alpha * sums[c][r]
  void (*add_transposed_tile)(float* out, int64_t out_row, int64_t rows, int64_t columns,
                              const float* sums, float alpha);
};

inline int64_t products_a_step(int64_t positions) {
  const int64_t products = kMatrixDepth / positions;
  return products < kMatrixProducts ? products : kMatrixProducts;
}

inline int64_t tail_steps(int64_t positions) {
  const int64_t products = products_a_step(positions);
  return (kMatrixProducts + products - 1) / products;
}

const MatrixKernels& matrix_kernels_amx();

}  // namespace fastfisher::cpu
