// Launchers of the top-R selection, and what they are told of the tensors. See fastfisher/topr.py.
#pragma once

#include <cstdint>

namespace fastfisher::cuda::topr {

// The operators' interface, as in csrc/cpu: selected elements are counted in chunks; one bit says
// whether any of a group is selected, and a word of such bits is of one tensor.
constexpr int kChunk = 1 << 13;
constexpr int kGroup = 16;
constexpr int kWord = 64 * kGroup;
constexpr int kChunkWords = kChunk / kWord;

enum class Dtype : int32_t { kHalf, kBFloat16, kFloat, kDouble };

// Where the elements of a tensor are. `shape` is the place of its dimensions among the numbers of
// the table (their number, then sizes, then strides in elements), or -1 where the elements follow
// each other.
struct Operand {
  char* data;
  int64_t shape;
};

struct Entry {
  Operand score, remain, target;  // data is nullptr where there is none
  int64_t count;                  // elements
  int64_t first_word, first_chunk;
  Dtype dtype;           // of the scores
  int32_t target_width;  // bytes
};

// Device memory: one Entry for each tensor, then the numbers of their shapes.
struct Table {
  const Entry* entries;
  const int64_t* numbers;
  int64_t tensors, words, chunks;
  double weight;  // of remain
  bool wide;      // some scores are double, so all keys have 64 bits
};

// Row of `layout`; see zero_selected_ in fastfisher/topr.py.
struct Layout {
  int64_t count, index_width, code, values, runs;
};
constexpr int64_t kAlignment = 16;  // of the parts of a record

// What select needs beside its results, in numbers of 8 bytes, all zero.
inline int64_t select_workspace(int64_t tensors, int64_t chunks) {
  return 2 * 2048 + 2 + tensors + chunks;
}
// Likewise for zero, the first of which becomes 1 where the selection is that of the scores, else
// 0.
inline int64_t zero_workspace(int64_t words, int64_t chunks) {
  return 1 + chunks + 1 + (words + 7) / 8;
}

}  // namespace fastfisher::cuda::topr

extern "C" {
// All return a cudaError_t; all pointers but that of `from` and the tables are device pointers.

// Writes `count` numbers from the host's memory, which are part of the launches: that of the caller
// may go at once, and a captured graph has them.
int ff_topr_write(int64_t* to, const int64_t* from, int64_t count, void* stream);
// Histogram of the first digit, which all counts share, and `finite` of each tensor.
int ff_topr_begin(const fastfisher::cuda::topr::Table* table, bool* finite, int64_t* workspace,
                  void* stream);
// The selection of the first k > 0, after ff_topr_begin; `selected` and `candidates` are zero.
int ff_topr_select(const fastfisher::cuda::topr::Table* table, int64_t k, int64_t* key,
                   int64_t* selected, uint64_t* candidates, int64_t* workspace, void* stream);
// `record` may be nullptr; it and `layout` are zero.
int ff_topr_zero(const fastfisher::cuda::topr::Table* table, const int64_t* key,
                 const int64_t* selected, const uint64_t* candidates, int64_t count, char* record,
                 fastfisher::cuda::topr::Layout* layout, int64_t* workspace, void* stream);
}
