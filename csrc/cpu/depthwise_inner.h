// Loops of the depthwise 3x3 convolution over NHWC maps (docs/math.md). No torch headers, no threads, no allocation.
//
// A map is (B, H, W, C); its B * H rows are numbered through. A kernel walks along a row with one block of channels and keeps a
// 3x3 window of inputs and the nine weights in registers: three loads and one store for nine multiply-adds.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "vec.h"

namespace cmt_fast {

struct MapSize {
  int64_t rows;  // B * H
  int64_t height, width, channels;
};

// Sums of dweight (9 taps) and dbias for each channel.
constexpr int kSums = 10;

// One row of a map at a channel. Beyond the top and bottom: zeros that do not advance.
template <typename T>
struct Row {
  const T* data;
  ptrdiff_t step;
};

// Rows h - 1, h, h + 1 of the image that row number `row` lies in.
template <typename T>
CMT_FAST_INLINE void three_rows(Row<T> (&rows)[3], const T* map, const T* zeros, MapSize n, int64_t row, int64_t c) {
  const int64_t h = row % n.height;
  const T* here = map + row * n.width * n.channels + c;
  for (int i = 0; i < 3; i++) {
    const bool inside = h + i >= 1 && h + i <= n.height;
    rows[i] = inside ? Row<T>{here + (i - 1) * n.width * n.channels, n.channels} : Row<T>{zeros + c, 0};
  }
}

// Three columns of three rows that move along a row; columns beyond its ends are zero.
template <typename T, int N>
struct Window {
  Vec<Acc<T>, N> left[3], middle[3], right[3];

  CMT_FAST_INLINE void start(const Row<T> (&rows)[3], int64_t width) {
    for (int i = 0; i < 3; i++) {
      left[i] = Vec<Acc<T>, N>{};
      load<N>(middle[i], rows[i].data);
    }
    enter(rows, 1, width);
  }

  CMT_FAST_INLINE void enter(const Row<T> (&rows)[3], int64_t column, int64_t width) {
    for (int i = 0; i < 3; i++) {
      if (column < width) {
        load<N>(right[i], rows[i].data + column * rows[i].step);
      } else {
        right[i] = Vec<Acc<T>, N>{};
      }
    }
  }

  CMT_FAST_INLINE void move(const Row<T> (&rows)[3], int64_t column, int64_t width) {
    for (int i = 0; i < 3; i++) {
      left[i] = middle[i];
      middle[i] = right[i];
    }
    enter(rows, column, width);
  }
};

// Calls body(std::integral_constant<int, N>, c) for blocks [c, c + N) that cover [begin, end). The last block overlaps the one
// before it instead of leaving a tail; the same values are computed twice. Ranges below one block take halves of it.
template <int N, typename Body>
CMT_FAST_INLINE void for_channel_blocks(int64_t begin, int64_t end, const Body& body) {
  if constexpr (N > 1) {
    if (end - begin < N) {
      for_channel_blocks<N / 2>(begin, end, body);
      return;
    }
  }
  for (int64_t c = begin; c < end; c += N) body(std::integral_constant<int, N>{}, std::min(c, end - N));
}

// y = conv(x) + bias (+ x) for rows [begin, end). taps (9, C); bias (C,); zeros: C zeros.
template <typename T, int BYTES>
CMT_FAST_INLINE void depthwise_conv3x3_rows(const T* x, const Acc<T>* taps, const Acc<T>* bias, const T* zeros, T* y,
                                            bool shortcut, MapSize n, int64_t begin, int64_t end) {
  using A = Acc<T>;
  for (int64_t row = begin; row < end; row++) {
    for_channel_blocks<BYTES / sizeof(A)>(0, n.channels, [&](auto lanes, int64_t c) CMT_FAST_LAMBDA_INLINE {
      constexpr int N = decltype(lanes)::value;
      using V = Vec<A, N>;
      V tap[9], b;
      for (int k = 0; k < 9; k++) load<N>(tap[k], taps + k * n.channels + c);
      load<N>(b, bias + c);
      Row<T> rows[3];
      three_rows(rows, x, zeros, n, row, c);
      T* out = y + row * n.width * n.channels + c;
      Window<T, N> window;
      window.start(rows, n.width);
      for (int64_t w = 0; w < n.width; w++) {
        V sum[3];  // one a row: shorter chains of dependent additions
        for (int i = 0; i < 3; i++) {
          sum[i] = tap[3 * i] * window.left[i];
          sum[i] += tap[3 * i + 1] * window.middle[i];
          sum[i] += tap[3 * i + 2] * window.right[i];
        }
        V total = (sum[0] + sum[1]) + (sum[2] + b);
        if (shortcut) total += window.middle[1];
        store<N>(out + w * n.channels, total);
        window.move(rows, w + 2, n.width);
      }
    });
  }
}

// Sums of grad * shifted x (9 taps) and of grad over rows [begin, end), for channels [c_begin, c_end). sums (10, C).
template <typename T, int BYTES>
CMT_FAST_INLINE void depthwise_conv3x3_sums(const T* grad, const T* x, const T* zeros, Acc<T>* sums, MapSize n,
                                            int64_t begin, int64_t end, int64_t c_begin, int64_t c_end) {
  using A = Acc<T>;
  for_channel_blocks<BYTES / sizeof(A)>(c_begin, c_end, [&](auto lanes, int64_t c) CMT_FAST_LAMBDA_INLINE {
    constexpr int N = decltype(lanes)::value;
    using V = Vec<A, N>;
    V sum[kSums] = {};
    for (int64_t row = begin; row < end; row++) {
      Row<T> rows[3];
      three_rows(rows, x, zeros, n, row, c);
      const T* g_row = grad + row * n.width * n.channels + c;
      Window<T, N> window;
      window.start(rows, n.width);
      for (int64_t w = 0; w < n.width; w++) {
        V g;
        load<N>(g, g_row + w * n.channels);
        for (int i = 0; i < 3; i++) {
          sum[3 * i] += g * window.left[i];
          sum[3 * i + 1] += g * window.middle[i];
          sum[3 * i + 2] += g * window.right[i];
        }
        sum[9] += g;
        window.move(rows, w + 2, n.width);
      }
    }
    for (int k = 0; k < kSums; k++) store<N>(sums + k * n.channels + c, sum[k]);
  });
}

// The same loops for each instruction set.
template <typename T>
struct DepthwiseConv3x3 {
  using A = Acc<T>;
  using Rows = void (*)(const T*, const A*, const A*, const T*, T*, bool, MapSize, int64_t, int64_t);
  using Sums = void (*)(const T*, const T*, const T*, A*, MapSize, int64_t, int64_t, int64_t, int64_t);

  static void rows_baseline(const T* x, const A* taps, const A* bias, const T* zeros, T* y, bool shortcut, MapSize n,
                            int64_t begin, int64_t end) {
    depthwise_conv3x3_rows<T, 16>(x, taps, bias, zeros, y, shortcut, n, begin, end);
  }
  CMT_FAST_TARGET_AVX2 static void rows_avx2(const T* x, const A* taps, const A* bias, const T* zeros, T* y,
                                             bool shortcut, MapSize n, int64_t begin, int64_t end) {
    depthwise_conv3x3_rows<T, 32>(x, taps, bias, zeros, y, shortcut, n, begin, end);
  }
  CMT_FAST_TARGET_AVX512 static void rows_avx512(const T* x, const A* taps, const A* bias, const T* zeros, T* y,
                                                 bool shortcut, MapSize n, int64_t begin, int64_t end) {
    depthwise_conv3x3_rows<T, 64>(x, taps, bias, zeros, y, shortcut, n, begin, end);
  }
  static void sums_baseline(const T* grad, const T* x, const T* zeros, A* sums, MapSize n, int64_t begin, int64_t end,
                            int64_t c_begin, int64_t c_end) {
    depthwise_conv3x3_sums<T, 16>(grad, x, zeros, sums, n, begin, end, c_begin, c_end);
  }
  CMT_FAST_TARGET_AVX2 static void sums_avx2(const T* grad, const T* x, const T* zeros, A* sums, MapSize n,
                                             int64_t begin, int64_t end, int64_t c_begin, int64_t c_end) {
    depthwise_conv3x3_sums<T, 32>(grad, x, zeros, sums, n, begin, end, c_begin, c_end);
  }
  CMT_FAST_TARGET_AVX512 static void sums_avx512(const T* grad, const T* x, const T* zeros, A* sums, MapSize n,
                                                 int64_t begin, int64_t end, int64_t c_begin, int64_t c_end) {
    depthwise_conv3x3_sums<T, 64>(grad, x, zeros, sums, n, begin, end, c_begin, c_end);
  }

  static Rows rows() {
    constexpr Rows table[] = {rows_baseline, rows_avx2, rows_avx512};
    return table[static_cast<int>(cpu_isa())];
  }
  static Sums sums() {
    constexpr Sums table[] = {sums_baseline, sums_avx2, sums_avx512};
    return table[static_cast<int>(cpu_isa())];
  }
};

}  // namespace cmt_fast
