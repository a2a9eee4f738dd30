// Registration of every compiled operation. The schemas are declared in Python, so tracing needs no library.
#include <Python.h>
#include <torch/csrc/stable/library.h>

#include "cpu/ops.h"

STABLE_TORCH_LIBRARY_IMPL(cmt_fast_native, CPU, m) {
  m.impl("depthwise_conv3x3_fwd", TORCH_BOX(&cmt_fast::depthwise_conv3x3_fwd_cpu));
  m.impl("depthwise_conv3x3_bwd", TORCH_BOX(&cmt_fast::depthwise_conv3x3_bwd_cpu));
}

// An empty module: loading the library is what registers the operations.
PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
