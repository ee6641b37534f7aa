// Kernels with a bug of choice, for the tests of the emulators.
#pragma once

#include <cstdint>

enum Bug : int64_t {
  kNone,
  kNoBarrier,
  kNoSecondBarrier,
  kDivergentBarrier,
  kExitBeforeBarrier,
  kReadOutOfBounds,
  kWriteOutOfBounds,
  kBeyondDimension,
  kUninitialisedShared,
  kUninitialisedWorkspace,
  kBetweenBlocks,
  kMisaligned,
  kShuffleMask,
  kNoWait,
  kWriteReadOnly,
  kOverflow,
  kWildPointer,
  kNoWarpSync,
  kTooMuchShared,
  kUnasked,
};

extern "C" {
// out [columns + 1] = the sums over in [rows, columns], and the sum of all; `partial` [3, columns]
// is a workspace. columns % 4 == 0.
int selftest_sums(float* out, float* partial, const float* in, int rows, int columns, int64_t bug,
                  void* stream);
}
