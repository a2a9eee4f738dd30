// What stands between matrix products that another library computes: steps of single rows. No torch headers.
#pragma once

#include "../dispatch.h"
#include "../rows.h"

namespace cmt_fast {

// LayerNorm without its affine over the first `channels` of a row, then zeros. A task is a row.
template <typename T>
struct NormaliseRows {
  struct Args {
    const T* x;
    T* out;
    int64_t width, channels;
    float eps;
  };

  template <int BYTES>
  CMT_FAST_INLINE static void run(const Args& args, int64_t begin, int64_t end) {
    const int64_t at = begin * args.width;
    normalise_rows<BYTES>(args.x + at, end - begin, args.width, args.channels, args.eps, args.out + at, args.width);
  }
};

// GELU, then an affine a channel. A task is a row.
template <typename T>
struct GeluAffineRows {
  struct Args {
    const T* x;
    const float *scale, *shift;
    T* out;
    int64_t width;
  };

  template <int BYTES>
  CMT_FAST_INLINE static void run(const Args& args, int64_t begin, int64_t end) {
    constexpr int N = BYTES / sizeof(float);
    for (int64_t row = begin; row < end; row++) {
      const T* x = args.x + row * args.width;
      T* out = args.out + row * args.width;
      for (int64_t c = 0; c < args.width; c += N) {
        Floats<N> v, scale, shift;
        load_part<N>(v, x + c, args.width - c);
        load_part<N>(scale, args.scale + c, args.width - c);
        load_part<N>(shift, args.shift + c, args.width - c);
        gelu<N>(v);
        v = v * scale + shift;
        store_part<N>(out + c, v, args.width - c);
      }
    }
  }
};

}  // namespace cmt_fast
