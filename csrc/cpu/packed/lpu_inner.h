// Local perception unit, LayerNorm and reduction of a packed model in one pass (docs/math.md, sections 2, 3 and 10). No torch headers.
#pragma once

#include "../dispatch.h"
#include "../gemm.h"
#include "../rows.h"
#include "conv_inner.h"

namespace cmt_fast {

// A task is one strip of k rows of an image: y = conv(x), and of its normalised pixels one row of the reduced map. With k = 1 that
// is the normalised map itself.
template <typename T>
struct LpuStrip {
  struct Args {
    const T* x;
    const float *taps, *bias;  // (9, C) and (C,)
    const float* reduction;    // (k * k, C), or null for k = 1
    const T* zeros;            // C
    T *y, *reduced;            // (B, H, W, C) and (B, H / k, W / k, C)
    MapSize map;
    int64_t k, channels;
    float eps;

    int64_t strips() const { return (map.height + k - 1) / k; }  // of an image; the last may be cut, and then reduces to nothing
  };

  // One row of y, rounded into the map and as it is into `line`.
  template <int BYTES>
  CMT_FAST_INLINE static void convolve(const Args& args, int64_t row, float* line, int64_t stride) {
    const MapSize& n = args.map;
    T* out = args.y + row * n.width * n.channels;
    for (int64_t begin = 0; begin < n.width; begin += kTile) {
      const int64_t end = std::min(begin + kTile, n.width);
      for_channel_blocks<BYTES / sizeof(float)>(0, n.channels, [&](auto lanes, int64_t c) CMT_FAST_LAMBDA_INLINE {
        constexpr int N = decltype(lanes)::value;
        convolve_pixels<N>(args.x, args.zeros, n, row, begin, end, c, args.taps, n.channels, args.bias,
                           [&](int64_t w, Floats<N>& v) CMT_FAST_LAMBDA_INLINE {
                             store<N>(line + w * stride + c, v);
                             store<N>(out + w * n.channels + c, v);
                           });
      });
    }
  }

  template <int BYTES>
  CMT_FAST_INLINE static void run(const Args& args, int64_t begin, int64_t end) {
    constexpr int N = BYTES / sizeof(float);
    const MapSize& n = args.map;
    const int64_t k = args.k, c = n.channels, stride = tile_stride(c), columns = n.width / k;
    float* line = scratch<0>(n.width * stride);
    float* sums = scratch<1>(columns * stride);
    for (int64_t task = begin; task < end; task++) {
      const int64_t image = task / args.strips(), strip = task % args.strips();
      const bool whole = (strip + 1) * k <= n.height;
      T* reduced = args.reduced + (image * (n.height / k) + strip) * columns * c;
      std::fill(sums, sums + columns * stride, 0.0f);
      for (int64_t dy = 0; dy < k && strip * k + dy < n.height; dy++) {
        convolve<BYTES>(args, image * n.height + strip * k + dy, line, stride);
        for (int64_t w = 0; whole && w < columns * k; w++) {
          const float* pixel = line + w * stride;
          const Moments m = row_moments<BYTES>(pixel, args.channels, args.eps);
          float* sum = sums + w / k * stride;
          for (int64_t i = 0; i < c; i += N) {
            Floats<N> v, tap, old;
            load<N>(v, pixel + i);
            v = (v - m.mean) * m.scale;
            if (args.reduction == nullptr) {
              keep_first<N>(v, args.channels - i);
              store_part<N>(reduced + w * c + i, v, c - i);
              continue;
            }
            load_part<N>(tap, args.reduction + (dy * k + w % k) * c + i, args.channels - i);
            load<N>(old, sum + i);
            v = v * tap + old;
            keep_first<N>(v, args.channels - i);
            store<N>(sum + i, v);
          }
        }
      }
      if (!whole || args.reduction == nullptr) continue;
      for (int64_t w = 0; w < columns; w++) {
        for (int64_t i = 0; i < c; i += N) {
          Floats<N> v;
          load<N>(v, sums + w * stride + i);
          store_part<N>(reduced + w * c + i, v, c - i);
        }
      }
    }
  }
};

}  // namespace cmt_fast
