// `import npr_ext._operators` loads this library; loading it registers the torch.ops.npr operators.
#include <ATen/Parallel.h>
#include <Python.h>
#include <torch/library.h>

extern "C" PyObject* PyInit__operators() {
  static PyModuleDef definition = {
      PyModuleDef_HEAD_INIT, "_operators", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&definition);
}

// Each library that was built with ATen takes up the number of threads at its first parallel loop; asking counts as
// one.
int64_t num_threads() {
  at::internal::lazy_init_num_threads();
  return at::get_num_threads();
}

TORCH_LIBRARY_FRAGMENT(npr, library) { library.def("num_threads() -> int", &num_threads); }
