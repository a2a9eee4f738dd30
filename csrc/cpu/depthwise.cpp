// Checks and glue of the depthwise 3x3 convolution; the arithmetic is in depthwise_inner.h.
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <vector>

#include "checks.h"
#include "depthwise_inner.h"
#include "ops.h"

namespace cmt_fast {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Work that is worth a thread, in multiply-adds of one channel.
constexpr int64_t kGrain = 1 << 14;

void check_like_x(const char* name, const Tensor& t, const Tensor& x) {
  STD_TORCH_CHECK(t.is_cpu(), name, " must be on the CPU");
  STD_TORCH_CHECK(t.scalar_type() == x.scalar_type(), name, " must have the dtype of x, ",
                  torch::headeronly::toString(x.scalar_type()), ", got ",
                  torch::headeronly::toString(t.scalar_type()));
}

MapSize check_inputs(const Tensor& x, const Tensor& weight) {
  STD_TORCH_CHECK(x.dim() == 4, "x must have shape (B, H, W, C), got ", shape_of(x));
  check_like_x("x", x, x);
  check_like_x("weight", weight, x);
  STD_TORCH_CHECK(x.size(1) > 0 && x.size(2) > 0 && x.size(3) > 0,
                  "x must have at least one row, column and channel, got ", shape_of(x));
  const int64_t c = x.size(3);
  STD_TORCH_CHECK(has_shape(weight, {c, 1, 3, 3}), "weight must have shape (", c, ", 1, 3, 3), got ",
                  shape_of(weight));
  return {x.size(0) * x.size(1), x.size(1), x.size(2), c};
}

// Calls body(T{}) with the element type of x.
template <typename Body>
void for_dtype(const Tensor& x, const Body& body) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return body(float{});
    case ScalarType::Double:
      return body(double{});
    case ScalarType::BFloat16:
      return body(bf16{});
    default:
      STD_TORCH_CHECK(false, "x must be float32, float64 or bfloat16, got ",
                      torch::headeronly::toString(x.scalar_type()));
  }
}

// (C, 1, 3, 3) -> (9, C), turned by 180 degrees for the gradient of x.
template <typename T>
std::vector<Acc<T>> pack_taps(const Tensor& weight, int64_t channels, bool turned) {
  std::vector<Acc<T>> taps(9 * channels);
  const T* w = read<T>(weight);
  for (int k = 0; k < 9; k++) {
    for (int64_t c = 0; c < channels; c++) taps[k * channels + c] = widen(w[c * 9 + (turned ? 8 - k : k)]);
  }
  return taps;
}

template <typename T>
void convolve(const Tensor& x, const std::vector<Acc<T>>& taps, const std::vector<Acc<T>>& bias, Tensor& y,
              bool shortcut, MapSize n) {
  const std::vector<T> zeros(n.channels, T{});
  const T* from = read<T>(x);
  T* to = write<T>(y);
  const auto rows = DepthwiseConv3x3<T>::rows();
  const int64_t grain = std::max<int64_t>(1, kGrain / (n.width * n.channels));
  torch::stable::parallel_for(0, n.rows, grain, [&](int64_t begin, int64_t end) {
    rows(from, taps.data(), bias.data(), zeros.data(), to, shortcut, n, begin, end);
  });
}

// The map is cut into pieces by its shape alone, and their sums are added in order: any number of threads gives the same bits.
template <typename T>
std::vector<Acc<T>> filter_sums(const Tensor& grad, const Tensor& x, MapSize n) {
  constexpr int64_t kMaxPieces = 64, kMinPixels = 128, kGroup = 64;
  const int64_t piece_rows = std::max((n.rows + kMaxPieces - 1) / kMaxPieces, (kMinPixels + n.width - 1) / n.width);
  const int64_t pieces = (n.rows + piece_rows - 1) / piece_rows;
  const int64_t groups = std::max<int64_t>(1, n.channels / kGroup);  // the last one takes what is left over
  const int64_t stride = kSums * n.channels;
  std::vector<Acc<T>> parts(std::max<int64_t>(1, pieces) * stride);
  const std::vector<T> zeros(n.channels, T{});
  const T *g = read<T>(grad), *from = read<T>(x);
  const auto sums = DepthwiseConv3x3<T>::sums();
  const int64_t grain = std::max<int64_t>(1, kGrain / (piece_rows * n.width * kGroup));
  torch::stable::parallel_for(0, pieces * groups, grain, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; task++) {
      const int64_t piece = task / groups, group = task % groups;
      sums(g, from, zeros.data(), parts.data() + piece * stride, n, piece * piece_rows,
           std::min((piece + 1) * piece_rows, n.rows), group * kGroup,
           group + 1 == groups ? n.channels : (group + 1) * kGroup);
    }
  });
  for (int64_t piece = 1; piece < pieces; piece++) {
    for (int64_t i = 0; i < stride; i++) parts[i] += parts[piece * stride + i];
  }
  parts.resize(stride);
  return parts;
}

}  // namespace

Tensor depthwise_conv3x3_fwd_cpu(Tensor x, Tensor weight, std::optional<Tensor> bias, bool shortcut) {
  const MapSize n = check_inputs(x, weight);
  if (bias) {
    check_like_x("bias", *bias, x);
    STD_TORCH_CHECK(has_shape(*bias, {n.channels}), "bias must have shape (", n.channels, ",), got ", shape_of(*bias));
  }
  x = torch::stable::contiguous(x);
  weight = torch::stable::contiguous(weight);
  if (bias) bias = torch::stable::contiguous(*bias);
  Tensor y = torch::stable::empty_like(x);
  for_dtype(x, [&](auto element) {
    using T = decltype(element);
    std::vector<Acc<T>> b(n.channels, Acc<T>{});
    if (bias) std::transform(read<T>(*bias), read<T>(*bias) + n.channels, b.begin(), widen<T>);
    convolve<T>(x, pack_taps<T>(weight, n.channels, false), b, y, shortcut, n);
  });
  return y;
}

std::tuple<Tensor, Tensor, Tensor> depthwise_conv3x3_bwd_cpu(Tensor grad, Tensor x, Tensor weight, bool shortcut,
                                                             bool need_x, bool need_weight, bool need_bias) {
  const MapSize n = check_inputs(x, weight);
  check_like_x("grad", grad, x);
  STD_TORCH_CHECK(has_shape(grad, {x.size(0), x.size(1), x.size(2), x.size(3)}), "grad must have the shape of x, ",
                  shape_of(x), ", got ", shape_of(grad));
  const int64_t c = n.channels;
  grad = torch::stable::contiguous(grad);
  x = torch::stable::contiguous(x);
  weight = torch::stable::contiguous(weight);
  Tensor dx = torch::stable::new_empty(x, {need_x ? x.size(0) : 0, n.height, n.width, c});
  Tensor dweight = torch::stable::new_empty(x, {need_weight ? c : 0, 1, 3, 3});
  Tensor dbias = torch::stable::new_empty(x, {need_bias ? c : 0});
  for_dtype(x, [&](auto element) {
    using T = decltype(element);
    if (need_x) {
      convolve<T>(grad, pack_taps<T>(weight, c, true), std::vector<Acc<T>>(c, Acc<T>{}), dx, shortcut, n);
    }
    if (!need_weight && !need_bias) return;
    const std::vector<Acc<T>> sums = filter_sums<T>(grad, x, n);
    if (need_weight) {
      T* out = write<T>(dweight);
      for (int64_t i = 0; i < 9 * c; i++) out[i] = narrow<T>(sums[i % 9 * c + i / 9]);
    }
    if (need_bias) std::transform(sums.begin() + 9 * c, sums.end(), write<T>(dbias), narrow<T>);
  });
  return {dx, dweight, dbias};
}

}  // namespace cmt_fast
