// Entry point of attention_inner.h.
#include "attention_inner.h"

#include "glue.h"
#include "ops.h"

namespace cmt_fast {

namespace {

// Tiles of the queries of an image: few enough rows for a near cache, and as many tiles for one thread as for another.
int64_t query_tiles(const AttentionSize& n) {
  constexpr int64_t kRows = 64;
  const int64_t widest = std::max({n.width, n.heads * n.key_dim, n.heads * n.value_dim, n.keys});
  const int64_t rows = std::min(kRows, tile_rows(widest));
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t tiles = (n.queries + rows - 1) / rows;
  return n.images >= threads ? tiles : std::min((tiles + threads - 1) / threads * threads, n.queries);
}

// Checks of what all forms have.
AttentionSize attention_size(const Tensor& y, const Tensor& keys_values, const Tensor& table, int64_t heads, int64_t key_dim,
                             int64_t value_dim, AttentionSize::Form form) {
  check_map(form == AttentionSize::kCore ? "q" : "y", y);
  STD_TORCH_CHECK(table.dim() == 3, "table must have shape (heads, queries, keys), got ", shape_of(table));
  STD_TORCH_CHECK(heads > 0 && key_dim > 0 && value_dim > 0 && table.size(2) > 0,
                  "heads, key_dim, value_dim and the number of keys must be positive");
  STD_TORCH_CHECK(keys_values.dim() == 3, "keys_values must have shape (B, keys, columns), got ", shape_of(keys_values));
  AttentionSize n{};
  n.images = y.size(0);
  n.queries = y.size(1) * y.size(2);
  n.keys = table.size(2);
  n.heads = heads;
  n.width = n.channels = y.size(3);
  n.key_dim = key_dim;
  n.value_dim = value_dim;
  n.columns = keys_values.size(2);
  n.form = form;
  const int64_t least = heads * (key_dim + value_dim) + (form == AttentionSize::kAbsorbed ? heads : 0);
  STD_TORCH_CHECK(n.columns >= least, "keys_values must have at least ", least, " columns for ", heads, " heads of ", key_dim,
                  " and ", value_dim, " channels, got ", n.columns);
  check("keys_values", keys_values, {n.images, n.keys, n.columns}, y.scalar_type());
  check("table", table, {heads, n.queries, n.keys}, y.scalar_type());
  return n;
}

// Lays keys and values out and attends; `more` adds to the arguments what a form has of its own.
template <typename T, typename More>
void attend(const Tensor& y, const Tensor& keys_values, const Tensor& table, const Tensor& out, const AttentionSize& n,
            bool base2, const More& more) {
  const auto floats = [&](int64_t of_head) {
    return torch::stable::new_empty(y, {n.images * n.heads * of_head}, ScalarType::Float);
  };
  const Tensor keys = floats(n.key_floats()), values = floats(n.value_floats()), key_bias = floats(n.bias_floats());
  run_tasks<AttentionLayout<T>>({read<T>(keys_values), write<float>(keys), write<float>(values), write<float>(key_bias), n},
                                n.images * n.heads);
  typename AttentionTile<T>::Args args{};
  args.y = read<T>(y);
  args.table = read<T>(table);
  args.keys = read<float>(keys);
  args.values = read<float>(values);
  args.key_bias = read<float>(key_bias);
  args.out = write<T>(out);
  args.n = n;
  args.unit = base2 ? 1.0f : 1.44269504f;
  args.tiles = query_tiles(n);
  more(args);
  run_tasks<AttentionTile<T>>(args, n.images * args.tiles);
}

}  // namespace

Tensor packed_attention_cpu(Tensor y, Tensor keys_values, Tensor table, std::optional<Tensor> query_weight,
                            std::optional<Tensor> query_bias, std::optional<Tensor> out_weight, Tensor out_bias, int64_t heads,
                            int64_t key_dim, int64_t value_dim, int64_t channels, double eps, bool base2) {
  const bool absorbed = !query_weight;
  STD_TORCH_CHECK(query_bias.has_value() != absorbed && out_weight.has_value() != absorbed,
                  "query_weight, query_bias and out_weight must be given together or not at all");
  AttentionSize n = attention_size(y, keys_values, table, heads, key_dim, value_dim,
                                   absorbed ? AttentionSize::kAbsorbed : AttentionSize::kFused);
  const int64_t c = n.width;
  check_channels(channels, c);
  n.channels = channels;
  STD_TORCH_CHECK(!absorbed || (key_dim == c && value_dim == c), "absorbed keys and values must have the ", c,
                  " channels of y, got ", key_dim, " and ", value_dim);
  Tensor out = torch::stable::new_empty(y, {y.size(0), y.size(1), y.size(2), c});
  for_map_dtype(y, [&](auto element) {
    using T = decltype(element);
    attend<T>(y, keys_values, table, out, n, base2, [&](auto& args) {
      if (!absorbed) {
        args.query = panels<T>("query_weight", *query_weight, c, heads * key_dim);
        args.query_bias = vector("query_bias", *query_bias, heads * key_dim);
        args.out_weight = panels<T>("out_weight", *out_weight, heads * value_dim, c);
      }
      args.out_bias = vector("out_bias", out_bias, c);
      args.eps = static_cast<float>(eps);
    });
  });
  return out;
}

Tensor packed_attention_core_cpu(Tensor q, Tensor keys_values, Tensor table, int64_t heads, int64_t key_dim, int64_t value_dim,
                                 bool base2) {
  const AttentionSize n = attention_size(q, keys_values, table, heads, key_dim, value_dim, AttentionSize::kCore);
  STD_TORCH_CHECK(n.width == heads * key_dim, "q must have ", heads, " * ", key_dim, " channels, got ", shape_of(q));
  Tensor out = torch::stable::new_empty(q, {q.size(0), q.size(1), q.size(2), heads * value_dim});
  for_map_dtype(q, [&](auto element) {
    using T = decltype(element);
    attend<T>(q, keys_values, table, out, n, base2, [](auto&) {});
  });
  return out;
}

}  // namespace cmt_fast
