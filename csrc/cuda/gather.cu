// A warp has a window of ordered positions and a chunk of the columns.
#include "gather.h"

#include "device.h"
#include "vectors.cuh"

namespace fastfisher::cuda {
namespace {

constexpr int kWarp = 32;
constexpr int kWarps = 4;  // of a block; each works alone
constexpr unsigned kAll = 0xffffffffu;
constexpr int kBatch = 4;   // loads of a thread under way
constexpr int kBlocks = 4;  // of a multiprocessor, at least

template <typename T>
constexpr int64_t kChunk = kWarp * Vector<T>::size;

// The columns of one thread.
struct Columns {
  int64_t first, left;
  int apart;
};

struct Place {
  int64_t window;
  Columns columns;
};

template <bool vector, typename T>
__device__ __forceinline__ Place place(const GatherTask<T>& s) {
  const int64_t index = int64_t{blockIdx.x} * kWarps + threadIdx.x / kWarp;
  const int64_t chunks = (s.columns + kChunk<T> - 1) / kChunk<T>;
  const int64_t first =
      index % chunks * kChunk<T> + threadIdx.x % kWarp * (vector ? Vector<T>::size : 1);
  return {index / chunks, {first, s.columns - first, vector ? 1 : kWarp}};
}

template <typename T>
__device__ __forceinline__ T* part_at(const GatherTask<T>& s, int64_t window, Part part) {
  return s.parts + (window * kParts + part) * s.columns;
}

template <bool vector, typename T>
__device__ __forceinline__ void store_part(const GatherTask<T>& s, const Place& at, Part part,
                                           const Vector<T>& value) {
  store<vector>(part_at(s, at.window, part) + at.columns.first, value, 1, at.columns.apart,
                at.columns.left);
}

template <bool vector, typename T>
__device__ __forceinline__ Vector<T> load_part(const GatherTask<T>& s, int64_t window, Part part,
                                               const Columns& columns, bool there) {
  Vector<T> value;
  load<vector>(value, part_at(s, window, part) + columns.first, 1, columns.apart,
               there ? columns.left : 0);
  return value;
}

template <typename T>
__device__ __forceinline__ void add(Vector<T>& to, const Vector<T>& value) {
#pragma unroll
  for (int k = 0; k < Vector<T>::size; ++k) to.lanes[k] += value.lanes[k];
}

template <typename T>
__device__ __forceinline__ void add_powers(Vector<T>& to, const Vector<T>& value, bool absolute) {
#pragma unroll
  for (int k = 0; k < Vector<T>::size; ++k) to.lanes[k] += power_of(value.lanes[k], absolute);
}

// out[token] += alpha * squares. No other thread has this token and these columns.
template <bool vector, typename T>
__device__ __forceinline__ void add_to_out(const GatherTask<T>& s, int64_t token,
                                           const Columns& columns, const Vector<T>& squares) {
  if (token == s.padding_index) return;
  T* const to = s.out + token * s.out_row + columns.first * s.out_column;
  Vector<T> sum;
  load<vector>(sum, to, s.out_column, columns.apart, columns.left);
#pragma unroll
  for (int k = 0; k < Vector<T>::size; ++k) sum.lanes[k] += s.alpha * squares.lanes[k];
  store<vector>(to, sum, s.out_column, columns.apart, columns.left);
}

// Whether positions `at` and `at + 1` in the order have one token, and one token in one sample.
struct Joint {
  bool token, run;
};

template <typename T>
__device__ __forceinline__ Joint joint(const GatherTask<T>& s, int64_t at) {
  if (at < 0 || at + 1 >= s.count || s.tokens[at] != s.tokens[at + 1]) return {false, false};
  return {true, s.order[at] / s.positions == s.order[at + 1] / s.positions};
}

template <bool vector, typename T>
__global__ void __launch_bounds__(kWarps* kWarp, kBlocks) gather_windows(const GatherTask<T> s) {
  const Place at = place<vector>(s);
  if (at.window >= s.windows) return;
  const Columns columns = at.columns;
  const int lane = threadIdx.x % kWarp;
  const int64_t begin = at.window * s.window;
  const int64_t end = min(begin + s.window, s.count);
  const Joint before = joint(s, begin - 1), after = joint(s, end - 1);
  // Whether what is being added up was cut by the window's beginning.
  bool is_head = before.run, is_first = before.token;
  Vector<T> run{}, squares{};
  int64_t token = s.tokens[begin];

  const auto end_run = [&] {
    if (is_head) {
      store_part<vector>(s, at, kHead, run);
    } else {
      add_powers(squares, run, s.absolute);
    }
    is_head = false;
    run = {};
  };
  const auto end_token = [&] {
    if (is_first) {
      store_part<vector>(s, at, kFirstSquares, squares);
    } else {
      add_to_out<vector>(s, token, columns, squares);
    }
    is_first = false;
    squares = {};
  };

  int64_t last_token = token, last_sample = s.order[begin] / s.positions;
  for (int64_t base = begin; base < end; base += kWarp) {
    const int count = static_cast<int>(min(int64_t{kWarp}, end - base));
    // A lane prepares one position for all.
    const bool there = lane < count;
    const int64_t own_token = there ? s.tokens[base + lane] : int64_t{0};
    FF_ASSERT(own_token >= 0 && own_token < s.vocabulary);
    const int64_t place = there ? s.order[base + lane] : int64_t{0};
    const int64_t sample = place / s.positions;
    int64_t offset = sample * s.sample + (place - sample * s.positions) * s.position;
    if (own_token == s.padding_index) offset = -1;  // nothing to read
    int64_t previous_token = __shfl_up_sync(kAll, own_token, 1);
    int64_t previous_sample = __shfl_up_sync(kAll, sample, 1);
    if (lane == 0) {
      previous_token = last_token;
      previous_sample = last_sample;
    }
    last_token = __shfl_sync(kAll, own_token, kWarp - 1);
    last_sample = __shfl_sync(kAll, sample, kWarp - 1);
    const unsigned new_token = __ballot_sync(kAll, there && own_token != previous_token);
    const unsigned new_run = new_token | __ballot_sync(kAll, there && sample != previous_sample);

    for (int i = 0; i < count; i += kBatch) {
      Vector<T> rows[kBatch];
#pragma unroll
      for (int u = 0; u < kBatch; ++u) {
        const int64_t from = __shfl_sync(kAll, offset, i + u);
        const bool is_read = i + u < count && from >= 0;
        load<vector>(rows[u], s.g + (is_read ? from : 0) + columns.first * s.column, s.column,
                     columns.apart, is_read ? columns.left : 0);
      }
#pragma unroll
      for (int u = 0; u < kBatch; ++u) {
        // The same in all lanes.
        if (new_run >> (i + u) & 1) end_run();
        if (new_token >> (i + u) & 1) {
          end_token();
          token = __shfl_sync(kAll, own_token, i + u);
        }
        add(run, rows[u]);
      }
    }
  }

  if (after.run && !is_head) {
    store_part<vector>(s, at, kTail, run);
  } else if (after.run) {
    store_part<vector>(s, at, kHead, run);
  } else {
    end_run();
  }
  if (after.token && !is_first) {
    store_part<vector>(s, at, kLastSquares, squares);
  } else {
    end_token();
  }
}

// For every token that more than one window has: the warp of the first of them adds up all.
template <bool vector, typename T>
__global__ void __launch_bounds__(kWarps* kWarp, kBlocks) gather_spans(const GatherTask<T> s) {
  const Place at = place<vector>(s);
  if (at.window >= s.windows) return;
  const Columns columns = at.columns;
  const int lane = threadIdx.x % kWarp;
  const int64_t end = min((at.window + 1) * s.window, s.count);
  const Joint after = joint(s, end - 1);
  if (!after.token) return;
  const int64_t token = s.tokens[end - 1];
  const int64_t begin = at.window * s.window;
  if (begin > 0 && s.tokens[begin - 1] == token) return;
  Vector<T> squares = load_part<vector>(s, at.window, kLastSquares, columns, true);
  Vector<T> run = load_part<vector>(s, at.window, kTail, columns, after.run);

  for (int64_t base = at.window + 1; base < s.windows; base += kWarp) {
    // A lane prepares one window for all.
    const int64_t window = base + lane;
    const int64_t first = window * s.window;
    const bool there = first < s.count && s.tokens[first] == token;
    const int64_t last = min(first + s.window, s.count) - 1;
    const bool cut = there && joint(s, first - 1).run;
    const bool open = there && s.tokens[last] == token && joint(s, last).run;
    const bool one_run = there && s.tokens[last] == token &&
                         s.order[first] / s.positions == s.order[last] / s.positions;
    const int count = __popc(__ballot_sync(kAll, there));
    const unsigned heads = __ballot_sync(kAll, cut);
    const unsigned passes = __ballot_sync(kAll, cut && open && one_run);
    const unsigned tails = __ballot_sync(kAll, open) & ~passes;

    for (int i = 0; i < count; i += kBatch) {
      Vector<T> head[kBatch], tail[kBatch], inner[kBatch];
#pragma unroll
      for (int u = 0; u < kBatch; ++u) {
        const bool is_there = i + u < count;
        head[u] = load_part<vector>(s, base + i + u, kHead, columns, heads >> (i + u) & 1);
        tail[u] = load_part<vector>(s, base + i + u, kTail, columns, tails >> (i + u) & 1);
        inner[u] = load_part<vector>(s, base + i + u, kFirstSquares, columns, is_there);
      }
#pragma unroll
      for (int u = 0; u < kBatch; ++u) {
        if (i + u >= count) break;
        add(run, head[u]);
        if (passes >> (i + u) & 1) continue;
        // Without a run that was cut this adds zeros.
        add_powers(squares, run, s.absolute);
        add(squares, inner[u]);
        run = tail[u];
      }
    }
    if (count < kWarp) break;
  }
  add_to_out<vector>(s, token, columns, squares);
}

template <typename T>
int launch(const GatherTask<T>& s, void* stream) {
  const int64_t warps = s.windows * ceil_div(s.columns, kChunk<T>);
  const dim3 grid(static_cast<unsigned>(ceil_div(warps, kWarps))), block(kWarps * kWarp);
  const int error = s.vector ? FF_LAUNCH((gather_windows<true, T>), grid, block, 0, stream, s)
                             : FF_LAUNCH((gather_windows<false, T>), grid, block, 0, stream, s);
  if (error != 0 || s.windows == 1) return error;
  return s.vector ? FF_LAUNCH((gather_spans<true, T>), grid, block, 0, stream, s)
                  : FF_LAUNCH((gather_spans<false, T>), grid, block, 0, stream, s);
}

}  // namespace
}  // namespace fastfisher::cuda

extern "C" int ff_gather_float(const fastfisher::cuda::GatherTask<float>* task, void* stream) {
  return fastfisher::cuda::launch(*task, stream);
}

extern "C" int ff_gather_double(const fastfisher::cuda::GatherTask<double>* task, void* stream) {
  return fastfisher::cuda::launch(*task, stream);
}
