// The CUDA language for a C++ compiler on the host: csrc/cuda/device.h includes this file in place of
// CUDA where FASTFISHER_EMULATED is defined.
#pragma once
#include <stdint.h>
#include <vector_types.h>
#include <vector_functions.h>
#include <cuda_fp16.h>
#include <cuda_bf16.h>
#include <cstring>
#include <cmath>
#include <algorithm>
#include <type_traits>
#undef __global__
#undef __device__
#undef __host__
#undef __forceinline__
#undef __launch_bounds__
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __restrict__ __restrict
#undef __constant__
#define __constant__ static
#define CUSIM_NOSAN_L __attribute__((no_sanitize("thread")))
#define CUSIM_NOSAN __attribute__((no_sanitize("thread"), noinline))
using std::min; using std::max;
namespace cusim {
struct Thr { uint3 tid; unsigned lin, lane, warp; };
struct Cfg { uint3 bid; dim3 bdim, gdim; };
extern Thr* cur; extern Cfg cfg;                       // current simulated thread / block
void* shared_slot(const void* key, size_t bytes, size_t align);
void* dyn_shared();
void  block_barrier(int line, int red, unsigned pred, unsigned* out);   // red: 0 none 1 count 2 and 3 or
void  warp_sync(unsigned mask, int line);
// generic warp rendezvous: every lane of mask deposits n bytes; all lanes see all deposits
const unsigned char* warp_gather(unsigned mask, int op, const void* v, unsigned n, int line);
void  warp_release();
void  fence();
unsigned long long clock64_();
void  fail(const char* fmt, ...);
int   launch(dim3 g, dim3 b, size_t smem, void (*f)(void*), void* arg, const char* name);
template <class F> int launch_lambda(dim3 g, dim3 b, size_t smem, F&& f, const char* name) {
  typedef typename std::remove_reference<F>::type L;
  return launch(g, b, smem, [](void* p) { (*static_cast<L*>(p))(); }, (void*)&f, name);
}
template <class T> struct Box { T v; unsigned arg; };
template <class T, class S> CUSIM_NOSAN T shfl(unsigned mask, T v, int line, int op, S src_of) {
  Box<T> b; std::memset(&b, 0, sizeof b); b.v = v;
  unsigned lane = cur->lane; int src = src_of((int)lane);
  const unsigned char* all = warp_gather(mask, op, &b, sizeof b, line);
  T r = v;
  if (src >= 0) {
    if (!((mask >> src) & 1)) fail("line %d: shuffle reads lane %d, which is not in mask %08x", line, src, mask);
    std::memcpy(&r, all + (size_t)src * sizeof b, sizeof r);
  }
  warp_release(); return r;
}
template <class T> T shfl_xor(unsigned m, T v, int x, int w, int line) {
  return shfl(m, v, line, 1, [=](int l) { int s = l ^ x; return s / w <= l / w ? s : -1; }); }
template <class T> T shfl_down(unsigned m, T v, int d, int w, int line) {
  return shfl(m, v, line, 2, [=](int l) { int s = l + d; return (l & (w - 1)) + d < w ? s : -1; }); }
template <class T> T shfl_up(unsigned m, T v, int d, int w, int line) {
  return shfl(m, v, line, 3, [=](int l) { int s = l - d; return (l & (w - 1)) - d >= 0 ? s : -1; }); }
template <class T> T shfl_idx(unsigned m, T v, int i, int w, int line) {
  return shfl(m, v, line, 4, [=](int l) { return (l & ~(w - 1)) | (i & (w - 1)); }); }
CUSIM_NOSAN inline unsigned ballot(unsigned m, int p, int line) {
  unsigned char c = p != 0; const unsigned char* a = warp_gather(m, 5, &c, 1, line); unsigned r = 0;
  for (int i = 0; i < 32; i++) if ((m >> i) & 1 && a[i]) r |= 1u << i;
  warp_release(); return r; }
template <class T> CUSIM_NOSAN unsigned match_any(unsigned m, T v, int line) {
  const unsigned char* a = warp_gather(m, 6, &v, sizeof v, line); unsigned r = 0;
  for (int i = 0; i < 32; i++) if ((m >> i) & 1 && !std::memcmp(a + i * sizeof v, &v, sizeof v)) r |= 1u << i;
  warp_release(); return r; }
template <class T, class O> CUSIM_NOSAN T warp_red(unsigned m, T v, int line, int op, O o) {
  const unsigned char* a = warp_gather(m, op, &v, sizeof v, line); bool first = true; T r = v;
  for (int i = 0; i < 32; i++) if ((m >> i) & 1) { T x; std::memcpy(&x, a + i * sizeof v, sizeof x); r = first ? x : o(r, x); first = false; }
  warp_release(); return r; }
// ---- atomics: relaxed hardware atomics, so that race checkers see them as atomic
template <class T, class O> T atomic_rmw(T* p, O o) {
  typedef typename std::conditional<sizeof(T) == 8, unsigned long long, unsigned>::type U;
  U* q = reinterpret_cast<U*>(p); U old = __atomic_load_n(q, __ATOMIC_RELAXED), nw;
  do { T t; std::memcpy(&t, &old, sizeof t); T n = o(t); std::memcpy(&nw, &n, sizeof n);
  } while (!__atomic_compare_exchange_n(q, &old, nw, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
  T t; std::memcpy(&t, &old, sizeof t); return t; }
}  // namespace cusim
#define threadIdx (::cusim::cur->tid)
#define blockIdx  (::cusim::cfg.bid)
#define blockDim  (::cusim::cfg.bdim)
#define gridDim   (::cusim::cfg.gdim)
#define warpSize 32
#define __syncthreads()        ::cusim::block_barrier(__LINE__, 0, 0, nullptr)
static inline unsigned cusim_bar_(int l, int r, unsigned p) { unsigned o; ::cusim::block_barrier(l, r, p, &o); return o; }
#define __syncthreads_count(p) cusim_bar_(__LINE__, 1, (p) != 0)
#define __syncthreads_and(p)   cusim_bar_(__LINE__, 2, (p) != 0)
#define __syncthreads_or(p)    cusim_bar_(__LINE__, 3, (p) != 0)
#define CUSIM_MASK0(...) CUSIM_MASK0_(__VA_ARGS__, 0xffffffffu)
#define CUSIM_MASK0_(m, ...) m
static inline void cusim_syncwarp_(int line, unsigned m = 0xffffffffu) { ::cusim::warp_sync(m, line); }
#define __syncwarp(...) cusim_syncwarp_(__LINE__ __VA_OPT__(,) __VA_ARGS__)
#define CUSIM_W_(a, w, ...) w
template <class T> T cusim_sx(int l, unsigned m, T v, int x, int w = 32) { return ::cusim::shfl_xor(m, v, x, w, l); }
template <class T> T cusim_sd(int l, unsigned m, T v, int x, int w = 32) { return ::cusim::shfl_down(m, v, x, w, l); }
template <class T> T cusim_su(int l, unsigned m, T v, int x, int w = 32) { return ::cusim::shfl_up(m, v, x, w, l); }
template <class T> T cusim_si(int l, unsigned m, T v, int x, int w = 32) { return ::cusim::shfl_idx(m, v, x, w, l); }
#define __shfl_xor_sync(...)  cusim_sx(__LINE__, __VA_ARGS__)
#define __shfl_down_sync(...) cusim_sd(__LINE__, __VA_ARGS__)
#define __shfl_up_sync(...)   cusim_su(__LINE__, __VA_ARGS__)
#define __shfl_sync(...)      cusim_si(__LINE__, __VA_ARGS__)
#define __ballot_sync(m, p)   ::cusim::ballot(m, p, __LINE__)
#define __any_sync(m, p)      (::cusim::ballot(m, p, __LINE__) != 0)
#define __all_sync(m, p)      (::cusim::ballot(m, p, __LINE__) == (m))
#define __match_any_sync(m, v) ::cusim::match_any(m, v, __LINE__)
#define __reduce_add_sync(m, v) ::cusim::warp_red(m, v, __LINE__, 7, [](auto a, auto b) { return a + b; })
#define __reduce_max_sync(m, v) ::cusim::warp_red(m, v, __LINE__, 8, [](auto a, auto b) { return a > b ? a : b; })
#define __reduce_min_sync(m, v) ::cusim::warp_red(m, v, __LINE__, 9, [](auto a, auto b) { return a < b ? a : b; })
template <class T, class V> T atomicAdd(T* p, V v) { return ::cusim::atomic_rmw(p, [=](T x) { return (T)(x + (T)v); }); }
template <class T, class V> T atomicMax(T* p, V v) { return ::cusim::atomic_rmw(p, [=](T x) { return x > (T)v ? x : (T)v; }); }
template <class T, class V> T atomicMin(T* p, V v) { return ::cusim::atomic_rmw(p, [=](T x) { return x < (T)v ? x : (T)v; }); }
template <class T, class V> T atomicOr(T* p, V v)  { return ::cusim::atomic_rmw(p, [=](T x) { return (T)(x | (T)v); }); }
template <class T, class V> T atomicAnd(T* p, V v) { return ::cusim::atomic_rmw(p, [=](T x) { return (T)(x & (T)v); }); }
template <class T, class V> T atomicExch(T* p, V v){ return ::cusim::atomic_rmw(p, [=](T) { return (T)v; }); }
template <class T, class C, class V> T atomicCAS(T* p, C c, V v) { return ::cusim::atomic_rmw(p, [=](T x) { return x == (T)c ? (T)v : x; }); }
#define __threadfence() ::cusim::fence()
#define __threadfence_block() ::cusim::fence()
template <class T> T __ldg(const T* p) { return *p; }
template <class T> T __ldcs(const T* p) { return *p; }
template <class T, class V> void __stcs(T* p, V v) { *p = v; }
static inline int __popc(unsigned x) { return __builtin_popcount(x); }
static inline int __ffs(int x) { return __builtin_ffs(x); }
static inline int __clz(int x) { return x ? __builtin_clz((unsigned)x) : 32; }
static inline unsigned __float_as_uint(float f) { unsigned u; std::memcpy(&u, &f, 4); return u; }
static inline float __uint_as_float(unsigned u) { float f; std::memcpy(&f, &u, 4); return f; }
static inline int __float_as_int(float f) { return (int)__float_as_uint(f); }
static inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
static inline float __fmul_rn(float a, float b) { return a * b; }
static inline float __fadd_rn(float a, float b) { return a + b; }
static inline float rsqrtf(float a) { return 1.0f / std::sqrt(a); }
#define FF_LAUNCH(kernel, grid, block, shared, stream, ...)                                       \
  ((void)(stream),                                                                                 \
   ::cusim::launch_lambda(                                                                         \
       grid, block, shared, [&]() CUSIM_NOSAN_L { (kernel)(__VA_ARGS__); }, #kernel))
#define FF_ALLOW_SHARED(kernel, bytes) 0
#define FF_SHARED(type, name, dims)            \
  static const char cusim_key_##name = 0;      \
  auto& name = *reinterpret_cast<type(*) dims>( \
      ::cusim::shared_slot(&cusim_key_##name, sizeof(type dims), alignof(type) > 16 ? alignof(type) : 16))
#define FF_DYNAMIC_SHARED(type, name) type* name = reinterpret_cast<type*>(::cusim::dyn_shared())

// csrc/cuda/ptx.h: a copy lands at the wait, as late as the hardware may deliver it, so that a missing
// wait is seen.
namespace cusim {
void cp_async(void* to, const void* from, unsigned bytes, bool take);
void cp_commit();
void cp_wait(int left);
}  // namespace cusim
template <int bytes>
inline void ff_cp_async(void* to, const void* from, bool take) {
  ::cusim::cp_async(to, from, bytes, take);
}
inline void ff_cp_commit() { ::cusim::cp_commit(); }
template <int left>
inline void ff_cp_wait() {
  ::cusim::cp_wait(left);
}
CUSIM_NOSAN inline void ff_mma_bf16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  unsigned v[6] = {a[0], a[1], a[2], a[3], b[0], b[1]};
  const unsigned char* all = ::cusim::warp_gather(0xffffffffu, 20, v, sizeof v, 0);
  auto reg = [&](int lane, int r) CUSIM_NOSAN_L { unsigned x; std::memcpy(&x, all + lane * 24 + r * 4, 4); return x; };
  auto bf = [](unsigned h) CUSIM_NOSAN_L { unsigned u = h << 16; float f; std::memcpy(&f, &u, 4); return f; };
  auto A = [&](int m, int k) CUSIM_NOSAN_L { unsigned x = reg((m % 8) * 4 + (k % 8) / 2, (k / 8) * 2 + m / 8); return bf(k & 1 ? x >> 16 : x & 0xffff); };
  auto B = [&](int k, int n) CUSIM_NOSAN_L { unsigned x = reg(n * 4 + (k % 8) / 2, 4 + k / 8); return bf(k & 1 ? x >> 16 : x & 0xffff); };
  int g = ::cusim::cur->lane / 4, t = ::cusim::cur->lane % 4;
  for (int i = 0; i < 4; i++) { double s = d[i]; for (int k = 0; k < 16; k++) s += (double)A(g + 8 * (i / 2), k) * B(k, 2 * t + i % 2); d[i] = (float)s; }
  ::cusim::warp_release();
}
