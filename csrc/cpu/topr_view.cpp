#include <algorithm>
#include <cstring>

#include "topr.h"

namespace fastfisher::cpu::topr {

View::View(void* data, const int64_t* sizes, const int64_t* strides, int64_t dim, int64_t width,
           ScalarType dtype)
    : data(static_cast<char*>(data)),
      sizes(sizes),
      strides(strides),
      dim(static_cast<int32_t>(dim)),
      width(static_cast<int32_t>(width)),
      dtype(dtype),
      count(1),
      contiguous(true) {
  for (int64_t d = dim; d-- > 0; count *= sizes[d]) {
    if (sizes[d] != 1 && strides[d] != count) contiguous = false;
  }
}

bool View::same_shape(const View& other) const {
  return std::equal(sizes, sizes + dim, other.sizes, other.sizes + other.dim);
}

int64_t View::offset(int64_t index) const {
  if (contiguous) return index * width;
  int64_t elements = 0;
  for (int64_t d = dim; d-- > 0; index /= sizes[d]) elements += index % sizes[d] * strides[d];
  return elements * width;
}

const char* View::read(int64_t begin, int64_t count, char* buffer) const {
  if (contiguous) return data + begin * width;
  const int64_t inner = sizes[dim - 1], step = strides[dim - 1] * width;
  for (char* to = buffer; count > 0;) {
    const int64_t run = std::min(count, inner - begin % inner);
    const char* from = data + offset(begin);
    for (int64_t i = 0; i < run; ++i, to += width) std::memcpy(to, from + i * step, width);
    begin += run;
    count -= run;
  }
  return buffer;
}

}  // namespace fastfisher::cpu::topr
