// Shuffles, votes and reductions of a warp, on the meetings of runtime.h.
#pragma once

#include "runtime.h"

namespace cusim {

// Operations that may meet each other only.
enum Op {
  op_sync,
  op_xor,
  op_down,
  op_up,
  op_index,
  op_ballot,
  op_match,
  op_reduce,
  op_mma,
  op_mma_tf32,
  op_ldmatrix
};

// What the lane that `source_of(lane)` names has; a lane whose source is negative keeps its own.
template <class T, class F>
CUSIM_NOSAN T shuffle(unsigned mask, T value, int line, Op op, F source_of) {
  const int source = source_of(static_cast<int>(cur->lane));
  const unsigned char* all = warp_gather(mask, op, &value, sizeof value, line);
  T result = value;
  if (source >= 0) {
    if (!((mask >> source) & 1)) {
      fail("line %d: shuffle reads lane %d, which is not in mask %08x", line, source, mask);
    }
    std::memcpy(&result, all + static_cast<size_t>(source) * sizeof value, sizeof result);
  }
  warp_release();
  return result;
}
template <class T>
T shuffle_xor(int line, unsigned mask, T value, int other, int width = 32) {
  return shuffle(mask, value, line, op_xor, [=](int lane) CUSIM_NOSAN_L {
    const int source = lane ^ other;
    return source / width <= lane / width ? source : -1;
  });
}
template <class T>
T shuffle_down(int line, unsigned mask, T value, unsigned delta, int width = 32) {
  return shuffle(mask, value, line, op_down, [=](int lane) CUSIM_NOSAN_L {
    const int distance = static_cast<int>(delta);
    return (lane & (width - 1)) + distance < width ? lane + distance : -1;
  });
}
template <class T>
T shuffle_up(int line, unsigned mask, T value, unsigned delta, int width = 32) {
  return shuffle(mask, value, line, op_up, [=](int lane) CUSIM_NOSAN_L {
    const int distance = static_cast<int>(delta);
    return (lane & (width - 1)) - distance >= 0 ? lane - distance : -1;
  });
}
template <class T>
T shuffle_index(int line, unsigned mask, T value, int index, int width = 32) {
  return shuffle(mask, value, line, op_index, [=](int lane) CUSIM_NOSAN_L {
    return (lane & ~(width - 1)) | (index & (width - 1));
  });
}

CUSIM_NOSAN inline unsigned ballot(int line, unsigned mask, int predicate) {
  const unsigned char mine = predicate != 0;
  const unsigned char* all = warp_gather(mask, op_ballot, &mine, 1, line);
  unsigned result = 0;
  for (unsigned i = 0; i < 32; ++i) {
    if ((mask >> i) & 1 && all[i] == 1) result |= 1u << i;
  }
  warp_release();
  return result;
}
template <class T>
CUSIM_NOSAN unsigned match_any(int line, unsigned mask, T value) {
  const unsigned char* all = warp_gather(mask, op_match, &value, sizeof value, line);
  unsigned result = 0;
  for (unsigned i = 0; i < 32; ++i) {
    if ((mask >> i) & 1 && !std::memcmp(all + i * sizeof value, &value, sizeof value)) {
      result |= 1u << i;
    }
  }
  warp_release();
  return result;
}
template <class T>
unsigned match_all(int line, unsigned mask, T value, int* predicate) {
  const unsigned same = match_any(line, mask, value);
  *predicate = same == mask;
  return *predicate ? mask : 0;
}
template <class T, class F>
CUSIM_NOSAN T reduce(int line, unsigned mask, T value, F combine) {
  const unsigned char* all = warp_gather(mask, op_reduce, &value, sizeof value, line);
  bool first = true;
  T result = value;
  for (unsigned i = 0; i < 32; ++i) {
    if (!((mask >> i) & 1)) continue;
    T other;
    std::memcpy(&other, all + i * sizeof value, sizeof other);
    result = first ? other : combine(result, other);
    first = false;
  }
  warp_release();
  return result;
}

}  // namespace cusim

#define __syncwarp(...) ::cusim::sync_lanes(__LINE__ __VA_OPT__(, ) __VA_ARGS__)
#define __activemask() ::cusim::active_mask()
#define __shfl_xor_sync(...) ::cusim::shuffle_xor(__LINE__, __VA_ARGS__)
#define __shfl_down_sync(...) ::cusim::shuffle_down(__LINE__, __VA_ARGS__)
#define __shfl_up_sync(...) ::cusim::shuffle_up(__LINE__, __VA_ARGS__)
#define __shfl_sync(...) ::cusim::shuffle_index(__LINE__, __VA_ARGS__)
#define __ballot_sync(mask, predicate) ::cusim::ballot(__LINE__, mask, predicate)
#define __any_sync(mask, predicate) (::cusim::ballot(__LINE__, mask, predicate) != 0)
#define __all_sync(mask, predicate) (::cusim::ballot(__LINE__, mask, predicate) == (mask))
#define __match_any_sync(mask, value) ::cusim::match_any(__LINE__, mask, value)
#define __match_all_sync(mask, value, predicate) \
  ::cusim::match_all(__LINE__, mask, value, predicate)
#define CUSIM_REDUCE(mask, value, expression) \
  ::cusim::reduce(__LINE__, mask, value, [](auto a, auto b) { return expression; })
#define __reduce_add_sync(mask, value) CUSIM_REDUCE(mask, value, a + b)
#define __reduce_max_sync(mask, value) CUSIM_REDUCE(mask, value, (a > b ? a : b))
#define __reduce_min_sync(mask, value) CUSIM_REDUCE(mask, value, (a < b ? a : b))
#define __reduce_and_sync(mask, value) CUSIM_REDUCE(mask, value, a& b)
#define __reduce_or_sync(mask, value) CUSIM_REDUCE(mask, value, a | b)
#define __reduce_xor_sync(mask, value) CUSIM_REDUCE(mask, value, a ^ b)

namespace cusim {
inline void sync_lanes(int line, unsigned mask = 0xffffffffu) { warp_sync(mask, line); }
}  // namespace cusim
