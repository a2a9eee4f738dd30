// What the entry points of the packed steps share: checks, dtype dispatch, the split of a product into tasks.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "../checks.h"
#include "linear_inner.h"

namespace cmt_fast {

inline const char* name_of(ScalarType type) { return torch::headeronly::toString(type); }

// Calls body(T{}) with the element type of a map.
template <typename Body>
void for_map_dtype(const Tensor& x, const Body& body) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return body(float{});
    case ScalarType::BFloat16:
      return body(bf16{});
    default:
      STD_TORCH_CHECK(false, "x must be float32 or bfloat16, got ", name_of(x.scalar_type()));
  }
}

inline void check(const char* name, const Tensor& t, const std::vector<int64_t>& shape, ScalarType type) {
  STD_TORCH_CHECK(t.is_cpu() && t.is_contiguous(), name, " must be a contiguous tensor on the CPU");
  STD_TORCH_CHECK(t.scalar_type() == type, name, " must have dtype ", name_of(type), ", got ", name_of(t.scalar_type()));
  std::string wanted;
  for (const int64_t size : shape) wanted += (wanted.empty() ? "" : ", ") + std::to_string(size);
  STD_TORCH_CHECK(has_shape(t, shape), name, " must have shape (", wanted, "), got ", shape_of(t));
}

inline void check_map(const char* name, const Tensor& x) {
  STD_TORCH_CHECK(x.dim() == 4 && x.size(1) > 0 && x.size(2) > 0 && x.size(3) > 0, name,
                  " must have shape (B, H, W, C) with at least one row, column and channel, got ", shape_of(x));
  check(name, x, {x.size(0), x.size(1), x.size(2), x.size(3)}, x.scalar_type());
}

inline void check_channels(int64_t channels, int64_t width) {
  STD_TORCH_CHECK(0 < channels && channels <= width, "channels must be 1 to ", width, ", got ", channels);
}

inline int64_t whole_panels(int64_t width) { return (width + kPanel - 1) / kPanel * kPanel; }

// A bias or affine of `width` channels, zeros after them up to the end of a panel.
inline const float* vector(const char* name, const Tensor& t, int64_t width) {
  check(name, t, {whole_panels(width)}, ScalarType::Float);
  return read<float>(t);
}

// A weight in panels, (panels, in, 16).
template <typename T>
Panels<T> panels(const char* name, const Tensor& t, int64_t in, int64_t out) {
  STD_TORCH_CHECK(in > 0 && out > 0, name, " must have at least one input and output, got ", in, " and ", out);
  check(name, t, {whole_panels(out) / kPanel, in, kPanel}, std::is_same_v<T, bf16> ? ScalarType::BFloat16 : ScalarType::Float);
  return {read<T>(t), in, out};
}

enum class Cut {
  kWholeRows,  // something needs all columns of a row
  kRows,       // what makes a tile is dear: panels are shared only where rows are too few
  kColumns,    // it is cheap: a single tile is made by every thread, and each reads only its share of the weight
};

// Tiles of at most tile_rows(width) rows, and so many tasks that every thread has as many as the others.
inline Split split_rows(int64_t rows, int64_t width, int64_t panels, Cut cut) {
  constexpr int64_t kFewRows = 12, kFewPanels = 4;
  const int64_t threads = torch::stable::get_num_threads();
  int64_t tiles = std::max<int64_t>(1, (rows + tile_rows(width) - 1) / tile_rows(width));
  const bool share = cut == Cut::kColumns && tiles == 1 && panels >= threads * kFewPanels;
  if (!share && tiles < 4 * threads) {
    const int64_t even = (tiles + threads - 1) / threads * threads;
    tiles = std::max(tiles, std::min(even, rows / kFewRows));
  }
  if (cut == Cut::kWholeRows) return {rows, tiles, 1};
  return {rows, tiles, std::clamp<int64_t>(threads / tiles, 1, std::max<int64_t>(panels / kFewPanels, 1))};
}

template <typename Body>
void run_tasks(const typename Body::Args& args, int64_t tasks) {
  const auto run = ForIsa<Body>::pick();
  torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) { run(args, begin, end); });
}

}  // namespace cmt_fast
