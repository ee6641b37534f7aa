// The recurrent steps: a thread has some neighbouring hidden units of one sample. Outputs may be
// inputs, so a thread reads all of its own before it writes.
#include "recurrent.h"

#include <algorithm>
#include <type_traits>

#include "device.h"
#include "vectors.cuh"

namespace fastfisher::cuda {
namespace {

constexpr int kThreads = 256;           // of a block
constexpr int64_t kMostBlocks = 65535;  // of a grid's second dimension

// The number of a single unit, where there are no vectors.
template <typename T>
struct Single {
  static constexpr int size = 1;
  T lanes[1];
};
template <typename T, bool vector>
struct Step {
  using Values = std::conditional_t<vector, Vector<T>, Single<T>>;
  static constexpr int count = Values::size;

  // The row's numbers from `at` on.
  template <typename Data>
  __device__ __forceinline__ static Values read(const Rows<Data>& from, int64_t row, int64_t at) {
    return read(from.data + row * from.stride + at);
  }
  __device__ __forceinline__ static Values read(const T* from) {
    return *reinterpret_cast<const Values*>(from);
  }
  __device__ __forceinline__ static void write(const Rows<T>& to, int64_t row, int64_t at,
                                               const Values& values) {
    T* const place = to.data + row * to.stride + at;
    if constexpr (vector) {
      ff_store(place, values.lanes);
    } else {
      *place = values.lanes[0];
    }
  }
  // Zeros where the operand is absent.
  __device__ __forceinline__ static void add(Values& to, const Rows<const T>& from, int64_t row,
                                             int64_t at) {
    if (from.data != nullptr) add(to, read(from, row, at));
  }
  __device__ __forceinline__ static void add_bias(Values& to, const T* bias, int64_t at) {
    if (bias != nullptr) add(to, read(bias + at));
  }
  __device__ __forceinline__ static void add(Values& to, const Values& values) {
#pragma unroll
    for (int k = 0; k < count; ++k) to.lanes[k] += values.lanes[k];
  }
};

__device__ __forceinline__ float exponential(float x) { return expf(x); }
__device__ __forceinline__ double exponential(double x) { return exp(x); }
__device__ __forceinline__ float squashed(float x) { return tanhf(x); }
__device__ __forceinline__ double squashed(double x) { return tanh(x); }
template <typename T>
__device__ __forceinline__ T sigmoid(T x) {
  return T(1) / (T(1) + exponential(-x));
}

template <bool vector, typename T>
__device__ __forceinline__ void do_step(const LstmStep<T>& s, int64_t n, int64_t u) {
  using S = Step<T, vector>;
  typename S::Values i = S::read(s.gates, n, u), f = S::read(s.gates, n, u + s.units);
  typename S::Values g = S::read(s.gates, n, u + 2 * s.units);
  typename S::Values o = S::read(s.gates, n, u + 3 * s.units);
  typename S::Values cell = S::read(s.cell, n, u), hidden;
  S::add_bias(i, s.bias, u);
  S::add_bias(f, s.bias, u + s.units);
  S::add_bias(g, s.bias, u + 2 * s.units);
  S::add_bias(o, s.bias, u + 3 * s.units);
#pragma unroll
  for (int k = 0; k < S::count; ++k) {
    i.lanes[k] = sigmoid(i.lanes[k]);
    f.lanes[k] = sigmoid(f.lanes[k]);
    g.lanes[k] = squashed(g.lanes[k]);
    o.lanes[k] = sigmoid(o.lanes[k]);
    cell.lanes[k] = f.lanes[k] * cell.lanes[k] + i.lanes[k] * g.lanes[k];
    hidden.lanes[k] = o.lanes[k] * squashed(cell.lanes[k]);
  }
  S::write(s.gates, n, u, i);
  S::write(s.gates, n, u + s.units, f);
  S::write(s.gates, n, u + 2 * s.units, g);
  S::write(s.gates, n, u + 3 * s.units, o);
  S::write(s.next_cell, n, u, cell);
  S::write(s.hidden, n, u, hidden);
}

template <bool vector, typename T>
__device__ __forceinline__ void do_step(const LstmStepBackward<T>& s, int64_t n, int64_t u) {
  using S = Step<T, vector>;
  typename S::Values i = S::read(s.gates, n, u), f = S::read(s.gates, n, u + s.units);
  typename S::Values g = S::read(s.gates, n, u + 2 * s.units);
  typename S::Values o = S::read(s.gates, n, u + 3 * s.units);
  const typename S::Values cell = S::read(s.cell, n, u), next_cell = S::read(s.next_cell, n, u);
  typename S::Values grad_cell = S::read(s.grad_cell, n, u), grad{};
  S::add(grad, s.grad_output, n, u);
  S::add(grad, s.grad_hidden, n, u);
#pragma unroll
  for (int k = 0; k < S::count; ++k) {
    const T input = i.lanes[k], forget = f.lanes[k], fresh = g.lanes[k], output = o.lanes[k];
    const T state = squashed(next_cell.lanes[k]);
    const T d = grad_cell.lanes[k] + grad.lanes[k] * output * (T(1) - state * state);
    i.lanes[k] = d * fresh * (input * (T(1) - input));
    f.lanes[k] = d * cell.lanes[k] * (forget * (T(1) - forget));
    g.lanes[k] = d * input * (T(1) - fresh * fresh);
    o.lanes[k] = grad.lanes[k] * state * (output * (T(1) - output));
    grad_cell.lanes[k] = d * forget;
  }
  S::write(s.grad_gates, n, u, i);
  S::write(s.grad_gates, n, u + s.units, f);
  S::write(s.grad_gates, n, u + 2 * s.units, g);
  S::write(s.grad_gates, n, u + 3 * s.units, o);
  S::write(s.grad_cell, n, u, grad_cell);
}

template <bool vector, typename T>
__device__ __forceinline__ void do_step(const GruStep<T>& s, int64_t n, int64_t u) {
  using S = Step<T, vector>;
  typename S::Values r = S::read(s.gates, n, u), z = S::read(s.gates, n, u + s.units);
  typename S::Values fresh = S::read(s.gates, n, u + 2 * s.units);
  typename S::Values candidate = S::read(s.product, n, u + 2 * s.units);
  typename S::Values hidden = S::read(s.hidden, n, u);
  S::add(r, S::read(s.product, n, u));
  S::add(z, S::read(s.product, n, u + s.units));
  S::add_bias(r, s.bias, u);
  S::add_bias(z, s.bias, u + s.units);
  S::add_bias(candidate, s.bias, u + 2 * s.units);
#pragma unroll
  for (int k = 0; k < S::count; ++k) {
    r.lanes[k] = sigmoid(r.lanes[k]);
    z.lanes[k] = sigmoid(z.lanes[k]);
    fresh.lanes[k] = squashed(fresh.lanes[k] + r.lanes[k] * candidate.lanes[k]);
    hidden.lanes[k] = fresh.lanes[k] + z.lanes[k] * (hidden.lanes[k] - fresh.lanes[k]);
  }
  S::write(s.gates, n, u, r);
  S::write(s.gates, n, u + s.units, z);
  S::write(s.gates, n, u + 2 * s.units, fresh);
  S::write(s.candidate, n, u, candidate);
  S::write(s.next_hidden, n, u, hidden);
}

template <bool vector, typename T>
__device__ __forceinline__ void do_step(const GruStepBackward<T>& s, int64_t n, int64_t u) {
  using S = Step<T, vector>;
  typename S::Values r = S::read(s.gates, n, u), z = S::read(s.gates, n, u + s.units);
  typename S::Values fresh = S::read(s.gates, n, u + 2 * s.units);
  typename S::Values candidate = S::read(s.candidate, n, u);
  const typename S::Values hidden = S::read(s.hidden, n, u);
  typename S::Values grad = S::read(s.grad_hidden, n, u);
  S::add(grad, s.grad_output, n, u);
#pragma unroll
  for (int k = 0; k < S::count; ++k) {
    const T reset = r.lanes[k], update = z.lanes[k], value = fresh.lanes[k];
    const T grad_fresh = grad.lanes[k] * (T(1) - update) * (T(1) - value * value);
    r.lanes[k] = grad_fresh * candidate.lanes[k] * (reset * (T(1) - reset));
    z.lanes[k] = grad.lanes[k] * (hidden.lanes[k] - value) * (update * (T(1) - update));
    fresh.lanes[k] = grad_fresh;
    candidate.lanes[k] = grad_fresh * reset;
    grad.lanes[k] *= update;
  }
  S::write(s.grad_gates, n, u, r);
  S::write(s.grad_gates, n, u + s.units, z);
  S::write(s.grad_gates, n, u + 2 * s.units, fresh);
  S::write(s.grad_product, n, u, r);
  S::write(s.grad_product, n, u + s.units, z);
  S::write(s.grad_product, n, u + 2 * s.units, candidate);
  S::write(s.grad_hidden, n, u, grad);
}

template <bool vector, template <typename> class S, typename T>
__global__ void __launch_bounds__(kThreads, 2) recurrent_step(const S<T> s) {
  const int64_t u = (int64_t{blockIdx.x} * blockDim.x + threadIdx.x) * Step<T, vector>::count;
  if (u >= s.units) return;
  const int64_t rows = int64_t{gridDim.y} * blockDim.y;
  for (int64_t n = int64_t{blockIdx.y} * blockDim.y + threadIdx.y; n < s.rows; n += rows) {
    do_step<vector>(s, n, u);
  }
}

// Whether a step's operands allow vectors, apart from the number of units.
template <typename T>
bool has_vectors(const Rows<T>& rows) {
  return rows.data == nullptr || is_aligned(rows.data, rows.stride);
}

template <typename T>
bool has_vectors(const LstmStep<T>& s) {
  return has_vectors(s.gates) && is_aligned(s.bias) && has_vectors(s.cell) &&
         has_vectors(s.next_cell) && has_vectors(s.hidden);
}

template <typename T>
bool has_vectors(const LstmStepBackward<T>& s) {
  return has_vectors(s.grad_gates) && has_vectors(s.grad_cell) && has_vectors(s.grad_output) &&
         has_vectors(s.grad_hidden) && has_vectors(s.gates) && has_vectors(s.cell) &&
         has_vectors(s.next_cell);
}

template <typename T>
bool has_vectors(const GruStep<T>& s) {
  return has_vectors(s.gates) && has_vectors(s.product) && is_aligned(s.bias) &&
         has_vectors(s.hidden) && has_vectors(s.candidate) && has_vectors(s.next_hidden);
}

template <typename T>
bool has_vectors(const GruStepBackward<T>& s) {
  return has_vectors(s.grad_gates) && has_vectors(s.grad_product) && has_vectors(s.grad_hidden) &&
         has_vectors(s.grad_output) && has_vectors(s.gates) && has_vectors(s.candidate) &&
         has_vectors(s.hidden);
}

template <template <typename> class S, typename T>
int launch(const S<T>& s, void* stream) {
  if (s.rows == 0 || s.units == 0) return 0;
  const bool vector = s.units % Vector<T>::size == 0 && has_vectors(s);
  const int64_t threads = vector ? s.units / Vector<T>::size : s.units;
  dim3 block(1, kThreads);
  while (block.x < kThreads && block.x < threads) {
    block.x *= 2;
    block.y /= 2;
  }
  const dim3 grid(static_cast<unsigned>(ceil_div(threads, block.x)),
                  static_cast<unsigned>(std::min(ceil_div(s.rows, block.y), kMostBlocks)));
  return vector ? FF_LAUNCH((recurrent_step<true, S, T>), grid, block, 0, stream, s)
                : FF_LAUNCH((recurrent_step<false, S, T>), grid, block, 0, stream, s);
}

}  // namespace
}  // namespace fastfisher::cuda

#define FF_LAUNCHER(name, Step, type)                                              \
  extern "C" int name##_##type(const fastfisher::Step<type>* step, void* stream) { \
    return fastfisher::cuda::launch(*step, stream);                                \
  }
FF_LAUNCHER(ff_lstm_step, LstmStep, float)
FF_LAUNCHER(ff_lstm_step, LstmStep, double)
FF_LAUNCHER(ff_lstm_step_backward, LstmStepBackward, float)
FF_LAUNCHER(ff_lstm_step_backward, LstmStepBackward, double)
FF_LAUNCHER(ff_gru_step, GruStep, float)
FF_LAUNCHER(ff_gru_step, GruStep, double)
FF_LAUNCHER(ff_gru_step_backward, GruStepBackward, float)
FF_LAUNCHER(ff_gru_step_backward, GruStepBackward, double)
