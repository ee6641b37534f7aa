// Instructions that CUDA C++ has no name for: inline PTX, or the emulator's functions.
#pragma once

#include "device.h"

#if !defined(FASTFISHER_EMULATED)

// Copies 4, 8 or 16 aligned bytes to shared memory in the background, or zeros where not `take`.
template <int bytes>
__device__ __forceinline__ void ff_cp_async(void* to, const void* from, bool take) {
  const auto address = static_cast<unsigned>(__cvta_generic_to_shared(to));
  if constexpr (bytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from),
                 "r"(take ? 16 : 0)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(address), "l"(from),
                 "n"(bytes), "r"(take ? bytes : 0)
                 : "memory");
  }
}
// Ends a group of copies.
__device__ __forceinline__ void ff_cp_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
// Waits until at most `left` groups of this thread are under way.
template <int left>
__device__ __forceinline__ void ff_cp_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(left) : "memory");
}

// Stores 16 aligned bytes at once. Where a plain store stands under a condition, the compiler takes
// it apart.
__device__ __forceinline__ void ff_store(float* to, const float (&from)[4]) {
  asm volatile("st.global.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)),
               "f"(from[0]), "f"(from[1]), "f"(from[2]), "f"(from[3])
               : "memory");
}
__device__ __forceinline__ void ff_store(double* to, const double (&from)[2]) {
  asm volatile("st.global.v2.f64 [%0], {%1, %2};" ::"l"(__cvta_generic_to_global(to)), "d"(from[0]),
               "d"(from[1])
               : "memory");
}

// Four 8 x 8 matrices of 16-bit elements, lane i naming row i % 8 of matrix i / 8: r[m] is of
// matrix m the elements (lane / 4, 2 * (lane % 4) and the next). Eight rows of 16 bytes are also 8
// x 4 floats.
__device__ __forceinline__ void ff_ldmatrix(unsigned (&r)[4], const void* row) {
  const auto address = static_cast<unsigned>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}
// The same of the matrices' transposes.
__device__ __forceinline__ void ff_ldmatrix_trans(unsigned (&r)[4], const void* row) {
  const auto address = static_cast<unsigned>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

// The nearest number of 10 bits of mantissa, ties away from zero.
__device__ __forceinline__ unsigned ff_tf32(float value) {
  unsigned rounded;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(rounded) : "f"(value));
  return rounded;
}
// d [16, 8] += a [16, 8] b [8, 8] of tf32, all of a warp; lower bits of a and b are not read.
__device__ __forceinline__ void ff_mma_tf32(float (&d)[4], const unsigned (&a)[4],
                                            const unsigned (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
// d [16, 8] += a [16, 16] b [16, 8], all of a warp, in the fragments' layout of the PTX manual.
__device__ __forceinline__ void ff_mma_bf16(float (&d)[4], const unsigned (&a)[4],
                                            const unsigned (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
#endif
