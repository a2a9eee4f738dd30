// Registration of every compiled operation. The schemas are declared in Python, so tracing needs no library.
#include <Python.h>
#include <torch/csrc/stable/library.h>

#include "cpu/ops.h"
#include "cpu/packed/ops.h"

STABLE_TORCH_LIBRARY_IMPL(cmt_fast_native, CPU, m) {
  m.impl("depthwise_conv3x3_fwd", TORCH_BOX(&cmt_fast::depthwise_conv3x3_fwd_cpu));
  m.impl("depthwise_conv3x3_bwd", TORCH_BOX(&cmt_fast::depthwise_conv3x3_bwd_cpu));
  m.impl("packed_linear", TORCH_BOX(&cmt_fast::packed_linear_cpu));
  m.impl("packed_conv3x3_gelu", TORCH_BOX(&cmt_fast::packed_conv3x3_gelu_cpu));
  m.impl("packed_patch_embed", TORCH_BOX(&cmt_fast::packed_patch_embed_cpu));
  m.impl("packed_lpu", TORCH_BOX(&cmt_fast::packed_lpu_cpu));
  m.impl("packed_attention", TORCH_BOX(&cmt_fast::packed_attention_cpu));
  m.impl("packed_attention_core", TORCH_BOX(&cmt_fast::packed_attention_core_cpu));
  m.impl("packed_normalise", TORCH_BOX(&cmt_fast::packed_normalise_cpu));
  m.impl("packed_gelu_affine", TORCH_BOX(&cmt_fast::packed_gelu_affine_cpu));
  m.impl("packed_depthwise_gelu", TORCH_BOX(&cmt_fast::packed_depthwise_gelu_cpu));
  m.impl("packed_expand", TORCH_BOX(&cmt_fast::packed_expand_cpu));
  m.impl("packed_depthwise_project", TORCH_BOX(&cmt_fast::packed_depthwise_project_cpu));
}

// An empty module: loading the library is what registers the operations.
PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
