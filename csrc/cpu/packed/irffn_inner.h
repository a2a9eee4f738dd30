// The two halves of the IRFFN in a packed model (docs/math.md, sections 2 and 10). No torch headers.
#pragma once

#include "conv_inner.h"
#include "linear_inner.h"

namespace cmt_fast {

// Channels between the pixels of the hidden map: more than it has, because pixels a power of 2 apart would share a set of the
// cache, and the convolution walks from pixel to pixel.
constexpr int64_t hidden_stride(int64_t channels) { return tile_stride(channels); }

// LayerNorm without affine, 1x1 expansion, GELU, affine: rows (C) -> rows (R) a hidden_stride apart.
template <typename T>
struct ExpandTile {
  struct Args {
    const T* x;
    Panels<T> weight;
    const float *bias, *scale, *shift;  // to the end of the last panel
    T* out;
    int64_t channels;  // that LayerNorm counts
    float eps;
    Split split;
  };

  template <int BYTES>
  CMT_FAST_INLINE static void run(const Args& args, int64_t begin, int64_t end) {
    constexpr int N = BYTES / sizeof(float);
    const int64_t c = args.weight.in, r = args.weight.out, stride = tile_stride(c), out_stride = hidden_stride(r);
    for_tasks(args.split, args.weight.count(), begin, end,
              [&](int64_t first, int64_t last, int64_t from, int64_t to, bool is_new) CMT_FAST_LAMBDA_INLINE {
                float* tile = scratch<0>((last - first) * stride);
                if (is_new) {
                  normalise_rows<BYTES>(args.x + first * c, last - first, c, args.channels, args.eps, tile, stride);
                }
                T* out = args.out + first * out_stride;
                multiply<BYTES>(tile, stride, last - first, args.weight, from, to,
                                [&](int64_t row, int64_t column, Floats<N>& v) CMT_FAST_LAMBDA_INLINE {
                                  Floats<N> a, b;
                                  load<N>(a, args.bias + column);
                                  v += a;
                                  gelu<N>(v);
                                  load<N>(a, args.scale + column);
                                  load<N>(b, args.shift + column);
                                  v = v * a + b;
                                  store_part<N>(out + row * out_stride + column, v, r - column);
                                });
              });
  }
};

// The depthwise convolution of a hidden map, with the shortcut in its centre tap, before GELU.
template <typename T>
struct HiddenConv {
  const T* hidden;           // (B, H, W, map.channels)
  const float *taps, *bias;  // (9, R) and (R,)
  const T* zeros;            // as many as the map has channels
  MapSize map;
  int64_t channels;  // R, of the map's channels
};

// GELU(conv + bias) of pixels [first, last), counted through all images, to rows of `out`.
template <int BYTES, typename T, typename Out>
CMT_FAST_INLINE void convolve_gelu(const HiddenConv<T>& conv, int64_t first, int64_t last, Out* out, int64_t stride) {
  const MapSize& n = conv.map;
  for (int64_t pixel = first; pixel < last;) {
    const int64_t row = pixel / n.width, w = pixel % n.width;
    const int64_t count = std::min({kTile, n.width - w, last - pixel});
    for_channel_blocks<BYTES / sizeof(float)>(0, conv.channels, [&](auto lanes, int64_t c) CMT_FAST_LAMBDA_INLINE {
      constexpr int N = decltype(lanes)::value;
      convolve_pixels<N>(conv.hidden, conv.zeros, n, row, w, w + count, c, conv.taps, conv.channels, conv.bias,
                         [&](int64_t column, Floats<N>& v) CMT_FAST_LAMBDA_INLINE {
                           gelu<N>(v);
                           store<N>(out + (pixel - first + column - w) * stride + c, v);
                         });
    });
    pixel += count;
  }
}

// The convolution and GELU alone: a task is one row of an image.
template <typename T>
struct ConvGeluRows {
  struct Args {
    HiddenConv<T> conv;
    T* out;  // (B, H, W, R)
  };

  template <int BYTES>
  CMT_FAST_INLINE static void run(const Args& args, int64_t begin, int64_t end) {
    const int64_t width = args.conv.map.width, r = args.conv.channels;
    convolve_gelu<BYTES>(args.conv, begin * width, end * width, args.out + begin * width * r, r);
  }
};

// The convolution, GELU, 1x1 projection, the block's shortcut.
template <typename T>
struct DepthwiseProjectTile {
  struct Args {
    HiddenConv<T> conv;
    const T* shortcut;   // (B, H, W, C)
    Panels<T> weight;
    const float* out_bias;  // to the end of the last panel
    T* out;
    Split split;
  };

  template <int BYTES>
  CMT_FAST_INLINE static void run(const Args& args, int64_t begin, int64_t end) {
    constexpr int N = BYTES / sizeof(float);
    const int64_t r = args.weight.in, c = args.weight.out, stride = tile_stride(r);
    for_tasks(args.split, args.weight.count(), begin, end,
              [&](int64_t first, int64_t last, int64_t from, int64_t to, bool is_new) CMT_FAST_LAMBDA_INLINE {
                float* tile = scratch<0>((last - first) * stride);
                if (is_new) convolve_gelu<BYTES>(args.conv, first, last, tile, stride);
                multiply<BYTES>(tile, stride, last - first, args.weight, from, to,
                                [&](int64_t row, int64_t column, Floats<N>& v) CMT_FAST_LAMBDA_INLINE {
                                  Floats<N> bias, shortcut;
                                  const int64_t at = (first + row) * c + column;
                                  load<N>(bias, args.out_bias + column);
                                  load_part<N>(shortcut, args.shortcut + at, c - column);
                                  v += bias + shortcut;
                                  store_part<N>(args.out + at, v, c - column);
                                });
              });
  }
};

}  // namespace cmt_fast
