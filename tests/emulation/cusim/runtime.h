// What the CUDA language of cusim.h stands on: threads, barriers, meetings of a warp, launches.
//
// Everything runs on one thread of the host. Each CUDA thread of a block is a fiber with a stack of
// its own, which runs until it waits for others; blocks run one after another. The order is
// forward, reverse or random, and the same order gives the same bits.
#pragma once

#include <vector_functions.h>
#include <vector_types.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

// For code of the emulator that is compiled into kernels, which the checkers shall not look at.
#define CUSIM_NOSAN_L __attribute__((no_sanitize("thread", "undefined")))
#define CUSIM_NOSAN __attribute__((no_sanitize("thread", "undefined"), noinline))

namespace cusim {

struct Thread {
  uint3 tid;
  unsigned linear, lane, warp;
};
struct Block {
  uint3 bid;
  dim3 bdim, gdim;
};
// The thread that runs, null outside a kernel, and its block.
extern Thread* cur;
extern Block cfg;

// Ends the launch with error 700 and this message, which says also where.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

// FF_SHARED, by the address of a static of its place in the source; FF_DYNAMIC_SHARED.
void* shared_slot(const void* key, size_t bytes, size_t align);
void* dyn_shared();
int allow_shared(const void* kernel, size_t bytes);

enum class Reduce { none, count, all, any };
unsigned block_barrier(int line, Reduce reduce, unsigned predicate);
void warp_sync(unsigned mask, int line);
void fence();
unsigned active_mask();

// The lanes of `mask` meet: each gives `bytes` bytes (64 at most) and gets what all gave, lane
// after lane, which stays until its warp_release(). `op` tells the operations apart that could
// meet.
const unsigned char* warp_gather(unsigned mask, int op, const void* value, unsigned bytes,
                                 int line);
void warp_release();

// Copies to shared memory in the background: csrc/cuda/ptx.h.
void cp_async(void* to, const void* from, unsigned bytes, bool take);
void cp_commit();
void cp_wait(int left);
// Forgets the copies of the block before.
void reset_copies();

// Four 8 x 8 matrices of 16-bit elements from shared memory, by the rows that the lanes name.
void ldmatrix(unsigned (&result)[4], const void* row, bool transposed);

struct Launch {
  const char* name;
  const void* kernel;
  dim3 grid, block;
  size_t shared;
  const unsigned char* parameters;
  size_t parameter_bytes;
};
int launch(const Launch& what, void (*run)(void*), void* argument);

// The bytes of a kernel's parameters, where the device finds them.
class Parameters {
 public:
  template <class T>
  void add(const T& value) {
    size_ = (size_ + alignof(T) - 1) / alignof(T) * alignof(T);
    static_assert(std::is_trivially_copyable_v<T>, "a kernel's parameters are copied as bytes");
    if (size_ + sizeof(T) <= sizeof bytes_) std::memcpy(bytes_ + size_, &value, sizeof(T));
    size_ += sizeof(T);
  }
  const unsigned char* data() const { return bytes_; }
  size_t size() const { return size_; }

 private:
  alignas(16) unsigned char bytes_[4096] = {};
  size_t size_ = 0;
};

template <class... P, class... A>
int launch_kernel(const char* name, dim3 grid, dim3 block, size_t shared, void (*kernel)(P...),
                  A&&... arguments) {
  Parameters parameters;
  (parameters.add(static_cast<P>(arguments)), ...);
  auto run = [&]() CUSIM_NOSAN_L { kernel(static_cast<P>(arguments)...); };
  const Launch what{name,
                    reinterpret_cast<const void*>(kernel),
                    grid,
                    block,
                    shared,
                    parameters.data(),
                    parameters.size()};
  return launch(what, [](void* p) CUSIM_NOSAN_L { (*static_cast<decltype(run)*>(p))(); }, &run);
}

}  // namespace cusim
