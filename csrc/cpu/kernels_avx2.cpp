// avx2 variant of kernels_impl.h.
#include "kernels.h"

// The target stays set to the end of the file, where templates are instantiated. Only kernels.h is
// included, so no library function is compiled for this instruction set.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif

#define FF_NAME "avx2"
#define FF_TABLE kernels_avx2
#define FF_VECTOR_BYTES 32
#define FF_MAX_ROWS 6
#include "kernels_impl.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif
