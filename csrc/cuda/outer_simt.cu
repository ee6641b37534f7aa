// A placeholder that shows the pattern: one thread computes one element. Float32, linear only.
#include "device.h"
#include "outer.h"

namespace fastfisher::cuda {
namespace {

__global__ void outer_simt(float* out, const float* g, const float* x, Problem p, float alpha) {
  const int64_t column = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  const int64_t row = blockIdx.y;
  if (column >= p.columns) return;
  float sum = 0;
  for (int64_t n = 0; n < p.samples; ++n) {
    float dot = 0;
    for (int64_t t = 0; t < p.out_width; ++t) {
      dot += g[n * p.g_stride[0] + row * p.g_stride[1] + t * p.g_stride[3]] *
             x[n * p.x_stride[0] + column * p.x_stride[1] + t * p.x_stride[3]];
    }
    sum += p.absolute ? fabsf(dot) : dot * dot;
  }
  out[row * p.out_stride[0] + column * p.out_stride[1]] += alpha * sum;
}

}  // namespace
}  // namespace fastfisher::cuda

extern "C" int ff_outer_simt_float(const fastfisher::Problem* problem, float* out, const float* g,
                                   const float* x, double alpha, void* stream) {
  const fastfisher::Problem& p = *problem;
  const dim3 grid(static_cast<unsigned>(fastfisher::ceil_div(p.columns, 64)),
                  static_cast<unsigned>(p.rows));
  return FF_LAUNCH(fastfisher::cuda::outer_simt, grid, dim3(64), 0, stream, out, g, x, p,
                   static_cast<float>(alpha));
}
