// The global memory that kernels may use: the tensors that the tests name, and what entry files
// allocate, which is seen because the library is linked with --wrap=torch_call_dispatcher.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/c/shim.h>

#include <cstring>
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

void add(void* begin, size_t bytes, int writable, int initialised) {
  if (bytes == 0) return;
  std::erase_if(regions, [=](const Region& each) {  // of memory that was freed since
    const char *first = static_cast<char*>(each.begin), *start = static_cast<char*>(begin);
    return first < start + bytes && start < first + each.bytes;
  });
  regions.push_back({begin, bytes, writable});
  if (cucheck_global) cucheck_global(begin, bytes, writable, initialised);
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
  const std::string_view name = op;
  const bool empty = name == "aten::empty" || name == "aten::new_empty" ||
                     name == "aten::empty_like" || name == "aten::new_empty_strided";
  if (empty || name == "aten::new_zeros" || name == "aten::full" || name == "aten::clone" ||
      name == "aten::contiguous" || name == "aten::to" || name == "aten::zeros_like") {
    AtenTensorHandle tensor;
    memcpy(&tensor, stack, sizeof tensor);
    void* data = nullptr;
    int64_t bytes = 0, offset = 0;
    aoti_torch_get_data_ptr(tensor, &data);
    aoti_torch_get_storage_size(tensor, &bytes);
    aoti_torch_get_storage_offset(tensor, &offset);
    if (offset == 0) {
      if (empty && data) memset(data, 0xff, static_cast<size_t>(bytes));
      add(data, static_cast<size_t>(bytes), 1, !empty);
    }
  } else if (cucheck_initialised) {
    cucheck_initialised();  // torch may have written any of it
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
