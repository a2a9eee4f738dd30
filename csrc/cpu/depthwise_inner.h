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

// Three neighbouring pixels of a row, which move along it.
template <typename T, int N>
struct Triple {
  Vec<Acc<T>, N> left, middle, right;

  CMT_FAST_INLINE Triple(Row<T> row, int64_t column) : left{}, right{} {
    if (column > 0) load<N>(left, row.data + (column - 1) * row.step);
    load<N>(middle, row.data + column * row.step);
  }

  CMT_FAST_INLINE void enter(Row<T> row, int64_t column) { load<N>(right, row.data + column * row.step); }

  CMT_FAST_INLINE void leave() {
    left = middle;
    middle = right;
  }
};

// Pixels of a row that are walked along before the next block of channels. Memory is so read in long runs; with whole rows it is
// not, and the kernel, though as fast in a loop of its own, loses to PyTorch inside a model, where x is in no near cache.
constexpr int64_t kTile = 8;

// Calls body(w, above, here, below) for pixels [begin, end) of a row, with their 3x3 neighbours at channels [c, c + N). What
// lies outside of the map is zero.
template <int N, typename T, typename Body>
CMT_FAST_INLINE void for_pixels(const T* map, const T* zeros, MapSize n, int64_t row, int64_t begin, int64_t end,
                                int64_t c, const Body& body) {
  const int64_t h = row % n.height, stride = n.width * n.channels;
  const T* data = map + row * stride + c;
  const Row<T> outside{zeros + c, 0}, row1{data, n.channels};
  const Row<T> row0 = h > 0 ? Row<T>{data - stride, n.channels} : outside;
  const Row<T> row2 = h + 1 < n.height ? Row<T>{data + stride, n.channels} : outside;
  Triple<T, N> above(row0, begin), here(row1, begin), below(row2, begin);
  const int64_t inner_end = end < n.width ? end : end - 1;
  for (int64_t w = begin; w < inner_end; w++) {
    above.enter(row0, w + 1);
    here.enter(row1, w + 1);
    below.enter(row2, w + 1);
    body(w, above, here, below);
    above.leave();
    here.leave();
    below.leave();
  }
  if (end == n.width) {
    above.right = here.right = below.right = Vec<Acc<T>, N>{};
    body(end - 1, above, here, below);
  }
}

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
    T* out = y + row * n.width * n.channels;
    for (int64_t tile = 0; tile < n.width; tile += kTile) {
      const int64_t tile_end = std::min(tile + kTile, n.width);
      for_channel_blocks<BYTES / sizeof(A)>(0, n.channels, [&](auto lanes, int64_t c) CMT_FAST_LAMBDA_INLINE {
        constexpr int N = decltype(lanes)::value;
        using V = Vec<A, N>;
        V tap[9], b;
        for (int k = 0; k < 9; k++) load<N>(tap[k], taps + k * n.channels + c);
        load<N>(b, bias + c);
        const auto pixel = [&](int64_t w, auto& above, auto& here, auto& below) CMT_FAST_LAMBDA_INLINE {
          // three sums: shorter chains of dependent additions
          V sum0 = tap[0] * above.left + tap[1] * above.middle + tap[2] * above.right;
          V sum1 = tap[3] * here.left + tap[4] * here.middle + tap[5] * here.right;
          V sum2 = tap[6] * below.left + tap[7] * below.middle + tap[8] * below.right;
          V sum = (sum0 + sum1) + (sum2 + b);
          if (shortcut) sum += here.middle;
          store<N>(out + w * n.channels + c, sum);
        };
        for_pixels<N>(x, zeros, n, row, tile, tile_end, c, pixel);
      });
    }
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
      const T* g_row = grad + row * n.width * n.channels + c;
      for_pixels<N>(x, zeros, n, row, 0, n.width, c, [&](int64_t w, auto& above, auto& here, auto& below) CMT_FAST_LAMBDA_INLINE {
        V g;
        load<N>(g, g_row + w * n.channels);
        sum[0] += g * above.left;
        sum[1] += g * above.middle;
        sum[2] += g * above.right;
        sum[3] += g * here.left;
        sum[4] += g * here.middle;
        sum[5] += g * here.right;
        sum[6] += g * below.left;
        sum[7] += g * below.middle;
        sum[8] += g * below.right;
        sum[9] += g;
      });
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
