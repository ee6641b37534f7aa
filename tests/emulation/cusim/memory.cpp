// The global memory that kernels may use: the tensors that the tests name, and what entry files
// allocate, which is seen because the library is linked with --wrap=torch_call_dispatcher.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/c/shim.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <string_view>
#include <vector>

#include "hooks.h"

namespace {

struct Region {
  void* begin;
  size_t bytes;
  int writable;
};
std::vector<Region> regions;

// Operators of torch that entry files get memory from: how many tensors, and whether they are
// empty.
struct Results {
  int tensors;
  bool empty;
};
const std::map<std::string_view, Results> kResults = {
    {"aten::empty", {1, true}},      {"aten::new_empty", {1, true}},
    {"aten::empty_like", {1, true}}, {"aten::new_empty_strided", {1, true}},
    {"aten::new_zeros", {1, false}}, {"aten::zeros_like", {1, false}},
    {"aten::full", {1, false}},      {"aten::clone", {1, false}},
    {"aten::to", {1, false}},        {"aten::contiguous", {1, false}},
    {"aten::reshape", {1, false}},   {"aten::sort", {2, false}},
    {"aten::cumsum", {1, false}},
};

void add(void* begin, size_t bytes, int writable, int initialised) {
  if (bytes == 0) return;
  std::erase_if(regions, [=](const Region& each) {  // of memory that was freed since
    const char *first = static_cast<char*>(each.begin), *start = static_cast<char*>(begin);
    return first < start + bytes && start < first + each.bytes;
  });
  regions.push_back({begin, bytes, writable});
  if (cucheck_global) cucheck_global(begin, bytes, writable, initialised);
}

// A result may be memory that was there before, of a tensor that is only read, say.
bool is_known(const char* begin, size_t bytes) {
  return std::any_of(regions.begin(), regions.end(), [=](const Region& each) {
    const char* first = static_cast<char*>(each.begin);
    return first <= begin && begin + bytes <= first + each.bytes;
  });
}

void add_result(AtenTensorHandle tensor, bool empty) {
  void* data = nullptr;
  int64_t size = 0, offset = 0;
  aoti_torch_get_data_ptr(tensor, &data);
  aoti_torch_get_storage_size(tensor, &size);
  aoti_torch_get_storage_offset(tensor, &offset);
  const auto bytes = static_cast<size_t>(size);
  if (offset != 0 || bytes == 0) return;
  if (empty) memset(data, 0xff, bytes);
  if (empty || !is_known(static_cast<char*>(data), bytes)) add(data, bytes, 1, !empty);
}

}  // namespace

extern "C" {
AOTITorchError __real_torch_call_dispatcher(const char* op, const char* overload,
                                            StableIValue* stack, uint64_t version);

// What entry files call torch's operators by. New memory is poisoned, with NaN.
__attribute__((visibility("hidden"))) AOTITorchError __wrap_torch_call_dispatcher(
    const char* op, const char* overload, StableIValue* stack, uint64_t version) {
  const AOTITorchError code = __real_torch_call_dispatcher(op, overload, stack, version);
  if (code) return code;
  const auto known = kResults.find(op);
  if (known == kResults.end()) {
    if (cucheck_initialised) cucheck_initialised();  // torch may have written any of it
    return code;
  }
  for (int i = 0; i < known->second.tensors; ++i) {
    AtenTensorHandle tensor;
    memcpy(&tensor, stack + i, sizeof tensor);
    add_result(tensor, known->second.empty);
  }
  return code;
}

#define CUSIM_API __attribute__((visibility("default")))
CUSIM_API void cusim_region(void* begin, size_t bytes, int writable) {
  add(begin, bytes, writable, 1);
}
CUSIM_API void cusim_forget_regions() {
  regions.clear();
  if (cucheck_forget) cucheck_forget();
}
// The regions' number; as many of them as fit are written to `out`.
CUSIM_API size_t cusim_regions(Region* out, size_t room) {
  for (size_t i = 0; i < regions.size() && i < room; ++i) out[i] = regions[i];
  return regions.size();
}
}
