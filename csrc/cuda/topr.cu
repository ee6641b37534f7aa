// The top-R selection: a radix select over many tensors, and the zeroing of what it selects.
//
// Each pass reads all tensors in one launch. A warp takes words of 1024 consecutive scores of a
// tensor, so that it needs no other warp, and a table says which tensor a word is of. A histogram
// pass counts one digit of the keys whose higher digits are those of the k-th key, and a kernel of
// one block finds the next digit from it. The second pass notes which groups of 16 scores have a
// key of at least the digit found, and no other group is read again. The last pass counts for each
// chunk what is above the k-th key and what equals it, and one block shares the ties out in order.
//
// Every sum is one of integers, so the order of the atomic additions cannot change a result.
#include "device.h"
#include "topr.h"

namespace fastfisher::cuda::topr {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kBlocksPerProcessor = 3;
constexpr int kScanThreads = 1024;
constexpr int kDigitBits = 11, kBins = 1 << kDigitBits;
constexpr unsigned kAll = 0xffffffffu;
static_assert(kWarps == kChunkWords, "a block zeroes a chunk, each warp a word of it");

// The digits found of the k-th key, and its rank among the keys that have them.
struct Search {
  unsigned long long prefix;
  int64_t rank;
};

// Scores are compared as ordered integers: see csrc/cpu/topr_kernels.h. As codes, which are not
// negative, they count from the lowest key, that of NaN.
template <typename Key>
constexpr Key kInfinity = sizeof(Key) == 4 ? Key{0x7f800000} : Key(0x7ff0000000000000);
template <typename Key>
using Code = std::conditional_t<sizeof(Key) == 4, uint32_t, uint64_t>;

__device__ __forceinline__ int32_t bits_of(float value) { return __float_as_int(value); }
__device__ __forceinline__ int64_t bits_of(double value) { return __double_as_longlong(value); }

template <typename Key, typename Float>
__device__ __forceinline__ Code<Key> code_of(Float value) {
  constexpr Code<Key> infinity = kInfinity<Key>, sign = ~(~Code<Key>{0} >> 1);
  const auto bits = static_cast<Code<Key>>(bits_of(value)), magnitude = bits & ~sign;
  if (magnitude > infinity) return 0;
  return (bits & sign ? infinity - magnitude : infinity + magnitude) + 1;
}

// How scores are stored, and what is computed with them: in their dtype, as two rounded operations.
struct Short {  // bfloat16 or float16: one code for both
  using Bits = uint16_t;
  bool is_half;

  __device__ explicit Short(Dtype dtype) : is_half(dtype == Dtype::kHalf) {}
  __device__ __forceinline__ float value(Bits bits) const {
    return is_half ? __half2float(__ushort_as_half(bits))
                   : __uint_as_float(static_cast<unsigned>(bits) << 16);
  }
  __device__ __forceinline__ float rounded(float value) const {
    return is_half ? __half2float(__float2half_rn(value))
                   : __bfloat162float(__float2bfloat16_rn(value));
  }
  __device__ __forceinline__ float subtract(float a, float b, double weight) const {
    return rounded(__fsub_rn(a, rounded(__fmul_rn(b, static_cast<float>(weight)))));
  }
};
struct Float {
  using Bits = uint32_t;

  __device__ explicit Float(Dtype) {}
  __device__ __forceinline__ float value(Bits bits) const { return __uint_as_float(bits); }
  __device__ __forceinline__ float subtract(float a, float b, double weight) const {
    return __fsub_rn(a, __fmul_rn(b, static_cast<float>(weight)));
  }
};
struct Double {
  using Bits = uint64_t;

  __device__ explicit Double(Dtype) {}
  __device__ __forceinline__ double value(Bits bits) const {
    return __longlong_as_double(static_cast<int64_t>(bits));
  }
  __device__ __forceinline__ double subtract(double a, double b, double weight) const {
    return __dsub_rn(a, __dmul_rn(b, weight));
  }
};

// a / b of numbers that are not negative; with fewer registers than a division of 64 bits takes,
// unless it takes one.
__device__ __forceinline__ int64_t divided(int64_t a, int64_t b) {
  if (((a | b) >> 32) == 0) return static_cast<uint32_t>(a) / static_cast<uint32_t>(b);
  // From the bits of the quotient above 2^32 down, as by hand; b is not 0.
  uint64_t quotient = 0, left = 0;
#pragma unroll 1
  for (int bit = 62; bit >= 0; --bit) {
    left = left << 1 | (static_cast<uint64_t>(a) >> bit & 1);
    if (left >= static_cast<uint64_t>(b)) {
      left -= static_cast<uint64_t>(b);
      quotient |= uint64_t{1} << bit;
    }
  }
  return static_cast<int64_t>(quotient);
}

// The place of an element in memory, in elements, from its place in row-major order.
__device__ __forceinline__ int64_t offset_of(const Operand& operand, const int64_t* numbers,
                                             int64_t index) {
  if (operand.shape < 0) return index;
  const int64_t* const sizes = numbers + operand.shape + 1;
  const int64_t dims = sizes[-1];
  int64_t offset = 0;
#pragma unroll 1
  for (int64_t d = dims - 1; d > 0; --d) {
    const int64_t rest = divided(index, sizes[d]);
    offset += (index - rest * sizes[d]) * sizes[dims + d];
    index = rest;
  }
  return offset + index * sizes[dims];
}

// As many elements of `width` bytes as 16 bytes hold, of which the first `valid` exist, from
// wherever they are. Loads name their state space: the compiler cannot know that of an address that
// it finds in memory.
template <int width>
__device__ __forceinline__ uint4 gather(const Operand& from, const int64_t* numbers, int64_t index,
                                        int valid) {
  uint64_t low = 0, high = 0;
#pragma unroll 1
  for (int i = 0; i < valid; ++i) {
    const char* const at = from.data + offset_of(from, numbers, index + i) * width;
    uint64_t bits = 0;
    if constexpr (width == 2) bits = __ldcg(reinterpret_cast<const uint16_t*>(at));
    if constexpr (width == 4) bits = __ldcg(reinterpret_cast<const uint32_t*>(at));
    if constexpr (width == 8) bits = __ldcg(reinterpret_cast<const uint64_t*>(at));
    const int byte = i * width;
    if (byte < 8) {
      low |= bits << byte * 8;
    } else {
      high |= bits << (byte - 8) * 8;
    }
  }
  return make_uint4(static_cast<unsigned>(low), static_cast<unsigned>(low >> 32),
                    static_cast<unsigned>(high), static_cast<unsigned>(high >> 32));
}

// One of the elements in 16 bytes; `i` is known to the compiler.
template <typename Bits>
__device__ __forceinline__ Bits element(const uint4& raw, int i) {
  const unsigned words[4] = {raw.x, raw.y, raw.z, raw.w};
  const int byte = i * static_cast<int>(sizeof(Bits));
  if constexpr (sizeof(Bits) == 8) {
    return static_cast<Bits>(words[byte / 4 + 1]) << 32 | words[byte / 4];
  } else {
    return static_cast<Bits>(words[byte / 4] >> byte % 4 * 8);
  }
}

// A word of scores, which the lanes of a warp read together.
struct Word {
  const Entry* entry;
  int64_t begin;  // in its tensor
  int count;      // scores, at most kWord

  __device__ __forceinline__ static bool is_plain(const Operand& operand) {
    return operand.shape < 0 && reinterpret_cast<uintptr_t>(operand.data) % 16 == 0;
  }

  // Calls f(step, codes, valid) on each lane for each of its vectors in the groups that are wanted,
  // and with valid = 0 for those in others. The vectors of one step, one a lane, follow each other.
  // Returns one bit for each group: whether f returned true for any of its vectors.
  template <typename Key, typename Stored, bool plain, typename F>
  __device__ __forceinline__ uint64_t visit_as(const Table& table, uint64_t wanted,
                                               const F& f) const {
    using Bits = typename Stored::Bits;
    constexpr int kLength = 16 / sizeof(Bits);  // of a vector
    constexpr int kSteps = kWord / (32 * kLength), kAhead = !plain ? 1 : sizeof(Key) == 8 ? 2 : 4;
    constexpr int kLanes = kGroup / kLength;  // of a group
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const Stored stored(entry->dtype);
    const bool paired = entry->remain.data != nullptr;
    uint64_t kept = 0;
#pragma unroll 1
    for (int first = 0; first < kSteps; first += kAhead) {
      // All loads before any of them is waited for.
      uint4 own[kAhead], other[kAhead];
#pragma unroll
      for (int s = 0; s < kAhead; ++s) {
        own[s] = other[s] = make_uint4(0, 0, 0, 0);
        const int place = ((first + s) * 32 + lane) * kLength;
        if ((wanted >> (place / kGroup) & 1) == 0) continue;
        if constexpr (plain) {
          const int64_t byte = (begin + place) * int64_t{sizeof(Bits)};
          own[s] = __ldcg(reinterpret_cast<const uint4*>(entry->score.data + byte));
          if (paired) {
            other[s] = __ldcg(reinterpret_cast<const uint4*>(entry->remain.data + byte));
          }
        } else {
          const int valid = min(kLength, count - place);
          own[s] = gather<sizeof(Bits)>(entry->score, table.numbers, begin + place, valid);
          if (!paired) continue;
          other[s] = gather<sizeof(Bits)>(entry->remain, table.numbers, begin + place, valid);
        }
      }
#pragma unroll
      for (int s = 0; s < kAhead; ++s) {
        const int place = ((first + s) * 32 + lane) * kLength;
        const int valid = (wanted >> (place / kGroup) & 1) != 0 ? min(kLength, count - place) : 0;
        Code<Key> codes[kLength];
#pragma unroll
        for (int i = 0; i < kLength; ++i) {
          auto value = stored.value(element<Bits>(own[s], i));
          if (paired) {
            value = stored.subtract(value, stored.value(element<Bits>(other[s], i)), table.weight);
          }
          if constexpr (sizeof(Key) == 8) {
            codes[i] = code_of<Key>(static_cast<double>(value));
          } else {
            codes[i] = code_of<Key>(value);
          }
        }
        const unsigned lanes = __ballot_sync(kAll, f(first + s, codes, valid));
        const bool any = lane < 32 / kLanes && (lanes >> lane * kLanes & ((1u << kLanes) - 1)) != 0;
        kept |= uint64_t{__ballot_sync(kAll, any)} << (first + s) * (32 / kLanes);
      }
    }
    return kept;
  }

  template <typename Key, bool plain, typename F>
  __device__ __forceinline__ uint64_t visit_any(const Table& table, uint64_t wanted,
                                                const F& f) const {
    switch (entry->dtype) {
      case Dtype::kFloat:
        return visit_as<Key, Float, plain>(table, wanted, f);
      case Dtype::kDouble:
        if constexpr (sizeof(Key) == 8) return visit_as<Key, Double, plain>(table, wanted, f);
        return 0;
      default:
        return visit_as<Key, Short, plain>(table, wanted, f);
    }
  }

  template <typename Key, typename F>
  __device__ __forceinline__ uint64_t visit(const Table& table, uint64_t wanted, const F& f) const {
    const bool plain = count == kWord && is_plain(entry->score) && is_plain(entry->remain);
    return plain ? visit_any<Key, true>(table, wanted, f) : visit_any<Key, false>(table, wanted, f);
  }
};

// The tensor of a word or a chunk: the last one whose first is not after it.
template <int64_t Entry::* first>
__device__ __forceinline__ int64_t tensor_of(const Table& table, int64_t place) {
  int64_t low = 0, high = table.tensors - 1;
  while (low < high) {
    const int64_t middle = (low + high + 1) / 2;
    if (table.entries[middle].*first <= place) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low;
}

// Calls f(tensor, number, word) for each word of this warp's share, which is one piece.
template <typename F>
__device__ __forceinline__ void for_each_word(const Table& table, const F& f) {
  const int64_t warps = int64_t{gridDim.x} * kWarps;
  const int64_t share = (table.words + warps - 1) / warps;
  const int64_t from = (int64_t{blockIdx.x} * kWarps + threadIdx.x / 32) * share;
  const int64_t to = min(from + share, table.words);
  if (from >= to) return;
  int64_t tensor = tensor_of<&Entry::first_word>(table, from);
  for (int64_t w = from; w < to; ++w) {
    while (tensor + 1 < table.tensors && table.entries[tensor + 1].first_word <= w) ++tensor;
    const Entry* const entry = table.entries + tensor;
    const int64_t begin = (w - entry->first_word) * kWord;
    const int count = static_cast<int>(min(int64_t{kWord}, entry->count - begin));
    f(tensor, w, Word{entry, begin, count});
  }
}

// Counts one digit of each lane. That of the first lane is counted for all lanes together: mostly,
// one digit is by far the most frequent, such as that of zero.
__device__ __forceinline__ void tally(unsigned* histogram, bool counts, unsigned digit) {
  const unsigned counted = __ballot_sync(kAll, counts);
  if (counted == 0) return;
  const int leader = __ffs(static_cast<int>(counted)) - 1;
  const unsigned common = __shfl_sync(kAll, digit, leader);
  const unsigned same = __ballot_sync(kAll, counts && digit == common);
  if (static_cast<int>(threadIdx.x) % 32 == leader) {
    atomicAdd(&histogram[common], static_cast<unsigned>(__popc(same)));
  } else if (counts && digit != common) {
    atomicAdd(&histogram[digit], 1u);
  }
}

// Which groups of scores a histogram pass reads: all of them; all, and notes those with a key of at
// least the digits found; or those noted, and notes anew.
enum class Pass { kFirst, kSecond, kLater };

// Adds the digits at `shift` of all keys that have the digits found before. The first pass finds
// which tensors have scores that are not finite.
template <typename Key>
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor)
    count_digits(Table table, const Search* search, Pass pass, int shift, int bits,
                 unsigned long long* histogram, uint64_t* candidates, unsigned* not_finite) {
  FF_SHARED(unsigned, own, [kBins]);
  for (int bin = threadIdx.x; bin < kBins; bin += kThreads) own[bin] = 0;
  __syncthreads();
  const auto prefix = pass == Pass::kFirst ? Code<Key>{0} : static_cast<Code<Key>>(search->prefix);
  for_each_word(table, [&](int64_t tensor, int64_t w, const Word& word) {
    bool finite = true;
    const uint64_t wanted = pass == Pass::kLater ? candidates[w] : ~uint64_t{0};
    const auto look = [&](int, const auto& codes, int valid) {
      bool reached = false;
#pragma unroll
      for (int i = 0; i < static_cast<int>(sizeof(codes) / sizeof(codes[0])); ++i) {
        const bool exists = i < valid;
        // In two shifts, for one by all bits is undefined.
        const Code<Key> above = codes[i] >> shift >> bits;
        tally(own, exists && above == prefix,
              static_cast<unsigned>(codes[i] >> shift) & ((1u << bits) - 1));
        reached |= exists && above >= prefix;
        // 0 is NaN, 1 and the largest are infinite.
        finite &= !exists || (codes[i] > 1 && codes[i] <= 2 * Code<Key>(kInfinity<Key>));
      }
      return reached;
    };
    const uint64_t kept = word.visit<Key>(table, wanted, look);
    __syncwarp();  // All have read what the first lane overwrites.
    const bool first_lane = threadIdx.x % 32 == 0;
    if (pass != Pass::kFirst) {
      if (first_lane) candidates[w] = kept;
    } else if (!__all_sync(kAll, finite) && first_lane) {
      atomicOr(&not_finite[tensor], 1u);
    }
  });
  __syncthreads();
  for (int bin = threadIdx.x; bin < kBins; bin += kThreads) {
    if (own[bin] != 0) atomicAdd(&histogram[bin], static_cast<unsigned long long>(own[bin]));
  }
}

// The sum of `value` over the threads before this one, and over all of them.
struct Scan {
  int64_t before, total;
};
__device__ __forceinline__ Scan scan(int64_t value, int64_t (&sums)[32]) {
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  int64_t sum = value;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const int64_t left = __shfl_up_sync(kAll, sum, step);
    if (lane >= step) sum += left;
  }
  if (lane == 31) sums[warp] = sum;
  __syncthreads();
  Scan result{sum - value, 0};
  for (int other = 0; other < static_cast<int>(blockDim.x) / 32; ++other) {
    if (other < warp) result.before += sums[other];
    result.total += sums[other];
  }
  // The sums may be written anew after this.
  __syncthreads();
  return result;
}

// Finds, from the histogram of a digit, which the k-th key has. One block. `rank` is k for the
// first digit, and 0 after it. Clears the histogram unless others need it.
__global__ void __launch_bounds__(kThreads)
    find_digit(Search* search, int64_t rank, int bits, unsigned long long* histogram, bool clear) {
  FF_SHARED(int64_t, sums, [32]);
  constexpr int kOwn = kBins / kThreads;
  const Search start = rank != 0 ? Search{0, rank} : *search;
  // From the highest digit.
  const int last = kBins - 1 - static_cast<int>(threadIdx.x) * kOwn;
  int64_t counts[kOwn], sum = 0;
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    counts[i] = static_cast<int64_t>(histogram[last - i]);
    sum += counts[i];
    if (clear) histogram[last - i] = 0;
  }
  int64_t above = scan(sum, sums).before;
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    if (above < start.rank && start.rank <= above + counts[i]) {
      *search = {start.prefix << bits | static_cast<unsigned>(last - i), start.rank - above};
    }
    above += counts[i];
  }
}

// Adds to each chunk of `selected` how many keys are above the one found, and to `ties` how many
// equal it. Only the groups with any are candidates after it.
template <typename Key>
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor)
    count_selected(Table table, const Search* search, int64_t* selected, int64_t* ties,
                   uint64_t* candidates) {
  const auto found = static_cast<Code<Key>>(search->prefix);
  for_each_word(table, [&](int64_t, int64_t w, const Word& word) {
    unsigned above = 0, equal = 0;
    const auto look = [&](int, const auto& codes, int valid) {
      bool reached = false;
#pragma unroll
      for (int i = 0; i < static_cast<int>(sizeof(codes) / sizeof(codes[0])); ++i) {
        above += i < valid && codes[i] > found;
        equal += i < valid && codes[i] == found;
        reached |= i < valid && codes[i] >= found;
      }
      return reached;
    };
    const uint64_t kept = word.visit<Key>(table, candidates[w], look);
    __syncwarp();  // All have read what the first lane overwrites.
    above = __reduce_add_sync(kAll, above);
    equal = __reduce_add_sync(kAll, equal);
    if (threadIdx.x % 32 != 0) return;
    candidates[w] = kept;
    const int64_t chunk = word.entry->first_chunk + word.begin / kChunk;
    if (above != 0) {
      atomicAdd(reinterpret_cast<unsigned long long*>(selected + chunk),
                static_cast<unsigned long long>(above));
    }
    if (equal != 0) {
      atomicAdd(reinterpret_cast<unsigned long long*>(ties + chunk),
                static_cast<unsigned long long>(equal));
    }
  });
}

// Selects the ties of the first chunks, as many as are left, and clears them. One block.
template <typename Key>
__global__ void __launch_bounds__(kScanThreads)
    share_ties(const Search* search, int64_t chunks, int64_t* selected, int64_t* ties,
               int64_t* key) {
  FF_SHARED(int64_t, sums, [32]);
  constexpr int kOwn = 4;
  int64_t left = search->rank;
  for (int64_t tile = 0; tile < chunks; tile += kScanThreads * kOwn) {
    const int64_t first = tile + int64_t{threadIdx.x} * kOwn;
    int64_t counts[kOwn], sum = 0;
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      counts[i] = first + i < chunks ? ties[first + i] : 0;
      sum += counts[i];
    }
    const Scan all = scan(sum, sums);
    int64_t own_left = left - all.before;
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      if (counts[i] == 0) continue;
      ties[first + i] = 0;
      if (own_left > 0) selected[first + i] += min(own_left, counts[i]);
      own_left -= counts[i];
    }
    left -= all.total;
  }
  if (threadIdx.x == 0) {
    *key = static_cast<int64_t>(static_cast<Key>(static_cast<Code<Key>>(search->prefix) -
                                                 static_cast<Code<Key>>(kInfinity<Key>) - 1));
  }
}

__global__ void __launch_bounds__(kThreads)
    write_finite(bool* finite, const unsigned* not_finite, int64_t tensors) {
  const int64_t t = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (t < tensors) finite[t] = not_finite[t] == 0;
}

// How many elements the chunks before each one select. One block.
__global__ void __launch_bounds__(kScanThreads)
    sum_selected(const int64_t* selected, int64_t chunks, int64_t count, int64_t* before,
                 int64_t* matches) {
  FF_SHARED(int64_t, sums, [32]);
  constexpr int kOwn = 4;
  int64_t done = 0;
  bool possible = true;
  for (int64_t tile = 0; tile < chunks; tile += kScanThreads * kOwn) {
    const int64_t first = tile + int64_t{threadIdx.x} * kOwn;
    int64_t counts[kOwn], sum = 0;
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      counts[i] = first + i < chunks ? selected[first + i] : 0;
      possible &= 0 <= counts[i] && counts[i] <= kChunk;
      sum += counts[i];
    }
    const Scan all = scan(sum, sums);
    int64_t place = done + all.before;
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      if (first + i < chunks) before[first + i] = place;
      place += counts[i];
    }
    done += all.total;
  }
  possible = __syncthreads_and(possible && done == count) != 0;
  if (threadIdx.x == 0) {
    before[chunks] = done;
    *matches = possible ? 1 : 0;
  }
}

// Where the record of each tensor is. One block.
__global__ void __launch_bounds__(kScanThreads)
    lay_out(Table table, const int64_t* before, Layout* layout) {
  FF_SHARED(int64_t, sums, [32]);
  int64_t end = 0;
  for (int64_t tile = 0; tile < table.tensors; tile += kScanThreads) {
    const int64_t t = tile + threadIdx.x;
    Layout row{};
    int64_t code = 0, values = 0;
    if (t < table.tensors) {
      const Entry& entry = table.entries[t];
      const int64_t next = t + 1 < table.tensors ? table.entries[t + 1].first_chunk : table.chunks;
      const int64_t packed = (entry.count + 7) / 8;
      row.count = before[next] - before[entry.first_chunk];
      row.index_width = entry.count <= int64_t{1} << 31 ? 4 : 8;
      if (row.count * row.index_width >= packed) row.index_width = 0;
      code = row.index_width == 0 ? packed : row.count * row.index_width;
      code = (code + kAlignment - 1) / kAlignment * kAlignment;
      values = row.count * entry.target_width;
      values = (values + kAlignment - 1) / kAlignment * kAlignment;
    }
    const Scan all = scan(code + values, sums);
    row.code = end + all.before;
    row.values = row.code + code;
    if (t < table.tensors) layout[t] = row;
    end += all.total;
  }
}

template <typename Bits>
__device__ __forceinline__ void take(char* from, char* values, int64_t rank, Bits zero) {
  auto* const at = reinterpret_cast<Bits*>(from);
  if (values != nullptr) reinterpret_cast<Bits*>(values)[rank] = __ldcg(at);
  __stcg(at, zero);
}

// Zeroes an element, and keeps it as the one of that rank unless `values` is nullptr.
__device__ __forceinline__ void take(char* from, int width, char* values, int64_t rank) {
  switch (width) {
    case 1:
      return take<uint8_t>(from, values, rank, 0);
    case 2:
      return take<uint16_t>(from, values, rank, 0);
    case 4:
      return take<uint32_t>(from, values, rank, 0);
    case 8:
      return take<uint64_t>(from, values, rank, 0);
    default:
      return take<uint4>(from, values, rank, make_uint4(0, 0, 0, 0));
  }
}

// Zeroes, in each chunk, its first elements in order, as many as `selected` says. Writes the record
// unless that is nullptr, and into `ends`, for each word, whether its first (1) and its last (2)
// element are selected.
template <typename Key>
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor)
    zero_chunks(Table table, const int64_t* key, const int64_t* selected,
                const uint64_t* candidates, const int64_t* before, Layout* layout, char* record,
                uint8_t* ends, int64_t* matches) {
  // One bit for each element of a word, in row-major order.
  FF_SHARED(unsigned, above_bits, [kWarps][32]);
  FF_SHARED(unsigned, tied_bits, [kWarps][32]);
  FF_SHARED(int, above_of, [kWarps]);
  FF_SHARED(int, ties_of, [kWarps]);
  FF_SHARED(int, agreed, [1]);
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  // Another block may find later that what it sees is no match, so one thread reads for all.
  if (threadIdx.x == 0)
    agreed[0] = atomicAdd(reinterpret_cast<unsigned long long*>(matches), 0ull) != 0;
  __syncthreads();
  if (agreed[0] == 0) return;
  const Code<Key> found = static_cast<Code<Key>>(*key) + static_cast<Code<Key>>(kInfinity<Key>) + 1;
  const int64_t share = (table.chunks + gridDim.x - 1) / gridDim.x;
  const int64_t from = blockIdx.x * share, to = min(from + share, table.chunks);
  if (from >= to) return;
  int64_t tensor = tensor_of<&Entry::first_chunk>(table, from);
  for (int64_t c = from; c < to; ++c) {
    const int64_t wanted = selected[c];
    if (wanted == 0) continue;
    while (tensor + 1 < table.tensors && table.entries[tensor + 1].first_chunk <= c) ++tensor;
    const Entry* const entry = table.entries + tensor;
    const int64_t in_tensor = (c - entry->first_chunk) * kChunkWords + warp;
    const int64_t begin = in_tensor * kWord, left_over = entry->count - begin;
    const int count = static_cast<int>(max(int64_t{0}, min(int64_t{kWord}, left_over)));
    unsigned bits = 0, ties = 0;
    if (count != 0) {
      const auto look = [&](int step, const auto& codes, int valid) {
        constexpr int kLength = static_cast<int>(sizeof(codes) / sizeof(codes[0]));
        constexpr int kLanes = 8 / kLength;  // of a byte
        unsigned over = 0, equal = 0;
#pragma unroll
        for (int i = 0; i < kLength; ++i) {
          over |= static_cast<unsigned>(i < valid && codes[i] > found) << i;
          equal |= static_cast<unsigned>(i < valid && codes[i] == found) << i;
        }
        over <<= lane % kLanes * kLength;
        equal <<= lane % kLanes * kLength;
#pragma unroll
        for (int other = 1; other < kLanes; other *= 2) {
          over |= __shfl_xor_sync(kAll, over, other);
          equal |= __shfl_xor_sync(kAll, equal, other);
        }
        if (lane % kLanes == 0) {
          const int byte = (step * 32 + lane) / kLanes;
          reinterpret_cast<uint8_t*>(above_bits[warp])[byte] = static_cast<uint8_t>(over);
          reinterpret_cast<uint8_t*>(tied_bits[warp])[byte] = static_cast<uint8_t>(equal);
        }
        return false;
      };
      Word{entry, begin, count}.visit<Key>(table, candidates[entry->first_word + in_tensor], look);
      __syncwarp();
      bits = above_bits[warp][lane];
      ties = tied_bits[warp][lane];
    }
    const int above =
        static_cast<int>(__reduce_add_sync(kAll, static_cast<unsigned>(__popc(bits))));
    const int tied = static_cast<int>(__reduce_add_sync(kAll, static_cast<unsigned>(__popc(ties))));
    if (lane == 0) {
      above_of[warp] = above;
      ties_of[warp] = tied;
    }
    __syncthreads();
    int above_all = 0, ties_all = 0, above_before = 0, ties_before = 0;
    for (int other = 0; other < kWarps; ++other) {
      if (other == warp) {
        above_before = above_all;
        ties_before = ties_all;
      }
      above_all += above_of[other];
      ties_all += ties_of[other];
    }
    // They may be written anew after this.
    __syncthreads();
    const int64_t left = wanted - above_all;
    if (left < 0 || left > ties_all) {
      if (threadIdx.x == 0) atomicExch(reinterpret_cast<unsigned long long*>(matches), 0ull);
      continue;
    }
    const int own_left = max(0, min(tied, static_cast<int>(left) - ties_before));
    int earlier = __popc(ties);
    if (own_left != 0 && own_left != tied) {
#pragma unroll
      for (int step = 1; step < 32; step *= 2) {
        const int sum = __shfl_up_sync(kAll, earlier, step);
        if (lane >= step) earlier += sum;
      }
      earlier -= __popc(ties);
      // The last ties go.
      for (int surplus = __popc(ties) - max(0, own_left - earlier); surplus > 0; --surplus) {
        ties ^= 0x80000000u >> __clz(static_cast<int>(ties));
      }
    } else if (own_left == 0) {
      ties = 0;
    }
    bits |= ties;
    // Not the runs, which other warps add to.
    int64_t index_width = 0;
    char *code = nullptr, *values = nullptr;
    if (record != nullptr) {
      index_width = layout[tensor].index_width;
      code = record + layout[tensor].code;
      values = record + layout[tensor].values;
    }
    int64_t rank = 0;  // among what the tensor selects
    if (record != nullptr) {
      rank = before[c] - before[entry->first_chunk] + above_before +
             min(left, static_cast<int64_t>(ties_before));
      const unsigned carry = __shfl_up_sync(kAll, bits, 1) >> 31;
      const unsigned starts = bits & ~(bits << 1 | (lane == 0 ? 0 : carry));
      const unsigned runs = __reduce_add_sync(kAll, static_cast<unsigned>(__popc(starts)));
      const unsigned last = __shfl_sync(kAll, bits, 31) >> 31;
      if (lane == 0 && count != 0) {
        ends[entry->first_word + in_tensor] = static_cast<uint8_t>((bits & 1) | last << 1);
        atomicAdd(reinterpret_cast<unsigned long long*>(&layout[tensor].runs),
                  static_cast<unsigned long long>(runs));
      }
      // A part of the record ends at a multiple of 16 bytes.
      if (index_width == 0 && lane * 32 < count) {
        reinterpret_cast<unsigned*>(code)[in_tensor * 32 + lane] = bits;
      }
    }
    for (int part = 0; part < 32; ++part) {
      const unsigned mask = __shfl_sync(kAll, bits, part);
      if (mask == 0) continue;
      if (mask >> lane & 1) {
        const int64_t index = begin + part * 32 + lane;
        const int64_t own = rank + __popc(mask & ((1u << lane) - 1));
        char* const at = entry->target.data +
                         offset_of(entry->target, table.numbers, index) * entry->target_width;
        take(at, entry->target_width, values, own);
        if (index_width == 4) {
          reinterpret_cast<int32_t*>(code)[own] = static_cast<int32_t>(index);
        } else if (index_width == 8) {
          reinterpret_cast<int64_t*>(code)[own] = index;
        }
      }
      rank += __popc(mask);
    }
  }
}

// Takes off the runs that go on from the word before, which were counted in both.
__global__ void __launch_bounds__(kThreads)
    join_runs(Table table, const uint8_t* ends, Layout* layout) {
  const int64_t w = int64_t{blockIdx.x} * kThreads + threadIdx.x + 1;
  if (w >= table.words || (ends[w] & 1) == 0 || (ends[w - 1] & 2) == 0) return;
  const int64_t tensor = tensor_of<&Entry::first_word>(table, w);
  if (table.entries[tensor].first_word == w) return;
  atomicAdd(reinterpret_cast<unsigned long long*>(&layout[tensor].runs), ~0ull);
}

// What a launch of ff_topr_write brings: its parameters may take 4 KiB.
struct Numbers {
  static constexpr int kCount = 500;
  int64_t value[kCount];
};

__global__ void __launch_bounds__(kThreads)
    write_numbers(int64_t* to, const __grid_constant__ Numbers numbers, int count) {
  for (int i = threadIdx.x; i < count; i += kThreads) to[i] = numbers.value[i];
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Enough to fill the device, but no more than there is work for. A block's histogram counts in 32
// bits, which sets how much one may take.
dim3 grid(int64_t tasks) {
  const int64_t wanted = int64_t{ff_processors()} * kBlocksPerProcessor;
  const int64_t least = ceil_div(tasks, int64_t{1} << 18);
  const int64_t blocks = wanted < least ? least : wanted;
  return dim3(static_cast<unsigned>(tasks < blocks ? tasks : blocks));
}

// The parts of the workspace of a selection.
struct Workspace {
  unsigned long long *first, *later;  // histograms
  Search* search;
  unsigned* not_finite;
  int64_t* ties;

  Workspace(int64_t* from, const Table& table)
      : first(reinterpret_cast<unsigned long long*>(from)),
        later(first + kBins),
        search(reinterpret_cast<Search*>(later + kBins)),
        not_finite(reinterpret_cast<unsigned*>(search + 1)),
        ties(from + 2 * kBins + 2 + table.tensors) {}
};
static_assert(sizeof(Search) == 2 * sizeof(int64_t) && kBins == 2048,
              "select_workspace counts with it");

#define FF_TRY(launch)              \
  do {                              \
    const int error_ = (launch);    \
    if (error_ != 0) return error_; \
  } while (false)

template <typename Key>
int begin(const Table& table, bool* finite, const Workspace& work, void* stream) {
  constexpr int shift = sizeof(Key) * 8 - kDigitBits;
  if (table.words != 0) {
    FF_TRY(FF_LAUNCH((count_digits<Key>), grid(ceil_div(table.words, kWarps)), dim3(kThreads), 0,
                     stream, table, work.search, Pass::kFirst, shift, kDigitBits, work.first,
                     nullptr, work.not_finite));
  }
  const auto blocks = static_cast<unsigned>(ceil_div(table.tensors, kThreads));
  return FF_LAUNCH(write_finite, dim3(blocks), dim3(kThreads), 0, stream, finite, work.not_finite,
                   table.tensors);
}

template <typename Key>
int select(const Table& table, int64_t k, int64_t* key, int64_t* selected, uint64_t* candidates,
           const Workspace& work, void* stream) {
  const dim3 words = grid(ceil_div(table.words, kWarps));
  FF_TRY(FF_LAUNCH(find_digit, dim3(1), dim3(kThreads), 0, stream, work.search, k, kDigitBits,
                   work.first, false));
  int shift = sizeof(Key) * 8 - kDigitBits;
  for (Pass pass = Pass::kSecond; shift != 0; pass = Pass::kLater) {
    const int bits = shift < kDigitBits ? shift : kDigitBits;
    shift -= bits;
    FF_TRY(FF_LAUNCH((count_digits<Key>), words, dim3(kThreads), 0, stream, table, work.search,
                     pass, shift, bits, work.later, candidates, nullptr));
    FF_TRY(FF_LAUNCH(find_digit, dim3(1), dim3(kThreads), 0, stream, work.search, int64_t{0}, bits,
                     work.later, true));
  }
  FF_TRY(FF_LAUNCH((count_selected<Key>), words, dim3(kThreads), 0, stream, table, work.search,
                   selected, work.ties, candidates));
  return FF_LAUNCH((share_ties<Key>), dim3(1), dim3(kScanThreads), 0, stream, work.search,
                   table.chunks, selected, work.ties, key);
}

template <typename Key>
int zero(const Table& table, const int64_t* key, const int64_t* selected,
         const uint64_t* candidates, int64_t count, char* record, Layout* layout,
         int64_t* workspace, void* stream) {
  int64_t* const matches = workspace;
  int64_t* const before = matches + 1;
  auto* const ends = reinterpret_cast<uint8_t*>(before + table.chunks + 1);
  FF_TRY(FF_LAUNCH(sum_selected, dim3(1), dim3(kScanThreads), 0, stream, selected, table.chunks,
                   count, before, matches));
  FF_TRY(FF_LAUNCH(lay_out, dim3(1), dim3(kScanThreads), 0, stream, table, before, layout));
  if (table.chunks == 0) return 0;
  FF_TRY(FF_LAUNCH((zero_chunks<Key>), grid(table.chunks), dim3(kThreads), 0, stream, table, key,
                   selected, candidates, before, layout, record, ends, matches));
  if (record == nullptr) return 0;
  const auto blocks = static_cast<unsigned>(ceil_div(table.words, kThreads));
  return FF_LAUNCH(join_runs, dim3(blocks), dim3(kThreads), 0, stream, table, ends, layout);
}

}  // namespace
}  // namespace fastfisher::cuda::topr

using namespace fastfisher::cuda::topr;

extern "C" int ff_topr_write(int64_t* to, const int64_t* from, int64_t count, void* stream) {
  for (int64_t done = 0; done < count; done += Numbers::kCount) {
    const int64_t left = count - done;
    const int part = static_cast<int>(left < Numbers::kCount ? left : Numbers::kCount);
    Numbers numbers;
    for (int i = 0; i < part; ++i) numbers.value[i] = from[done + i];
    FF_TRY(FF_LAUNCH(write_numbers, dim3(1), dim3(kThreads), 0, stream, to + done, numbers, part));
  }
  return 0;
}

extern "C" int ff_topr_begin(const Table* table, bool* finite, int64_t* workspace, void* stream) {
  const Workspace work(workspace, *table);
  return table->wide ? begin<int64_t>(*table, finite, work, stream)
                     : begin<int32_t>(*table, finite, work, stream);
}

extern "C" int ff_topr_select(const Table* table, int64_t k, int64_t* key, int64_t* selected,
                              uint64_t* candidates, int64_t* workspace, void* stream) {
  const Workspace work(workspace, *table);
  return table->wide ? select<int64_t>(*table, k, key, selected, candidates, work, stream)
                     : select<int32_t>(*table, k, key, selected, candidates, work, stream);
}

extern "C" int ff_topr_zero(const Table* table, const int64_t* key, const int64_t* selected,
                            const uint64_t* candidates, int64_t count, char* record, Layout* layout,
                            int64_t* workspace, void* stream) {
  return table->wide ? zero<int64_t>(*table, key, selected, candidates, count, record, layout,
                                     workspace, stream)
                     : zero<int32_t>(*table, key, selected, candidates, count, record, layout,
                                     workspace, stream);
}
