// Matrix products with what stands before and after them in the same loop. No torch headers, no threads.
//
// A weight (out, in) is laid out once in panels of 16 outputs, (ceil(out / 16), in, 16), with zeros beyond `out`
// (cmt_fast/inference/native/layout.py). The left factor is a tile of rows in float32, made by whoever calls: normalised, convolved or
// gathered on the way, so that it never was in memory before. A block of rows times a panel is summed up in registers, in the
// same order whatever the tile, so the size of tiles and the number of threads do not change a bit.
#pragma once

#include <algorithm>
#include <type_traits>
#include <vector>

#include "math.h"

namespace cmt_fast {

constexpr int kPanel = 16;

// Floats between the rows of a tile: 16 more than needed, as rows a power of 2 apart would share the sets of a cache.
constexpr int64_t tile_stride(int64_t width) { return (width + kPanel - 1) / kPanel * kPanel + kPanel; }

// What one task of a matrix product keeps in a near cache: rows for 256 KiB of the left factor.
constexpr int64_t tile_rows(int64_t width) { return std::clamp<int64_t>((1 << 16) / std::max<int64_t>(width, 1), 24, 192); }

template <typename W>
struct Panels {
  const W* data;
  int64_t in, out;

  int64_t count() const { return (out + kPanel - 1) / kPanel; }
  const W* panel(int64_t i) const { return data + i * in * kPanel; }
};

// A thread's own memory, which stays: allocating some 100 KiB at each call would cost more than what is computed in it.
// Slots are for buffers that are used at the same time.
constexpr int kPanelSlot = 4;
template <int SLOT>
inline float* scratch(int64_t floats) {
  static thread_local std::vector<float> buffer;
  if (static_cast<int64_t>(buffer.size()) < floats) buffer.resize(floats);
  return buffer.data();
}

// A block of the result that is summed up in registers: at most kRows rows of kPanels panels.
template <int BYTES>
struct BlockShape {
  static constexpr int kLanes = BYTES / sizeof(float);
  static constexpr int kRows = BYTES == 64 ? 12 : BYTES == 32 ? 6 : 2;
  static constexpr int kPanels = BYTES == 64 ? 2 : 1;
};

// Terms that are summed up in one go. A sum of sums has a smaller rounding error than one long sum, and costs 2 %.
constexpr int64_t kRun = 128;

// block (rows, panels * 16) = a (rows, k) times panels of (k, 16) at b, one after the other.
struct BlockProduct {
  const float* a;
  int64_t stride;  // of the rows of a
  const float* b;
  int64_t k;
  float* block;
  // Memory to ask for meanwhile, so many bytes a step of k: weights come from far away, once a call.
  const char* ahead;
  int64_t ahead_step;
};

template <int BYTES, int ROWS, int PANELS>
CMT_FAST_INLINE void multiply_block(const BlockProduct& x) {
  constexpr int L = BYTES / sizeof(float), VECTORS = PANELS * kPanel / L;
  const float *a = x.a, *b = x.b;
  const char* ahead = x.ahead;
  const int64_t stride = x.stride, k = x.k, ahead_step = x.ahead_step;
  for (int64_t from = 0; from < k; from += kRun) {
    const int64_t end = std::min(from + kRun, k);
    Floats<L> sum[ROWS][VECTORS] = {};
    for (int64_t p = from; p < end; p++) {
      __builtin_prefetch(ahead + p * ahead_step, 0, 2);
      Floats<L> right[VECTORS];
#pragma GCC unroll 8
      for (int j = 0; j < VECTORS; j++) load<L>(right[j], b + j * L / kPanel * k * kPanel + p * kPanel + j * L % kPanel);
#pragma GCC unroll 16
      for (int i = 0; i < ROWS; i++) {
        const float left = a[i * stride + p];
#pragma GCC unroll 8
        for (int j = 0; j < VECTORS; j++) sum[i][j] += left * right[j];
      }
    }
    float* to = x.block;
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; i++) {
#pragma GCC unroll 8
      for (int j = 0; j < VECTORS; j++, to += L) {
        if (from > 0) {
          Floats<L> before;
          load<L>(before, to);
          sum[i][j] += before;
        }
        store<L>(to, sum[i][j]);
      }
    }
  }
}

// The same as functions, so that all products share them.
template <int ROWS, int PANELS>
CMT_FAST_NOINLINE void multiply_block_baseline(const BlockProduct& x) {
  multiply_block<16, ROWS, PANELS>(x);
}
template <int ROWS, int PANELS>
CMT_FAST_TARGET_AVX2 CMT_FAST_NOINLINE void multiply_block_avx2(const BlockProduct& x) {
  multiply_block<32, ROWS, PANELS>(x);
}
template <int ROWS, int PANELS>
CMT_FAST_TARGET_AVX512 CMT_FAST_NOINLINE void multiply_block_avx512(const BlockProduct& x) {
  multiply_block<64, ROWS, PANELS>(x);
}

// multiply_block of `rows` rows, at most ROWS.
template <int BYTES, int ROWS, int PANELS>
CMT_FAST_INLINE void multiply_rows(int64_t rows, const BlockProduct& x) {
  if constexpr (ROWS > 1) {
    if (rows < ROWS) {
      multiply_rows<BYTES, ROWS - 1, PANELS>(rows, x);
      return;
    }
  }
  if constexpr (BYTES == 64) {
    multiply_block_avx512<ROWS, PANELS>(x);
  } else if constexpr (BYTES == 32) {
    multiply_block_avx2<ROWS, PANELS>(x);
  } else {
    multiply_block_baseline<ROWS, PANELS>(x);
  }
}

// Panels [begin, begin + count) in float32: where they are, or widened into a thread's own memory, which takes 1 % of a product.
template <int BYTES, typename W>
CMT_FAST_INLINE const float* float_panels(const Panels<W>& right, int64_t begin, int64_t count) {
  if constexpr (std::is_same_v<W, float>) {
    return right.panel(begin);
  } else {
    constexpr int L = BYTES / sizeof(float);
    const int64_t size = count * right.in * kPanel;
    float* wide = scratch<kPanelSlot>(size);
    for (int64_t i = 0; i < size; i += L) {
      Floats<L> v;
      load<L>(v, right.panel(begin) + i);
      store<L>(wide + i, v);
    }
    return wide;
  }
}

// Calls finish(row, column, vector) for every vector of (rows, k) times panels [begin, end). a has a row every `stride` floats. Columns go
// up to the end of the last panel: beyond `out` they are zero, and finish must not store them.
template <int BYTES, typename W, typename Finish>
CMT_FAST_INLINE void multiply(const float* a, int64_t stride, int64_t rows, const Panels<W>& right, int64_t begin, int64_t end,
                              const Finish& finish) {
  using Shape = BlockShape<BYTES>;
  constexpr int L = Shape::kLanes;
  alignas(64) float block[Shape::kRows * Shape::kPanels * kPanel];
  const int64_t groups = (rows + Shape::kRows - 1) / Shape::kRows;  // of rows, as equal as can be
  for (int64_t panel = begin; panel < end; panel += Shape::kPanels) {
    const int64_t panels = std::min<int64_t>(Shape::kPanels, end - panel), width = panels * kPanel;
    const float* b = float_panels<BYTES>(right, panel, panels);
    // The groups share the lines of what comes next; in the end they ask again for what is there.
    const int64_t ahead_step = (panels * kPanel * static_cast<int64_t>(sizeof(W)) + groups - 1) / groups;
    const char* next = reinterpret_cast<const char*>(right.panel(panel + panels < end ? panel + panels : panel));
    for (int64_t g = 0; g < groups; g++) {
      const int64_t first = rows * g / groups, count = rows * (g + 1) / groups - first;
      const BlockProduct product{a + first * stride, stride, b, right.in, block, next + g * right.in * ahead_step, ahead_step};
      if (panels == Shape::kPanels) {
        multiply_rows<BYTES, Shape::kRows, Shape::kPanels>(count, product);
      } else {
        multiply_rows<BYTES, Shape::kRows, 1>(count, product);
      }
      for (int64_t row = 0; row < count; row++) {
        for (int64_t column = 0; column < width; column += L) {
          Floats<L> v;
          load<L>(v, block + row * width + column);
          finish(first + row, panel * kPanel + column, v);
        }
      }
    }
  }
}

}  // namespace cmt_fast
