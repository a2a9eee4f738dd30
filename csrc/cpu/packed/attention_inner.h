// Attention of a packed model: LayerNorm, logits, softmax, weighted sum, output projection, shortcut (docs/math.md, sections 4 and 10).
// No torch headers.
//
// Keys and values of an image are laid out in panels first. A tile of queries then goes through everything at once; no logit is in
// memory but in a tile.
#pragma once

#include "linear_inner.h"

namespace cmt_fast {

struct AttentionSize {
  int64_t images, queries, keys, heads;
  int64_t width, channels;     // of a token of y: padded, and what LayerNorm counts
  int64_t key_dim, value_dim;  // of a head
  int64_t columns;             // of keys_values
  // Absorbed: keys and values hold the query and output projections, and the columns end with key biases. Fused: the projections are made
  // here. Core: queries come and outputs go, (.., heads * dim), and whoever calls does the rest.
  enum Form { kAbsorbed, kFused, kCore } form;

  int64_t key_panels() const { return (keys + kPanel - 1) / kPanel; }
  int64_t value_panels() const { return (value_dim + kPanel - 1) / kPanel; }
  // Floats of one head's keys, values and key biases.
  int64_t key_floats() const { return key_panels() * kPanel * key_dim; }
  int64_t value_floats() const { return value_panels() * kPanel * keys; }
  int64_t bias_floats() const { return key_panels() * kPanel; }
};

// A task is one head of one image: keys_values (keys, columns) to panels.
template <typename T>
struct AttentionLayout {
  struct Args {
    const T* keys_values;
    float *keys, *values, *key_bias;
    AttentionSize n;
  };

  template <int BYTES>
  CMT_FAST_INLINE static void run(const Args& args, int64_t begin, int64_t end) {
    constexpr int N = BYTES / sizeof(float);
    const AttentionSize& n = args.n;
    for (int64_t task = begin; task < end; task++) {
      const int64_t image = task / n.heads, head = task % n.heads;
      const T* from = args.keys_values + image * n.keys * n.columns;
      float* keys = args.keys + task * n.key_floats();
      float* key_bias = args.key_bias + task * n.bias_floats();
      for (int64_t m = 0; m < n.key_panels() * kPanel; m++) {
        const bool real = m < n.keys;
        const T* row = from + (real ? m : 0) * n.columns;
        float* to = keys + m / kPanel * kPanel * n.key_dim + m % kPanel;
        for (int64_t d = 0; d < n.key_dim; d++) to[d * kPanel] = real ? widen(row[head * n.key_dim + d]) : 0.0f;
        key_bias[m] = real && n.form == AttentionSize::kAbsorbed ? widen(row[n.heads * (n.key_dim + n.value_dim) + head]) : 0.0f;
      }
      // With absorbed projections the heads' outputs are summed: their values follow one another within each panel.
      const bool absorbed = n.form == AttentionSize::kAbsorbed;
      const int64_t height = absorbed ? n.heads * n.keys : n.keys;
      float* values = absorbed ? args.values + image * n.heads * n.value_floats() + head * n.keys * kPanel
                                 : args.values + task * n.value_floats();
      for (int64_t m = 0; m < n.keys; m++) {
        const T* row = from + m * n.columns + n.heads * n.key_dim + head * n.value_dim;
        for (int64_t panel = 0; panel < n.value_panels(); panel++) {
          float* to = values + (panel * height + m) * kPanel;
          for (int64_t d = 0; d < kPanel; d += N) {
            Floats<N> v;
            load_part<N>(v, row + panel * kPanel + d, n.value_dim - panel * kPanel - d);
            store<N>(to + d, v);
          }
        }
      }
    }
  }
};

// A task is one tile of the queries of one image.
template <typename T>
struct AttentionTile {
  struct Args {
    const T *y, *table;                     // (B, N, C), in the core form the queries, and (h, N, M)
    const float *keys, *values, *key_bias;  // from AttentionLayout
    Panels<T> query, out_weight;            // in the fused form
    const float *query_bias, *out_bias;     // to the end of the last panel; not in the core form
    T* out;
    AttentionSize n;
    float eps;
    float unit;  // log2 of what a logit is the logarithm to
    int64_t tiles;
  };

  // Softmax weights of one head for rows [first, first + rows): (rows, keys) at `weights`.
  template <int BYTES>
  CMT_FAST_INLINE static void attend(const Args& args, int64_t image, int64_t head, int64_t first, int64_t rows, const float* q,
                                     int64_t q_stride, float* weights, int64_t stride) {
    constexpr int N = BYTES / sizeof(float);
    const AttentionSize& n = args.n;
    const int64_t slot = image * n.heads + head;
    const Panels<float> keys{args.keys + slot * n.key_floats(), n.key_dim, n.keys};
    multiply<BYTES>(q, q_stride, rows, keys, 0, keys.count(),
                    [&](int64_t row, int64_t column, Floats<N>& v) CMT_FAST_LAMBDA_INLINE {
                      store<N>(weights + row * stride + column, v);
                    });
    for (int64_t row = 0; row < rows; row++) {
      softmax_row<BYTES>(weights + row * stride, args.table + (head * n.queries + first + row) * n.keys,
                         args.key_bias + slot * n.bias_floats(), n.keys, args.unit);
    }
  }

  // One head after the other, outputs side by side: finish(row, column, vector) for the columns of head * value_dim on.
  template <int BYTES, typename Finish>
  CMT_FAST_INLINE static void attend_all(const Args& args, int64_t image, int64_t first, int64_t rows, const float* q,
                                         int64_t q_stride, const Finish& finish) {
    constexpr int N = BYTES / sizeof(float);
    const AttentionSize& n = args.n;
    const int64_t stride = tile_stride(n.keys);
    float* weights = scratch<1>(rows * stride);
    for (int64_t head = 0; head < n.heads; head++) {
      attend<BYTES>(args, image, head, first, rows, q + head * n.key_dim, q_stride, weights, stride);
      const Panels<float> values{args.values + (image * n.heads + head) * n.value_floats(), n.keys, n.value_dim};
      multiply<BYTES>(weights, stride, rows, values, 0, values.count(),
                      [&](int64_t row, int64_t column, Floats<N>& v) CMT_FAST_LAMBDA_INLINE {
                        finish(row, head * n.value_dim + column, v, n.value_dim - column);
                      });
    }
  }

  template <int BYTES>
  CMT_FAST_INLINE static void run(const Args& args, int64_t begin, int64_t end) {
    constexpr int N = BYTES / sizeof(float);
    const AttentionSize& n = args.n;
    for (int64_t task = begin; task < end; task++) {
      const int64_t image = task / args.tiles, tile = task % args.tiles;
      const int64_t first = n.queries * tile / args.tiles, rows = n.queries * (tile + 1) / args.tiles - first;
      const int64_t token = image * n.queries + first;
      if (n.form == AttentionSize::kCore) {
        const int64_t width = n.heads * n.key_dim, stride = tile_stride(width), out_width = n.heads * n.value_dim;
        float* q = scratch<0>(rows * stride);
        for (int64_t row = 0; row < rows; row++) widen_row<BYTES>(args.y + (token + row) * width, width, q + row * stride);
        attend_all<BYTES>(args, image, first, rows, q, stride,
                          [&](int64_t row, int64_t column, Floats<N>& v, int64_t count) CMT_FAST_LAMBDA_INLINE {
                            store_part<N>(args.out + (token + row) * out_width + column, v, count);
                          });
        continue;
      }
      const int64_t x_stride = tile_stride(n.width);
      float* x = scratch<0>(rows * x_stride);
      normalise_rows<BYTES>(args.y + token * n.width, rows, n.width, n.channels, args.eps, x, x_stride);
      const auto finish = [&](int64_t row, int64_t column, Floats<N>& v) CMT_FAST_LAMBDA_INLINE {
        Floats<N> bias, shortcut;
        const int64_t at = (token + row) * n.width + column;
        load<N>(bias, args.out_bias + column);
        load_part<N>(shortcut, args.y + at, n.width - column);
        v += bias + shortcut;
        store_part<N>(args.out + at, v, n.width - column);
      };
      if (n.form == AttentionSize::kAbsorbed) {
        // Heads side by side, each in the padding that the one before it left.
        const int64_t stride = tile_stride(n.heads * n.keys);
        float* weights = scratch<1>(rows * stride);
        for (int64_t head = 0; head < n.heads; head++) {
          attend<BYTES>(args, image, head, first, rows, x, x_stride, weights + head * n.keys, stride);
        }
        const Panels<float> values{args.values + image * n.heads * n.value_floats(), n.heads * n.keys, n.width};
        multiply<BYTES>(weights, stride, rows, values, 0, values.count(), finish);
        continue;
      }
      const int64_t q_stride = tile_stride(args.query.out), o_stride = tile_stride(args.out_weight.in);
      float* q = scratch<2>(rows * q_stride);
      float* o = scratch<3>(rows * o_stride);
      multiply<BYTES>(x, x_stride, rows, args.query, 0, args.query.count(),
                      [&](int64_t row, int64_t column, Floats<N>& v) CMT_FAST_LAMBDA_INLINE {
                        Floats<N> bias;
                        load<N>(bias, args.query_bias + column);
                        v += bias;
                        store<N>(q + row * q_stride + column, v);
                      });
      attend_all<BYTES>(args, image, first, rows, q, q_stride,
                        [&](int64_t row, int64_t column, Floats<N>& v, int64_t count) CMT_FAST_LAMBDA_INLINE {
                          store_part<N>(o + row * o_stride + column, v, count);
                        });
      multiply<BYTES>(o, o_stride, rows, args.out_weight, 0, args.out_weight.count(), finish);
    }
  }
};

}  // namespace cmt_fast
