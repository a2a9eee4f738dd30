// The steps of a packed model on a CPU; the schemas stand in cmt_fast/inference/native/schema.py.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

namespace cmt_fast {

using torch::stable::Tensor;

Tensor packed_linear_cpu(Tensor x, Tensor weight, Tensor bias, int64_t out);

Tensor packed_conv3x3_gelu_cpu(Tensor x, Tensor weight, Tensor bias, std::optional<Tensor> scale, std::optional<Tensor> shift,
                               int64_t out, int64_t stride);

Tensor packed_patch_embed_cpu(Tensor x, Tensor weight, Tensor bias, Tensor scale, Tensor shift, int64_t out, int64_t channels,
                              double eps);

std::tuple<Tensor, Tensor> packed_lpu_cpu(Tensor x, Tensor taps, Tensor bias, std::optional<Tensor> reduction, int64_t k,
                                          int64_t channels, double eps);

Tensor packed_attention_cpu(Tensor y, Tensor keys_values, Tensor table, std::optional<Tensor> query_weight,
                            std::optional<Tensor> query_bias, std::optional<Tensor> out_weight, Tensor out_bias, int64_t heads,
                            int64_t key_dim, int64_t value_dim, int64_t channels, double eps, bool base2);

Tensor packed_expand_cpu(Tensor x, Tensor weight, Tensor bias, Tensor scale, Tensor shift, int64_t out, int64_t channels,
                         double eps);

Tensor packed_attention_core_cpu(Tensor q, Tensor keys_values, Tensor table, int64_t heads, int64_t key_dim, int64_t value_dim,
                                 bool base2);

Tensor packed_normalise_cpu(Tensor x, int64_t channels, double eps);

Tensor packed_gelu_affine_cpu(Tensor x, Tensor scale, Tensor shift);

Tensor packed_depthwise_gelu_cpu(Tensor hidden, Tensor taps, Tensor bias);

Tensor packed_depthwise_project_cpu(Tensor hidden, Tensor shortcut, Tensor taps, Tensor bias, Tensor weight, Tensor out_bias);

}  // namespace cmt_fast
