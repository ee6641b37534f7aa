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
  kNoClearBarrier,
  kNoAtomicBarrier,
};

extern "C" {
// out [columns + 1 + 17] = the sums over in [rows, columns], the sum of all, and how many elements
// are 0, 1, ... 16; no other ones are allowed. `partial` [3, columns] is a workspace.
// columns % 4 == 0.
int selftest_sums(float* out, float* partial, const float* in, int rows, int columns, int64_t bug,
                  void* stream);
}
