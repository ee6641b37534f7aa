#include "selftest.h"

#include "device.h"
#include "ptx.h"

namespace {

constexpr int kWidth = 32, kHeight = 4, kParts = 2, kValues = 17;

__global__ void part_sums(float* partial, float* total, const float* in, int rows, int columns,
                          int64_t bug) {
  FF_SHARED(float, tile, [kHeight][kWidth]);
  FF_SHARED(float, lanes, [kWidth]);
  const int line = threadIdx.x / kWidth, lane = threadIdx.x % kWidth;
  const int column = blockIdx.x * kWidth + lane;
  if (bug == kExitBeforeBarrier && column >= columns) return;
  float sum = 0;
  for (int first = blockIdx.y * kHeight; first < rows; first += kParts * kHeight) {
    const int row = first + line;
    const bool inside = column < columns && row < rows;
    const bool take = inside || bug == kReadOutOfBounds;
    if (inside || bug != kUninitialisedShared) {
      ff_cp_async<4>(&tile[line][lane], in + (take ? row * columns + column : 0), take);
    }
    ff_cp_commit();
    if (bug != kNoWait) ff_cp_wait<0>();
    if (bug == kDivergentBarrier) {
      if (line == 0) {
        __syncthreads();
      } else {
        __syncthreads();
      }
    } else if (bug != kNoBarrier) {
      __syncthreads();
    }
    if (line == 0) {
      for (int i = 0; i < kHeight; ++i) sum += tile[i][lane + (bug == kBeyondDimension)];
    }
    if (bug != kNoSecondBarrier) __syncthreads();
  }
  if (line != 0) return;
  lanes[lane] = sum;
  if (bug != kNoWarpSync) __syncwarp();
  float all = lanes[lane ^ 1];
  for (int i = 16; i > 0; i /= 2) {
    all += __shfl_xor_sync(bug == kShuffleMask ? 0x0000ffffu : 0xffffffffu, all, i);
  }
  if (column < columns) partial[blockIdx.y * columns + column] = sum;
  if (bug == kWriteOutOfBounds) partial[3 * columns + column] = sum;
  if (lane != 0) return;
  if (bug == kBetweenBlocks) {
    *total += all;
  } else {
    atomicAdd(total, all);
  }
}

__global__ void add_parts(float* out, const float* partial, float* in, int columns, int64_t bug) {
  const int column = 4 * threadIdx.x;
  if (column >= columns) return;
  float4 sum = make_float4(0, 0, 0, 0);
  const int parts = kParts + (bug == kUninitialisedWorkspace);
  for (int i = 0; i < parts; ++i) {
    const float* from = partial + i * columns + column + (bug == kMisaligned);
    const float4 part = *reinterpret_cast<const float4*>(from);
    sum.x += part.x;
    sum.y += part.y;
    sum.z += part.z;
    sum.w += part.w;
  }
  *reinterpret_cast<float4*>(out + column) = sum;
  if (bug == kWriteReadOnly) in[column] = 0;
  if (bug == kOverflow) out[column] = static_cast<float>((columns << 22) * columns);
  if (bug == kWildPointer) reinterpret_cast<float*>(static_cast<uintptr_t>(column))[16] = 1;
}

// Shared memory that is cleared, added to by all and read, in each block anew.
__global__ void count_values(float* counts, const float* in, int elements, int64_t bug) {
  FF_SHARED(unsigned, own, [kValues]);
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  if (thread < kValues) own[thread] = 0;
  if (bug != kNoClearBarrier) __syncthreads();
  for (int i = blockIdx.x * threads + thread; i < elements; i += gridDim.x * threads) {
    atomicAdd(&own[static_cast<int>(in[i])], 1u);
  }
  if (bug != kNoAtomicBarrier) __syncthreads();
  if (thread < kValues) atomicAdd(&counts[thread], static_cast<float>(own[thread]));
}

template <bool asks>
__global__ void dynamic_shared(float* out) {
  FF_DYNAMIC_SHARED(float, buffer);
  buffer[threadIdx.x] = 0;
  out[threadIdx.x] = buffer[threadIdx.x];
}

}  // namespace

extern "C" int selftest_sums(float* out, float* partial, const float* in, int rows, int columns,
                             int64_t bug, void* stream) {
  const dim3 grid(static_cast<unsigned>((columns + kWidth - 1) / kWidth), kParts);
  if (bug == kTooMuchShared) {
    if (const int error = FF_ALLOW_SHARED(dynamic_shared<true>, 160 << 10)) return error;
    return FF_LAUNCH(dynamic_shared<true>, 1, 1, 162 << 10, stream, out);
  }
  if (bug == kUnasked) return FF_LAUNCH(dynamic_shared<false>, 1, 1, 64 << 10, stream, out);
  if (const int error = FF_LAUNCH(part_sums, grid, kWidth * kHeight, 0, stream, partial,
                                  out + columns, in, rows, columns, bug)) {
    return error;
  }
  if (const int error = FF_LAUNCH(add_parts, 1, 64, 0, stream, out, partial, const_cast<float*>(in),
                                  columns, bug)) {
    return error;
  }
  return FF_LAUNCH(count_values, 3, 96, 0, stream, out + columns + 1, in, rows * columns, bug);
}
