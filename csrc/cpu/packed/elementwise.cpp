// Entry points of elementwise_inner.h.
#include "elementwise_inner.h"

#include "glue.h"
#include "ops.h"

namespace cmt_fast {

Tensor packed_normalise_cpu(Tensor x, int64_t channels, double eps) {
  check_map("x", x);
  const int64_t width = x.size(3), rows = x.size(0) * x.size(1) * x.size(2);
  check_channels(channels, width);
  Tensor y = torch::stable::new_empty(x, {x.size(0), x.size(1), x.size(2), width});
  for_map_dtype(x, [&](auto element) {
    using T = decltype(element);
    run_tasks<NormaliseRows<T>>({read<T>(x), write<T>(y), width, channels, static_cast<float>(eps)}, rows);
  });
  return y;
}

Tensor packed_gelu_affine_cpu(Tensor x, Tensor scale, Tensor shift) {
  check_map("x", x);
  const int64_t width = x.size(3), rows = x.size(0) * x.size(1) * x.size(2);
  check("scale", scale, {width}, ScalarType::Float);
  check("shift", shift, {width}, ScalarType::Float);
  Tensor y = torch::stable::new_empty(x, {x.size(0), x.size(1), x.size(2), width});
  for_map_dtype(x, [&](auto element) {
    using T = decltype(element);
    run_tasks<GeluAffineRows<T>>({read<T>(x), read<float>(scale), read<float>(shift), write<T>(y), width}, rows);
  });
  return y;
}

}  // namespace cmt_fast
