// The scores of a top-R selection: many tensors of any strides and floating-point dtype, read in
// chunks as float or double, and divided among threads.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cstring>
#include <type_traits>
#include <vector>

#include "../checks.h"
#include "topr_kernels.h"
#include "workspace.h"

namespace fastfisher::cpu::topr {

// Consecutive scores of one tensor whose selected elements are counted together; part of the
// operators' interface (CHUNK in fastfisher/topr.py).
constexpr int64_t kChunk = int64_t{1} << 13;

// Where the elements of a tensor are, in row-major order.
class Elements {
 public:
  explicit Elements(const Tensor& tensor)
      : width_(static_cast<int64_t>(tensor.element_size())), contiguous_(tensor.is_contiguous()) {
    if (contiguous_) return;
    const auto sizes = tensor.sizes();
    const auto strides = tensor.strides();
    sizes_.assign(sizes.begin(), sizes.end());
    strides_.assign(strides.begin(), strides.end());
  }

  int64_t width() const { return width_; }
  bool contiguous() const { return contiguous_; }

  // Bytes from the first element to the one at `index`.
  int64_t offset(int64_t index) const {
    if (contiguous_) return index * width_;
    int64_t elements = 0;
    for (size_t d = sizes_.size(); d-- > 0; index /= sizes_[d]) {
      elements += index % sizes_[d] * strides_[d];
    }
    return elements * width_;
  }

  // The elements [begin, begin + count) in one piece: in place, or copied to `buffer`.
  const void* read(const char* data, int64_t begin, int64_t count, char* buffer) const {
    if (contiguous_) return data + begin * width_;
    const int64_t inner = sizes_.back(), step = strides_.back() * width_;
    for (char* to = buffer; count > 0;) {
      const int64_t run = std::min(count, inner - begin % inner);
      const char* from = data + offset(begin);
      for (int64_t i = 0; i < run; ++i, to += width_) std::memcpy(to, from + i * step, width_);
      begin += run;
      count -= run;
    }
    return buffer;
  }

 private:
  int64_t width_;
  bool contiguous_;
  std::vector<int64_t> sizes_, strides_;
};

// The scores of one tensor: forget, or forget - remain * weight.
struct Source {
  Source(const Tensor& score, const Tensor* other)
      : forget(static_cast<const char*>(score.const_data_ptr())),
        remain(other == nullptr ? nullptr : static_cast<const char*>(other->const_data_ptr())),
        forget_elements(score),
        remain_elements(other == nullptr ? score : *other),
        dtype(score.scalar_type()),
        count(score.numel()) {}

  const char* forget;
  const char* remain;  // or nullptr
  Elements forget_elements, remain_elements;
  ScalarType dtype;
  int64_t count;
};

// The working memory of a thread.
template <typename T>
struct Scratch {
  alignas(64) T score[kChunk];
  alignas(64) char forget[kChunk * sizeof(double)];
  alignas(64) char remain[kChunk * sizeof(double)];
  alignas(64) Key<T> keys[kChunk];

  static Scratch& get() { return *static_cast<Scratch*>(Workspace::get(sizeof(Scratch))); }
};

// A score is computed in the dtype of its tensor, as two rounded operations, and widened after
// that. GCC would fuse them where the processor always has a fused multiply-add.
template <typename Stored, typename T>
#if !defined(__clang__)
__attribute__((optimize("fp-contract=off")))
#endif
void convert(T* out, const void* forget, const void* remain, double weight, int64_t count) {
  using Computed = std::conditional_t<std::is_same_v<Stored, double>, double, float>;
  const auto* f = static_cast<const Stored*>(forget);
  const auto* r = static_cast<const Stored*>(remain);
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

// Scores [begin, begin + count) of a source, count <= kChunk; T is double if any source is.
template <typename T>
const T* read(const Source& source, int64_t begin, int64_t count, double weight,
              Scratch<T>& scratch) {
  const void* f = source.forget_elements.read(source.forget, begin, count, scratch.forget);
  const void* r = source.remain == nullptr
                      ? nullptr
                      : source.remain_elements.read(source.remain, begin, count, scratch.remain);
  switch (source.dtype) {
    case ScalarType::Double:
      if (r == nullptr) return static_cast<const T*>(f);
      convert<double>(scratch.score, f, r, weight, count);
      break;
    case ScalarType::Float:
      if (r == nullptr && std::is_same_v<T, float>) return static_cast<const T*>(f);
      convert<float>(scratch.score, f, r, weight, count);
      break;
    case ScalarType::BFloat16:
      convert<c10::BFloat16>(scratch.score, f, r, weight, count);
      break;
    default:
      convert<c10::Half>(scratch.score, f, r, weight, count);
  }
  return scratch.score;
}

struct Chunk {
  int64_t begin;  // in its tensor
  int32_t tensor;
  int32_t count;
};

// All scores of a call, their chunks in order, and tasks of whole chunks of about equal length.
class Scores {
 public:
  Scores(const char* op, const std::vector<Tensor>& scores, const std::vector<Tensor>& remain,
         double weight)
      : weight(weight) {
#define FF_CHECK_SCORES(argument, condition, ...) \
  STD_TORCH_CHECK(condition, "fastfisher::", op, ": " argument ": ", __VA_ARGS__)
    FF_CHECK_SCORES("remain", remain.empty() || remain.size() == scores.size(),
                    "expected none or one for each of the ", scores.size(), " scores");
    FF_CHECK_SCORES("scores", scores.size() < size_t{1} << 31, "expected fewer than 2^31");
    sources.reserve(scores.size());
    for (size_t i = 0; i < scores.size(); ++i) {
      const Tensor* other = remain.empty() ? nullptr : &remain[i];
      const ScalarType dtype = scores[i].scalar_type();
      FF_CHECK_SCORES("scores",
                      dtype == ScalarType::Float || dtype == ScalarType::Double ||
                          dtype == ScalarType::BFloat16 || dtype == ScalarType::Half,
                      "expected float32, float64, bfloat16 or float16");
      FF_CHECK_SCORES(
          "remain",
          other == nullptr || (other->scalar_type() == dtype && same_shape(*other, scores[i])),
          "expected the dtypes and shapes of the scores");
      sources.emplace_back(scores[i], other);
      any_double = any_double || dtype == ScalarType::Double;
    }
#undef FF_CHECK_SCORES
    divide();
  }

  static bool same_shape(const Tensor& a, const Tensor& b) {
    const auto x = a.sizes(), y = b.sizes();
    return std::equal(x.begin(), x.end(), y.begin(), y.end());
  }

  int64_t chunks() const { return static_cast<int64_t>(chunk.size()); }

  template <typename T>
  const T* read(const Chunk& c, Scratch<T>& scratch) const {
    return topr::read(sources[c.tensor], c.begin, c.count, weight, scratch);
  }

  // Calls f(from, to) with ranges of chunks that together are all of them, on several threads.
  template <typename F>
  void parallel(const F& f) const {
    const int64_t tasks = static_cast<int64_t>(task_.size()) - 1;
    if (tasks == 0) return;
    torch::stable::parallel_for(0, tasks, kGrain,
                                [&](int64_t from, int64_t to) { f(task_[from], task_[to]); });
  }

  const double weight;
  bool any_double = false;
  std::vector<Source> sources;
  std::vector<Chunk> chunk;
  std::vector<int64_t> first_chunk;  // of each tensor, and the number of chunks
  std::vector<int64_t> offset;       // of each tensor's first score among all
  int64_t total = 0;

 private:
  // A thread is worth starting for this many tasks of kChunk scores or more.
  static constexpr int64_t kGrain = 8;

  void divide() {
    int64_t filled = kChunk;
    for (size_t t = 0; t < sources.size(); ++t) {
      first_chunk.push_back(chunks());
      offset.push_back(total);
      for (int64_t begin = 0; begin < sources[t].count; begin += kChunk) {
        if (filled >= kChunk) {
          task_.push_back(chunks());
          filled = 0;
        }
        const int64_t count = std::min(kChunk, sources[t].count - begin);
        chunk.push_back({begin, static_cast<int32_t>(t), static_cast<int32_t>(count)});
        filled += count;
      }
      total += sources[t].count;
    }
    task_.push_back(chunks());
    first_chunk.push_back(chunks());
  }

  std::vector<int64_t> task_;  // first chunk of each, and the number of chunks
};

}  // namespace fastfisher::cpu::topr
