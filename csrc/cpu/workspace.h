// Buffers that grow and are kept by the calling thread, so that a call per layer does not ask the
// system for fresh pages each time.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace fastfisher::cpu {

// What a call shares among its threads, and what a thread uses for its own part of the work: the
// thread that calls does both.
enum class Scope { kCall, kThread };

class Workspace {
 public:
  // `bytes` of memory, aligned to a cache line, valid until the next call for this scope on this
  // thread.
  template <Scope scope = Scope::kCall>
  static void* get(size_t bytes) {
    thread_local Workspace workspace;
    if (bytes > workspace.bytes_) {
      const size_t rounded = (bytes + 4095) / 4096 * 4096;
      workspace.memory_.reset();
      workspace.bytes_ = 0;
      void* memory = std::aligned_alloc(64, rounded);
      if (memory == nullptr) throw std::bad_alloc();
      workspace.memory_.reset(memory);
      workspace.bytes_ = rounded;
    }
#if defined(__SANITIZE_ADDRESS__)
    // What an earlier call needed is no more this call's than memory of anybody else.
    char* const begin = static_cast<char*>(workspace.memory_.get());
    ASAN_UNPOISON_MEMORY_REGION(begin, bytes);
    ASAN_POISON_MEMORY_REGION(begin + bytes, workspace.bytes_ - bytes);
#endif
    return workspace.memory_.get();
  }

 private:
  struct Free {
    void operator()(void* memory) const { std::free(memory); }
  };
  std::unique_ptr<void, Free> memory_;
  size_t bytes_ = 0;
};

}  // namespace fastfisher::cpu
