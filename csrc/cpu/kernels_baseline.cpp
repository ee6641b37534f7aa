// baseline variant of kernels_impl.h.
#include "kernels.h"

#define FF_NAME "baseline"
#define FF_TABLE kernels_baseline
#define FF_VECTOR_BYTES 16
#define FF_MAX_ROWS 6
#include "kernels_impl.h"
