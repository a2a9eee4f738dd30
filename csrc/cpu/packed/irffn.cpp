// Entry points of irffn_inner.h.
#include "irffn_inner.h"

#include "glue.h"
#include "ops.h"

namespace cmt_fast {

Tensor packed_expand_cpu(Tensor x, Tensor weight, Tensor bias, Tensor scale, Tensor shift, int64_t out, int64_t channels,
                         double eps) {
  check_map("x", x);
  check_channels(channels, x.size(3));
  const int64_t in = x.size(3), rows = x.size(0) * x.size(1) * x.size(2);
  Tensor y = torch::stable::new_empty(x, {x.size(0), x.size(1), x.size(2), hidden_stride(out)});
  for_map_dtype(x, [&](auto element) {
    using T = decltype(element);
    const auto right = panels<T>("weight", weight, in, out);
    const Split split = split_rows(rows, in, right.count(), Cut::kColumns);
    run_tasks<ExpandTile<T>>({read<T>(x), right, vector("bias", bias, out), vector("scale", scale, out),
                              vector("shift", shift, out), write<T>(y), channels, static_cast<float>(eps), split},
                             split.tasks());
  });
  return y;
}

Tensor packed_depthwise_project_cpu(Tensor hidden, Tensor shortcut, Tensor taps, Tensor bias, Tensor weight, Tensor out_bias) {
  check_map("hidden", hidden);
  check_map("shortcut", shortcut);
  STD_TORCH_CHECK(taps.dim() == 2, "taps must have shape (9, R), got ", shape_of(taps));
  const int64_t b = hidden.size(0), h = hidden.size(1), w = hidden.size(2), c = shortcut.size(3);
  const int64_t r = taps.size(1), stride = hidden.size(3);  // hidden_stride(r) is best
  STD_TORCH_CHECK(stride >= r, "hidden must have at least the ", r, " channels of taps, got ", shape_of(hidden));
  check("shortcut", shortcut, {b, h, w, c}, hidden.scalar_type());
  check("taps", taps, {9, r}, ScalarType::Float);
  check("bias", bias, {r}, ScalarType::Float);
  Tensor y = torch::stable::new_empty(shortcut, {b, h, w, c});
  for_map_dtype(hidden, [&](auto element) {
    using T = decltype(element);
    const auto right = panels<T>("weight", weight, r, c);
    const Split split = split_rows(b * h * w, r, right.count(), Cut::kRows);
    const std::vector<T> zeros(stride, T{});
    const HiddenConv<T> conv{read<T>(hidden), read<float>(taps), read<float>(bias), zeros.data(), {b * h, h, w, stride}, r};
    run_tasks<DepthwiseProjectTile<T>>({conv, read<T>(shortcut), right, vector("out_bias", out_bias, c), write<T>(y), split},
                                       split.tasks());
  });
  return y;
}

Tensor packed_depthwise_gelu_cpu(Tensor hidden, Tensor taps, Tensor bias) {
  check_map("hidden", hidden);
  const int64_t b = hidden.size(0), h = hidden.size(1), w = hidden.size(2), r = hidden.size(3);
  check("taps", taps, {9, r}, ScalarType::Float);
  check("bias", bias, {r}, ScalarType::Float);
  Tensor y = torch::stable::new_empty(hidden, {b, h, w, r});
  for_map_dtype(hidden, [&](auto element) {
    using T = decltype(element);
    const std::vector<T> zeros(r, T{});
    const HiddenConv<T> conv{read<T>(hidden), read<float>(taps), read<float>(bias), zeros.data(), {b * h, h, w, r}, r};
    run_tasks<ConvGeluRows<T>>({conv, write<T>(y)}, b * h);
  });
  return y;
}

}  // namespace cmt_fast
