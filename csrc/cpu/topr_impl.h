// The kernels of topr_kernels.h; part of kernels_impl.h, which includes this file inside its
// namespace, once per instruction set.

// Bit i is a[i] > b[i].
template <typename K>
FF_INLINE uint64_t greater(typename Vector<K>::type a, typename Vector<K>::type b) {
#if defined(FASTFISHER_X86) && FF_VECTOR_BYTES == 64
  if constexpr (sizeof(K) == 4) return _mm512_cmpgt_epi32_mask((__m512i)a, (__m512i)b);
  if constexpr (sizeof(K) == 8) return _mm512_cmpgt_epi64_mask((__m512i)a, (__m512i)b);
#elif defined(FASTFISHER_X86) && FF_VECTOR_BYTES == 32
  if constexpr (sizeof(K) == 4) return static_cast<uint32_t>(_mm256_movemask_ps((__m256)(a > b)));
  if constexpr (sizeof(K) == 8) return static_cast<uint32_t>(_mm256_movemask_pd((__m256d)(a > b)));
#elif defined(FASTFISHER_X86) && FF_VECTOR_BYTES == 16
  if constexpr (sizeof(K) == 4) return static_cast<uint32_t>(_mm_movemask_ps((__m128)(a > b)));
  if constexpr (sizeof(K) == 8) return static_cast<uint32_t>(_mm_movemask_pd((__m128d)(a > b)));
#else
  uint64_t bits = 0;
  for (int i = 0; i < Vector<K>::lanes; ++i) bits |= uint64_t(a[i] > b[i]) << i;
  return bits;
#endif
}

// Calls f(w) for each word of 64 scores. Four places are read in turn, which lets more of memory be
// on the way at once than one place after the other does.
template <typename F>
FF_INLINE void for_each_word(int64_t words, const F& f) {
  const int64_t part = words / 4;
  for (int64_t w = 0; w < part; ++w) {
    FF_UNROLL for (int64_t place = 0; place < 4; ++place) f(place * part + w);
  }
  for (int64_t w = 4 * part; w < words; ++w) f(w);
}

// The keys of vectors of scores, right for all but NaN, and the largest magnitude seen.
template <typename T>
struct KeyReader {
  using vector = typename Vector<Key<T>>::type;
  vector largest = {};

  FF_INLINE vector read(const T* score) {
    const auto bits = (vector)load(score);
    const vector sign = bits >> static_cast<int>(sizeof(T) * 8 - 1);
    const vector magnitude = bits & ~(Key<T>(1) << (sizeof(T) * 8 - 1));
    largest = magnitude > largest ? magnitude : largest;
    return (magnitude ^ sign) - sign;
  }

  FF_INLINE bool reached(Key<T> magnitude) const {
    return greater<Key<T>>(largest, vector{} + (magnitude - 1)) != 0;
  }
};

template <typename T>
KeyCounts filter(Key<T>* inside, const T* score, int64_t count, Key<T> low, Key<T> high) {
  using vector = typename Vector<Key<T>>::type;
  constexpr int L = Vector<T>::lanes;
  const vector lowest = vector{} + low, highest = vector{} + high;
  KeyReader<T> keys;
  KeyCounts counts;
  for_each_word(count / 64, [&](int64_t w) __attribute__((always_inline)) {
    const T* from = score + w * 64;
    uint64_t over = 0, under = 0;
    FF_UNROLL for (int v = 0; v < 64; v += L) {
      const vector key = keys.read(from + v);
      over |= greater<Key<T>>(key, highest) << v;
      under |= greater<Key<T>>(lowest, key) << v;
    }
    counts.above += bit_count(over);
    uint64_t within = ~(over | under);
    if (__builtin_expect(within == 0, 1)) return;
    if (inside == nullptr) {
      counts.inside += bit_count(within);
      return;
    }
    for (; within != 0; within &= within - 1) {
      inside[counts.inside++] = key_of(from[__builtin_ctzll(within)]);
    }
  });
  counts.finite = !keys.reached(KeyOf<T>::infinity);
  int64_t i = count / 64 * 64;
  if (keys.reached(KeyOf<T>::infinity + 1)) {
    counts = {0, 0, false};
    i = 0;
  }
  for (; i < count; ++i) {
    const Key<T> key = key_of(score[i]);
    counts.above += key > high;
    counts.finite = counts.finite && key < KeyOf<T>::infinity && key > -KeyOf<T>::infinity;
    if (key < low || key > high) continue;
    if (inside != nullptr) inside[counts.inside] = key;
    ++counts.inside;
  }
  return counts;
}

template <typename T>
int64_t mark(uint64_t* bits, const T* score, int64_t count, Key<T> least) {
  using vector = typename Vector<Key<T>>::type;
  constexpr int L = Vector<T>::lanes;
  const vector lowest = vector{} + least;
  KeyReader<T> keys;
  int64_t marked = 0;
  for_each_word(count / 64, [&](int64_t w) __attribute__((always_inline)) {
    uint64_t under = 0;
    FF_UNROLL for (int v = 0; v < 64; v += L) {
      under |= greater<Key<T>>(lowest, keys.read(score + w * 64 + v)) << v;
    }
    bits[w] = ~under;
    marked += bit_count(~under);
  });
  int64_t i = count / 64 * 64;
  if (keys.reached(KeyOf<T>::infinity + 1)) marked = i = 0;
  for (; i < count; i += 64) {
    bits[i / 64] = 0;
    for (int64_t v = 0; v < 64 && i + v < count; ++v) {
      bits[i / 64] |= uint64_t(key_of(score[i + v]) >= least) << v;
    }
    marked += bit_count(bits[i / 64]);
  }
  return marked;
}

template <typename T>
TopKernels<T> make_top_kernels() {
  return {&filter<T>, &mark<T>};
}
