// Matrix products of a packed model whose left factor is gathered: rows as they are, 2x2 patches, 3x3 windows. No torch headers.
#pragma once

#include <cmath>

#include "../dispatch.h"
#include "../gemm.h"
#include "../rows.h"

namespace cmt_fast {

// A task is one tile of rows and one group of panels; tasks are numbered tile by tile.
struct Split {
  int64_t rows, tiles, groups;

  int64_t tasks() const { return rows > 0 ? tiles * groups : 0; }
  int64_t first_row(int64_t tile) const { return rows * tile / tiles; }
};

// Calls body(first_row, last_row, first_panel, last_panel, is_new_tile) for tasks [begin, end).
template <typename Body>
CMT_FAST_INLINE void for_tasks(const Split& split, int64_t panels, int64_t begin, int64_t end, const Body& body) {
  int64_t previous = -1;
  for (int64_t task = begin; task < end; task++) {
    const int64_t tile = task / split.groups, group = task % split.groups;
    body(split.first_row(tile), split.first_row(tile + 1), panels * group / split.groups,
         panels * (group + 1) / split.groups, tile != previous);
    previous = tile;
  }
}

template <int BYTES, typename T>
CMT_FAST_INLINE void widen_row(const T* x, int64_t count, float* out) {
  constexpr int N = BYTES / sizeof(float);
  for (int64_t c = 0; c < count; c += N) {
    Floats<N> v;
    load_part<N>(v, x + c, count - c);
    store_part<N>(out + c, v, count - c);
  }
}

// out (rows, weight.out) = x (rows, weight.in) weight^T + bias.
template <typename T>
struct LinearTile {
  struct Args {
    const T* x;
    Panels<T> weight;
    const float* bias;  // to the end of the last panel
    T* out;
    Split split;
  };

  template <int BYTES>
  CMT_FAST_INLINE static void run(const Args& args, int64_t begin, int64_t end) {
    constexpr int N = BYTES / sizeof(float);
    const int64_t k = args.weight.in, n = args.weight.out, stride = tile_stride(k);
    for_tasks(args.split, args.weight.count(), begin, end,
              [&](int64_t first, int64_t last, int64_t from, int64_t to, bool is_new) CMT_FAST_LAMBDA_INLINE {
                float* tile = scratch<0>((last - first) * stride);
                for (int64_t row = first; is_new && row < last; row++) {
                  widen_row<BYTES>(args.x + row * k, k, tile + (row - first) * stride);
                }
                T* out = args.out + first * n;
                multiply<BYTES>(tile, stride, last - first, args.weight, from, to,
                                [&](int64_t row, int64_t column, Floats<N>& v) CMT_FAST_LAMBDA_INLINE {
                                  Floats<N> bias;
                                  load<N>(bias, args.bias + column);
                                  v += bias;
                                  store_part<N>(out + row * n + column, v, n - column);
                                });
              });
  }
};

// 2x2 patches times a matrix, then LayerNorm with its affine: (B, H, W, C_in) -> (B, H / 2, W / 2, C).
template <typename T>
struct PatchEmbedTile {
  struct Args {
    const T* x;
    Panels<T> weight;                   // in: 4 C_in
    const float *bias, *scale, *shift;  // to the end of the last panel
    T* out;
    int64_t height, width;  // of x
    int64_t channels;       // that LayerNorm counts
    float eps;
    Split split;  // one group: LayerNorm needs whole rows
  };

  template <int BYTES>
  CMT_FAST_INLINE static void run(const Args& args, int64_t begin, int64_t end) {
    constexpr int N = BYTES / sizeof(float);
    const int64_t k = args.weight.in, n = args.weight.out, stride = tile_stride(k), line = args.width * (k / 4);
    const int64_t out_height = args.height / 2, out_width = args.width / 2;
    for_tasks(args.split, args.weight.count(), begin, end,
              [&](int64_t first, int64_t last, int64_t from, int64_t to, bool) CMT_FAST_LAMBDA_INLINE {
                float* tile = scratch<0>((last - first) * stride);
                const int64_t out_stride = tile_stride(n);
                float* result = scratch<1>((last - first) * out_stride);
                for (int64_t row = first; row < last; row++) {
                  const int64_t image = row / (out_height * out_width), y = row / out_width % out_height;
                  const T* corner = args.x + (image * args.height + 2 * y) * line + row % out_width * (k / 2);
                  widen_row<BYTES>(corner, k / 2, tile + (row - first) * stride);
                  widen_row<BYTES>(corner + line, k / 2, tile + (row - first) * stride + k / 2);
                }
                multiply<BYTES>(tile, stride, last - first, args.weight, from, to,
                                [&](int64_t row, int64_t column, Floats<N>& v) CMT_FAST_LAMBDA_INLINE {
                                  Floats<N> bias;
                                  load<N>(bias, args.bias + column);
                                  v += bias;
                                  store<N>(result + row * out_stride + column, v);
                                });
                for (int64_t row = 0; row < last - first; row++) {
                  const float* x = result + row * out_stride;
                  const Moments m = row_moments<BYTES>(x, args.channels, args.eps);
                  for (int64_t c = 0; c < n; c += N) {
                    Floats<N> v, scale, shift;
                    load<N>(v, x + c);
                    load<N>(scale, args.scale + c);
                    load<N>(shift, args.shift + c);
                    v = (v - m.mean) * m.scale;
                    v = v * scale + shift;  // both 0 for padded channels
                    store_part<N>(args.out + (first + row) * n + c, v, n - c);
                  }
                }
              });
  }
};

// 3x3 convolution, zero padding 1, then GELU, then an affine: (B, H, W, C_in) -> (B, ceil(H / s), ceil(W / s), S).
template <typename T>
struct ConvGeluTile {
  struct Args {
    const T* x;
    Panels<T> weight;                   // in: 9 C_in, window row by row
    const float *bias, *scale, *shift;  // to the end of the last panel; scale and shift may be null
    T* out;
    int64_t height, width, out_height, out_width, stride;
    Split split;
  };

  // The window around the pixel (y, x) of an image as 9 C floats, zero outside.
  template <int BYTES>
  CMT_FAST_INLINE static void gather(const T* image, const Args& args, int64_t y, int64_t x, int64_t c, float* out) {
    const int64_t left = std::max<int64_t>(x - 1, 0), right = std::min(x + 2, args.width);
    for (int64_t dy = 0; dy < 3; dy++, out += 3 * c) {
      if (y + dy < 1 || y + dy > args.height) {
        std::fill(out, out + 3 * c, 0.0f);
        continue;
      }
      const int64_t before = (left - (x - 1)) * c, count = (right - left) * c;
      std::fill(out, out + before, 0.0f);
      widen_row<BYTES>(image + ((y + dy - 1) * args.width + left) * c, count, out + before);
      std::fill(out + before + count, out + 3 * c, 0.0f);
    }
  }

  template <int BYTES>
  CMT_FAST_INLINE static void run(const Args& args, int64_t begin, int64_t end) {
    constexpr int N = BYTES / sizeof(float);
    const int64_t k = args.weight.in, n = args.weight.out, stride = tile_stride(k), c = k / 9;
    for_tasks(args.split, args.weight.count(), begin, end,
              [&](int64_t first, int64_t last, int64_t from, int64_t to, bool is_new) CMT_FAST_LAMBDA_INLINE {
                float* tile = scratch<0>((last - first) * stride);
                for (int64_t row = first; is_new && row < last; row++) {
                  const int64_t image = row / (args.out_height * args.out_width);
                  gather<BYTES>(args.x + image * args.height * args.width * c, args,
                                row / args.out_width % args.out_height * args.stride,
                                row % args.out_width * args.stride, c, tile + (row - first) * stride);
                }
                T* out = args.out + first * n;
                multiply<BYTES>(tile, stride, last - first, args.weight, from, to,
                                [&](int64_t row, int64_t column, Floats<N>& v) CMT_FAST_LAMBDA_INLINE {
                                  Floats<N> a, b;
                                  load<N>(a, args.bias + column);
                                  v += a;
                                  gelu<N>(v);
                                  if (args.scale != nullptr) {
                                    load<N>(a, args.scale + column);
                                    load<N>(b, args.shift + column);
                                    v = v * a + b;
                                  }
                                  store_part<N>(out + row * n + column, v, n - column);
                                });
              });
  }
};

}  // namespace cmt_fast
