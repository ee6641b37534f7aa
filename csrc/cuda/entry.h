// What the operators' entry files share: device, stream, and errors of a launch.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <initializer_list>
#include <optional>

#include "../checks.h"

#if defined(FASTFISHER_EMULATED)
extern "C" const char* cusim_error();
#define FF_LAUNCH_ERROR(error) cusim_error()
#else
#include <cuda_runtime_api.h>
#define FF_LAUNCH_ERROR(error) cudaGetErrorString(static_cast<cudaError_t>(error))
#endif

// A launcher's error becomes an exception that names the operator.
#define FF_CHECK_LAUNCH(op, call)                                                                \
  do {                                                                                           \
    const int error = (call);                                                                    \
    STD_TORCH_CHECK(error == 0, "fastfisher::" op ": the launch failed with CUDA error ", error, \
                    ": ", FF_LAUNCH_ERROR(error));                                               \
  } while (false)

// FF_REGISTER(m) { m.impl("name", TORCH_BOX(&function)); }
#if defined(FASTFISHER_EMULATED)
// FASTFISHER_EMULATED is the namespace's name, so that several builds may live in one process.
#define FF_REGISTER_IN(name, m) STABLE_TORCH_LIBRARY_IMPL(name, CPU, m)
#define FF_REGISTER(m) FF_REGISTER_IN(FASTFISHER_EMULATED, m)
#else
#define FF_REGISTER(m) STABLE_TORCH_LIBRARY_IMPL(fastfisher, CUDA, m)
#endif

namespace fastfisher::cuda {

// The dispatcher calls a kernel for the device of any of its tensors.
inline bool are_together(const Tensor& first, std::initializer_list<Tensor> others) {
  for (const Tensor& other : others) {
    if (other.is_cuda() != first.is_cuda() ||
        other.get_device_index() != first.get_device_index()) {
      return false;
    }
  }
  return true;
}

// Makes a tensor's device the current one for its lifetime; kernels go to its current stream. Where
// the kernels are emulated, tensors are on the CPU and there is no stream.
class OnDevice {
 public:
#if defined(FASTFISHER_EMULATED)
  explicit OnDevice(const Tensor&) {}
  void* stream() const { return nullptr; }
#else
  explicit OnDevice(const Tensor& tensor)
      : index_(tensor.get_device_index()), guard_(tensor.get_device_index()) {}
  void* stream() const {
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index_, &stream));
    return stream;
  }

 private:
  int32_t index_;
  torch::stable::accelerator::DeviceGuard guard_;
#endif
};

}  // namespace fastfisher::cuda
