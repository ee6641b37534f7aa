// The module fastfisher._cuda. Importing it registers the CUDA kernels, each in its entry file; a
// module of its own, so that the CPU's kernels load where this one cannot.
#include <Python.h>

PyMODINIT_FUNC PyInit__cuda() {
  static PyModuleDef definition{};
  definition.m_base = PyModuleDef_HEAD_INIT;
  definition.m_name = "_cuda";
  definition.m_doc = "The CUDA kernels; importing it registers them with torch.ops.fastfisher.";
  definition.m_size = -1;
  PyObject* module = PyModule_Create(&definition);
  if (module != nullptr) {
    PyModule_AddStringConstant(module, "architectures", FASTFISHER_ARCHITECTURES);
  }
  return module;
}
