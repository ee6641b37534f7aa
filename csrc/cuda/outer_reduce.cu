// Adds up what the splits of a task wrote to the workspace, and adds it to out.
#include "outer.h"
#include "outer_device.h"

namespace fastfisher::cuda {
namespace {

// A block has so many pieces of out, and for each so many threads that share the splits: small outs
// have many.
constexpr int kPieces = 32;
constexpr int kShares = 8;
// What leaves 64 registers to a thread.
constexpr int kBlocksPerUnit = 4;
static_assert(kWorkspaceBytes < int64_t{1} << 31, "pieces are counted in 32 bits");

// A piece is `count` consecutive columns of a row; `row_pieces` is how many such a row has.
template <typename T, int count>
__global__ void __launch_bounds__(kPieces* kShares, kBlocksPerUnit)
    outer_reduce(const OuterTask task, const Divider row_pieces) {
  FF_SHARED(T, shared, [kShares][count][kPieces]);
  const int lane = static_cast<int>(threadIdx.x), share = static_cast<int>(threadIdx.y);
  const int piece = static_cast<int>(blockIdx.x) * kPieces + lane;
  const bool exists = piece < task.entries / count;
  T sum[count] = {};
  if (exists) {
    const T* const partial = static_cast<const T*>(task.workspace) + int64_t{piece} * count;
#pragma unroll 4
    for (int64_t split = share; split < task.splits; split += kShares) {
      const auto pack = *reinterpret_cast<const Pack<T, count>*>(partial + split * task.entries);
#pragma unroll
      for (int k = 0; k < count; ++k) sum[k] += pack.at[k];
    }
  }
#pragma unroll
  for (int k = 0; k < count; ++k) shared[share][k][lane] = sum[k];
  __syncthreads();
  if (share != 0 || !exists) return;
#pragma unroll
  for (int each = 1; each < kShares; ++each) {
#pragma unroll
    for (int k = 0; k < count; ++k) sum[k] += shared[each][k][lane];
  }
  int row, column;
  row_pieces.divide(piece, row, column);
  OutColumns<count, T>(task, column * count).add(row, sum);
}

template <typename T, int count>
int launch_for(const OuterTask& task, void* stream) {
  const auto blocks = static_cast<unsigned>(ceil_div(task.entries / count, kPieces));
  return FF_LAUNCH((outer_reduce<T, count>), dim3(blocks), dim3(kPieces, kShares), 0, stream, task,
                   Divider(task.matrix_columns / count));
}

template <typename T>
int launch(const OuterTask& task, void* stream) {
  constexpr int kLanes = 16 / sizeof(T);
  if (task.matrix_columns % kLanes == 0) return launch_for<T, kLanes>(task, stream);
  return launch_for<T, 1>(task, stream);
}

}  // namespace
}  // namespace fastfisher::cuda

extern "C" int ff_outer_reduce_float(const fastfisher::cuda::OuterTask* task, void* stream) {
  return fastfisher::cuda::launch<float>(*task, stream);
}

extern "C" int ff_outer_reduce_double(const fastfisher::cuda::OuterTask* task, void* stream) {
  return fastfisher::cuda::launch<double>(*task, stream);
}
