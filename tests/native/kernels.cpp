// Runs the loops of csrc/cpu/packed on random shapes, for every instruction set of this CPU, and compares with plain loops in double.
//
// Made for AddressSanitizer and UndefinedBehaviorSanitizer (test_sanitize.py): every tensor is a heap block of exactly its size. Values are
// checked too, coarsely; how exact they are is the subject of tests/inference/test_native_steps.py.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <random>
#include <thread>
#include <vector>

#include "cpu/isa.h"
#ifdef WITHOUT_AVX512  // this CPU has none: the loops over vectors of 64 bytes, in instructions of AVX2
#undef CMT_FAST_TARGET_AVX512
#define CMT_FAST_TARGET_AVX512 CMT_FAST_TARGET_AVX2
#endif
#include "cpu/packed/attention_inner.h"
#include "cpu/packed/elementwise_inner.h"
#include "cpu/packed/irffn_inner.h"
#include "cpu/packed/lpu_inner.h"

using namespace cmt_fast;

static Isa isa;  // at work
Isa cmt_fast::cpu_isa() { return isa; }

namespace {

// ---- random sizes and tensors --------------------------------------------------------------------------------------------

using Doubles = std::vector<double>;

std::mt19937 generator;
int seed;

int64_t pick(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(generator); }

// Of channels: of the models, or any.
int64_t width() {
  constexpr int64_t kModels[] = {1, 3, 16, 46, 52, 76, 165};
  return pick(0, 1) ? kModels[pick(0, 6)] : pick(1, 90);
}

float normal(float deviation = 1) { return std::normal_distribution<float>(0, deviation)(generator); }

template <typename T>
std::vector<T> tensor(int64_t size, float deviation = 1) {
  std::vector<T> result(size);
  for (T& value : result) value = narrow<T>(normal(deviation));
  return result;
}

// (channels,) with zeros up to the end of the last panel.
std::vector<float> panel_vector(int64_t channels) {
  std::vector<float> result((channels + kPanel - 1) / kPanel * kPanel);
  for (int64_t i = 0; i < channels; i++) result[i] = normal();
  return result;
}

template <typename T>
std::vector<T> to_panels(const std::vector<T>& weight, int64_t out, int64_t in) {
  std::vector<T> result((out + kPanel - 1) / kPanel * kPanel * in);
  for (int64_t o = 0; o < out; o++) {
    for (int64_t i = 0; i < in; i++) result[(o / kPanel * in + i) * kPanel + o % kPanel] = weight[o * in + i];
  }
  return result;
}

template <typename T>
Doubles doubles(const std::vector<T>& x) {
  Doubles result(x.size());
  for (size_t i = 0; i < x.size(); i++) result[i] = widen(x[i]);
  return result;
}

Split split(int64_t rows, int64_t panels) {
  const int64_t tiles = pick(0, 1) ? pick(1, rows) : 1;
  return {rows, tiles, pick(0, 1) ? pick(1, panels) : 1};
}

// ---- running and comparing -----------------------------------------------------------------------------------------------

// All tasks, cut as threads might cut them.
template <typename Body>
void run(const typename Body::Args& args, int64_t tasks) {
  for (int64_t begin = 0; begin < tasks;) {
    const int64_t end = pick(0, 1) ? tasks : pick(begin + 1, tasks);
    ForIsa<Body>::pick()(args, begin, end);
    begin = end;
  }
}

[[noreturn]] void fail(const char* name, const char* type, size_t at, double got, double expected) {
  std::printf("%s of %s, instruction set %d, seed %d: element %zu is %.9g, expected %.9g\n", name, type, static_cast<int>(isa), seed,
              at, got, expected);
  std::exit(1);
}

template <typename T>
constexpr const char* name_of_type() {
  return std::is_same_v<T, bf16> ? "bfloat16" : "float32";
}

template <typename T>
void compare(const char* name, const std::vector<T>& got, const Doubles& expected) {
  double scale = 1e-30;
  for (const double value : expected) scale = std::max(scale, std::abs(value));
  for (size_t i = 0; i < got.size(); i++) {
    const double value = widen(got[i]), rounding = std::is_same_v<T, bf16> ? std::abs(expected[i]) / 256 : 0;
    if (!(std::abs(value - expected[i]) <= rounding + 2e-4 * scale)) fail(name, name_of_type<T>(), i, value, expected[i]);
  }
}

// Runs body(out) with outputs full of NaN, twice: other cuts into tasks must give the same bits.
template <typename T, typename Body>
void check(const char* name, const Doubles& expected, const Body& body) {
  std::vector<T> first(expected.size(), narrow<T>(NAN)), second = first;
  body(first.data());
  body(second.data());
  compare(name, first, expected);
  for (size_t i = 0; i < first.size(); i++) {
    if (std::memcmp(&first[i], &second[i], sizeof(T)) != 0) {
      fail(name, "two cuts into tasks", i, widen(second[i]), widen(first[i]));
    }
  }
}

// ---- plain loops ---------------------------------------------------------------------------------------------------------

double gelu_of(double x) { return x * 0.5 * (1 + std::erf(x * std::sqrt(0.5))); }

constexpr float kEps = 0.1f;

Doubles normalised(const Doubles& x, int64_t rows, int64_t row_width, int64_t channels) {
  Doubles result(x.size());
  for (int64_t r = 0; r < rows; r++) {
    const double* row = x.data() + r * row_width;
    double mean = 0, square = 0;
    for (int64_t c = 0; c < channels; c++) mean += row[c] / channels;
    for (int64_t c = 0; c < channels; c++) square += (row[c] - mean) * (row[c] - mean) / channels;
    for (int64_t c = 0; c < channels; c++) result[r * row_width + c] = (row[c] - mean) / std::sqrt(square + kEps);
  }
  return result;
}

// x (rows, in) times weight (out, in) transposed, plus bias.
template <typename T>
Doubles product(const Doubles& x, int64_t rows, const std::vector<T>& weight, int64_t out, int64_t in, const float* bias) {
  Doubles result(rows * out);
  for (int64_t r = 0; r < rows; r++) {
    for (int64_t o = 0; o < out; o++) {
      double sum = bias == nullptr ? 0 : bias[o];
      for (int64_t i = 0; i < in; i++) sum += x[r * in + i] * widen(weight[o * in + i]);
      result[r * out + o] = sum;
    }
  }
  return result;
}

// Depthwise, of the first `channels` of pixels `stride` apart.
Doubles convolved(const Doubles& x, MapSize n, int64_t channels, const std::vector<float>& taps, const std::vector<float>& bias) {
  Doubles result(n.rows * n.width * channels);
  for (int64_t row = 0; row < n.rows; row++) {
    for (int64_t w = 0; w < n.width; w++) {
      for (int64_t c = 0; c < channels; c++) {
        double sum = bias[c];
        for (int64_t k = 0; k < 9; k++) {
          const int64_t dy = k / 3 - 1, column = w + k % 3 - 1, h = row % n.height + dy;
          if (h < 0 || h >= n.height || column < 0 || column >= n.width) continue;
          sum += x[((row + dy) * n.width + column) * n.channels + c] * taps[k * channels + c];
        }
        result[(row * n.width + w) * channels + c] = sum;
      }
    }
  }
  return result;
}

MapSize map_size(int64_t channels, int64_t least = 1) {
  const int64_t height = pick(least, 6 + least);
  return {pick(1, 2) * height, height, pick(least, 18), channels};
}

// ---- the steps -----------------------------------------------------------------------------------------------------------

template <typename T>
void linear() {
  const int64_t rows = pick(1, 40), in = width(), out = width();
  const auto x = tensor<T>(rows * in), weight = tensor<T>(out * in), panels = to_panels(weight, out, in);
  const auto bias = panel_vector(out);
  check<T>("linear", product(doubles(x), rows, weight, out, in, bias.data()), [&](T* y) {
    const Panels<T> right{panels.data(), in, out};
    const Split cut = split(rows, right.count());
    run<LinearTile<T>>({x.data(), right, bias.data(), y, cut}, cut.tasks());
  });
}

template <typename T>
void patch_embed() {
  const int64_t c_in = pick(1, 60), in = 4 * c_in, out = width(), channels = pick(1, out);
  const MapSize n = map_size(c_in, 2);
  const int64_t images = n.rows / n.height, h = n.height / 2, w = n.width / 2, rows = images * h * w;
  const auto x = tensor<T>(n.rows * n.width * c_in), weight = tensor<T>(out * in), panels = to_panels(weight, out, in);
  auto bias = panel_vector(out), scale = panel_vector(channels), shift = panel_vector(channels);
  scale.resize(bias.size());
  shift.resize(bias.size());
  Doubles patches;
  for (int64_t row = 0; row < rows; row++) {
    const int64_t top = row / (h * w) * n.height + row / w % h * 2, left = row % w * 2;
    for (int64_t k = 0; k < 4; k++) {
      for (int64_t c = 0; c < c_in; c++) patches.push_back(widen(x[((top + k / 2) * n.width + left + k % 2) * c_in + c]));
    }
  }
  Doubles expected = normalised(product(patches, rows, weight, out, in, bias.data()), rows, out, channels);
  for (int64_t i = 0; i < rows * out; i++) expected[i] = expected[i] * scale[i % out] + shift[i % out];
  check<T>("patch_embed", expected, [&](T* y) {
    const Split cut{rows, pick(1, rows), 1};
    run<PatchEmbedTile<T>>({x.data(), {panels.data(), in, out}, bias.data(), scale.data(), shift.data(), y, n.height, n.width,
                            channels, kEps, cut},
                           cut.tasks());
  });
}

template <typename T>
void conv3x3() {
  const int64_t c = pick(1, 20), in = 9 * c, out = pick(1, 60), stride = pick(1, 2);
  const MapSize n = map_size(c);
  const int64_t images = n.rows / n.height, h = (n.height + stride - 1) / stride, w = (n.width + stride - 1) / stride;
  const int64_t rows = images * h * w;
  const auto x = tensor<T>(n.rows * n.width * c), weight = tensor<T>(out * in), panels = to_panels(weight, out, in);
  const auto bias = panel_vector(out), scale = panel_vector(out), shift = panel_vector(out);
  const bool affine = pick(0, 1);
  Doubles windows;
  for (int64_t row = 0; row < rows; row++) {
    for (int64_t k = 0; k < 9; k++) {
      const int64_t y = row / w % h * stride + k / 3 - 1, column = row % w * stride + k % 3 - 1;
      const bool inside = y >= 0 && y < n.height && column >= 0 && column < n.width;
      for (int64_t i = 0; i < c; i++) {
        windows.push_back(inside ? widen(x[((row / (h * w) * n.height + y) * n.width + column) * c + i]) : 0);
      }
    }
  }
  Doubles expected = product(windows, rows, weight, out, in, bias.data());
  for (int64_t i = 0; i < rows * out; i++) {
    expected[i] = gelu_of(expected[i]) * (affine ? scale[i % out] : 1) + (affine ? shift[i % out] : 0);
  }
  check<T>("conv3x3_gelu", expected, [&](T* y) {
    const Panels<T> right{panels.data(), in, out};
    const Split cut = split(rows, right.count());
    run<ConvGeluTile<T>>({x.data(), right, bias.data(), affine ? scale.data() : nullptr, affine ? shift.data() : nullptr, y, n.height,
                          n.width, h, w, stride, cut},
                         cut.tasks());
  });
}

template <typename T>
void lpu() {
  constexpr int64_t kReductions[] = {1, 2, 4, 8};
  const int64_t k = kReductions[pick(0, 3)], c = width(), channels = pick(1, c);
  const MapSize n = map_size(c, k);
  const int64_t images = n.rows / n.height, h = n.height / k, w = n.width / k;
  const auto x = tensor<T>(n.rows * n.width * c), zeros = std::vector<T>(c);
  const auto taps = tensor<float>(9 * c), bias = tensor<float>(c), reduction = tensor<float>(k * k * c, 1.0f / k);
  const Doubles y = convolved(doubles(x), n, c, taps, bias), normal_map = normalised(y, n.rows * n.width, c, channels);
  Doubles reduced(images * h * w * c);
  for (int64_t i = 0; i < images * h * k; i++) {
    for (int64_t column = 0; column < w * k; column++) {
      for (int64_t j = 0; j < c; j++) {
        const int64_t image = i / (h * k), row = i % (h * k);
        const double tap = k == 1 ? 1 : reduction[(row % k * k + column % k) * c + j];
        reduced[((image * h + row / k) * w + column / k) * c + j] +=
            tap * normal_map[((image * n.height + row) * n.width + column) * c + j];
      }
    }
  }
  std::vector<T> other(reduced.size(), narrow<T>(NAN));
  const auto both = [&](T* map, T* small) {
    const typename LpuStrip<T>::Args args{x.data(), taps.data(), bias.data(), k > 1 ? reduction.data() : nullptr, zeros.data(), map,
                                          small, n, k, channels, kEps};
    run<LpuStrip<T>>(args, images * args.strips());
  };
  check<T>("lpu, map", y, [&](T* map) { both(map, other.data()); });
  std::vector<T> map(y.size());
  check<T>("lpu, reduced", reduced, [&](T* small) { both(map.data(), small); });
}

template <typename T>
void attention(AttentionSize::Form form) {
  AttentionSize n{};
  n.images = pick(1, 2);
  n.queries = pick(1, 50);
  n.keys = pick(1, 40);
  n.heads = pick(1, 3);
  n.form = form;
  const bool absorbed = form == AttentionSize::kAbsorbed, core = form == AttentionSize::kCore;
  n.width = absorbed ? pick(1, 60) : width();
  n.key_dim = absorbed ? n.width : pick(1, 20);
  n.value_dim = absorbed ? n.width : pick(1, 40);
  const int64_t q_width = n.heads * n.key_dim, o_width = n.heads * n.value_dim;
  if (core) n.width = q_width;
  n.channels = pick(1, n.width);
  n.columns = q_width + o_width + (absorbed ? n.heads : 0) + pick(0, 9);
  const int64_t tokens = n.images * n.queries, c = n.width;
  const auto y = tensor<T>(tokens * c), keys_values = tensor<T>(n.images * n.keys * n.columns, 0.3f);
  const auto table = tensor<T>(n.heads * n.queries * n.keys);
  const auto q_weight = tensor<T>(q_width * c, 0.1f), o_weight = tensor<T>(c * o_width);
  const auto q_panels = to_panels(q_weight, q_width, c), o_panels = to_panels(o_weight, c, o_width);
  const auto q_bias = panel_vector(q_width), o_bias = panel_vector(c);
  const bool base2 = pick(0, 1);

  const Doubles x = core ? doubles(y) : normalised(doubles(y), tokens, c, n.channels);
  const Doubles q = form == AttentionSize::kFused ? product(x, tokens, q_weight, q_width, c, q_bias.data()) : x;
  Doubles heads(tokens * o_width), summed(tokens * c);
  for (int64_t token = 0; token < tokens; token++) {
    const int64_t image = token / n.queries, query = token % n.queries;
    for (int64_t head = 0; head < n.heads; head++) {
      Doubles weights(n.keys);
      double sum = 0;
      for (int64_t m = 0; m < n.keys; m++) {
        const T* row = keys_values.data() + (image * n.keys + m) * n.columns;
        double logit = widen(table[(head * n.queries + query) * n.keys + m]);
        if (absorbed) logit += widen(row[q_width + o_width + head]);
        const double* of_head = absorbed ? q.data() + token * c : q.data() + token * q_width + head * n.key_dim;
        for (int64_t d = 0; d < n.key_dim; d++) logit += of_head[d] * widen(row[head * n.key_dim + d]);
        sum += weights[m] = base2 ? std::exp2(logit) : std::exp(logit);
      }
      for (int64_t m = 0; m < n.keys; m++) {
        const T* row = keys_values.data() + (image * n.keys + m) * n.columns + q_width + head * n.value_dim;
        for (int64_t d = 0; d < n.value_dim; d++) {
          const double part = weights[m] / sum * widen(row[d]);
          heads[token * o_width + head * n.value_dim + d] += part;
          if (absorbed) summed[token * c + d] += part;
        }
      }
    }
  }
  Doubles expected = heads;
  if (!core) {
    expected = absorbed ? summed : product(heads, tokens, o_weight, c, o_width, nullptr);
    for (int64_t i = 0; i < tokens * c; i++) expected[i] += widen(y[i]) + o_bias[i % c];
  }
  check<T>(core ? "attention, core" : absorbed ? "attention, absorbed" : "attention, fused", expected, [&](T* out) {
    std::vector<float> keys(n.images * n.heads * n.key_floats(), NAN), values(n.images * n.heads * n.value_floats(), NAN);
    std::vector<float> key_bias(n.images * n.heads * n.bias_floats(), NAN);
    run<AttentionLayout<T>>({keys_values.data(), keys.data(), values.data(), key_bias.data(), n}, n.images * n.heads);
    typename AttentionTile<T>::Args args{};
    args.y = y.data();
    args.table = table.data();
    args.keys = keys.data();
    args.values = values.data();
    args.key_bias = key_bias.data();
    if (form == AttentionSize::kFused) {
      args.query = {q_panels.data(), c, q_width};
      args.query_bias = q_bias.data();
      args.out_weight = {o_panels.data(), o_width, c};
    }
    args.out_bias = o_bias.data();
    args.out = out;
    args.n = n;
    args.eps = kEps;
    args.unit = base2 ? 1.0f : 1.44269504f;
    args.tiles = pick(1, n.queries);
    run<AttentionTile<T>>(args, n.images * args.tiles);
  });
}

template <typename T>
void expand() {
  const int64_t rows = pick(1, 40), c = width(), channels = pick(1, c), r = width(), stride = hidden_stride(r);
  const auto x = tensor<T>(rows * c), weight = tensor<T>(r * c), panels = to_panels(weight, r, c);
  const auto bias = panel_vector(r), scale = panel_vector(r), shift = panel_vector(r);
  Doubles expected = product(normalised(doubles(x), rows, c, channels), rows, weight, r, c, bias.data());
  for (int64_t i = 0; i < rows * r; i++) expected[i] = gelu_of(expected[i]) * scale[i % r] + shift[i % r];
  check<T>("expand", expected, [&](T* y) {
    std::vector<T> hidden(rows * stride);
    const Panels<T> right{panels.data(), c, r};
    const Split cut = split(rows, right.count());
    run<ExpandTile<T>>({x.data(), right, bias.data(), scale.data(), shift.data(), hidden.data(), channels, kEps, cut}, cut.tasks());
    for (int64_t i = 0; i < rows * r; i++) y[i] = hidden[i / r * stride + i % r];
  });
}

template <typename T>
void depthwise(bool project) {
  const int64_t r = width(), c = width(), stride = project ? hidden_stride(r) : r;
  const MapSize n = map_size(stride);
  const int64_t rows = n.rows * n.width;
  auto hidden = tensor<T>(rows * stride);
  for (int64_t i = 0; i < rows * stride; i++) {
    if (i % stride >= r) hidden[i] = narrow<T>(NAN);  // between the pixels, never to be used
  }
  const auto shortcut = tensor<T>(rows * c), weight = tensor<T>(c * r), panels = to_panels(weight, c, r);
  const auto zeros = std::vector<T>(stride);
  const auto taps = tensor<float>(9 * r), bias = tensor<float>(r), out_bias = panel_vector(c);
  const HiddenConv<T> conv{hidden.data(), taps.data(), bias.data(), zeros.data(), n, r};
  Doubles expected = convolved(doubles(hidden), n, r, taps, bias);
  for (double& value : expected) value = gelu_of(value);
  if (!project) {
    check<T>("depthwise_gelu", expected, [&](T* y) { run<ConvGeluRows<T>>({conv, y}, n.rows); });
    return;
  }
  expected = product(expected, rows, weight, c, r, out_bias.data());
  for (int64_t i = 0; i < rows * c; i++) expected[i] += widen(shortcut[i]);
  check<T>("depthwise_project", expected, [&](T* y) {
    const Panels<T> right{panels.data(), r, c};
    const Split cut = split(rows, right.count());
    run<DepthwiseProjectTile<T>>({conv, shortcut.data(), right, out_bias.data(), y, cut}, cut.tasks());
  });
}

template <typename T>
void elementwise() {
  const int64_t rows = pick(1, 40), c = width(), channels = pick(1, c);
  const auto x = tensor<T>(rows * c);
  const auto scale = tensor<float>(c), shift = tensor<float>(c);
  check<T>("normalise", normalised(doubles(x), rows, c, channels),
           [&](T* y) { run<NormaliseRows<T>>({x.data(), y, c, channels, kEps}, rows); });
  Doubles expected = doubles(x);
  for (int64_t i = 0; i < rows * c; i++) expected[i] = gelu_of(expected[i]) * scale[i % c] + shift[i % c];
  check<T>("gelu_affine", expected, [&](T* y) { run<GeluAffineRows<T>>({x.data(), scale.data(), shift.data(), y, c}, rows); });
}

template <typename T>
std::vector<std::function<void()>> steps() {
  return {
      linear<T>,
      patch_embed<T>,
      conv3x3<T>,
      lpu<T>,
      [] { attention<T>(AttentionSize::kAbsorbed); },
      [] { attention<T>(AttentionSize::kFused); },
      [] { attention<T>(AttentionSize::kCore); },
      expand<T>,
      [] { depthwise<T>(true); },
      [] { depthwise<T>(false); },
      elementwise<T>,
  };
}

// A thread's own memory as calls before leave it: of any size and full of NaN.
void use_scratch() {
  constexpr int64_t kFloats = 1 << 16;
  for (float* buffer : {scratch<0>(kFloats), scratch<1>(kFloats), scratch<2>(kFloats), scratch<3>(kFloats), scratch<kPanelSlot>(kFloats)}) {
    std::fill(buffer, buffer + kFloats, NAN);
  }
}

std::vector<Isa> instruction_sets() {
#if CMT_FAST_X86
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return {Isa::kBaseline};
#endif
  return {Isa::kBaseline, Isa::kAvx2, Isa::kAvx512};
}

}  // namespace

// kernels ROUNDS: that many random shapes of each step, dtype and instruction set.
int main(int, char** arguments) {
  const int rounds = std::atoi(arguments[1]);
  int64_t shapes = 0;
  for (const Isa each : instruction_sets()) {
    isa = each;
    for (const auto& table : {steps<float>(), steps<bf16>()}) {
      for (const auto& step : table) {
        for (int round = 0; round < rounds; round++, shapes++) {
          generator.seed(seed = round);
          // A thread of its own starts with no scratch memory, so that it is just as large as this step asks for.
          std::thread([&] {
            if (round % 2) use_scratch();
            step();
          }).join();
        }
      }
    }
  }
  std::printf("%lld shapes\n", static_cast<long long>(shapes));
}
