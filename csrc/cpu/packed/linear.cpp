// Entry points of linear_inner.h.
#include "glue.h"
#include "ops.h"

namespace cmt_fast {

Tensor packed_linear_cpu(Tensor x, Tensor weight, Tensor bias, int64_t out) {
  STD_TORCH_CHECK(x.dim() == 2, "x must have shape (rows, in), got ", shape_of(x));
  const int64_t rows = x.size(0), in = x.size(1);
  check("x", x, {rows, in}, x.scalar_type());
  Tensor y = torch::stable::new_empty(x, {rows, out});
  for_map_dtype(x, [&](auto element) {
    using T = decltype(element);
    const auto w = panels<T>("weight", weight, in, out);
    const Split split = split_rows(rows, in, w.count(), Cut::kColumns);
    run_tasks<LinearTile<T>>({read<T>(x), w, vector("bias", bias, out), write<T>(y), split}, split.tasks());
  });
  return y;
}

Tensor packed_patch_embed_cpu(Tensor x, Tensor weight, Tensor bias, Tensor scale, Tensor shift, int64_t out, int64_t channels,
                              double eps) {
  check_map("x", x);
  check_channels(channels, out);
  const int64_t b = x.size(0), h = x.size(1), w = x.size(2), in = 4 * x.size(3);
  STD_TORCH_CHECK(h > 1 && w > 1, "x must have at least two rows and columns, got ", shape_of(x));
  Tensor y = torch::stable::new_empty(x, {b, h / 2, w / 2, out});
  for_map_dtype(x, [&](auto element) {
    using T = decltype(element);
    const auto right = panels<T>("weight", weight, in, out);
    const Split split = split_rows(b * (h / 2) * (w / 2), in, right.count(), Cut::kWholeRows);
    run_tasks<PatchEmbedTile<T>>({read<T>(x), right, vector("bias", bias, out), vector("scale", scale, out),
                                  vector("shift", shift, out), write<T>(y), h, w, channels, static_cast<float>(eps), split},
                                 split.tasks());
  });
  return y;
}

Tensor packed_conv3x3_gelu_cpu(Tensor x, Tensor weight, Tensor bias, std::optional<Tensor> scale, std::optional<Tensor> shift,
                               int64_t out, int64_t stride) {
  check_map("x", x);
  STD_TORCH_CHECK(stride == 1 || stride == 2, "stride must be 1 or 2, got ", stride);
  STD_TORCH_CHECK(scale.has_value() == shift.has_value(), "scale and shift must be given together or not at all");
  const int64_t b = x.size(0), h = x.size(1), w = x.size(2), in = 9 * x.size(3);
  const int64_t out_h = (h + stride - 1) / stride, out_w = (w + stride - 1) / stride;
  Tensor y = torch::stable::new_empty(x, {b, out_h, out_w, out});
  for_map_dtype(x, [&](auto element) {
    using T = decltype(element);
    const auto right = panels<T>("weight", weight, in, out);
    const Split split = split_rows(b * out_h * out_w, in, right.count(), Cut::kColumns);
    run_tasks<ConvGeluTile<T>>(
        {read<T>(x), right, vector("bias", bias, out), scale ? vector("scale", *scale, out) : nullptr,
         shift ? vector("shift", *shift, out) : nullptr, write<T>(y), h, w, out_h, out_w, stride, split},
        split.tasks());
  });
  return y;
}

}  // namespace cmt_fast
