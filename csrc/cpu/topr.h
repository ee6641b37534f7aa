// The top-R selection, independent of how its arguments came: through torch's dispatcher
// (topr_op.cpp) or straight from Python objects (csrc/direct.cpp), which costs a tenth as much
// where tensors are many and small.
#pragma once

#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <functional>
#include <vector>

namespace fastfisher::cpu::topr {

using torch::headeronly::ScalarType;

// A tensor of any strides. Sizes and strides are the tensor's own.
struct View {
  char* data;
  const int64_t* sizes;
  const int64_t* strides;
  int32_t dim;
  int32_t width;  // bytes of an element
  ScalarType dtype;
  int64_t count;  // elements
  bool contiguous;

  View() = default;
  View(void* data, const int64_t* sizes, const int64_t* strides, int64_t dim, int64_t width,
       ScalarType dtype);

  bool same_shape(const View& other) const;
  // Bytes from the first element to the one at `index` in row-major order.
  int64_t offset(int64_t index) const;
  // The elements [begin, begin + count) in one piece: in place, or copied to `buffer`.
  const char* read(int64_t begin, int64_t count, char* buffer) const;
};

// Makes an uninitialised contiguous tensor on the CPU, which is a result of the call, and returns
// its memory.
using Allocate = std::function<void*(ScalarType dtype, const std::vector<int64_t>& sizes)>;

// Numbers that `zero` tells of each parameter, the first of which is how many it zeroed.
constexpr int64_t kLayoutColumns = 5;

// The operators of fastfisher/topr.py; the tensors are allocated in the order of their results.
void select(const std::vector<View>& scores, const std::vector<View>& remain, double weight,
            const std::vector<int64_t>& counts, const Allocate& allocate);
void zero(const std::vector<View>& parameters, const std::vector<View>& scores,
          const std::vector<View>& remain, double weight, const View& key, const View& selected,
          const View& candidates, int64_t count, bool record, const Allocate& allocate);

}  // namespace fastfisher::cpu::topr
