// The kernels of matrix_kernels.h for AMX. Built for every x86-64 Linux; dispatch.cpp asks the
// processor and the operating system before it hands them out.
#include "matrix_kernels.h"

#if defined(__clang__)
#pragma clang attribute push(                                                            \
    __attribute__((                                                                      \
        target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma,amx-tile,amx-bf16"))), \
    apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma,amx-tile,amx-bf16")
#endif

#include <immintrin.h>

#define FF_INLINE inline __attribute__((always_inline))
#define FF_UNROLL _Pragma("GCC unroll 16")

namespace fastfisher::cpu {
namespace {

constexpr int64_t kRowBytes = 64;
// Positions between what is asked for and what is read.
constexpr int64_t kAhead = 32;
constexpr int64_t kStepBytes = kMatrixSide * kRowBytes;

// Eight tiles of 16 rows of 64 bytes. In memory beforehand: the instruction does not tell the
// compiler how much it reads.
struct alignas(64) TileConfig {
  uint8_t palette = 1, first_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
constexpr TileConfig kTileConfig;

void begin() { _tile_loadconfig(&kTileConfig); }

void end() { _tile_release(); }

// ---------------------------------------------------------------------------------------------
// pack

FF_INLINE void transpose(__m512* rows) {
  __m512 other[16];
  const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const __m512i high =
      _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
  FF_UNROLL for (int round = 0; round < 4; ++round) {
    FF_UNROLL for (int i = 0; i < 8; ++i) {
      other[2 * i] = _mm512_permutex2var_ps(rows[i], low, rows[i + 8]);
      other[2 * i + 1] = _mm512_permutex2var_ps(rows[i], high, rows[i + 8]);
    }
    FF_UNROLL for (int i = 0; i < 16; ++i) rows[i] = other[i];
  }
}

// `lanes` of 16 elements from `from` on, the others from `rest`.
FF_INLINE __m512 load(__m512 rest, __mmask16 lanes, const float* from) {
  return _mm512_mask_loadu_ps(rest, lanes, from);
}

FF_INLINE __m512 load(__m512 rest, __mmask16 lanes, const uint16_t* from) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes, from));
  return _mm512_castsi512_ps(_mm512_mask_slli_epi32(_mm512_castps_si512(rest), lanes, wide, 16));
}

// The same, `stride` elements apart.
FF_INLINE __m512 gather(__m512 rest, __mmask16 lanes, const float* from, int64_t stride) {
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i at = _mm512_mullo_epi32(lane, _mm512_set1_epi32(int32_t(stride)));
  return _mm512_mask_i32gather_ps(rest, lanes, at, from, 4);
}

FF_INLINE __m512 gather(__m512 rest, __mmask16 lanes, const uint16_t* from, int64_t stride) {
  // No instruction gathers half a word, and a whole one might lie past the end.
  alignas(32) uint16_t values[16] = {};
  for (int64_t i = 0; i < 16; ++i) {
    if (lanes >> i & 1) values[i] = from[i * stride];
  }
  return load(rest, lanes, values);
}

// Row c: the chunk's positions of channel c.
template <typename T>
FF_INLINE void load_channels(__m512* rows, const MatrixOperand& x, int64_t chunk) {
  const int32_t first = x.first_piece[chunk], last = x.first_piece[chunk + 1];
  FF_UNROLL for (int c = 0; c < 16; ++c) rows[c] = _mm512_setzero_ps();
  for (int32_t i = first; i < last; ++i) {
    const T* const from = static_cast<const T*>(x.data) + x.pieces[i].offset;
    const __mmask16 lanes = x.pieces[i].lanes;
    if (x.position_stride == 1) {
      FF_UNROLL for (int c = 0; c < 16; ++c) {
        if (c < x.channels) rows[c] = load(rows[c], lanes, from + c * x.channel_stride);
      }
    } else {
      FF_UNROLL for (int c = 0; c < 16; ++c) {
        if (c < x.channels) {
          rows[c] = gather(rows[c], lanes, from + c * x.channel_stride, x.position_stride);
        }
      }
    }
  }
}

// Row t: the channels at position t of the chunk.
template <typename T>
FF_INLINE void load_positions(__m512* rows, const MatrixOperand& x, int64_t chunk) {
  const __mmask16 channels = __mmask16((1u << x.channels) - 1);
  const int32_t first = x.first_piece[chunk], last = x.first_piece[chunk + 1];
  const T* const data = static_cast<const T*>(x.data);
  const __m512 zero = _mm512_setzero_ps();
  if (last - first == 1 && x.pieces[first].lanes == 0xffff) {
    const T* const from = data + x.pieces[first].offset;
    FF_UNROLL for (int t = 0; t < 16; ++t) {
      // Positions may be pages apart, which the processor does not foresee.
      _mm_prefetch(from + (t + kAhead) * x.position_stride, _MM_HINT_T0);
      rows[t] = load(zero, channels, from + t * x.position_stride);
    }
    return;
  }
  FF_UNROLL for (int t = 0; t < 16; ++t) rows[t] = zero;
  for (int32_t i = first; i < last; ++i) {
    const T* const from = data + x.pieces[i].offset;
    FF_UNROLL for (int t = 0; t < 16; ++t) {
      if (x.pieces[i].lanes >> t & 1) {
        rows[t] = load(zero, channels, from + t * x.position_stride);
      }
    }
  }
}

// Rows of 16 positions, a channel each.
FF_INLINE void load_by_channel(__m512* rows, const MatrixOperand& x, int64_t chunk) {
  if (x.channel_stride == 1) {
    x.is_bfloat16 ? load_positions<uint16_t>(rows, x, chunk)
                  : load_positions<float>(rows, x, chunk);
    transpose(rows);
  } else {
    x.is_bfloat16 ? load_channels<uint16_t>(rows, x, chunk) : load_channels<float>(rows, x, chunk);
  }
}

// Rows of 16 channels, a position each.
FF_INLINE void load_by_position(__m512* rows, const MatrixOperand& x, int64_t chunk) {
  if (x.channel_stride == 1) {
    x.is_bfloat16 ? load_positions<uint16_t>(rows, x, chunk)
                  : load_positions<float>(rows, x, chunk);
  } else {
    x.is_bfloat16 ? load_channels<uint16_t>(rows, x, chunk) : load_channels<float>(rows, x, chunk);
    transpose(rows);
  }
}

// The upper half of each element, which is a bfloat16, and what is left of it.
FF_INLINE __m512i take_term(__m512& value) {
  const __m512i mask = _mm512_set1_epi32(int32_t(0xffff0000));
  const __m512i term = _mm512_and_si512(_mm512_castps_si512(value), mask);
  value = _mm512_sub_ps(value, _mm512_castsi512_ps(term));
  return term;
}

// Elements (even[i], odd[i]) side by side.
FF_INLINE __m512i pair_up(__m512i even, __m512i odd) {
  return _mm512_or_si512(_mm512_srli_epi32(even, 16), odd);
}

void pack_left(char* to, int64_t term, int64_t row, const MatrixOperand& x, int64_t first,
               int64_t chunks, int64_t terms) {
  const __m512i odd_words =
      _mm512_set_epi16(63, 61, 59, 57, 55, 53, 51, 49, 47, 45, 43, 41, 39, 37, 35, 33, 31, 29, 27,
                       25, 23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1);
  for (int64_t chunk = 0; chunk < chunks; chunk += 2, to += kRowBytes) {
    alignas(64) __m512 values[2][16];
    for (int half = 0; half < 2; ++half) {
      __m512 rows[16];
      load_by_channel(rows, x, first + chunk + half);
      FF_UNROLL for (int c = 0; c < 16; ++c) values[half][c] = rows[c];
    }
    if (terms == 1) {
      for (int c = 0; c < 16; ++c) {
        _mm512_storeu_si512(to + c * row, __m512i(_mm512_cvtne2ps_pbh(values[1][c], values[0][c])));
      }
      continue;
    }
    for (int c = 0; c < 16; ++c) {
      __m512 low = values[0][c], high = values[1][c];
      char* at = to + c * row;
      FF_UNROLL for (int i = 0; i < 3; ++i, at += term) {
        const __m512i low_term = take_term(low);
        const __m512i high_term = take_term(high);
        _mm512_storeu_si512(at, _mm512_permutex2var_epi16(low_term, odd_words, high_term));
      }
    }
  }
}

void pack_right(char* to, int64_t term, const MatrixOperand& x, int64_t first, int64_t chunks,
                int64_t terms) {
  const __m512i interleave =
      _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                       21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    __m512 rows[16];
    load_by_position(rows, x, first + chunk);
    FF_UNROLL for (int pair = 0; pair < 8; ++pair, to += kRowBytes) {
      __m512 even = rows[2 * pair], odd = rows[2 * pair + 1];
      if (terms == 1) {
        const __m512i both = __m512i(_mm512_cvtne2ps_pbh(odd, even));
        _mm512_storeu_si512(to, _mm512_permutexvar_epi16(interleave, both));
      } else {
        FF_UNROLL for (int i = 0; i < 3; ++i) {
          const __m512i even_term = take_term(even);
          _mm512_storeu_si512(to + i * term, pair_up(even_term, take_term(odd)));
        }
      }
    }
  }
}

// The terms of the products, the largest product first.
constexpr int kLeftTerms[kMatrixProducts] = {0, 0, 1, 1, 0, 2};
constexpr int kRightTerms[kMatrixProducts] = {0, 1, 0, 1, 2, 0};

void clear(char* tile) {
  for (int64_t i = 0; i < kStepBytes; i += kRowBytes) {
    _mm512_storeu_si512(tile + i, _mm512_setzero_si512());
  }
}

// Whether the products leave no place of the tail's steps empty.
bool fills_its_steps(int64_t positions) {
  const int64_t products = products_a_step(positions);
  return products * positions == kMatrixDepth && kMatrixProducts % products == 0;
}

void pack_left_tail(char* to, int64_t step, const MatrixOperand& x, int64_t chunk,
                    int64_t positions) {
  const int64_t products = products_a_step(positions);
  if (!fills_its_steps(positions)) {
    for (int64_t i = 0; i < tail_steps(positions); ++i) clear(to + i * step);
  }
  alignas(64) __m512 rows[16];
  load_by_channel(rows, x, chunk);
  const __mmask16 lanes = __mmask16((1u << positions) - 1);
  char* at[kMatrixProducts];
  for (int64_t p = 0; p < kMatrixProducts; ++p) {
    at[p] = to + p / products * step + p % products * positions * 2;
  }
  for (int c = 0; c < 16; ++c) {
    __m512 value = rows[c];
    __m256i terms[3];
    FF_UNROLL for (int i = 0; i < 3; ++i) {
      terms[i] = _mm512_cvtepi32_epi16(_mm512_srli_epi32(take_term(value), 16));
    }
    FF_UNROLL for (int p = 0; p < kMatrixProducts; ++p) {
      _mm256_mask_storeu_epi16(at[p] + c * kRowBytes, lanes, terms[kLeftTerms[p]]);
    }
  }
}

void pack_right_tail(char* to, const MatrixOperand& x, int64_t chunk, int64_t positions) {
  const int64_t products = products_a_step(positions);
  if (!fills_its_steps(positions)) {
    for (int64_t i = 0; i < tail_steps(positions); ++i) clear(to + i * kStepBytes);
  }
  alignas(64) __m512 rows[16];
  load_by_position(rows, x, chunk);
  if (positions % 2 == 0) {
    // Every pair of positions stays one.
    char* at[kMatrixProducts];
    for (int64_t p = 0; p < kMatrixProducts; ++p) {
      at[p] = to + p / products * kStepBytes + p % products * positions / 2 * kRowBytes;
    }
    for (int64_t pair = 0; pair < positions / 2; ++pair) {
      __m512 even = rows[2 * pair], odd = rows[2 * pair + 1];
      __m512i terms[3];
      FF_UNROLL for (int i = 0; i < 3; ++i) {
        const __m512i even_term = take_term(even);
        terms[i] = pair_up(even_term, take_term(odd));
      }
      FF_UNROLL for (int p = 0; p < kMatrixProducts; ++p) {
        _mm512_storeu_si512(at[p] + pair * kRowBytes, terms[kRightTerms[p]]);
      }
    }
    return;
  }
  for (int64_t t = 0; t < positions; ++t) {
    __m512 value = rows[t];
    __m512i terms[3];
    FF_UNROLL for (int i = 0; i < 3; ++i) terms[i] = take_term(value);
    FF_UNROLL for (int p = 0; p < kMatrixProducts; ++p) {
      const int64_t place = p % products * positions + t;
      char* const at = to + p / products * kStepBytes + place / 2 * kRowBytes;
      const __m512i term = terms[kRightTerms[p]];
      if (place % 2 == 0) {
        _mm512_mask_storeu_epi16(at, 0x55555555, _mm512_srli_epi32(term, 16));
      } else {
        _mm512_mask_storeu_epi16(at, 0xaaaaaaaa, term);
      }
    }
  }
}

// ---------------------------------------------------------------------------------------------
// tile

// Tiles 0 to 3 are sums, 4 and 5 terms of the left operands, 6 and 7 of the right ones. The unit
// begins a product every 16 cycles and ends it 52 later, so four sums keep it busy: of the four
// products of two operands each, or of parts of fewer products.
template <int Sources, int Blocks, int Part>
FF_INLINE void multiply() {
  if constexpr (Sources == 2 && Blocks == 2) {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 5, 6);
    _tile_dpbf16ps(2, 4, 7);
    _tile_dpbf16ps(3, 5, 7);
  } else if constexpr (Sources == 2) {
    if constexpr (Part % 2 == 0) {
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 5, 6);
    } else {
      _tile_dpbf16ps(2, 4, 6);
      _tile_dpbf16ps(3, 5, 6);
    }
  } else if constexpr (Blocks == 2) {
    if constexpr (Part % 2 == 0) {
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
    } else {
      _tile_dpbf16ps(2, 4, 6);
      _tile_dpbf16ps(3, 4, 7);
    }
  } else {
    if constexpr (Part % 3 == 0) _tile_dpbf16ps(0, 4, 6);
    if constexpr (Part % 3 == 1) _tile_dpbf16ps(1, 4, 6);
    if constexpr (Part % 3 == 2) _tile_dpbf16ps(2, 4, 6);
  }
}

template <int Sources, int Blocks, int Terms>
FF_INLINE void add_step(const MatrixTile& tile, const char* const* left, const char* right,
                        int64_t step) {
  const auto load_left = [&](int64_t term) __attribute__((always_inline)) {
    const int64_t at = term * tile.left_term + step * kRowBytes;
    _tile_loadd(4, left[0] + at, tile.left_row);
    if constexpr (Sources == 2) _tile_loadd(5, left[1] + at, tile.left_row);
  };
  const auto load_right = [&](int64_t term) __attribute__((always_inline)) {
    const char* const at = right + term * tile.right_term + step * kStepBytes;
    _tile_loadd(6, at, kRowBytes);
    if constexpr (Blocks == 2) _tile_loadd(7, at + tile.right_block, kRowBytes);
  };
  load_left(0);
  if constexpr (Terms == 1) {
    load_right(0);
    multiply<Sources, Blocks, 0>();
    return;
  }
  // The left operand's rows may begin anywhere, which makes them the slower to load.
  load_right(2);
  multiply<Sources, Blocks, 0>();
  load_right(1);
  multiply<Sources, Blocks, 1>();
  load_right(0);
  multiply<Sources, Blocks, 2>();
  load_left(1);
  multiply<Sources, Blocks, 3>();
  load_right(1);
  multiply<Sources, Blocks, 4>();
  load_left(2);
  load_right(0);
  multiply<Sources, Blocks, 5>();
}

template <int Sources, int Blocks, int Part>
FF_INLINE void add_tail_step(const MatrixTile& tile, int64_t left_at, const char* right) {
  if (Part >= tile.tail_steps) return;
  const int64_t at = left_at + Part * tile.left_tail_step;
  _tile_loadd(4, tile.left_tail[0] + at, kRowBytes);
  if constexpr (Sources == 2) _tile_loadd(5, tile.left_tail[1] + at, kRowBytes);
  _tile_loadd(6, right + Part * kStepBytes, kRowBytes);
  if constexpr (Blocks == 2)
    _tile_loadd(7, right + tile.right_block + Part * kStepBytes, kRowBytes);
  multiply<Sources, Blocks, Part>();
}

// The sums of one sample, from the tiles in `value`, squared and added to those of all.
template <int Sources, int Blocks>
FF_INLINE void finish_sample(const MatrixTile& tile, const float* value) {
  constexpr int64_t kTiles = Sources * Blocks;
  FF_UNROLL for (int64_t i = 0; i < kTiles; ++i) {
    const int64_t source = i % Sources * kMatrixTile;
    float* const sums = tile.sums + i / Sources * tile.sum_block + source;
    float* const partial = tile.partial == nullptr
                               ? nullptr
                               : tile.partial + i / Sources * tile.partial_block + source;
    const float* const from = value + i * kMatrixTile;
    FF_UNROLL for (int64_t j = 0; j < kMatrixTile; j += 16) {
      __m512 v = _mm512_load_ps(from + j);
      if constexpr (kTiles < 4) v += _mm512_load_ps(from + kTiles * kMatrixTile + j);
      if constexpr (kTiles == 1) v += _mm512_load_ps(from + 2 * kMatrixTile + j);
      if (partial != nullptr) {
        if (!tile.first) v += _mm512_loadu_ps(partial + j);
        if (!tile.last) {
          _mm512_storeu_ps(partial + j, v);
          continue;
        }
      }
      _mm512_storeu_ps(sums + j, _mm512_fmadd_ps(v, v, _mm512_loadu_ps(sums + j)));
    }
  }
}

template <int Sources, int Blocks, int Terms>
void tile_of(const MatrixTile& tile) {
  alignas(64) float value[2][4 * kMatrixTile];
  const char* left[kMatrixPair] = {tile.left[0], tile.left[1]};
  const char* right = tile.right;
  for (int64_t n = 0; n < tile.samples; ++n) {
    // The tile instructions do not tell the compiler what they read.
    asm volatile("" : : : "memory");
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t step = 0; step < tile.steps; ++step) {
      add_step<Sources, Blocks, Terms>(tile, left, right, step);
    }
    if (tile.tail_steps > 0) {
      const char* const right_tail = tile.right_tail + n * tile.right_sample;
      add_tail_step<Sources, Blocks, 0>(tile, n * tile.left_sample, right_tail);
      add_tail_step<Sources, Blocks, 1>(tile, n * tile.left_sample, right_tail);
      add_tail_step<Sources, Blocks, 2>(tile, n * tile.left_sample, right_tail);
    }
    // The sample before, while the unit works on this one.
    if (n > 0) finish_sample<Sources, Blocks>(tile, value[(n - 1) % 2]);
    float* const to = value[n % 2];
    _tile_stored(0, to, kRowBytes);
    _tile_stored(1, to + kMatrixTile, kRowBytes);
    _tile_stored(2, to + 2 * kMatrixTile, kRowBytes);
    _tile_stored(3, to + 3 * kMatrixTile, kRowBytes);
    FF_UNROLL for (int s = 0; s < Sources; ++s) left[s] += tile.left_sample;
    right += tile.right_sample;
  }
  asm volatile("" : : : "memory");
  finish_sample<Sources, Blocks>(tile, value[(tile.samples - 1) % 2]);
}

template <int Terms>
void tile_by_size(const MatrixTile& t) {
  if (t.sources == 2) return t.blocks == 2 ? tile_of<2, 2, Terms>(t) : tile_of<2, 1, Terms>(t);
  return t.blocks == 2 ? tile_of<1, 2, Terms>(t) : tile_of<1, 1, Terms>(t);
}

void tile(const MatrixTile& t, int64_t terms) {
  terms == 1 ? tile_by_size<1>(t) : tile_by_size<3>(t);
}

void add_tile(float* out, int64_t out_row, int64_t rows, int64_t columns, const float* sums,
              float alpha) {
  const __mmask16 lanes = __mmask16((1u << columns) - 1);
  const __m512 factor = _mm512_set1_ps(alpha);
  for (int64_t r = 0; r < rows; ++r) {
    float* const at = out + r * out_row;
    const __m512 before = _mm512_maskz_loadu_ps(lanes, at);
    const __m512 sum = _mm512_loadu_ps(sums + r * kMatrixSide);
    _mm512_mask_storeu_ps(at, lanes, _mm512_fmadd_ps(factor, sum, before));
  }
}

void add_transposed_tile(float* out, int64_t out_row, int64_t rows, int64_t columns,
                         const float* sums, float alpha) {
  __m512 values[16];
  FF_UNROLL for (int c = 0; c < 16; ++c) values[c] = _mm512_loadu_ps(sums + c * kMatrixSide);
  transpose(values);
  alignas(64) float rows_first[kMatrixTile];
  FF_UNROLL for (int r = 0; r < 16; ++r) _mm512_store_ps(rows_first + r * 16, values[r]);
  add_tile(out, out_row, rows, columns, rows_first, alpha);
}

}  // namespace

const MatrixKernels& matrix_kernels_amx() {
  static const MatrixKernels kernels = {
      &begin,           &end,  &pack_left, &pack_right,         &pack_left_tail,
      &pack_right_tail, &tile, &add_tile,  &add_transposed_tile};
  return kernels;
}

}  // namespace fastfisher::cpu

#if defined(__clang__)
#pragma clang attribute pop
#endif
