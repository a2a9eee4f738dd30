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

}  // namespace

Tensor packed_attention_cpu(Tensor y, Tensor keys_values, Tensor table, std::optional<Tensor> query_weight,
                            std::optional<Tensor> query_bias, std::optional<Tensor> out_weight, Tensor out_bias, int64_t heads,
                            int64_t key_dim, int64_t value_dim, int64_t channels, double eps, bool base2) {
  check_map("y", y);
  const bool absorbed = !query_weight;
  STD_TORCH_CHECK(query_bias.has_value() != absorbed && out_weight.has_value() != absorbed,
                  "query_weight, query_bias and out_weight must be given together or not at all");
  const int64_t b = y.size(0), c = y.size(3), queries = y.size(1) * y.size(2);
  check_channels(channels, c);
  STD_TORCH_CHECK(table.dim() == 3, "table must have shape (heads, queries, keys), got ", shape_of(table));
  STD_TORCH_CHECK(heads > 0 && key_dim > 0 && value_dim > 0 && table.size(2) > 0,
                  "heads, key_dim, value_dim and the number of keys must be positive");
  STD_TORCH_CHECK(keys_values.dim() == 3, "keys_values must have shape (B, keys, columns), got ", shape_of(keys_values));
  const AttentionSize n{b, queries, table.size(2), heads, c, channels, key_dim, value_dim, keys_values.size(2), absorbed};
  STD_TORCH_CHECK(n.columns >= heads * (key_dim + value_dim) + (absorbed ? heads : 0), "keys_values has ", n.columns,
                  " columns, too few for ", heads, " heads of ", key_dim, " and ", value_dim, " channels");
  STD_TORCH_CHECK(!absorbed || (key_dim == c && value_dim == c), "absorbed keys and values must have the ", c,
                  " channels of y, got ", key_dim, " and ", value_dim);
  check("keys_values", keys_values, {b, n.keys, n.columns}, y.scalar_type());
  check("table", table, {heads, queries, n.keys}, y.scalar_type());
  Tensor out = torch::stable::new_empty(y, {b, y.size(1), y.size(2), c});
  const auto floats = [&](int64_t of_head) {
    return torch::stable::new_empty(y, {b * heads * of_head}, ScalarType::Float);
  };
  Tensor keys = floats(n.key_floats()), values = floats(n.value_floats()), key_bias = floats(n.bias_floats());
  for_map_dtype(y, [&](auto element) {
    using T = decltype(element);
    run_tasks<AttentionLayout<T>>({read<T>(keys_values), write<float>(keys), write<float>(values), write<float>(key_bias), n},
                                  b * heads);
    typename AttentionTile<T>::Args args{};
    args.y = read<T>(y);
    args.table = read<T>(table);
    args.keys = read<float>(keys);
    args.values = read<float>(values);
    args.key_bias = read<float>(key_bias);
    if (!absorbed) {
      args.query = panels<T>("query_weight", *query_weight, c, heads * key_dim);
      args.query_bias = vector("query_bias", *query_bias, heads * key_dim);
      args.out_weight = panels<T>("out_weight", *out_weight, heads * value_dim, c);
    }
    args.out_bias = vector("out_bias", out_bias, c);
    args.out = write<T>(out);
    args.n = n;
    args.eps = static_cast<float>(eps);
    args.unit = base2 ? 1.0f : 1.44269504f;
    args.tiles = query_tiles(n);
    run_tasks<AttentionTile<T>>(args, b * args.tiles);
  });
  return out;
}

}  // namespace cmt_fast
