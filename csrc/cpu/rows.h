// LayerNorm and softmax of single rows in float32. No torch headers.
#pragma once

#include <cmath>

#include "math.h"

namespace cmt_fast {

// x[i] for i < count, 0 from there on: what is summed up has no garbage in it.
template <int N>
CMT_FAST_INLINE void keep_first(Floats<N>& v, int64_t count) {
  if (count >= N) return;
  Vec<int32_t, N> lane;
  for (int i = 0; i < N; i++) lane[i] = i;
  v = lane < static_cast<int32_t>(count) ? v : Floats<N>{};
}

struct Moments {
  float mean, scale;  // scale = 1 / sqrt(variance + eps)
};

// Of the first `channels` of a row, in two passes.
template <int BYTES, typename T>
CMT_FAST_INLINE Moments row_moments(const T* x, int64_t channels, float eps) {
  constexpr int N = BYTES / sizeof(float);
  using V = Floats<N>;
  V sum{}, square{}, v;
  for (int64_t c = 0; c < channels; c += N) {
    load_part<N>(v, x + c, channels - c);
    sum += v;
  }
  const float mean = sum_lanes<N>(sum) / channels;
  for (int64_t c = 0; c < channels; c += N) {
    load_part<N>(v, x + c, channels - c);
    v -= mean;
    keep_first<N>(v, channels - c);
    square += v * v;
  }
  return {mean, 1.0f / std::sqrt(sum_lanes<N>(square) / channels + eps)};
}

// Rows of `width` elements to rows of LayerNorm without its affine over the first `channels`, then zeros.
template <int BYTES, typename T, typename Out>
CMT_FAST_INLINE void normalise_rows(const T* x, int64_t rows, int64_t width, int64_t channels, float eps, Out* out,
                                    int64_t stride) {
  constexpr int N = BYTES / sizeof(float);
  for (int64_t row = 0; row < rows; row++, x += width, out += stride) {
    const Moments m = row_moments<BYTES>(x, channels, eps);
    for (int64_t c = 0; c < width; c += N) {
      Floats<N> v;
      load_part<N>(v, x + c, channels - c);
      v = (v - m.mean) * m.scale;
      keep_first<N>(v, channels - c);
      store_part<N>(out + c, v, width - c);
    }
  }
}

// In place: logits (keys,) plus bias (keys,) plus key bias to weights that sum to 1. unit: log2 of what a logit is the logarithm to.
template <int BYTES, typename T>
CMT_FAST_INLINE void softmax_row(float* logits, const T* bias, const float* key_bias, int64_t keys, float unit) {
  constexpr int N = BYTES / sizeof(float);
  using V = Floats<N>;
  V most, v, b, sum{};
  fill<N>(most, -INFINITY);
  for (int64_t m = 0; m < keys; m += N) {
    const int64_t count = keys - m;
    load<N>(v, logits + m);  // a row of logits is padded to whole panels
    load_part<N>(b, bias + m, count);
    v += b;
    load<N>(b, key_bias + m);
    v += b;
    store<N>(logits + m, v);
    if (count < N) {
      for (int i = 0; i < count; i++) most[0] = v[i] > most[0] ? v[i] : most[0];
    } else {
      most = v > most ? v : most;
    }
  }
  const float top = max_lanes<N>(most);
  for (int64_t m = 0; m < keys; m += N) {
    load<N>(v, logits + m);
    v = (v - top) * unit;
    exp2_of_negative<N>(v);
    keep_first<N>(v, keys - m);
    store<N>(logits + m, v);
    sum += v;
  }
  const float scale = 1.0f / sum_lanes<N>(sum);
  for (int64_t m = 0; m < keys; m += N) {
    load<N>(v, logits + m);
    v *= scale;
    store<N>(logits + m, v);
  }
}

}  // namespace cmt_fast
