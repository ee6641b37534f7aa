// The top-R operators on Python's tensors without torch's dispatcher.
#pragma once

#include <pybind11/pybind11.h>

namespace fastfisher {

void define_direct(pybind11::module_& m);

}  // namespace fastfisher
