// Top-R, second half: zero what a selection of select_top selects, and record what it was. Of the
// scores, only the groups that the selection names as candidates are read again.

#include <atomic>
#include <bit>

#include "topr_scores.h"

namespace fastfisher::cpu::topr {
namespace {

// Every part of the record begins at a multiple of the width of the widest dtype.
constexpr int64_t kAlignment = 16;

// Row of `layout`: where the record of one tensor is; see zero_selected_ in fastfisher/topr.py.
struct Layout {
  int64_t count, index_width, code, values, runs;
};
static_assert(sizeof(Layout) == kLayoutColumns * sizeof(int64_t));

// Some groups of a chunk.
struct Groups {
  uint16_t number[kChunkGroups];
  int64_t listed = 0;
};

// The elements of a chunk, one bit each.
struct Bits {
  explicit Bits(const Chunk& chunk) : words((chunk.count + 63) / 64) {
    std::fill_n(word, words, 0);
  }

  int64_t words;
  union {
    uint64_t word[kChunk / 64];
    uint16_t group[kChunkGroups];
  };
};
static_assert(std::endian::native == std::endian::little);

template <typename T>
class Zeroing {
 public:
  Zeroing(const Scores& scores, const std::vector<View>& targets, int64_t key,
          const int64_t* selected, const uint64_t* candidates, std::vector<Layout>& layout,
          char* record)
      : scores_(scores),
        targets_(targets),
        least_(narrowed<T>(static_cast<Key<Wide<T>>>(key))),
        above_(key > KeyOf<Wide<T>>::infinity ? least_
                                              : narrowed<T>(static_cast<Key<Wide<T>>>(key + 1))),
        selected_(selected),
        candidates_(candidates),
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
        const Chunk& chunk = scores_.chunk[c];
        const View& target = targets_[chunk.tensor];
        Bits bits(chunk);
        Groups groups;
        if (selected_[c] != 0 && !mark(c, bits, groups)) {
          matches = false;
          continue;
        }
        if (record_ != nullptr) {
          write_record(c, before[c], bits, groups);
          const int64_t last = chunk.count - 1;
          runs[c] = count_runs(bits);
          ends[c] = (bits.word[0] & 1) | (bits.word[last / 64] >> last % 64 & 1) << 1;
        }
        if (target.contiguous) {
          kernels().groups.zero(target.data + chunk.begin * target.width, target.width, bits.group,
                                groups.number, groups.listed);
        } else {
          for_each_selected(target, chunk.begin, bits, groups,
                            [&](char* at) { std::memset(at, 0, target.width); });
        }
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
  // Sets the bits of what is selected of chunk c, its first selected_[c] elements in order, and
  // lists the groups with any.
  bool mark(int64_t c, Bits& bits, Groups& groups) const {
    const Chunk& chunk = scores_.chunk[c];
    const View& target = targets_[chunk.tensor];
    const uint64_t* candidates = candidates_ + chunk.candidates;
    const int64_t all = (chunk.count + kGroup - 1) / kGroup, words = (all + 63) / 64;
    int64_t candidate_groups = 0;
    for (int64_t w = 0; w < words; ++w) candidate_groups += bit_count(candidates[w]);
    const uint16_t* looked_at = all_groups();
    int64_t listed = all;
    if (2 * candidate_groups < all) {
      listed = 0;
      for (int64_t w = 0; w < words; ++w) {
        for (uint64_t left = candidates[w]; left != 0; left &= left - 1) {
          const int64_t group = w * 64 + std::countr_zero(left);
          if (group >= all) break;
          groups.number[listed++] = static_cast<uint16_t>(group);
          // Scattered groups are no pattern that the processor could foresee.
          scores_.fetch(chunk, group);
          topr::fetch(target, chunk.begin, group);
        }
      }
      looked_at = groups.number;
    }
    const T* score = scores_.read(chunk, Scratch<T>::get(), looked_at, listed);
    const auto marked = [&](Bits& to, Key<T> least) {
      return kernels().top(T{}).mark(to.group, score, chunk.count, looked_at, listed, least);
    };
    int64_t surplus = marked(bits, least_) - selected_[c];
    if (surplus > 0) {
      // Ties at the end of the chunk that are not selected.
      Bits above(chunk);
      marked(above, above_);
      for (int64_t w = bits.words; w-- > 0 && surplus > 0;) {
        for (uint64_t ties = bits.word[w] & ~above.word[w]; ties != 0 && surplus > 0; --surplus) {
          const uint64_t last = std::bit_floor(ties);
          bits.word[w] ^= last;
          ties ^= last;
        }
      }
    }
    // Without a branch, which could not be foreseen.
    for (int64_t i = 0; i < listed; ++i) {
      const uint16_t group = looked_at[i];
      groups.number[groups.listed] = group;
      groups.listed += bits.group[group] != 0;
    }
    return surplus == 0;
  }

  // Calls f with the address of each selected element of a chunk that begins at `begin`.
  template <typename F>
  static void for_each_selected(const View& target, int64_t begin, const Bits& bits,
                                const Groups& groups, const F& f) {
    for (int64_t i = 0; i < groups.listed; ++i) {
      const int64_t first = begin + groups.number[i] * kGroup;
      for (uint32_t left = bits.group[groups.number[i]]; left != 0; left &= left - 1) {
        f(target.data + target.offset(first + std::countr_zero(left)));
      }
    }
  }

  // Writes down chunk c, of whose tensor `before` elements come first.
  void write_record(int64_t c, int64_t before, const Bits& bits, const Groups& groups) const {
    const Chunk& chunk = scores_.chunk[c];
    const View& target = targets_[chunk.tensor];
    const Layout& layout = layout_[chunk.tensor];
    char* code = record_ + layout.code;
    if (layout.index_width == 0) {
      std::memcpy(code + chunk.begin / 8, bits.word, (chunk.count + 7) / 8);
    } else if (layout.index_width == 4) {
      kernels().groups.take_indices(reinterpret_cast<int32_t*>(code) + before,
                                    static_cast<int32_t>(chunk.begin), bits.group, groups.number,
                                    groups.listed);
    } else {
      auto* to = reinterpret_cast<int64_t*>(code) + before;
      for (int64_t i = 0; i < groups.listed; ++i) {
        const int64_t first = chunk.begin + groups.number[i] * kGroup;
        for (uint32_t left = bits.group[groups.number[i]]; left != 0; left &= left - 1) {
          *to++ = first + std::countr_zero(left);
        }
      }
    }
    char* values = record_ + layout.values + before * target.width;
    if (target.contiguous) {
      kernels().groups.take(values, target.data + chunk.begin * target.width, target.width,
                            bits.group, groups.number, groups.listed);
    } else {
      for_each_selected(target, chunk.begin, bits, groups, [&](const char* at) {
        std::memcpy(values, at, target.width);
        values += target.width;
      });
    }
  }

  static int32_t count_runs(const Bits& bits) {
    int32_t runs = 0;
    uint64_t carry = 0;
    for (int64_t w = 0; w < bits.words; ++w) {
      runs += bit_count(bits.word[w] & ~(bits.word[w] << 1 | carry));
      carry = bits.word[w] >> 63;
    }
    return runs;
  }

  const Scores& scores_;
  const std::vector<View>& targets_;
  const Key<T> least_, above_;
  const int64_t* const selected_;
  const uint64_t* const candidates_;
  std::vector<Layout>& layout_;
  char* const record_;  // or nullptr
};

bool is_row(const View& view, int64_t size) {
  return view.dtype == ScalarType::Long && view.dim == 1 && view.count == size && view.contiguous;
}

bool is_number(const View& view) { return view.dtype == ScalarType::Long && view.dim == 0; }

}  // namespace

void zero(const std::vector<View>& parameters, const std::vector<View>& scores,
          const std::vector<View>& remain, double weight, const View& key, const View& selected,
          const View& candidates, int64_t count, bool record, const Allocate& allocate) {
#define FF_CHECK_ZERO(argument, condition, ...) \
  FF_CHECK("zero_selected_", argument, condition, __VA_ARGS__)
  const Scores all("zero_selected_", scores, remain, weight);
  FF_CHECK_ZERO("parameters", parameters.size() == scores.size(), "expected one for each score");
  FF_CHECK_ZERO("key", is_number(key), "expected int64, of no dimension");
  const int64_t least = *reinterpret_cast<const int64_t*>(key.data);
  all.with_type([&]<typename T>() {
    constexpr int64_t infinity = KeyOf<Wide<T>>::infinity;
    FF_CHECK_ZERO("key", -infinity - 1 <= least && least <= infinity + 1,
                  "expected that of a score, got ", least);
  });
  FF_CHECK_ZERO("selected", is_row(selected, all.chunks()),
                "expected int64, one for each chunk of ", kChunk, " scores");
  FF_CHECK_ZERO("candidates", is_row(candidates, all.candidate_words),
                "expected int64, a bit for each ", kGroup, " scores");
  const auto* counts = reinterpret_cast<const int64_t*>(selected.data);
  std::vector<Layout> layout(parameters.size());
  for (size_t t = 0; t < parameters.size(); ++t) {
    FF_CHECK_ZERO("parameters", parameters[t].same_shape(scores[t]),
                  "expected the shapes of the scores");
    const int32_t width = parameters[t].width;
    FF_CHECK_ZERO("parameters", width <= 16 && std::has_single_bit(static_cast<uint32_t>(width)),
                  "expected elements of 1, 2, 4, 8 or 16 bytes");
  }
  int64_t total = 0;
  for (int64_t c = 0; c < all.chunks(); ++c) {
    FF_CHECK_ZERO("selected", counts[c] >= 0 && counts[c] <= all.chunk[c].count,
                  "expected at most what a chunk has, got ", counts[c]);
    layout[all.chunk[c].tensor].count += counts[c];
    total += counts[c];
  }
  FF_CHECK_ZERO("selected", total == count, "expected ", count, " in all, got ", total);
  int64_t end = 0;
  const auto reserve = [&end](int64_t bytes) {
    const int64_t begin = end;
    end += (bytes + kAlignment - 1) / kAlignment * kAlignment;
    return begin;
  };
  for (size_t t = 0; t < parameters.size(); ++t) {
    Layout& row = layout[t];
    const int64_t size = scores[t].count, packed = (size + 7) / 8;
    row.index_width = size <= int64_t{1} << 31 ? 4 : 8;
    if (row.count * row.index_width >= packed) row.index_width = 0;
    row.code = reserve(row.index_width == 0 ? packed : row.count * row.index_width);
    row.values = reserve(row.count * parameters[t].width);
  }
  auto* bytes = static_cast<char*>(allocate(ScalarType::Byte, {record ? end : 0}));
  bool matches = false;
  all.with_type([&]<typename T>() {
    matches = Zeroing<T>(all, parameters, least, counts,
                         reinterpret_cast<const uint64_t*>(candidates.data), layout,
                         record ? bytes : nullptr)
                  .run();
  });
  FF_CHECK_ZERO("selected", matches, "expected what select_top gave for these scores");
#undef FF_CHECK_ZERO
  void* rows = allocate(ScalarType::Long, {static_cast<int64_t>(layout.size()), kLayoutColumns});
  if (!layout.empty()) std::memcpy(rows, layout.data(), layout.size() * sizeof(Layout));
}

}  // namespace fastfisher::cpu::topr
