// The 3x3 depthwise convolution inside other loops of a packed model, with fewer instructions than that of depthwise_inner.h: every column
// of three pixels is loaded once and added to the three outputs that it belongs to, so no window has to be kept. No torch headers.
#pragma once

#include "../depthwise_inner.h"
#include "../math.h"

namespace cmt_fast {

// Calls emit(w, conv + bias) for pixels [begin, end) of a row at channels [c, c + N). taps (9, tap_stride) and bias in float32.
template <int N, typename T, typename Emit>
CMT_FAST_INLINE void convolve_pixels(const T* map, const T* zeros, MapSize n, int64_t row, int64_t begin, int64_t end, int64_t c,
                                     const float* taps, int64_t tap_stride, const float* bias, const Emit& emit) {
  using V = Floats<N>;
  const int64_t h = row % n.height, stride = n.width * n.channels;
  const T* data = map + row * stride + c;
  const Row<T> outside{zeros + c, 0}, row1{data, n.channels};
  const Row<T> row0 = h > 0 ? Row<T>{data - stride, n.channels} : outside;
  const Row<T> row2 = h + 1 < n.height ? Row<T>{data + stride, n.channels} : outside;
  V tap[9], b, x0, x1, x2;
  for (int k = 0; k < 9; k++) load<N>(tap[k], taps + k * tap_stride + c);
  load<N>(b, bias + c);
  const auto enter = [&](int64_t column) CMT_FAST_LAMBDA_INLINE {
    load<N>(x0, row0.data + column * row0.step);
    load<N>(x1, row1.data + column * row1.step);
    load<N>(x2, row2.data + column * row2.step);
  };
  // Adds the column at hand to `sum`, the output on whose left, middle or right (0, 1, 2) it is.
  const auto add = [&](V& sum, int side) CMT_FAST_LAMBDA_INLINE {
    sum += tap[side] * x0;
    sum += tap[3 + side] * x1;
    sum += tap[6 + side] * x2;
  };
  V now = b, next = b;
  if (begin > 0) {
    enter(begin - 1);
    add(now, 0);
  }
  enter(begin);
  add(now, 1);
  add(next, 0);
  const int64_t inner_end = end < n.width ? end + 1 : end;
  for (int64_t column = begin + 1; column < inner_end; column++) {
    enter(column);
    V done = now;
    add(done, 2);
    now = next;
    add(now, 1);
    next = b;
    add(next, 0);
    emit(column - 1, done);
  }
  if (end == n.width) emit(end - 1, now);
}

}  // namespace cmt_fast
