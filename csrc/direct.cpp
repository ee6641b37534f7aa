// Handing 10,000 tensors to an operator through torch's dispatcher takes longer than selecting and
// zeroing. DLPack's exchange interface, which is stable as well, describes a tensor in place.

#include "direct.h"

// C alone, but torch hides it from users of its stable interface together with its C++.
#pragma push_macro("TORCH_TARGET_VERSION")
#undef TORCH_TARGET_VERSION
#include <ATen/dlpack.h>
#pragma pop_macro("TORCH_TARGET_VERSION")
#include <pybind11/stl.h>

#include <algorithm>
#include <optional>

#include "cpu/topr.h"

namespace fastfisher {
namespace {

namespace py = pybind11;
using cpu::topr::ScalarType;
using cpu::topr::View;

// What is needed of Python's torch; filled in when the module is imported, and never released.
struct Torch {
  PyObject *tensor, *parameter;  // the types
  const DLPackExchangeAPI* exchange;
  py::handle empty, int64, uint8, boolean, is_neg;
};
Torch torch;

ScalarType dtype_of(const DLDataType& type) {
  if (type.code == kDLFloat && type.bits == 16) return ScalarType::Half;
  if (type.code == kDLFloat && type.bits == 32) return ScalarType::Float;
  if (type.code == kDLFloat && type.bits == 64) return ScalarType::Double;
  if (type.code == kDLBfloat && type.bits == 16) return ScalarType::BFloat16;
  if (type.code == kDLInt && type.bits == 64) return ScalarType::Long;
  return ScalarType::Undefined;
}

// A view of a tensor, or nothing where that is not all there is to say about it.
std::optional<View> view_of(PyObject* object) {
  auto* const type = reinterpret_cast<PyObject*>(Py_TYPE(object));
  if (type != torch.tensor && type != torch.parameter) return std::nullopt;
  DLTensor from;
  if (torch.exchange->dltensor_from_py_object_no_sync(object, &from) != 0) {
    PyErr_Clear();
    return std::nullopt;
  }
  if (from.device.device_type != kDLCPU) return std::nullopt;
  const View view(static_cast<char*>(from.data) + from.byte_offset, from.shape, from.strides,
                  from.ndim, from.dtype.bits * from.dtype.lanes / 8, dtype_of(from.dtype));
  if (view.count != 0 && from.data == nullptr) return std::nullopt;
  // The imaginary part of a conjugate holds what is still to be negated; its elements are apart.
  if ((!view.contiguous || view.count == 1) && torch.is_neg(py::handle(object)).cast<bool>()) {
    return std::nullopt;
  }
  return view;
}

std::optional<std::vector<View>> views_of(const py::list& tensors) {
  std::vector<View> views;
  views.reserve(tensors.size());
  for (const py::handle tensor : tensors) {
    const auto view = view_of(tensor.ptr());
    if (!view) return std::nullopt;
    views.push_back(*view);
  }
  return views;
}

// Whether all are scores; where not, the caller says so better than the kernels.
bool all_floating(const std::vector<View>& views) {
  return std::all_of(views.begin(), views.end(), [](const View& view) {
    return view.dtype != ScalarType::Undefined && view.dtype != ScalarType::Long;
  });
}

// Runs f(allocate) without Python's lock. Appends the tensors that it allocated to `results`, and
// returns the memory of the last one.
template <typename F>
void* run(py::list& results, const F& f) {
  void* last = nullptr;
  const auto allocate = [&](ScalarType dtype, const std::vector<int64_t>& sizes) {
    const py::gil_scoped_acquire lock;
    const py::handle type = dtype == ScalarType::Long   ? torch.int64
                            : dtype == ScalarType::Bool ? torch.boolean
                                                        : torch.uint8;
    // Whatever the user's defaults are.
    const py::object tensor =
        torch.empty(sizes, py::arg("dtype") = type, py::arg("device") = "cpu");
    results.append(tensor);
    last = view_of(tensor.ptr()).value().data;
    return last;
  };
  {
    const py::gil_scoped_release unlocked;
    f(allocate);
  }
  return last;
}

// As the operators; None where the tensors are not all plain ones in the memory of the CPU, or what
// is asked for does not make sense.
py::object select_top(const py::list& scores, const py::list& remain, double weight,
                      const std::vector<int64_t>& counts) {
  const auto own = views_of(scores), other = views_of(remain);
  if (!own || !other || !all_floating(*own)) return py::none();
  int64_t total = 0;
  for (const View& view : *own) total += view.count;
  for (const int64_t count : counts) {
    if (count < 0 || count > total) return py::none();
  }
  py::list results;
  run(results, [&](const cpu::topr::Allocate& allocate) {
    cpu::topr::select(*own, *other, weight, counts, allocate);
  });
  return py::tuple(results);
}

// The third result lists the parameters in which something was zeroed.
py::object zero_selected_(const py::list& parameters, const py::list& scores,
                          const py::list& remain, double weight, const py::object& key,
                          const py::object& selected, const py::object& candidates, int64_t count,
                          bool record) {
  const auto targets = views_of(parameters), own = views_of(scores), other = views_of(remain);
  const auto least = view_of(key.ptr()), counts = view_of(selected.ptr());
  const auto groups = view_of(candidates.ptr());
  if (!targets || !own || !other || !least || !counts || !groups || !all_floating(*own)) {
    return py::none();
  }
  py::list results;
  const void* layout = run(results, [&](const cpu::topr::Allocate& allocate) {
    cpu::topr::zero(*targets, *own, *other, weight, *least, *counts, *groups, count, record,
                    allocate);
  });
  py::list changed;
  const auto* zeroed = static_cast<const int64_t*>(layout);
  for (const py::handle parameter : parameters) {
    if (*zeroed != 0) changed.append(parameter);
    zeroed += cpu::topr::kLayoutColumns;
  }
  results.append(changed);
  return py::tuple(results);
}

}  // namespace

void define_direct(py::module_& m) {
  const py::object module = py::module_::import("torch");
  const py::object tensor = module.attr("Tensor");
  const py::object capsule = py::getattr(tensor, "__dlpack_c_exchange_api__", py::none());
  if (capsule.is_none()) return;
  const auto* exchange = static_cast<const DLPackExchangeAPI*>(
      PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
  if (exchange == nullptr) throw py::error_already_set();
  if (exchange->header.version.major != DLPACK_MAJOR_VERSION) return;
  const auto keep = [](const py::object& object) { return py::object(object).release(); };
  torch = {keep(tensor).ptr(),
           keep(module.attr("nn").attr("Parameter")).ptr(),
           exchange,
           keep(module.attr("empty")),
           keep(module.attr("int64")),
           keep(module.attr("uint8")),
           keep(module.attr("bool")),
           keep(module.attr("is_neg"))};
  m.def("select_top", &select_top);
  m.def("zero_selected_", &zero_selected_);
}

}  // namespace fastfisher
