// Top-R, second half: zero what a selection of select_top selects, and record what it was. One more
// pass over the scores; chunks in which nothing is selected are not even read.

#include <atomic>
#include <bit>
#include <tuple>

#include "dispatch.h"
#include "ops.h"
#include "topr_scores.h"

namespace fastfisher::cpu {
namespace {

using topr::Chunk;
using topr::Elements;
using topr::kChunk;
using topr::Scores;
using topr::Scratch;

constexpr int64_t kWords = kChunk / 64;
// Every part of the record begins at a multiple of the width of the widest dtype.
constexpr int64_t kAlignment = 16;

// Row of `layout`: where the record of one tensor is; see zero_selected_ in fastfisher/topr.py.
struct Layout {
  int64_t count, index_width, code, values, runs;
};

template <typename F>
void for_each_bit(const uint64_t* bits, int64_t words, const F& f) {
  for (int64_t w = 0; w < words; ++w) {
    for (uint64_t word = bits[w]; word != 0; word &= word - 1) f(w * 64 + std::countr_zero(word));
  }
}

struct Target {
  explicit Target(const Tensor& parameter)
      : data(static_cast<char*>(parameter.mutable_data_ptr())), elements(parameter) {}

  char* data;
  Elements elements;
};

// Zeroes the elements of a chunk whose bits are set, after copying them to `values`.
template <int Width>
void zero_chunk(const Target& target, int64_t begin, const uint64_t* bits, int64_t words,
                char* values) {
  const auto zero = [&values](char* at) {
    if (values != nullptr) {
      std::memcpy(values, at, Width);
      values += Width;
    }
    std::memset(at, 0, Width);
  };
  if (target.elements.contiguous()) {
    char* data = target.data + begin * Width;
    for_each_bit(bits, words, [&](int64_t i) { zero(data + i * Width); });
  } else {
    for_each_bit(bits, words,
                 [&](int64_t i) { zero(target.data + target.elements.offset(begin + i)); });
  }
}

using ZeroChunk = void (*)(const Target&, int64_t, const uint64_t*, int64_t, char*);

ZeroChunk zero_chunk_of(int64_t width) {
  switch (width) {
    case 1:
      return &zero_chunk<1>;
    case 2:
      return &zero_chunk<2>;
    case 4:
      return &zero_chunk<4>;
    case 8:
      return &zero_chunk<8>;
    case 16:
      return &zero_chunk<16>;
    default:
      return nullptr;
  }
}

template <typename Index>
void write_indices(char* to, int64_t begin, const uint64_t* bits, int64_t words) {
  for_each_bit(bits, words, [&](int64_t i) {
    const auto index = static_cast<Index>(begin + i);
    std::memcpy(to, &index, sizeof(index));
    to += sizeof(index);
  });
}

template <typename T>
class Zeroing {
 public:
  Zeroing(const Scores& scores, const std::vector<Target>& targets, int64_t key,
          const int64_t* selected, std::vector<Layout>& layout, char* record)
      : scores_(scores),
        targets_(targets),
        key_(static_cast<Key<T>>(key)),
        selected_(selected),
        layout_(layout),
        record_(record) {}

  // Whether `selected` is what these scores select.
  bool run() {
    const int64_t chunks = scores_.chunks();
    // Elements that the earlier chunks of the same tensor select.
    std::vector<int64_t> before(chunks);
    for (int64_t c = 1; c < chunks; ++c) {
      if (scores_.chunk[c].begin != 0) before[c] = before[c - 1] + selected_[c - 1];
    }
    std::vector<int32_t> runs(chunks);
    std::vector<uint8_t> ends(chunks);  // 1: the first element is selected, 2: the last one is
    std::atomic<bool> matches{true};
    scores_.parallel([&](int64_t from, int64_t to) {
      for (int64_t c = from; c < to; ++c) {
        uint64_t bits[kWords];
        if (!mark(c, bits)) {
          matches = false;
          continue;
        }
        const Chunk& chunk = scores_.chunk[c];
        const Target& target = targets_[chunk.tensor];
        const int64_t words = (chunk.count + 63) / 64, width = target.elements.width();
        char* values = nullptr;
        if (record_ != nullptr) {
          const Layout& layout = layout_[chunk.tensor];
          write_code(layout, chunk.begin, before[c], chunk.count, bits);
          values = record_ + layout.values + before[c] * width;
          runs[c] = count_runs(bits, words);
          const int64_t last = chunk.count - 1;
          ends[c] = (bits[0] & 1) | (bits[last / 64] >> last % 64 & 1) << 1;
        }
        if (selected_[c] != 0) zero_chunk_of(width)(target, chunk.begin, bits, words, values);
      }
    });
    for (int64_t c = 0; c < chunks; ++c) {
      int64_t& sum = layout_[scores_.chunk[c].tensor].runs;
      // A run that goes on from the chunk before was counted in both.
      const bool joined = scores_.chunk[c].begin != 0 && (ends[c] & 1) && (ends[c - 1] & 2);
      sum += runs[c] - (joined ? 1 : 0);
    }
    return matches;
  }

 private:
  // Sets the bits of what is selected of chunk c: its first selected_[c] elements in order.
  bool mark(int64_t c, uint64_t* bits) const {
    const Chunk& chunk = scores_.chunk[c];
    const int64_t words = (chunk.count + 63) / 64;
    if (selected_[c] == 0) {
      std::fill_n(bits, words, 0);
      return true;
    }
    const T* score = scores_.read(chunk, Scratch<T>::get());
    const TopKernels<T>& kernel = kernels().top<T>();
    int64_t surplus = kernel.mark(bits, score, chunk.count, key_) - selected_[c];
    if (surplus <= 0) return surplus == 0;
    // Ties at the end of the chunk that are not selected.
    uint64_t above[kWords];
    kernel.mark(above, score, chunk.count, key_ + 1);
    for (int64_t w = words; w-- > 0 && surplus > 0;) {
      for (uint64_t ties = bits[w] & ~above[w]; ties != 0 && surplus > 0; --surplus) {
        const uint64_t last = std::bit_floor(ties);
        bits[w] ^= last;
        ties ^= last;
      }
    }
    return surplus == 0;
  }

  void write_code(const Layout& layout, int64_t begin, int64_t before, int64_t count,
                  const uint64_t* bits) const {
    char* code = record_ + layout.code;
    const int64_t words = (count + 63) / 64;
    if (layout.index_width == 0) {
      std::memcpy(code + begin / 8, bits, (count + 7) / 8);
    } else if (layout.index_width == 4) {
      write_indices<int32_t>(code + before * 4, begin, bits, words);
    } else {
      write_indices<int64_t>(code + before * 8, begin, bits, words);
    }
  }

  static int32_t count_runs(const uint64_t* bits, int64_t words) {
    int32_t runs = 0;
    uint64_t carry = 0;
    for (int64_t w = 0; w < words; ++w) {
      runs += bit_count(bits[w] & ~(bits[w] << 1 | carry));
      carry = bits[w] >> 63;
    }
    return runs;
  }

  const Scores& scores_;
  const std::vector<Target>& targets_;
  const Key<T> key_;
  const int64_t* const selected_;
  std::vector<Layout>& layout_;
  char* const record_;  // or nullptr
};

}  // namespace

std::tuple<Tensor, Tensor> zero_selected_(std::vector<Tensor> parameters,
                                          std::vector<Tensor> scores, std::vector<Tensor> remain,
                                          double weight, int64_t key, Tensor selected,
                                          bool record) {
#define FF_CHECK_ZERO(argument, condition, ...) \
  FF_CHECK("zero_selected_", argument, condition, __VA_ARGS__)
  const Scores all("zero_selected_", scores, remain, weight);
  FF_CHECK_ZERO("parameters", parameters.size() == scores.size(), "expected one for each score");
  const int64_t infinity = all.any_double ? KeyOf<double>::infinity : KeyOf<float>::infinity;
  FF_CHECK_ZERO("key", -infinity - 1 <= key && key <= infinity + 1,
                "expected that of a score, got ", key);
  FF_CHECK_ZERO("selected",
                selected.is_cpu() && selected.scalar_type() == ScalarType::Long &&
                    selected.dim() == 1 && selected.size(0) == all.chunks() &&
                    selected.is_contiguous(),
                "expected int64, one for each chunk of ", kChunk, " scores");
  const auto* counts = static_cast<const int64_t*>(selected.const_data_ptr());
  std::vector<Target> targets;
  targets.reserve(parameters.size());
  std::vector<Layout> layout(parameters.size());
  int64_t end = 0;
  const auto reserve = [&end](int64_t bytes) {
    const int64_t begin = end;
    end += (bytes + kAlignment - 1) / kAlignment * kAlignment;
    return begin;
  };
  for (size_t t = 0; t < parameters.size(); ++t) {
    FF_CHECK_ZERO("parameters", Scores::same_shape(parameters[t], scores[t]),
                  "expected the shapes of the scores");
    targets.emplace_back(parameters[t]);
    const int64_t width = targets.back().elements.width();
    FF_CHECK_ZERO("parameters", zero_chunk_of(width) != nullptr,
                  "expected elements of 1, 2, 4, 8 or 16 bytes");
    Layout& row = layout[t];
    for (int64_t c = all.first_chunk[t]; c < all.first_chunk[t + 1]; ++c) {
      FF_CHECK_ZERO("selected", counts[c] >= 0 && counts[c] <= all.chunk[c].count,
                    "expected at most what a chunk has, got ", counts[c]);
      row.count += counts[c];
    }
    const int64_t size = all.sources[t].count, packed = (size + 7) / 8;
    row.index_width = size <= int64_t{1} << 31 ? 4 : 8;
    if (row.count * row.index_width >= packed) row.index_width = 0;
    row.code = reserve(row.index_width == 0 ? packed : row.count * row.index_width);
    row.values = reserve(row.count * width);
  }
  const Tensor bytes = torch::stable::empty({record ? end : 0}, ScalarType::Byte);
  auto* to_bytes = record ? static_cast<char*>(bytes.mutable_data_ptr()) : nullptr;
  const bool matches = all.any_double
                           ? Zeroing<double>(all, targets, key, counts, layout, to_bytes).run()
                           : Zeroing<float>(all, targets, key, counts, layout, to_bytes).run();
  FF_CHECK_ZERO("selected", matches, "expected what select_top gave for these scores");
#undef FF_CHECK_ZERO
  const Tensor rows =
      torch::stable::empty({static_cast<int64_t>(layout.size()), 5}, ScalarType::Long);
  if (!layout.empty()) {
    std::memcpy(rows.mutable_data_ptr(), layout.data(), layout.size() * sizeof(Layout));
  }
  return {bytes, rows};
}

}  // namespace fastfisher::cpu
