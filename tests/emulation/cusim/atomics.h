// Atomic operations on 4 and 8 bytes, as relaxed atomics of the host, by which checkers know them.
#pragma once

#include <cstring>
#include <type_traits>

namespace cusim {

template <class T, class F>
T atomic_change(T* address, F changed) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "atomics are of 4 or 8 bytes");
  using Word = std::conditional_t<sizeof(T) == 8, unsigned long long, unsigned>;
  Word* word = reinterpret_cast<Word*>(address);
  Word seen = __atomic_load_n(word, __ATOMIC_RELAXED);
  while (true) {
    T before;
    std::memcpy(&before, &seen, sizeof before);
    const T after = changed(before);
    Word wanted;
    std::memcpy(&wanted, &after, sizeof wanted);
    if (__atomic_compare_exchange_n(word, &seen, wanted, false, __ATOMIC_RELAXED,
                                    __ATOMIC_RELAXED)) {
      return before;
    }
  }
}

}  // namespace cusim

#define CUSIM_ATOMIC(name, expression)                                              \
  template <class T>                                                                \
  T name(T* address, std::type_identity_t<T> value) {                               \
    return ::cusim::atomic_change(address, [=](T old) -> T { return expression; }); \
  }
CUSIM_ATOMIC(atomicAdd, old + value)
CUSIM_ATOMIC(atomicSub, old - value)
CUSIM_ATOMIC(atomicMax, old > value ? old : value)
CUSIM_ATOMIC(atomicMin, old < value ? old : value)
CUSIM_ATOMIC(atomicAnd, old& value)
CUSIM_ATOMIC(atomicOr, old | value)
CUSIM_ATOMIC(atomicXor, old ^ value)
CUSIM_ATOMIC(atomicExch, value)
CUSIM_ATOMIC(atomicInc, old >= value ? 0 : old + 1)
CUSIM_ATOMIC(atomicDec, old == 0 || old > value ? value : old - 1)
#undef CUSIM_ATOMIC

template <class T>
T atomicCAS(T* address, std::type_identity_t<T> expected, std::type_identity_t<T> value) {
  // Bits are compared, as the hardware does.
  return ::cusim::atomic_change(address, [=](T old) -> T {
    return std::memcmp(&old, &expected, sizeof old) == 0 ? value : old;
  });
}
