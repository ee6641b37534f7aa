// Top-R, first half: the k-th largest of many scores, and how many each chunk has of the first k.
//
// A random sample brackets the k-th key. One pass over the scores then counts the keys above the
// bracket, collects those inside, makes a histogram of them, and notes which groups of scores have
// any of the bracket or above: the second half need read no others. The bin of the histogram with
// the k-th key, searched among what was collected, has the answer. A bracket of a few keys, as
// 16-bit scores and ties have it, needs no collecting: each key in it is counted. Where the sample
// misled, or too many keys lie inside to be collected, that bin, or what the bracket left out, is
// the bracket of another pass. Every sum is one of integers over chunks that depend on the tensors
// alone, so neither the number of threads nor the instruction set can change a result.

#include <atomic>
#include <cmath>
#include <functional>
#include <iterator>
#include <memory>
#include <mutex>
#include <numeric>

#include "topr_scores.h"

namespace fastfisher::cpu::topr {
namespace {

// The sample is large enough for a bracket of this part of the scores, or of half of what may be
// collected where that is more; but at most kLargestSample of them or one in kSampleEvery.
constexpr double kBracketed = 0.0035;
constexpr int64_t kSampleEvery = 64, kLargestSample = int64_t{1} << 18;
// For the first and the last ranks, too, the sample has so many scores in a part of that size.
constexpr double kSampledInBracket = 32;
// Half the width of the bracket in standard deviations of the sampled rank: one call in some
// hundreds needs another pass.
constexpr double kMargin = 3.0;
// Keys that a pass may collect: one in kCollectOneIn of the scores, so that they take less than 1%
// of the memory of the scores, or kSmall if that is more. Up to kSmall scores need no sample.
constexpr int64_t kCollectOneIn = 144;
constexpr int64_t kSmall = int64_t{1} << 16;
constexpr int64_t kBins = int64_t{1} << 12;
// The keys of a bracket of at most so many are counted one by one.
constexpr int64_t kFew = 8;

// The keys [low, high].
template <typename T>
struct Bracket {
  using Bits = std::make_unsigned_t<Key<T>>;

  Key<T> low = lowest_key<T>;
  Key<T> high = KeyOf<T>::infinity;

  // One less than the number of keys, which may not fit.
  Bits span() const { return static_cast<Bits>(static_cast<Bits>(high) - static_cast<Bits>(low)); }
  // The bracket is divided into at most kBins bins of 2^shift() keys, counted from above.
  int shift() const {
    int bits = 0;
    while ((span() >> bits) >= Bits{kBins}) ++bits;
    return bits;
  }
  Bracket bin(int64_t index) const {
    const auto begin = static_cast<Bits>(index) << shift();
    const Bits end = std::min<Bits>(begin + ((Bits{1} << shift()) - 1), span());
    const auto top = static_cast<Bits>(high);
    return {static_cast<Key<T>>(top - end), static_cast<Key<T>>(top - begin)};
  }
  int64_t bin_of(Key<T> key) const {
    return static_cast<Bits>(static_cast<Bits>(high) - static_cast<Bits>(key)) >> shift();
  }
  bool has(Key<T> key) const { return low <= key && key <= high; }
  bool has_few() const { return span() < kFew; }
};

// The search for one k-th key: a bracket, and what the last pass saw of it.
template <typename T>
struct Search {
  int64_t index;  // of its count in the call
  int64_t rank;   // k, from 1
  Bracket<T> bracket;

  uint64_t* candidates;  // of all chunks

  // Where the bracket has few keys: of each chunk, how many are low, low + 1, ..., high + 1 or
  // more.
  std::vector<int32_t> at_least;
  // Where it has many: keys of each chunk above it and inside, and where those begin in
  // `collected`.
  std::vector<int32_t> above, inside;
  std::vector<int64_t> place;
  std::unique_ptr<Key<T>[]> collected;
  std::atomic<int64_t> used{0};
  std::vector<int64_t> histogram;

  int64_t entries() const { return static_cast<int64_t>(bracket.span()) + 2; }
};

template <typename T>
class Selector {
 public:
  // Entry j of `keys` and row j of `selected` and `candidates` get the selection of counts[j]
  // scores.
  Selector(const Scores& scores, const std::vector<int64_t>& counts, int64_t* keys,
           int64_t* selected, uint64_t* candidates)
      : scores_(scores), keys_(keys), selected_(selected), not_finite_(scores.chunks()) {
    for (size_t j = 0; j < counts.size(); ++j) {
      if (counts[j] == 0) {
        keys[j] = int64_t{KeyOf<Wide<T>>::infinity} + 1;
        std::fill_n(selected + j * scores.chunks(), scores.chunks(), 0);
        std::fill_n(candidates + j * scores.candidate_words, scores.candidate_words, 0);
        continue;
      }
      auto& search = *open_.emplace_back(std::make_unique<Search<T>>());
      search.index = static_cast<int64_t>(j);
      search.rank = counts[j];
      search.candidates = candidates + j * scores.candidate_words;
    }
    const int64_t searches = std::max<int64_t>(1, static_cast<int64_t>(open_.size()));
    budget_ = std::min(scores.total, std::max(kSmall, scores.total / kCollectOneIn / searches));
  }

  // Entry t of `finite` gets whether the scores of tensor t are.
  void run(bool* finite) {
    if (scores_.total > kSmall && !open_.empty()) bracket();
    do {
      pass();
      std::erase_if(open_, [&](const auto& search) { return resolve(*search); });
    } while (!open_.empty());
    std::fill_n(finite, scores_.forget.size(), true);
    for (int64_t c = 0; c < scores_.chunks(); ++c) {
      if (not_finite_[c]) finite[scores_.chunk[c].tensor] = false;
    }
  }

 private:
  // Brackets each rank between two ranks of a sample.
  void bracket() {
    const double bracketed =
        std::max(kBracketed, 0.5 * kSmall / static_cast<double>(scores_.total));
    double wanted = kSampledInBracket / bracketed;
    for (const auto& search : open_) {
      const double part = part_of(*search);
      wanted = std::max(wanted, std::pow(2 * kMargin / bracketed, 2) * part * (1 - part));
    }
    const int64_t size =
        std::min({static_cast<int64_t>(wanted), kLargestSample, scores_.total / kSampleEvery});
    std::vector<Key<T>> sample(size);
    torch::stable::parallel_for(0, size, 1024, [&](int64_t from, int64_t to) {
      auto& scratch = Scratch<T>::get();
      // Many at a time, so that their cache misses overlap.
      Chunk places[64];
      for (int64_t begin = from; begin < to; begin += 64) {
        const int64_t count = std::min<int64_t>(64, to - begin);
        for (int64_t i = 0; i < count; ++i) places[i] = random_place(begin + i, size);
        for (int64_t i = 0; i < count; ++i) {
          sample[begin + i] = key_of(*scores_.read(places[i], scratch));
        }
      }
    });
    for (auto& search : open_) {
      const double part = part_of(*search), rank = part * static_cast<double>(size);
      const double margin = kMargin * (std::sqrt(rank * (1 - part)) + 2);
      const auto first = static_cast<int64_t>(std::floor(rank - margin));
      const auto last = static_cast<int64_t>(std::ceil(rank + margin));
      auto end = sample.end();
      const auto key_at = [&](int64_t place) {
        const auto at = sample.begin() + (place - 1);
        std::nth_element(sample.begin(), at, end, std::greater<>());
        end = at;  // what is above is before it
        return *at;
      };
      if (last <= size) search->bracket.low = key_at(last);
      if (first >= 1) search->bracket.high = key_at(first);
    }
  }

  double part_of(const Search<T>& search) const {
    return static_cast<double>(search.rank) / static_cast<double>(scores_.total);
  }

  // A random place in the i-th of `parts` equal parts, so that no pattern can meet a stride.
  Chunk random_place(int64_t i, int64_t parts) const {
    // splitmix64
    uint64_t hash = (static_cast<uint64_t>(i) + 1) * 0x9e3779b97f4a7c15;
    hash = (hash ^ (hash >> 30)) * 0xbf58476d1ce4e5b9;
    hash = (hash ^ (hash >> 27)) * 0x94d049bb133111eb;
    hash ^= hash >> 31;
    const int64_t step = scores_.total / parts;
    const int64_t position = i * step + static_cast<int64_t>(hash % static_cast<uint64_t>(step));
    const auto next = std::upper_bound(scores_.offset.begin(), scores_.offset.end(), position);
    const int64_t tensor = next - scores_.offset.begin() - 1;
    const int64_t index = position - scores_.offset[tensor];
    __builtin_prefetch(scores_.forget[tensor].data + scores_.forget[tensor].offset(index));
    if (!scores_.remain.empty()) {
      __builtin_prefetch(scores_.remain[tensor].data + scores_.remain[tensor].offset(index));
    }
    return {index, static_cast<int32_t>(tensor), 1, 0};
  }

  // Reads all scores once, for every open search.
  void pass() {
    for (auto& search : open_) {
      const int64_t chunks = scores_.chunks();
      if (search->bracket.has_few()) {
        search->at_least.resize(chunks * search->entries());
        continue;
      }
      search->above.resize(chunks);
      search->inside.resize(chunks);
      search->place.resize(chunks);
      search->histogram.assign(kBins, 0);
      search->used = 0;
      // Not initialised: only what is used of it takes up memory.
      search->collected.reset(new Key<T>[budget_]);
    }
    std::mutex mutex;
    scores_.parallel([&](int64_t from, int64_t to) {
      auto& scratch = Scratch<T>::get();
      uint64_t unused[kChunkGroups / 64];
      std::vector<std::vector<int64_t>> histograms(open_.size(), std::vector<int64_t>(kBins));
      for (int64_t c = from; c < to; ++c) {
        const T* score = scores_.read(scores_.chunk[c], scratch);
        if (open_.empty()) tally(c, score, nullptr, 0, unused, 0);
        for (size_t s = 0; s < open_.size(); ++s) {
          look(*open_[s], c, score, histograms[s], scratch.keys);
        }
      }
      const std::lock_guard<std::mutex> lock(mutex);
      for (size_t s = 0; s < open_.size(); ++s) {
        if (open_[s]->bracket.has_few()) continue;
        for (int64_t bin = 0; bin < kBins; ++bin) open_[s]->histogram[bin] += histograms[s][bin];
      }
    });
  }

  void tally(int64_t c, const T* score, int32_t* at_least, int64_t entries, uint64_t* candidates,
             Key<T> low) {
    const int64_t count = scores_.chunk[c].count;
    if (!kernels().top(T{}).tally(at_least, entries, candidates, score, count, low)) {
      not_finite_[c] = 1;
    }
  }

  void look(Search<T>& search, int64_t c, const T* score, std::vector<int64_t>& histogram,
            Key<T>* keys) {
    const Chunk& chunk = scores_.chunk[c];
    const Bracket<T>& bracket = search.bracket;
    uint64_t* candidates = search.candidates + chunk.candidates;
    if (bracket.has_few()) {
      const int64_t entries = search.entries();
      tally(c, score, search.at_least.data() + c * entries, entries, candidates, bracket.low);
      return;
    }
    const KeyCounts counts =
        kernels().top(T{}).filter(keys, candidates, score, chunk.count, bracket.low, bracket.high);
    if (!counts.finite) not_finite_[c] = 1;
    search.above[c] = counts.above;
    search.inside[c] = counts.inside;
    if (counts.inside == 0) return;
    for (int32_t i = 0; i < counts.inside; ++i) ++histogram[bracket.bin_of(keys[i])];
    search.place[c] = search.used.fetch_add(counts.inside, std::memory_order_relaxed);
    if (search.place[c] + counts.inside <= budget_) {
      std::copy(keys, keys + counts.inside, search.collected.get() + search.place[c]);
    }
  }

  // Writes the selection, or returns false with the bracket of the next pass.
  bool resolve(Search<T>& search) {
    Bracket<T>& bracket = search.bracket;
    const auto above_it = [&] {
      bracket = {static_cast<Key<T>>(bracket.high + 1), KeyOf<T>::infinity};
      return false;
    };
    const auto below_it = [&] {
      bracket = {lowest_key<T>, static_cast<Key<T>>(bracket.low - 1)};
      return false;
    };
    if (bracket.has_few()) {
      const int64_t entries = search.entries();
      std::vector<int64_t> at_least(entries);
      for (int64_t c = 0; c < scores_.chunks(); ++c) {
        for (int64_t j = 0; j < entries; ++j) at_least[j] += search.at_least[c * entries + j];
      }
      if (search.rank <= at_least[entries - 1]) return above_it();
      if (search.rank > at_least[0]) return below_it();
      int64_t j = entries - 2;
      while (search.rank > at_least[j]) --j;
      select(search, static_cast<Key<T>>(bracket.low + j), [&](int64_t c) {
        const int32_t* of_chunk = search.at_least.data() + c * entries;
        return Split{of_chunk[j + 1], of_chunk[j] - of_chunk[j + 1]};
      });
      return true;
    }
    const auto above = std::accumulate(search.above.begin(), search.above.end(), int64_t{0});
    const auto inside = std::accumulate(search.inside.begin(), search.inside.end(), int64_t{0});
    if (search.rank <= above) return above_it();
    if (search.rank > above + inside) return below_it();
    int64_t rank = search.rank - above, index = 0;
    while (rank > search.histogram[index]) rank -= search.histogram[index++];
    const Bracket<T> bin = bracket.bin(index);
    if (inside > budget_) {
      bracket = bin;
      return false;
    }
    std::vector<Key<T>> candidates;
    std::copy_if(search.collected.get(), search.collected.get() + inside,
                 std::back_inserter(candidates), [&](Key<T> k) { return bin.has(k); });
    std::nth_element(candidates.begin(), candidates.begin() + (rank - 1), candidates.end(),
                     std::greater<>());
    const Key<T> key = candidates[rank - 1];
    select(search, key, [&](int64_t c) {
      const Key<T>* keys = search.collected.get() + search.place[c];
      Split split{search.above[c], 0};
      for (int32_t i = 0; i < search.inside[c]; ++i) {
        split.above += keys[i] > key;
        split.ties += keys[i] == key;
      }
      return split;
    });
    return true;
  }

  struct Split {
    int32_t above, ties;  // of a key
  };

  // Keys above the k-th of each chunk, and as many of its ties as are left when their turn comes.
  template <typename F>
  void select(const Search<T>& search, Key<T> key, const F& split_of) {
    const int64_t chunks = scores_.chunks();
    int64_t* selected = selected_ + search.index * chunks;
    std::vector<int32_t> ties(chunks);
    scores_.parallel([&](int64_t from, int64_t to) {
      for (int64_t c = from; c < to; ++c) {
        const Split split = split_of(c);
        selected[c] = split.above;
        ties[c] = split.ties;
      }
    });
    int64_t left = search.rank - std::accumulate(selected, selected + chunks, int64_t{0});
    for (int64_t c = 0; c < chunks; ++c) {
      const int64_t taken = std::min<int64_t>(left, ties[c]);
      selected[c] += taken;
      left -= taken;
    }
    keys_[search.index] = widened<T>(key);
  }

  const Scores& scores_;
  int64_t* const keys_;
  int64_t* const selected_;
  std::vector<uint8_t> not_finite_;  // chunks with a score that is NaN or infinite
  std::vector<std::unique_ptr<Search<T>>> open_;
  int64_t budget_ = 0;
};

}  // namespace

void select(const std::vector<View>& scores, const std::vector<View>& remain, double weight,
            const std::vector<int64_t>& counts, const Allocate& allocate) {
  const Scores all("select_top", scores, remain, weight);
  for (const int64_t count : counts) {
    FF_CHECK("select_top", "counts", count >= 0 && count <= all.total, "expected 0..", all.total,
             ", the number of scores, got ", count);
  }
  const auto rows = static_cast<int64_t>(counts.size());
  const auto tensors = static_cast<int64_t>(scores.size());
  auto* keys = static_cast<int64_t*>(allocate(ScalarType::Long, {rows}));
  auto* selected = static_cast<int64_t*>(allocate(ScalarType::Long, {rows, all.chunks()}));
  auto* finite = static_cast<bool*>(allocate(ScalarType::Bool, {tensors}));
  auto* candidates =
      static_cast<uint64_t*>(allocate(ScalarType::Long, {rows, all.candidate_words}));
  all.with_type(
      [&]<typename T>() { Selector<T>(all, counts, keys, selected, candidates).run(finite); });
}

}  // namespace fastfisher::cpu::topr
