// The kernels of kernels.h, written once with GCC/Clang vector extensions and compiled per
// instruction set: the including file sets FF_NAME, FF_VECTOR_BYTES, FF_MAX_ROWS and the target.
// Accumulation policy: a sample's gradient is summed in the operand type, squared in registers and
// added to a tile that lives no longer than one call, so that sums over a data set are sums of
// sums over blocks of samples.

#if !defined(FF_NAME) || !defined(FF_VECTOR_BYTES) || !defined(FF_MAX_ROWS)
#error "include this file from a kernels_<isa>.cpp only"
#endif

#if defined(FASTFISHER_X86)
#include <immintrin.h>
#endif

#define FF_INLINE inline __attribute__((always_inline))
#define FF_UNROLL _Pragma("GCC unroll 16")

namespace fastfisher::cpu {
namespace {

template <typename T>
struct Vector {
  static constexpr int lanes = FF_VECTOR_BYTES / sizeof(T);
  typedef T type __attribute__((vector_size(FF_VECTOR_BYTES)));
  // The same vector at an address that is aligned for one element only.
  typedef T unaligned __attribute__((vector_size(FF_VECTOR_BYTES), aligned(alignof(T)), may_alias));
};

template <typename T>
FF_INLINE typename Vector<T>::type load(const T* from) {
  return *reinterpret_cast<const typename Vector<T>::unaligned*>(from);
}

template <typename T>
FF_INLINE void store(T* to, typename Vector<T>::type value) {
  *reinterpret_cast<typename Vector<T>::unaligned*>(to) = value;
}

template <typename V>
FF_INLINE V magnitude(V value) {
  return value < 0 ? -value : value;
}

// ---------------------------------------------------------------------------------------------
// pack

// In-register transpose of a lanes x lanes block: log2(lanes) rounds of interleaving row i with
// row i + lanes / 2.
template <typename T>
FF_INLINE void transpose(typename Vector<T>::type* rows) {
  constexpr int L = Vector<T>::lanes;
  typename Vector<T>::type other[L];
  FF_UNROLL for (int step = 1; step < L; step *= 2) {
    FF_UNROLL for (int i = 0; i < L / 2; ++i) {
      const auto a = rows[i];
      const auto b = rows[i + L / 2];
      if constexpr (L == 16) {
        other[2 * i] =
            __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
        other[2 * i + 1] = __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13,
                                                   29, 14, 30, 15, 31);
      } else if constexpr (L == 8) {
        other[2 * i] = __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
        other[2 * i + 1] = __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
      } else if constexpr (L == 4) {
        other[2 * i] = __builtin_shufflevector(a, b, 0, 4, 1, 5);
        other[2 * i + 1] = __builtin_shufflevector(a, b, 2, 6, 3, 7);
      } else {
        other[2 * i] = __builtin_shufflevector(a, b, 0, 2);
        other[2 * i + 1] = __builtin_shufflevector(a, b, 1, 3);
      }
    }
    FF_UNROLL for (int i = 0; i < L; ++i) rows[i] = other[i];
  }
}

template <typename T>
void pack_scalar(T* dst, int64_t ld, const T* src, int64_t row_stride, int64_t position_stride,
                 int64_t rows, int64_t begin, int64_t end) {
  for (int64_t t = begin; t < end; ++t) {
    for (int64_t r = 0; r < rows; ++r) {
      dst[t * ld + r] = src[r * row_stride + t * position_stride];
    }
  }
}

template <typename T>
void pack(T* dst, int64_t ld, const T* src, int64_t row_stride, int64_t position_stride,
          int64_t rows, int64_t positions) {
  constexpr int L = Vector<T>::lanes;
  if (row_stride == 1 && ld == rows && position_stride == rows) {
    __builtin_memcpy(dst, src, positions * rows * sizeof(T));
    return;
  }
  if (row_stride == 1 && rows <= 2 * L) {
    // Whole vectors, but for the last positions, where they would reach past the end of src or dst.
    const int64_t width = rows > L ? 2 * L : L;
    const int64_t step = position_stride < ld ? position_stride : ld;
    const int64_t exact = step > 0 ? (width - rows + step - 1) / step : positions;
    int64_t t = 0;
    for (; t < positions - exact; ++t) {
      const T* from = src + t * position_stride;
      const auto low = load(from);
      if (rows > L) store(dst + t * ld + L, load(from + L));
      store(dst + t * ld, low);
    }
    for (; t < positions; ++t) {
      __builtin_memcpy(dst + t * ld, src + t * position_stride, rows * sizeof(T));
    }
    return;
  }
  if (position_stride != 1 || rows > 2 * L) {
    pack_scalar(dst, ld, src, row_stride, position_stride, rows, 0, positions);
    return;
  }
  // Stores are whole vectors in ascending order: what one position spills past `rows` the next
  // position overwrites, so partial panels need no masks.
  const int64_t whole = positions / L * L;
  for (int64_t t = 0; t < whole; t += L) {
    typename Vector<T>::type low[L] = {};
    typename Vector<T>::type high[L] = {};
    FF_UNROLL for (int r = 0; r < L; ++r) {
      if (r < rows) low[r] = load(src + r * row_stride + t);
    }
    transpose<T>(low);
    if (rows > L) {
      FF_UNROLL for (int r = 0; r < L; ++r) {
        if (r + L < rows) high[r] = load(src + (r + L) * row_stride + t);
      }
      transpose<T>(high);
      FF_UNROLL for (int i = 0; i < L; ++i) {
        store(dst + (t + i) * ld, low[i]);
        store(dst + (t + i) * ld + L, high[i]);
      }
    } else {
      FF_UNROLL for (int i = 0; i < L; ++i) store(dst + (t + i) * ld, low[i]);
    }
  }
  pack_scalar(dst, ld, src, row_stride, 1, rows, whole, positions);
}

template <typename T>
void pack_across(T* dst, int64_t panel_stride, int64_t width, const T* src, int64_t position_stride,
                 int64_t channels, int64_t positions) {
  constexpr int L = Vector<T>::lanes;
  const int64_t whole = channels / width;
  const int64_t rest = channels - whole * width;
  // A store of whole vectors spills into the next position's entries, which come later; a load
  // reads the next channels'. At the end there is neither.
  const int64_t step = position_stride < width ? position_stride : width;
  const int64_t spill = (width > L ? 2 * L : L) - width;
  const int64_t exact = step <= 0 || spill < 0 ? positions : (spill + step - 1) / step;
  int64_t t = 0;
  for (; t < positions - exact; ++t) {
    const T* from = src + t * position_stride;
    T* to = dst + t * width;
    if (width > L) {
      for (int64_t p = 0; p < whole; ++p, from += width, to += panel_stride) {
        const auto low = load(from);
        store(to + L, load(from + L));
        store(to, low);
      }
    } else {
      for (int64_t p = 0; p < whole; ++p, from += width, to += panel_stride) store(to, load(from));
    }
    __builtin_memcpy(to, from, rest * sizeof(T));
  }
  for (; t < positions; ++t) {
    for (int64_t c = 0; c < channels; c += width) {
      __builtin_memcpy(dst + c / width * panel_stride + t * width, src + t * position_stride + c,
                       (channels - c < width ? channels - c : width) * sizeof(T));
    }
  }
}

// ---------------------------------------------------------------------------------------------
// outer

template <typename T, int V>
FF_INLINE void flush_row(const OuterTile<T>& tile, int64_t row, int64_t column,
                         const typename Vector<T>::type* value) {
  constexpr int L = Vector<T>::lanes;
  T* out = tile.out + row * tile.out_row;
  if (tile.out_column == nullptr && column + V * L <= tile.columns) {
    FF_UNROLL for (int v = 0; v < V; ++v) {
      T* at = out + column + v * L;
      store(at, load(at) + value[v] * tile.alpha);
    }
    return;
  }
  T lanes[V * L];
  FF_UNROLL for (int v = 0; v < V; ++v) store(lanes + v * L, value[v]);
  for (int64_t c = column; c < tile.columns && c < column + V * L; ++c) {
    out[tile.out_column == nullptr ? c : tile.out_column[c]] += tile.alpha * lanes[c - column];
  }
}

// R rows and V vectors of columns of one sample's gradient are held in registers over its
// positions, the tile of S on the stack. Half as many rows with S in registers too were slower
// for as few as two positions a sample.
template <typename T, int R, int V>
__attribute__((noinline)) void register_tile(const OuterTile<T>& tile, int64_t row,
                                             int64_t column) {
  using vector = typename Vector<T>::type;
  constexpr int L = Vector<T>::lanes;
  const T* const g_begin = tile.g + row;
  const T* const x_begin = tile.x + column;
  const int64_t g_position = tile.g_position;
  const int64_t x_position = tile.x_position;
  if (tile.out_column == nullptr) {
    // The tile of out is needed when the sums are done; it should be near by then.
    FF_UNROLL for (int r = 0; r < R; ++r) {
      FF_UNROLL for (int v = 0; v < V; ++v) {
        __builtin_prefetch(tile.out + (row + r) * tile.out_row + column + v * L, 1);
      }
    }
  }
  vector sum[R][V] = {};
  for (int64_t n = 0; n < tile.samples; ++n) {
    vector gradient[R][V] = {};
    for (int64_t line = 0; line < tile.lines; ++line) {
      const T* g = g_begin + n * tile.g_sample + line * tile.g_line;
      const T* x = x_begin + n * tile.x_sample + line * tile.x_line;
      for (int64_t t = 0; t < tile.positions; ++t) {
        vector xs[V];
        FF_UNROLL for (int v = 0; v < V; ++v) xs[v] = load(x + v * L);
        FF_UNROLL for (int r = 0; r < R; ++r) {
          FF_UNROLL for (int v = 0; v < V; ++v) gradient[r][v] += xs[v] * g[r];
        }
        g += g_position;
        x += x_position;
      }
    }
    // Keeps the compiler from holding `sum` in registers, where it would spill `gradient`.
    asm volatile("" : : "r"(&sum[0][0]) : "memory");
    if (tile.absolute) {
      FF_UNROLL for (int r = 0; r < R; ++r) {
        FF_UNROLL for (int v = 0; v < V; ++v) sum[r][v] += magnitude(gradient[r][v]);
      }
      continue;
    }
    FF_UNROLL for (int r = 0; r < R; ++r) {
      FF_UNROLL for (int v = 0; v < V; ++v) sum[r][v] += gradient[r][v] * gradient[r][v];
    }
  }
  FF_UNROLL for (int r = 0; r < R; ++r) flush_row<T, V>(tile, row + r, column, sum[r]);
}

// Rows that R x V accumulators leave room for, V being 1, 2 or 3 vectors of columns.
constexpr int rows_for(int vectors) {
  if (vectors == 1) return FF_MAX_ROWS > 8 ? 16 : 12;
  return vectors == 3 ? (FF_MAX_ROWS > 8 ? 8 : 4) : FF_MAX_ROWS;
}

template <typename T>
using RegisterTile = void (*)(const OuterTile<T>&, int64_t, int64_t);

template <typename T, int V, int R = 1>
RegisterTile<T> find_register_tile(int64_t rows) {
  if constexpr (R > rows_for(V)) {
    return nullptr;
  } else {
    return rows == R ? &register_tile<T, R, V> : find_register_tile<T, V, R + 1>(rows);
  }
}

template <typename T, int V>
void tile_columns(const OuterTile<T>& tile, int64_t column) {
  const int64_t parts = (tile.rows + rows_for(V) - 1) / rows_for(V);
  int64_t row = 0;
  for (int64_t part = 0; part < parts; ++part) {
    const int64_t rows = (tile.rows - row + parts - part - 1) / (parts - part);
    find_register_tile<T, V>(rows)(tile, row, column);
    row += rows;
  }
}

template <typename T>
void outer_tile(const OuterTile<T>& tile) {
  constexpr int64_t L = Vector<T>::lanes;
  int64_t vectors = (tile.columns + L - 1) / L;
  int64_t column = 0;
  while (vectors > 0) {
    if (vectors == 1) {
      tile_columns<T, 1>(tile, column);
      return;
    }
    if (vectors == 3) {
      tile_columns<T, 3>(tile, column);
      return;
    }
    tile_columns<T, 2>(tile, column);
    vectors -= 2;
    column += 2 * L;
  }
}

template <typename T>
void depthwise_tile(const DepthwiseTile<T>& tile) {
  using vector = typename Vector<T>::type;
  constexpr int64_t L = Vector<T>::lanes;
  for (int64_t c = 0; c < tile.channels; c += L) {
    vector sum = {};
    for (int64_t n = 0; n < tile.samples; ++n) {
      // Four accumulators hide the latency of the multiply-add.
      vector gradient[4] = {};
      for (int64_t line = 0; line < tile.lines; ++line) {
        const T* g = tile.g + n * tile.g_sample + line * tile.g_line + c;
        const T* x = tile.x + n * tile.x_sample + line * tile.x_line + c;
        int64_t t = 0;
        for (; t + 4 <= tile.positions; t += 4) {
          FF_UNROLL for (int i = 0; i < 4; ++i) {
            gradient[i] += load(g + i * tile.g_position) * load(x + i * tile.x_position);
          }
          g += 4 * tile.g_position;
          x += 4 * tile.x_position;
        }
        for (; t < tile.positions; ++t) {
          gradient[0] += load(g) * load(x);
          g += tile.g_position;
          x += tile.x_position;
        }
      }
      const vector total = (gradient[0] + gradient[1]) + (gradient[2] + gradient[3]);
      sum += tile.absolute ? magnitude(total) : total * total;
    }
    T lanes[L];
    store(lanes, sum);
    for (int64_t i = 0; i < L && c + i < tile.channels; ++i) {
      tile.out[(c + i) * tile.out_channel] += tile.alpha * lanes[i];
    }
  }
}

// ---------------------------------------------------------------------------------------------
// channel

template <typename T>
FF_INLINE T horizontal_sum(typename Vector<T>::type value) {
  constexpr int L = Vector<T>::lanes;
  T lanes[L];
  store(lanes, value);
  FF_UNROLL for (int width = L / 2; width > 0; width /= 2) {
    FF_UNROLL for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  }
  return lanes[0];
}

// Channels innermost: V vectors of channels down the positions, P of which are summed apart, so
// that few channels do not wait for the latency of one addition after the other.
template <typename T, int V, int P, bool HasX, bool HasMean, bool PerChannel, bool HasGradInput>
FF_INLINE void channel_sums_columns(const ChannelSums<T>& s, int64_t c) {
  using vector = typename Vector<T>::type;
  constexpr int64_t L = Vector<T>::lanes;
  vector weight[P][V] = {};
  vector bias[P][V] = {};
  vector factor[V] = {};
  if constexpr (HasGradInput) {
    FF_UNROLL for (int v = 0; v < V; ++v) factor[v] = load(s.factor + c + v * L);
  }
  int64_t t = 0;
  const auto add = [&](int64_t at, int p) __attribute__((always_inline)) {
    FF_UNROLL for (int v = 0; v < V; ++v) {
      const vector g = load(s.g + at * s.g_position + c + v * L);
      bias[p][v] += g;
      if constexpr (HasGradInput) {
        store(s.grad_input + at * s.g_position + c + v * L, g * factor[v]);
      }
      if constexpr (HasX) {
        vector xhat = load(s.x + at * s.x_position + c + v * L);
        if constexpr (PerChannel) {
          if constexpr (HasMean) xhat -= load(s.mean + at * s.mean_position + c + v * L);
          xhat *= load(s.scale + at * s.scale_position + c + v * L);
        } else {
          if constexpr (HasMean) xhat -= s.mean[at * s.mean_position];
          xhat *= s.scale[at * s.scale_position];
        }
        weight[p][v] += g * xhat;
      }
    }
  };
  for (; t + P <= s.positions; t += P) {
    FF_UNROLL for (int p = 0; p < P; ++p) add(t + p, p);
  }
  for (; t < s.positions; ++t) add(t, 0);
  FF_UNROLL for (int v = 0; v < V; ++v) {
    vector weight_sum = weight[0][v];
    vector bias_sum = bias[0][v];
    FF_UNROLL for (int p = 1; p < P; ++p) {
      weight_sum += weight[p][v];
      bias_sum += bias[p][v];
    }
    if (s.bias != nullptr) store(s.bias + c + v * L, bias_sum);
    if constexpr (HasX) store(s.weight + c + v * L, weight_sum);
  }
}

template <typename T, bool HasX, bool HasMean, bool PerChannel, bool HasGradInput = false>
void channel_sums_last(const ChannelSums<T>& s) {
  constexpr int64_t L = Vector<T>::lanes;
  int64_t c = 0;
  for (; c + 4 * L <= s.channels; c += 4 * L) {
    channel_sums_columns<T, 4, 1, HasX, HasMean, PerChannel, HasGradInput>(s, c);
  }
  for (; c + L <= s.channels; c += L) {
    channel_sums_columns<T, 1, 4, HasX, HasMean, PerChannel, HasGradInput>(s, c);
  }
  for (; c < s.channels; ++c) {
    T weight = 0;
    T bias = 0;
    for (int64_t t = 0; t < s.positions; ++t) {
      const T g = s.g[t * s.g_position + c];
      bias += g;
      if constexpr (HasGradInput) s.grad_input[t * s.g_position + c] = g * s.factor[c];
      if constexpr (HasX) {
        T xhat = s.x[t * s.x_position + c];
        const int64_t at = PerChannel ? c : 0;
        if constexpr (HasMean) xhat -= s.mean[t * s.mean_position + at];
        weight += g * xhat * s.scale[t * s.scale_position + at];
      }
    }
    if (s.bias != nullptr) s.bias[c] = bias;
    if constexpr (HasX) s.weight[c] = weight;
  }
}

// Positions innermost, with a mean and a scale that do not change along them.
template <typename T, bool HasX, bool HasGradInput = false>
void channel_sums_first(const ChannelSums<T>& s) {
  using vector = typename Vector<T>::type;
  constexpr int64_t L = Vector<T>::lanes;
  constexpr int V = 4;
  for (int64_t c = 0; c < s.channels; ++c) {
    const T* g = s.g + c * s.g_channel;
    const T* x = HasX ? s.x + c * s.x_channel : nullptr;
    const T mean = HasX && s.mean != nullptr ? s.mean[c * s.mean_channel] : T(0);
    T* const grad_input = HasGradInput ? s.grad_input + c * s.g_channel : nullptr;
    const T factor = HasGradInput ? s.factor[c] : T(0);
    vector weight[V] = {};
    vector bias[V] = {};
    int64_t t = 0;
    for (; t + V * L <= s.positions; t += V * L) {
      FF_UNROLL for (int v = 0; v < V; ++v) {
        const vector gv = load(g + t + v * L);
        bias[v] += gv;
        if constexpr (HasGradInput) store(grad_input + t + v * L, gv * factor);
        if constexpr (HasX) weight[v] += gv * (load(x + t + v * L) - mean);
      }
    }
    T weight_rest = 0;
    T bias_rest = 0;
    for (; t < s.positions; ++t) {
      bias_rest += g[t];
      if constexpr (HasGradInput) grad_input[t] = g[t] * factor;
      if constexpr (HasX) weight_rest += g[t] * (x[t] - mean);
    }
    if (s.bias != nullptr) {
      s.bias[c] = horizontal_sum<T>((bias[0] + bias[1]) + (bias[2] + bias[3])) + bias_rest;
    }
    if constexpr (HasX) {
      const T total = horizontal_sum<T>((weight[0] + weight[1]) + (weight[2] + weight[3]));
      s.weight[c] = (total + weight_rest) * s.scale[c * s.scale_channel];
    }
  }
}

template <typename T>
void channel_sums_any(const ChannelSums<T>& s) {
  for (int64_t c = 0; c < s.channels; ++c) {
    T weight = 0;
    T bias = 0;
    for (int64_t t = 0; t < s.positions; ++t) {
      const int64_t at = t * s.g_position + c * s.g_channel;
      const T g = s.g[at];
      bias += g;
      if (s.grad_input != nullptr) s.grad_input[at] = g * s.factor[c];
      if (s.x != nullptr) {
        T xhat = s.x[t * s.x_position + c * s.x_channel];
        if (s.mean != nullptr) xhat -= s.mean[t * s.mean_position + c * s.mean_channel];
        weight += g * xhat * s.scale[t * s.scale_position + c * s.scale_channel];
      }
    }
    if (s.bias != nullptr) s.bias[c] = bias;
    if (s.weight != nullptr) s.weight[c] = weight;
  }
}

template <typename T>
void channel_sums(const ChannelSums<T>& s) {
  const bool has_x = s.weight != nullptr;
  const bool has_mean = s.mean != nullptr;
  if (s.grad_input != nullptr) {
    // What a batch norm asks for; everything else goes the long way.
    const bool all = has_x && has_mean;
    if (all && s.g_channel == 1 && s.x_channel == 1 && s.scale_channel == 1 &&
        s.mean_channel == 1) {
      return channel_sums_last<T, true, true, true, true>(s);
    }
    if (all && s.g_position == 1 && s.x_position == 1 && s.scale_position == 0 &&
        s.mean_position == 0) {
      return channel_sums_first<T, true, true>(s);
    }
    return channel_sums_any(s);
  }
  if (s.g_channel == 1 && !has_x) return channel_sums_last<T, false, false, false>(s);
  if (s.g_channel == 1 && s.x_channel == 1) {
    const bool per_channel = s.scale_channel == 1 && (!has_mean || s.mean_channel == 1);
    const bool per_position = s.scale_channel == 0 && (!has_mean || s.mean_channel == 0);
    if (per_channel && has_mean) return channel_sums_last<T, true, true, true>(s);
    if (per_channel) return channel_sums_last<T, true, false, true>(s);
    if (per_position && has_mean) return channel_sums_last<T, true, true, false>(s);
    if (per_position) return channel_sums_last<T, true, false, false>(s);
  }
  if (s.g_position == 1 && !has_x) return channel_sums_first<T, false>(s);
  if (s.g_position == 1 && s.x_position == 1 && s.scale_position == 0 &&
      (!has_mean || s.mean_position == 0)) {
    return channel_sums_first<T, true>(s);
  }
  channel_sums_any(s);
}

// ---------------------------------------------------------------------------------------------
// gather, and the last step of the channel family

template <typename T>
void add_powers(T* out, const T* value, T alpha, bool absolute, int64_t count) {
  constexpr int64_t L = Vector<T>::lanes;
  int64_t i = 0;
  for (; i + L <= count; i += L) {
    const auto v = load(value + i);
    store(out + i, load(out + i) + (absolute ? magnitude(v) : v * v) * alpha);
  }
  for (; i < count; ++i) {
    out[i] += (absolute ? magnitude(value[i]) : value[i] * value[i]) * alpha;
  }
}

template <typename T>
void add(T* sum, const T* value, int64_t count) {
  constexpr int64_t L = Vector<T>::lanes;
  int64_t i = 0;
  for (; i + L <= count; i += L) store(sum + i, load(sum + i) + load(value + i));
  for (; i < count; ++i) sum[i] += value[i];
}

template <typename T>
Kernels<T> make_kernels() {
  return {Vector<T>::lanes, rows_for(2),        rows_for(1),      &pack<T>,       &pack_across<T>,
          &outer_tile<T>,   &depthwise_tile<T>, &channel_sums<T>, &add_powers<T>, &add<T>};
}

#include "recurrent_impl.h"
#include "topr_impl.h"

}  // namespace

const KernelTable& FF_TABLE() {
  static const KernelTable table = {FF_NAME,
                                    make_kernels<float>(),
                                    make_kernels<double>(),
                                    make_top_kernels<float>(),
                                    make_top_kernels<double>(),
                                    make_top_kernels<Half>(),
                                    make_top_kernels<BFloat16>(),
                                    {&take, &take_indices, &zero},
                                    make_recurrent_kernels<float>(),
                                    make_recurrent_kernels<double>(),
                                    nullptr};
  return table;
}

}  // namespace fastfisher::cpu
