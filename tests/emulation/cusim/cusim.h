// The CUDA language for a C++ compiler on the host: csrc/cuda/device.h includes this file in place
// of CUDA where FASTFISHER_EMULATED is defined. Vector and 16-bit types are NVIDIA's own headers'.
//
// Not there: cooperative groups, textures, clusters, inline PTX outside csrc/cuda/ptx.h. A warp has
// no lock-step, as on hardware since Volta.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <vector_functions.h>
#include <vector_types.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#undef __global__
#undef __device__
#undef __host__
#undef __forceinline__
#undef __noinline__
#undef __launch_bounds__
#undef __constant__
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__
#define __launch_bounds__(...)
#define __grid_constant__
#define __constant__ static
#define __restrict__ __restrict

#include "atomics.h"
#include "runtime.h"
#include "warp.h"

using std::max;
using std::min;

#define threadIdx (::cusim::cur->tid)
#define blockIdx (::cusim::cfg.bid)
#define blockDim (::cusim::cfg.bdim)
#define gridDim (::cusim::cfg.gdim)
#define warpSize 32

#define CUSIM_BARRIER(reduce, predicate) \
  ::cusim::block_barrier(__LINE__, ::cusim::Reduce::reduce, (predicate) != 0)
#define __syncthreads() static_cast<void>(CUSIM_BARRIER(none, 0))
#define __syncthreads_count(predicate) static_cast<int>(CUSIM_BARRIER(count, predicate))
#define __syncthreads_and(predicate) static_cast<int>(CUSIM_BARRIER(all, predicate))
#define __syncthreads_or(predicate) static_cast<int>(CUSIM_BARRIER(any, predicate))
#define __threadfence() ::cusim::fence()
#define __threadfence_block() ::cusim::fence()

template <class T>
T __ldg(const T* from) {
  return *from;
}
template <class T>
T __ldcs(const T* from) {
  return *from;
}
template <class T>
T __ldcg(const T* from) {
  return *from;
}
template <class T, class V>
void __stcs(T* to, V value) {
  *to = value;
}
template <class T, class V>
void __stcg(T* to, V value) {
  *to = value;
}

namespace cusim {
template <class To, class From>
To bits_as(From value) {
  static_assert(sizeof(To) == sizeof(From));
  To result;
  std::memcpy(&result, &value, sizeof result);
  return result;
}
}  // namespace cusim
inline unsigned __float_as_uint(float value) { return ::cusim::bits_as<unsigned>(value); }
inline int __float_as_int(float value) { return ::cusim::bits_as<int>(value); }
inline float __uint_as_float(unsigned bits) { return ::cusim::bits_as<float>(bits); }
inline float __int_as_float(int bits) { return ::cusim::bits_as<float>(bits); }
inline long long __double_as_longlong(double value) { return ::cusim::bits_as<long long>(value); }
inline double __longlong_as_double(long long bits) { return ::cusim::bits_as<double>(bits); }

inline int __popc(unsigned value) { return __builtin_popcount(value); }
inline int __popcll(unsigned long long value) { return __builtin_popcountll(value); }
inline int __ffs(int value) { return __builtin_ffs(value); }
inline int __ffsll(long long value) { return __builtin_ffsll(value); }
inline int __clz(int value) { return value ? __builtin_clz(static_cast<unsigned>(value)) : 32; }
inline int __clzll(long long value) {
  return value ? __builtin_clzll(static_cast<unsigned long long>(value)) : 64;
}
inline unsigned long long __brevll(unsigned long long value) {
  unsigned long long result = 0;
  for (int i = 0; i < 64; ++i) result |= ((value >> i) & 1) << (63 - i);
  return result;
}
inline unsigned __brev(unsigned value) { return static_cast<unsigned>(__brevll(value) >> 32); }
inline unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>((static_cast<unsigned long long>(a) * b) >> 32);
}
inline unsigned __byte_perm(unsigned low, unsigned high, unsigned selector) {
  const unsigned long long all = static_cast<unsigned long long>(high) << 32 | low;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) {
    result |= static_cast<unsigned>(all >> ((selector >> (4 * i) & 7) * 8) & 0xff) << (8 * i);
  }
  return result;
}
inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned shift) {
  return static_cast<unsigned>(
      ((static_cast<unsigned long long>(high) << 32 | low) << (shift & 31)) >> 32);
}
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
  return static_cast<unsigned>((static_cast<unsigned long long>(high) << 32 | low) >> (shift & 31));
}

// Keeps the compiler from fusing an operation with the next one.
template <class T>
inline T cusim_rounded_(T value) {
  __asm__("" : "+x"(value));
  return value;
}
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fmul_rn(float a, float b) { return cusim_rounded_(a * b); }
inline float __fadd_rn(float a, float b) { return cusim_rounded_(a + b); }
inline float __fsub_rn(float a, float b) { return cusim_rounded_(a - b); }
inline float __fdividef(float a, float b) { return a / b; }
inline double __fma_rn(double a, double b, double c) { return std::fma(a, b, c); }
inline double __dmul_rn(double a, double b) { return cusim_rounded_(a * b); }
inline double __dsub_rn(double a, double b) { return cusim_rounded_(a - b); }
inline double __dadd_rn(double a, double b) { return a + b; }
inline float __expf(float a) { return std::exp(a); }
inline float __logf(float a) { return std::log(a); }
inline float rsqrtf(float a) { return 1.0f / std::sqrt(a); }
inline double rsqrt(double a) { return 1.0 / std::sqrt(a); }

#define FF_LAUNCH(kernel, grid, block, shared, stream, ...) \
  (static_cast<void>(stream),                               \
   ::cusim::launch_kernel(#kernel, grid, block, shared, kernel __VA_OPT__(, ) __VA_ARGS__))
#define FF_ASSERT(condition) \
  ((condition) ? void(0) : ::cusim::fail("assertion failed: %s", #condition))
// Few, so that what they share out takes several turns.
inline int ff_processors() { return 1; }
#define FF_ALLOW_SHARED(kernel, bytes) \
  ::cusim::allow_shared(reinterpret_cast<const void*>(kernel), bytes)
#define FF_SHARED(type, name, dims)             \
  static const char cusim_key_##name = 0;       \
  auto& name = *reinterpret_cast<type(*) dims>( \
      ::cusim::shared_slot(&cusim_key_##name, sizeof(type dims), alignof(type)))
#define FF_DYNAMIC_SHARED(type, name) type* name = reinterpret_cast<type*>(::cusim::dyn_shared())

// csrc/cuda/ptx.h: a copy lands at the wait, as late as the hardware may deliver it, so that a
// missing wait is seen.
template <int bytes>
inline void ff_cp_async(void* to, const void* from, bool take) {
  ::cusim::cp_async(to, from, bytes, take);
}
inline void ff_cp_commit() { ::cusim::cp_commit(); }
template <int left>
inline void ff_cp_wait() {
  ::cusim::cp_wait(left);
}
inline void ff_store(float* to, const float (&from)[4]) {
  *reinterpret_cast<float4*>(to) = make_float4(from[0], from[1], from[2], from[3]);
}
inline void ff_store(double* to, const double (&from)[2]) {
  *reinterpret_cast<double2*>(to) = make_double2(from[0], from[1]);
}

namespace cusim {
// The four sums of a lane, of m16n8 matrices whose elements `a(row, k)` and `b(k, column)` give;
// added up without rounding, and rounded once.
template <int depth, class A, class B>
CUSIM_NOSAN void mma_16x8(float (&d)[4], A a, B b) {
  const int group = static_cast<int>(cur->lane) / 4, pair = static_cast<int>(cur->lane) % 4;
  for (int i = 0; i < 4; ++i) {
    double sum = d[i];
    for (int k = 0; k < depth; ++k) {
      sum += static_cast<double>(a(group + 8 * (i / 2), k)) * b(k, 2 * pair + i % 2);
    }
    d[i] = static_cast<float>(sum);
  }
}
// Register `index` of lane `lane` among `count` of each lane.
CUSIM_NOSAN inline unsigned lane_register(const unsigned char* all, int count, int lane,
                                          int index) {
  unsigned result;
  std::memcpy(&result, all + (lane * count + index) * 4, sizeof result);
  return result;
}
CUSIM_NOSAN inline float bf16_half(unsigned pair, int half) {
  return bits_as<float>((half ? pair >> 16 : pair & 0xffff) << 16);
}
}  // namespace cusim

CUSIM_NOSAN inline void ff_mma_bf16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  const unsigned mine[6] = {a[0], a[1], a[2], a[3], b[0], b[1]};
  const unsigned char* all =
      ::cusim::warp_gather(0xffffffffu, ::cusim::op_mma, mine, sizeof mine, 0);
  ::cusim::mma_16x8<16>(
      d,
      [all](int m, int k) CUSIM_NOSAN_L {
        const int lane = m % 8 * 4 + k % 8 / 2, index = k / 8 * 2 + m / 8;
        return ::cusim::bf16_half(::cusim::lane_register(all, 6, lane, index), k % 2);
      },
      [all](int k, int n) CUSIM_NOSAN_L {
        const int lane = n * 4 + k % 8 / 2, index = 4 + k / 8;
        return ::cusim::bf16_half(::cusim::lane_register(all, 6, lane, index), k % 2);
      });
  ::cusim::warp_release();
}

// Reads 19 bits of an operand, as the hardware does, so that a product of unrounded numbers is
// seen.
CUSIM_NOSAN inline void ff_mma_tf32(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  const unsigned mine[6] = {a[0], a[1], a[2], a[3], b[0], b[1]};
  const unsigned char* all =
      ::cusim::warp_gather(0xffffffffu, ::cusim::op_mma_tf32, mine, sizeof mine, 0);
  const auto number = [all](int lane, int index) CUSIM_NOSAN_L {
    return __uint_as_float(::cusim::lane_register(all, 6, lane, index) & 0xffffe000u);
  };
  ::cusim::mma_16x8<8>(
      d,
      [number](int m, int k) CUSIM_NOSAN_L { return number(m % 8 * 4 + k % 4, k / 4 * 2 + m / 8); },
      [number](int k, int n) CUSIM_NOSAN_L { return number(n * 4 + k % 4, 4 + k / 4); });
  ::cusim::warp_release();
}
// Ties away from zero, as cvt.rna.tf32; infinities and NaN stay what they are.
inline unsigned ff_tf32(float value) {
  const unsigned bits = __float_as_uint(value);
  if (!std::isfinite(value)) return bits | (std::isnan(value) ? 0x00400000u : 0u);
  return (bits + 0x1000u) & 0xffffe000u;
}

inline void ff_ldmatrix(unsigned (&r)[4], const void* row) { ::cusim::ldmatrix(r, row, false); }
inline void ff_ldmatrix_trans(unsigned (&r)[4], const void* row) {
  ::cusim::ldmatrix(r, row, true);
}
