// The scores of a top-R selection: many tensors of any strides and floating-point dtype, read in
// chunks of one type, and divided among threads.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <type_traits>
#include <vector>

#include "../checks.h"
#include "dispatch.h"
#include "topr.h"
#include "workspace.h"

namespace fastfisher::cpu::topr {

// Consecutive scores of one tensor whose selected elements are counted together; part of the
// operators' interface (CHUNK in fastfisher/topr.py), as is kGroup.
constexpr int64_t kChunk = int64_t{1} << 13;
constexpr int64_t kChunkGroups = kChunk / kGroup;

// Scores of one 16-bit dtype are compared as such; different dtypes as the float or double that has
// all their values. To the caller a key is that of a float or a double.
template <typename T>
using Wide = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <typename T>
Key<Wide<T>> widened(Key<T> key) {
  if constexpr (sizeof(T) == 2) {
    if (key == lowest_key<T>) return lowest_key<float>;
    if (key > KeyOf<T>::infinity) return KeyOf<float>::infinity + 1;
    using Stored = std::conditional_t<std::is_same_v<T, Half>, c10::Half, c10::BFloat16>;
    const auto magnitude = static_cast<uint16_t>(key < 0 ? -key : key);
    const Key<float> wide = key_of(static_cast<float>(Stored(magnitude, Stored::from_bits())));
    return key < 0 ? -wide : wide;
  } else {
    return key;
  }
}

// The smallest key that is no smaller than a widened one, which is at most infinity + 1.
template <typename T>
Key<T> narrowed(Key<Wide<T>> wide) {
  if constexpr (sizeof(T) == 2) {
    int32_t low = lowest_key<T>, high = KeyOf<T>::infinity + 1;
    while (low < high) {
      const int32_t middle = low + (high - low) / 2;
      if (widened<T>(static_cast<Key<T>>(middle)) < wide) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    return static_cast<Key<T>>(low);
  } else {
    return wide;
  }
}

// The numbers of all groups of a chunk, in order.
inline const uint16_t* all_groups() {
  static const auto groups = [] {
    std::array<uint16_t, kChunkGroups> numbers;
    for (size_t i = 0; i < numbers.size(); ++i) numbers[i] = static_cast<uint16_t>(i);
    return numbers;
  }();
  return groups.data();
}

// The working memory of a thread.
template <typename T>
struct Scratch {
  alignas(64) T score[kChunk];
  alignas(64) char forget[kChunk * sizeof(double)];
  alignas(64) char remain[kChunk * sizeof(double)];
  alignas(64) Key<T> keys[kChunk + 64];

  static Scratch& get() { return *static_cast<Scratch*>(Workspace::get(sizeof(Scratch))); }
};

// A score is computed in the dtype of its tensor, as two rounded operations, and widened after
// that. GCC would fuse them where the processor always has a fused multiply-add.
template <typename Stored, typename T>
#if !defined(__clang__)
__attribute__((optimize("fp-contract=off")))
#endif
void convert(T* out, const char* forget, const char* remain, double weight, int64_t count) {
  using Computed = std::conditional_t<std::is_same_v<Stored, double>, double, float>;
  const auto* f = reinterpret_cast<const Stored*>(forget);
  const auto* r = reinterpret_cast<const Stored*>(remain);
  if (r == nullptr) {
    for (int64_t i = 0; i < count; ++i) out[i] = static_cast<T>(f[i]);
    return;
  }
  const auto w = static_cast<Computed>(weight);
  for (int64_t i = 0; i < count; ++i) {
    const auto product = static_cast<Stored>(static_cast<Computed>(r[i]) * w);
    const auto difference = static_cast<Computed>(f[i]) - static_cast<Computed>(product);
    out[i] = static_cast<T>(static_cast<Stored>(difference));
  }
}

template <typename T>
constexpr ScalarType dtype_of = std::is_same_v<T, double>  ? ScalarType::Double
                                : std::is_same_v<T, float> ? ScalarType::Float
                                : std::is_same_v<T, Half>  ? ScalarType::Half
                                                           : ScalarType::BFloat16;

struct Chunk {
  int64_t begin;  // in its tensor
  int32_t tensor;
  int32_t count;
  int64_t candidates;  // where its bits begin, in words
};

// Fetches one group of a chunk that begins at `begin`, unless its elements are scattered. Inlined,
// for GCC removes calls of a function that does nothing else, and so it does with such a loop.
inline __attribute__((always_inline)) void fetch(const View& view, int64_t begin, int64_t group) {
  if (!view.contiguous) return;
  const char* at = view.data + (begin + group * kGroup) * view.width;
  __builtin_prefetch(at);
  if (kGroup * view.width > 64) __builtin_prefetch(at + 64);
}

// All scores of a call, their chunks in order, and tasks of whole chunks of about equal length. The
// scores of a tensor are forget, or forget - remain * weight.
class Scores {
 public:
  Scores(const char* op, const std::vector<View>& forget, const std::vector<View>& remain,
         double weight)
      : forget(forget), remain(remain), weight(weight) {
#define FF_CHECK_SCORES(argument, condition, ...) \
  STD_TORCH_CHECK(condition, "fastfisher::", op, ": " argument ": ", __VA_ARGS__)
    FF_CHECK_SCORES("remain", remain.empty() || remain.size() == forget.size(),
                    "expected none or one for each of the ", forget.size(), " scores");
    FF_CHECK_SCORES("scores", forget.size() < size_t{1} << 31, "expected fewer than 2^31");
    for (size_t i = 0; i < forget.size(); ++i) {
      const ScalarType own = forget[i].dtype;
      const bool is_double = own == ScalarType::Double;
      FF_CHECK_SCORES("scores",
                      is_double || own == ScalarType::Float || own == ScalarType::BFloat16 ||
                          own == ScalarType::Half,
                      "expected float32, float64, bfloat16 or float16");
      FF_CHECK_SCORES("remain",
                      remain.empty() || (remain[i].dtype == own && remain[i].same_shape(forget[i])),
                      "expected the dtypes and shapes of the scores");
      if (i == 0) dtype_ = own;
      if (own != dtype_) {
        dtype_ = is_double || dtype_ == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
      }
    }
#undef FF_CHECK_SCORES
    divide();
  }

  int64_t chunks() const { return static_cast<int64_t>(chunk.size()); }

  // Calls f.operator()<T>() with the type that all scores are read as.
  template <typename F>
  void with_type(const F& f) const {
    switch (dtype_) {
      case ScalarType::Double:
        return f.template operator()<double>();
      case ScalarType::BFloat16:
        return f.template operator()<BFloat16>();
      case ScalarType::Half:
        return f.template operator()<Half>();
      default:
        return f.template operator()<float>();
    }
  }

  // The scores of a chunk. Those not in the listed groups need not be there.
  template <typename T>
  const T* read(const Chunk& c, Scratch<T>& scratch, const uint16_t* groups, int64_t listed) const {
    const View& own = forget[c.tensor];
    const char* f = own.read(c.begin, c.count, scratch.forget);
    const char* r =
        remain.empty() ? nullptr : remain[c.tensor].read(c.begin, c.count, scratch.remain);
    if (own.dtype == dtype_of<T>) {
      const auto* as_is = reinterpret_cast<const T*>(f);
      if (r == nullptr) return as_is;
      kernels().top(T{}).subtract(scratch.score, as_is, reinterpret_cast<const T*>(r), weight,
                                  c.count, groups, listed);
      return scratch.score;
    }
    if constexpr (sizeof(T) > 2) {
      switch (own.dtype) {
        case ScalarType::Float:
          convert<float>(scratch.score, f, r, weight, c.count);
          break;
        case ScalarType::BFloat16:
          convert<c10::BFloat16>(scratch.score, f, r, weight, c.count);
          break;
        default:
          convert<c10::Half>(scratch.score, f, r, weight, c.count);
      }
    }
    return scratch.score;
  }

  template <typename T>
  const T* read(const Chunk& c, Scratch<T>& scratch) const {
    return read(c, scratch, all_groups(), (c.count + kGroup - 1) / kGroup);
  }

  // Fetches what the scores of one group of a chunk are read from.
  __attribute__((always_inline)) void fetch(const Chunk& c, int64_t group) const {
    topr::fetch(forget[c.tensor], c.begin, group);
    if (!remain.empty()) topr::fetch(remain[c.tensor], c.begin, group);
  }

  // Calls f(from, to) with ranges of chunks that together are all of them, on several threads.
  template <typename F>
  void parallel(const F& f) const {
    const int64_t tasks = static_cast<int64_t>(task_.size()) - 1;
    if (tasks == 0) return;
    torch::stable::parallel_for(0, tasks, kGrain,
                                [&](int64_t from, int64_t to) { f(task_[from], task_[to]); });
  }

  const std::vector<View>& forget;
  const std::vector<View>& remain;  // or none
  const double weight;
  std::vector<Chunk> chunk;
  std::vector<int64_t> offset;  // of each tensor's first score among all
  int64_t total = 0;
  int64_t candidate_words = 0;

 private:
  // A thread is worth starting for this many tasks of kChunk scores or more.
  static constexpr int64_t kGrain = 8;

  void divide() {
    offset.reserve(forget.size());
    chunk.reserve(forget.size());
    int64_t filled = kChunk;
    for (size_t t = 0; t < forget.size(); ++t) {
      offset.push_back(total);
      for (int64_t begin = 0; begin < forget[t].count; begin += kChunk) {
        if (filled >= kChunk) {
          task_.push_back(chunks());
          filled = 0;
        }
        const int64_t count = std::min(kChunk, forget[t].count - begin);
        chunk.push_back(
            {begin, static_cast<int32_t>(t), static_cast<int32_t>(count), candidate_words});
        candidate_words += (count + 64 * kGroup - 1) / (64 * kGroup);
        filled += count;
      }
      total += forget[t].count;
    }
    task_.push_back(chunks());
  }

  ScalarType dtype_ = ScalarType::Float;
  std::vector<int64_t> task_;  // first chunk of each, and the number of chunks
};

}  // namespace fastfisher::cpu::topr
