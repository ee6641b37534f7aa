// Registration of the compiled kernels, and the module's introspection. The schemas are in
// fastfisher/ops.py, so that the operators exist, in plain torch, where this file was never built.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/stable/library.h>

#include <map>
#include <string>

#include "cpu/dispatch.h"
#include "cpu/ops.h"
#include "direct.h"

STABLE_TORCH_LIBRARY_IMPL(fastfisher, CPU, m) {
  m.impl("linear_sum_grad_squared_", TORCH_BOX(&fastfisher::cpu::linear_sum_grad_squared_));
  m.impl("conv2d_sum_grad_squared_", TORCH_BOX(&fastfisher::cpu::conv2d_sum_grad_squared_));
  m.impl("channel_sum_grad_squared_", TORCH_BOX(&fastfisher::cpu::channel_sum_grad_squared_));
  m.impl("embedding_sum_grad_squared_", TORCH_BOX(&fastfisher::cpu::embedding_sum_grad_squared_));
  m.impl("lstm_step_", TORCH_BOX(&fastfisher::cpu::lstm_step_));
  m.impl("lstm_step_backward_", TORCH_BOX(&fastfisher::cpu::lstm_step_backward_));
  m.impl("gru_step_", TORCH_BOX(&fastfisher::cpu::gru_step_));
  m.impl("gru_step_backward_", TORCH_BOX(&fastfisher::cpu::gru_step_backward_));
  m.impl("select_top", TORCH_BOX(&fastfisher::cpu::select_top));
  m.impl("zero_selected_", TORCH_BOX(&fastfisher::cpu::zero_selected_));
}

PYBIND11_MODULE(_C, m) {
  m.doc() =
      "Compiled kernels of fastfisher; importing it registers them with torch.ops.fastfisher.";
  m.def(
      "build_config",
      [] {
        return std::map<std::string, std::string>{
            {"compiler", __VERSION__},
            {"cxx_standard", std::to_string(__cplusplus)},
            {"torch_target", FASTFISHER_TORCH_TARGET},
        };
      },
      "How this module was compiled.");
  m.def(
      "cpu_isa", [] { return std::string(fastfisher::cpu::kernels().name); },
      "The instruction set in use.");
  m.def("supported_cpu_isas", &fastfisher::cpu::supported_isas,
        "The instruction sets this machine can run, slowest first.");
  m.def("set_cpu_isa", &fastfisher::cpu::set_isa, pybind11::arg("isa"),
        "Use one instruction set from now on; for tests and benchmarks.");
  m.def(
      "set_always_matrix_unit", &fastfisher::cpu::set_always_matrix_unit, pybind11::arg("always"),
      "Whether a matrix unit takes also what it is slower at; for tests, whose shapes are small.");
  fastfisher::define_direct(m);
}
