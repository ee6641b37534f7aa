// What kernels and launchers need of the CUDA language. The emulator that runs them on the host in
// the tests has its own version of all of it, so a kernel includes this file, declares shared
// memory with FF_SHARED or FF_DYNAMIC_SHARED, and is launched by FF_LAUNCH; under nvcc that is
// plain CUDA.
#pragma once

#include <cstdint>

#if defined(FASTFISHER_EMULATED)
#include "cusim.h"
#else
#include <assert.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

// Returns a cudaError_t as an int. `kernel` is in parentheses where it has template arguments.
#define FF_LAUNCH(kernel, grid, block, shared, stream, ...)                         \
  (kernel<<<grid, block, shared, static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__), \
   static_cast<int>(cudaGetLastError()))
// To be called before a launch with more than 48 KiB of dynamic shared memory.
#define FF_ALLOW_SHARED(kernel, bytes) \
  static_cast<int>(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes))
// FF_SHARED(float, tile, [16][64]);
#define FF_SHARED(type, name, dims) __shared__ type name dims
#define FF_DYNAMIC_SHARED(type, name)                                 \
  extern __shared__ __align__(16) unsigned char ff_dynamic_shared_[]; \
  type* name = reinterpret_cast<type*>(ff_dynamic_shared_)
// Stops the kernel, whatever NDEBUG says: the stream's next synchronization raises an error, and
// the condition is printed. For what the host cannot check without waiting for the device.
#define FF_ASSERT(condition) \
  ((condition) ? void(0) : __assert_fail(#condition, "fastfisher", __LINE__, __func__))

// Multiprocessors of the current device.
inline int ff_processors() {
  int device = 0, count = 1;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  return count;
}
#endif
