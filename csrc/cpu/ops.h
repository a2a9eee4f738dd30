// What csrc/cpu offers; the schemas stand in cmt_fast/ops/<op>/schema.py.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

namespace cmt_fast {

torch::stable::Tensor depthwise_conv3x3_fwd_cpu(torch::stable::Tensor x, torch::stable::Tensor weight,
                                                std::optional<torch::stable::Tensor> bias, bool shortcut);

std::tuple<torch::stable::Tensor, torch::stable::Tensor, torch::stable::Tensor> depthwise_conv3x3_bwd_cpu(
    torch::stable::Tensor grad, torch::stable::Tensor x, torch::stable::Tensor weight, bool shortcut, bool need_x,
    bool need_weight, bool need_bias);

}  // namespace cmt_fast
