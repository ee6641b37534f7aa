// Launchers of the gather family: out[v] += alpha * sum_n (sum_{t: index[n, t] = v} g[n, t])^2. The
// positions are ordered by token, and those of one token by sample. Windows of them are summed run
// by run (a run: one token in one sample); what a window's ends cut is put together afterwards.
#pragma once

#include <cstdint>

namespace fastfisher::cuda {

// What a window leaves of what its ends cut, each [columns].
enum Part : int {
  kHead,          // the sum of the run that is cut by the beginning
  kTail,          // the sum of the run that is cut by the end, and not by the beginning
  kFirstSquares,  // of the token that is cut by the beginning
  kLastSquares,   // of the token that is cut by the end, and not by the beginning
  kParts,
};

template <typename T>
struct GatherTask {
  T* out;
  int64_t out_row, out_column;  // strides
  const T* g;
  int64_t sample, position, column;  // strides
  // Both [count]: the tokens in ascending order, and which position of which sample each was:
  // sample * positions + position.
  const int64_t *tokens, *order;
  int64_t count, positions, vocabulary, columns, padding_index;
  int64_t window, windows;  // positions in one, a multiple of a warp's lanes, and how many
  T* parts;                 // [windows, kParts, columns]
  T alpha;
  bool absolute, vector;
};

}  // namespace fastfisher::cuda

extern "C" {
// Each returns a cudaError_t. A token that is not in [0, vocabulary) stops the kernel with an
// assertion before anything is read or written with it.
int ff_gather_float(const fastfisher::cuda::GatherTask<float>* task, void* stream);
int ff_gather_double(const fastfisher::cuda::GatherTask<double>* task, void* stream);
}
