// What the runtime tells the checker, which is there in a checked build only, and what it asks for.
#pragma once

#include <cstddef>

#include "runtime.h"

namespace cusim {

// The fiber that runs, for the checker to know it and to leave its stack alone.
struct Running {
  const Thread* thread;
  const char* stack;
  size_t stack_bytes;
};
Running running();

}  // namespace cusim

#define CUSIM_HOOK __attribute__((weak))
extern "C" {
CUSIM_HOOK void cucheck_launch(const char* kernel);
CUSIM_HOOK void cucheck_block_begin(unsigned threads);
CUSIM_HOOK void cucheck_block_end();
CUSIM_HOOK void cucheck_barrier();
CUSIM_HOOK void cucheck_warp_sync(unsigned warp, unsigned mask);
CUSIM_HOOK void cucheck_fence();
CUSIM_HOOK void cucheck_shared(void* begin, size_t bytes);
CUSIM_HOOK void cucheck_global(void* begin, size_t bytes, int writable, int initialised);
CUSIM_HOOK void cucheck_initialised();
CUSIM_HOOK void cucheck_forget();
// Accesses that the emulator makes for the kernel that is at `code`.
CUSIM_HOOK void cucheck_read(const void* from, size_t bytes, const void* code);
CUSIM_HOOK void cucheck_copy_issued(void* to, size_t bytes, const void* code);
CUSIM_HOOK void cucheck_copy_landed(void* to, size_t bytes, const void* code);
}
