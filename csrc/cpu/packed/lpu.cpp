// Entry point of lpu_inner.h.
#include "lpu_inner.h"

#include "glue.h"
#include "ops.h"

namespace cmt_fast {

std::tuple<Tensor, Tensor> packed_lpu_cpu(Tensor x, Tensor taps, Tensor bias, std::optional<Tensor> reduction, int64_t k,
                                          int64_t channels, double eps) {
  check_map("x", x);
  const int64_t b = x.size(0), h = x.size(1), w = x.size(2), c = x.size(3);
  check_channels(channels, c);
  STD_TORCH_CHECK(k >= 1 && k <= h && k <= w, "k must be at least 1 and no larger than the map, got k = ", k, " and x ",
                  shape_of(x));
  STD_TORCH_CHECK(reduction.has_value() == (k > 1), "reduction must be given for k > 1, and only then");
  check("taps", taps, {9, c}, ScalarType::Float);
  check("bias", bias, {c}, ScalarType::Float);
  if (reduction) check("reduction", *reduction, {k * k, c}, ScalarType::Float);
  Tensor y = torch::stable::new_empty(x, {b, h, w, c});
  Tensor reduced = torch::stable::new_empty(x, {b, h / k, w / k, c});
  for_map_dtype(x, [&](auto element) {
    using T = decltype(element);
    const std::vector<T> zeros(c, T{});
    const typename LpuStrip<T>::Args args{read<T>(x),
                                          read<float>(taps),
                                          read<float>(bias),
                                          reduction ? read<float>(*reduction) : nullptr,
                                          zeros.data(),
                                          write<T>(y),
                                          write<T>(reduced),
                                          MapSize{b * h, h, w, c},
                                          k,
                                          channels,
                                          static_cast<float>(eps)};
    run_tasks<LpuStrip<T>>(args, b * args.strips());
  });
  return {y, reduced};
}

}  // namespace cmt_fast
