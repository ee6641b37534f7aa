// The kernels of topr_kernels.h; part of kernels_impl.h, which includes this file inside its
// namespace, once per instruction set.

// Integers of a register, or of `bytes` of one.
template <typename K, int bytes = FF_VECTOR_BYTES>
struct Integers {
  static constexpr int lanes = bytes / sizeof(K);
  typedef K type __attribute__((vector_size(bytes)));
  typedef K unaligned __attribute__((vector_size(bytes), aligned(sizeof(K)), may_alias));
};

// Bit i is a[i] > b[i].
template <typename K, typename V>
FF_INLINE uint64_t greater(V a, V b) {
#if defined(FASTFISHER_X86)
  if constexpr (sizeof(V) == 64) {
#if FF_VECTOR_BYTES == 64
    if constexpr (sizeof(K) == 2) return _mm512_cmpgt_epi16_mask((__m512i)a, (__m512i)b);
    if constexpr (sizeof(K) == 4) return _mm512_cmpgt_epi32_mask((__m512i)a, (__m512i)b);
    if constexpr (sizeof(K) == 8) return _mm512_cmpgt_epi64_mask((__m512i)a, (__m512i)b);
#endif
  } else if constexpr (sizeof(V) == 32) {
#if FF_VECTOR_BYTES >= 32
    const auto over = (__m256i)(a > b);
    if constexpr (sizeof(K) == 2) {
      const auto bytes =
          static_cast<uint32_t>(_mm256_movemask_epi8(_mm256_packs_epi16(over, over)));
      return (bytes & 0xff) | (bytes >> 8 & 0xff00);
    }
    if constexpr (sizeof(K) == 4) {
      return static_cast<uint32_t>(_mm256_movemask_ps((__m256)over));
    }
    if constexpr (sizeof(K) == 8) {
      return static_cast<uint32_t>(_mm256_movemask_pd((__m256d)over));
    }
#endif
  } else {
    const auto over = (__m128i)(a > b);
    if constexpr (sizeof(K) == 2) {
      return static_cast<uint32_t>(_mm_movemask_epi8(_mm_packs_epi16(over, over))) & 0xff;
    }
    if constexpr (sizeof(K) == 4) return static_cast<uint32_t>(_mm_movemask_ps((__m128)over));
    if constexpr (sizeof(K) == 8) return static_cast<uint32_t>(_mm_movemask_pd((__m128d)over));
  }
#else
  uint64_t bits = 0;
  for (size_t i = 0; i < sizeof(V) / sizeof(K); ++i) bits |= uint64_t(a[i] > b[i]) << i;
  return bits;
#endif
}

// Reads scores as keys, and keeps the largest magnitude seen. Keys are right for all but NaN,
// unless NaN is heeded.
template <typename T, bool heed_nan, int bytes = FF_VECTOR_BYTES>
struct KeyReader {
  using vector = typename Integers<Key<T>, bytes>::type;
  vector largest = {};

  FF_INLINE vector read(const T* score) {
    const auto bits =
        (vector) * reinterpret_cast<const typename Integers<Key<T>, bytes>::unaligned*>(score);
    const vector sign = bits >> static_cast<int>(sizeof(T) * 8 - 1);
    const vector magnitude = bits & static_cast<Key<T>>(~(Key<T>(1) << (sizeof(T) * 8 - 1)));
    largest = magnitude > largest ? magnitude : largest;
    const vector key = (magnitude ^ sign) - sign;
    if constexpr (!heed_nan) return key;
    return magnitude > KeyOf<T>::infinity ? vector{} + lowest_key<T> : key;
  }

  FF_INLINE bool reached(Key<T> magnitude) const {
    return greater<Key<T>>(largest, vector{} + static_cast<Key<T>>(magnitude - 1)) != 0;
  }
};

// Ahead of what the processor itself fetches, which stops at the end of a page.
template <typename T>
FF_INLINE void fetch_ahead(const T* score) {
  // An integer, for what is ahead of the last score may be nothing's address.
  __builtin_prefetch(reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(score) + 2048));
}

// Calls f(stream, w, from, valid) for each word of 64 scores; where fewer are left, `from` has
// zeros behind those that are `valid`. Two places are read in turn, which lets more of memory be on
// the way at once; each of these streams has its words in order, 16 at a time.
template <typename T, typename F>
FF_INLINE void for_each_word(const T* score, int64_t count, const F& f) {
  const int64_t whole = count / 64, rest = count % 64, half = whole / 32 * 16;
  for (int64_t w = 0; w < half; ++w) {
    f(0, w, score + w * 64, ~uint64_t{0});
    f(1, half + w, score + (half + w) * 64, ~uint64_t{0});
  }
  for (int64_t w = 2 * half; w < whole; ++w) f(0, w, score + w * 64, ~uint64_t{0});
  if (rest == 0) return;
  alignas(64) T last[64] = {};
  __builtin_memcpy(last, score + whole * 64, rest * sizeof(T));
  f(0, whole, last, ~(~uint64_t{0} << rest));
}

// One bit for each of the four groups of a word: whether any of its bits is set.
FF_INLINE uint64_t groups_of(uint64_t word) {
  uint64_t any = 0;
  FF_UNROLL for (int g = 0; g < 4; ++g) {
    any |= uint64_t((word >> (g * kGroup) & 0xffff) != 0) << g;
  }
  return any;
}

// The candidates of a chunk, from its words of scores.
struct Candidates {
  uint64_t* const to;
  uint64_t groups[2] = {};  // of each stream

  FF_INLINE void add(int stream, int64_t w, uint64_t word) {
    groups[stream] |= groups_of(word) << (w % 16 * 4);
    if (w % 16 != 15) return;
    to[w / 16] = groups[stream];
    groups[stream] = 0;
  }
  FF_INLINE void finish(int64_t count) {
    const int64_t words = (count + 63) / 64;
    if (words % 16 != 0) to[words / 16] = groups[0];
  }
};

// Whether keys can be put together in a register.
template <typename K>
constexpr bool can_compress = FF_VECTOR_BYTES == 64 && sizeof(K) >= 4;

template <typename K, typename V>
FF_INLINE V compress(V keys, [[maybe_unused]] uint64_t chosen) {
#if defined(FASTFISHER_X86) && FF_VECTOR_BYTES == 64
  if constexpr (sizeof(K) == 4) return (V)_mm512_maskz_compress_epi32(chosen, (__m512i)keys);
  if constexpr (sizeof(K) == 8) return (V)_mm512_maskz_compress_epi64(chosen, (__m512i)keys);
#endif
  return keys;
}

template <typename T, bool heed_nan>
FF_INLINE KeyCounts filter_scores(Key<T>* inside, uint64_t* candidates, const T* score,
                                  int64_t count, Key<T> low, Key<T> high, bool* has_nan) {
  using Reader = KeyReader<T, heed_nan>;
  using vector = typename Reader::vector;
  constexpr int L = Integers<Key<T>>::lanes;
  const vector lowest = vector{} + low, highest = vector{} + high;
  Reader keys;
  KeyCounts counts;
  Candidates flags{candidates};
  const auto look = [&](int stream, int64_t w, const T* from,
                        uint64_t valid) __attribute__((always_inline)) {
    uint64_t over = 0, under = 0;
    FF_UNROLL for (int v = 0; v < 64; v += L) {
      fetch_ahead(from + v);
      const vector key = keys.read(from + v);
      const uint64_t above = greater<Key<T>>(key, highest), below = greater<Key<T>>(lowest, key);
      over |= above << v;
      under |= below << v;
      if constexpr (can_compress<Key<T>>) {
        const uint64_t within = ~(above | below) & ((uint64_t{1} << L) - 1) & valid >> v;
        *reinterpret_cast<typename Integers<Key<T>>::unaligned*>(inside + counts.inside) =
            compress<Key<T>>(key, within);
        counts.inside += bit_count(within);
      }
    }
    counts.above += bit_count(over & valid);
    flags.add(stream, w, ~under & valid);
    if constexpr (can_compress<Key<T>>) return;
    for (uint64_t within = ~(over | under) & valid; within != 0; within &= within - 1) {
      inside[counts.inside++] = key_of(from[__builtin_ctzll(within)]);
    }
  };
  for_each_word(score, count, look);
  flags.finish(count);
  counts.finite = !keys.reached(KeyOf<T>::infinity);
  *has_nan = keys.reached(KeyOf<T>::infinity + 1);
  return counts;
}

template <typename T>
KeyCounts filter(Key<T>* inside, uint64_t* candidates, const T* score, int64_t count, Key<T> low,
                 Key<T> high) {
  bool has_nan;
  const KeyCounts counts =
      filter_scores<T, false>(inside, candidates, score, count, low, high, &has_nan);
  if (!has_nan) return counts;
  return filter_scores<T, true>(inside, candidates, score, count, low, high, &has_nan);
}

template <typename T, bool heed_nan>
FF_INLINE bool tally_scores(int32_t* at_least, int64_t entries, uint64_t* candidates,
                            const T* score, int64_t count, Key<T> low, bool* has_nan) {
  using Reader = KeyReader<T, heed_nan>;
  using vector = typename Reader::vector;
  constexpr int L = Integers<Key<T>>::lanes;
  Reader keys;
  Candidates flags{candidates};
  for (int64_t j = 0; j < entries; ++j) at_least[j] = 0;
  const auto look = [&](int stream, int64_t w, const T* from,
                        uint64_t valid) __attribute__((always_inline)) {
    vector key[64 / L];
    FF_UNROLL for (int v = 0; v < 64 / L; ++v) {
      fetch_ahead(from + v * L);
      key[v] = keys.read(from + v * L);
    }
    for (int64_t j = 0; j < entries; ++j) {
      const vector least = vector{} + static_cast<Key<T>>(low + j);
      uint64_t under = 0;
      FF_UNROLL for (int v = 0; v < 64 / L; ++v) under |= greater<Key<T>>(least, key[v]) << (v * L);
      at_least[j] += bit_count(~under & valid);
      if (j == 0) flags.add(stream, w, ~under & valid);
    }
  };
  for_each_word(score, count, look);
  flags.finish(count);
  *has_nan = keys.reached(KeyOf<T>::infinity + 1);
  return !keys.reached(KeyOf<T>::infinity);
}

template <typename T>
bool tally(int32_t* at_least, int64_t entries, uint64_t* candidates, const T* score, int64_t count,
           Key<T> low) {
  bool has_nan;
  const bool finite =
      tally_scores<T, false>(at_least, entries, candidates, score, count, low, &has_nan);
  if (!has_nan) return finite;
  return tally_scores<T, true>(at_least, entries, candidates, score, count, low, &has_nan);
}

// Whether so many groups are listed that one finds most of memory in the order of addresses.
FF_INLINE bool is_dense(int64_t listed, int64_t count) { return 2 * kGroup * listed >= count; }

// Calls f(group, from) for each listed group of scores; where a group is not whole, `from` is a
// copy with zeros behind it.
template <typename T, typename F>
FF_INLINE void for_each_group(const T* score, int64_t count, const uint16_t* groups, int64_t listed,
                              const F& f) {
  const bool dense = is_dense(listed, count);
  for (int64_t i = 0; i < listed; ++i) {
    const int64_t begin = groups[i] * kGroup;
    if (dense) fetch_ahead(score + begin);
    if (begin + kGroup <= count) {
      f(groups[i], score + begin);
    } else {
      alignas(64) T last[kGroup] = {};
      __builtin_memcpy(last, score + begin, (count - begin) * sizeof(T));
      f(groups[i], last);
    }
  }
}

template <typename T>
int64_t mark(uint16_t* bits, const T* score, int64_t count, const uint16_t* groups, int64_t listed,
             Key<T> least) {
  constexpr int bytes = FF_VECTOR_BYTES < kGroup * sizeof(T) ? FF_VECTOR_BYTES : kGroup * sizeof(T);
  using Reader = KeyReader<T, true, bytes>;
  constexpr int L = Integers<Key<T>, bytes>::lanes;
  const auto lowest = typename Reader::vector{} + least;
  Reader keys;
  int64_t marked = 0;
  const auto look = [&](int64_t group, const T* from) __attribute__((always_inline)) {
    uint64_t under = 0;
    FF_UNROLL for (int v = 0; v < kGroup; v += L) {
      under |= greater<Key<T>>(lowest, keys.read(from + v)) << v;
    }
    const int64_t left = count - group * kGroup;
    const uint16_t valid = left < kGroup ? (1 << left) - 1 : 0xffff;
    bits[group] = ~under & valid;
    marked += bit_count(bits[group]);
  };
  for_each_group(score, count, groups, listed, look);
  return marked;
}

// A group of floats, or of their bits, in as many registers as it takes: how a function would pass
// them does not matter where each is inlined.
#pragma GCC diagnostic ignored "-Wpsabi"
typedef float group_floats __attribute__((vector_size(4 * kGroup)));
typedef int32_t group_bits __attribute__((vector_size(4 * kGroup)));
typedef uint16_t group_stored __attribute__((vector_size(2 * kGroup), aligned(2), may_alias));

FF_INLINE group_floats widened(const Half* from) {
  const auto stored = *reinterpret_cast<const group_stored*>(from);
#if defined(FASTFISHER_X86) && FF_VECTOR_BYTES == 64
  return (group_floats)_mm512_maskz_cvtph_ps(0xffff, (__m256i)stored);
#else
  const group_bits bits = __builtin_convertvector(stored, group_bits);
  const group_bits magnitude = bits & 0x7fff, sign = (bits & 0x8000) << 16;
  const group_bits normal = (magnitude << 13) + (112 << 23);
  const group_bits special = (magnitude << 13) | 0x7f800000;
  // The last bit of 0.5 is worth as much as that of the smallest half, and no denormal is used,
  // which the processor may have been told to flush.
  const group_bits small = (group_bits)((group_floats)(magnitude + 0x3f000000) - 0.5f);
  return (group_floats)(sign |
                        (magnitude >= 0x7c00 ? special : (magnitude < 0x400 ? small : normal)));
#endif
}

// Rounds to the nearest, ties to even.
FF_INLINE void narrow(Half* to, group_floats value) {
#if defined(FASTFISHER_X86) && FF_VECTOR_BYTES == 64
  *reinterpret_cast<group_stored*>(to) = (group_stored)_mm512_maskz_cvtps_ph(
      0xffff, (__m512)value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  const group_bits bits = (group_bits)value;
  const group_bits magnitude = bits & 0x7fffffff, sign = bits >> 16 & 0x8000;
  const group_bits normal = (magnitude - (112 << 23) + 0xfff + (magnitude >> 13 & 1)) >> 13;
  const group_bits small = (group_bits)((group_floats)magnitude + 0.5f) - 0x3f000000;
  const group_bits special = magnitude > 0x7f800000 ? group_bits{} + 0x7e00 : group_bits{} + 0x7c00;
  const group_bits half =
      magnitude >= 0x47800000 ? special : (magnitude < 0x38800000 ? small : normal);
  *reinterpret_cast<group_stored*>(to) = __builtin_convertvector(sign | half, group_stored);
#endif
}

FF_INLINE group_floats widened(const BFloat16* from) {
  const auto stored = *reinterpret_cast<const group_stored*>(from);
  return (group_floats)(__builtin_convertvector(stored, group_bits) << 16);
}

FF_INLINE void narrow(BFloat16* to, group_floats value) {
  const group_bits bits = (group_bits)value;
  const group_bits rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  const group_bits stored = (bits & 0x7fffffff) > 0x7f800000 ? group_bits{} + 0x7fc0 : rounded;
  *reinterpret_cast<group_stored*>(to) = __builtin_convertvector(stored, group_stored);
}

// GCC would fuse the two operations where the processor always has a fused multiply-add.
template <typename T>
#if !defined(__clang__)
__attribute__((optimize("fp-contract=off")))
#endif
void subtract(T* out, const T* forget, const T* remain, double weight, int64_t count,
              const uint16_t* groups, int64_t listed) {
  const auto w = static_cast<T>(weight);
  const auto group = [&](int64_t begin, int64_t size) {
    for (int64_t i = begin; i < begin + size; ++i) {
      const T product = remain[i] * w;
      out[i] = forget[i] - product;
    }
  };
  const bool dense = is_dense(listed, count);
  for (int64_t i = 0; i < listed; ++i) {
    const int64_t begin = groups[i] * kGroup;
    if (dense) {
      fetch_ahead(forget + begin);
      fetch_ahead(remain + begin);
    }
    if (begin + kGroup <= count) {
      group(begin, kGroup);
    } else {
      group(begin, count - begin);
    }
  }
}

template <typename T>
void subtract_halves(T* out, const T* forget, const T* remain, double weight, int64_t count,
                     const uint16_t* groups, int64_t listed) {
  const auto w = static_cast<float>(weight);
  const auto group = [w](T* to, const T* f, const T* r) __attribute__((always_inline)) {
    T product[kGroup];
    narrow(product, widened(r) * w);
    narrow(to, widened(f) - widened(product));
  };
  const bool dense = is_dense(listed, count);
  for (int64_t i = 0; i < listed; ++i) {
    const int64_t begin = groups[i] * kGroup;
    if (dense) {
      fetch_ahead(forget + begin);
      fetch_ahead(remain + begin);
    }
    if (begin + kGroup <= count) {
      group(out + begin, forget + begin, remain + begin);
    } else {
      T last[2][kGroup] = {};
      __builtin_memcpy(last[0], forget + begin, (count - begin) * sizeof(T));
      __builtin_memcpy(last[1], remain + begin, (count - begin) * sizeof(T));
      group(last[0], last[0], last[1]);
      __builtin_memcpy(out + begin, last[0], (count - begin) * sizeof(T));
    }
  }
}

template <typename T>
TopKernels<T> make_top_kernels() {
  if constexpr (sizeof(T) == 2)
    return {&filter<T>, &tally<T>, &mark<T>, &subtract_halves<T>};
  else
    return {&filter<T>, &tally<T>, &mark<T>, &subtract<T>};
}

// ---------------------------------------------------------------------------------------------
// elements of any dtype

// Calls f(data, bits) for each listed group, where `data` is that of its first element.
template <int width, typename Data, typename F>
FF_INLINE void for_each_taken(Data* data, const uint16_t* bits, const uint16_t* groups,
                              int64_t listed, const F& f) {
  constexpr int64_t kAhead = 96;
  for (int64_t i = 0; i < listed; ++i) {
    const int64_t next = groups[i + kAhead < listed ? i + kAhead : listed - 1];
    __builtin_prefetch(data + next * kGroup * width);
    f(data + groups[i] * kGroup * width, bits[groups[i]]);
  }
}

// Calls f(at) for each element whose bit is set.
template <int width, typename Data, typename F>
FF_INLINE void for_each_element(Data* data, const uint16_t* bits, const uint16_t* groups,
                                int64_t listed, const F& f) {
  const auto group = [&](Data* begin, uint32_t left) __attribute__((always_inline)) {
    for (; left != 0; left &= left - 1) f(begin + __builtin_ctz(left) * width);
  };
  for_each_taken<width>(data, bits, groups, listed, group);
}

template <int width>
void take_elements(char* out, const char* data, const uint16_t* bits, const uint16_t* groups,
                   int64_t listed) {
#if defined(FASTFISHER_X86) && FF_VECTOR_BYTES == 64
  // Not the instruction that stores what it compresses: some processors are slow at it.
  if constexpr (width == 4) {
    const auto group = [&](const char* begin, __mmask16 chosen) __attribute__((always_inline)) {
      const int taken = bit_count(chosen);
      const __m512i values = _mm512_maskz_loadu_epi32(chosen, begin);
      _mm512_mask_storeu_epi32(out, (1u << taken) - 1, _mm512_maskz_compress_epi32(chosen, values));
      out += taken * width;
    };
    return for_each_taken<width>(data, bits, groups, listed, group);
  }
#endif
  const auto one = [&](const char* at) __attribute__((always_inline)) {
    __builtin_memcpy(out, at, width);
    out += width;
  };
  for_each_element<width>(data, bits, groups, listed, one);
}

template <int width>
void zero_elements(char* data, const uint16_t* bits, const uint16_t* groups, int64_t listed) {
#if defined(FASTFISHER_X86) && FF_VECTOR_BYTES == 64
  if constexpr (width <= 4) {
    const auto group = [](char* begin, __mmask16 chosen) __attribute__((always_inline)) {
      if constexpr (width == 1) _mm_mask_storeu_epi8(begin, chosen, _mm_setzero_si128());
      if constexpr (width == 2) _mm256_mask_storeu_epi16(begin, chosen, _mm256_setzero_si256());
      if constexpr (width == 4) _mm512_mask_storeu_epi32(begin, chosen, _mm512_setzero_si512());
    };
    return for_each_taken<width>(data, bits, groups, listed, group);
  }
#endif
  const auto one = [](char* at) __attribute__((always_inline)) { __builtin_memset(at, 0, width); };
  for_each_element<width>(data, bits, groups, listed, one);
}

// Calls f with `width` as a constant.
template <typename F>
FF_INLINE void with_width(int64_t width, const F& f) {
  switch (width) {
    case 1:
      return f.template operator()<1>();
    case 2:
      return f.template operator()<2>();
    case 4:
      return f.template operator()<4>();
    case 8:
      return f.template operator()<8>();
    default:
      return f.template operator()<16>();
  }
}

void take(char* out, const char* data, int64_t width, const uint16_t* bits, const uint16_t* groups,
          int64_t listed) {
  with_width(width, [&]<int w>() { take_elements<w>(out, data, bits, groups, listed); });
}

void take_indices(int32_t* out, int32_t first, const uint16_t* bits, const uint16_t* groups,
                  int64_t listed) {
#if defined(FASTFISHER_X86) && FF_VECTOR_BYTES == 64
  const __m512i places = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  for (int64_t i = 0; i < listed; ++i) {
    const __mmask16 chosen = bits[groups[i]];
    const int taken = bit_count(chosen);
    const int32_t begin = first + static_cast<int32_t>(groups[i] * kGroup);
    const __m512i indices = _mm512_add_epi32(places, _mm512_set1_epi32(begin));
    _mm512_mask_storeu_epi32(out, (1u << taken) - 1, _mm512_maskz_compress_epi32(chosen, indices));
    out += taken;
  }
#else
  for (int64_t i = 0; i < listed; ++i) {
    const int32_t begin = first + static_cast<int32_t>(groups[i] * kGroup);
    for (uint32_t left = bits[groups[i]]; left != 0; left &= left - 1) {
      *out++ = begin + __builtin_ctz(left);
    }
  }
#endif
}

void zero(char* data, int64_t width, const uint16_t* bits, const uint16_t* groups, int64_t listed) {
  with_width(width, [&]<int w>() { zero_elements<w>(data, bits, groups, listed); });
}
