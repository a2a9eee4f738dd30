"""The inverted residual feed-forward network in training as one autograd function."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from cmt_fast.ops.batch_norm.training import BatchNormPlan, reduced_sums, statistics
from cmt_fast.ops.checks import second_derivative_error
from cmt_fast.ops.irffn import train_schema as kernels
from cmt_fast.ops.irffn.output_lpu_schema import output_lpu, output_lpu_gradient


class Parameters(NamedTuple):
    """Those of the sub-layer, in the order in which the function takes them; None for a missing one.

    norm (C,): LayerNorm's; expand (R, C, 1, 1), dw (R, 1, 3, 3), project (C, R, 1, 1); bn1, bn2 (R,), bn3 (C,); lpu (C, 1, 3, 3): of the LPU of the
    block after it, if that runs here too.
    """

    norm_weight: Tensor | None
    norm_bias: Tensor | None
    expand_weight: Tensor
    expand_bias: Tensor | None
    bn1_weight: Tensor | None
    bn1_bias: Tensor | None
    dw_weight: Tensor
    dw_bias: Tensor | None
    bn2_weight: Tensor | None
    bn2_bias: Tensor | None
    project_weight: Tensor
    project_bias: Tensor | None
    bn3_weight: Tensor | None
    bn3_bias: Tensor | None
    lpu_weight: Tensor | None
    lpu_bias: Tensor | None


class Options(NamedTuple):
    """What is no tensor.

    Attributes:
        dtype: of the maps inside, and of the operands of the products.
        eps: of the LayerNorm and the three BatchNorms.
        groups: of processes over which each BatchNorm takes its statistics, or None.
        shortcut: add x; always with an LPU.
        recompute: keep no h for the backward pass: the expansion makes it again, bit for bit.
    """

    dtype: torch.dtype
    eps: tuple[float, float, float, float]
    groups: tuple[Any, Any, Any]
    shortcut: bool
    recompute: bool


class IRFFNFunction(torch.autograd.Function):
    """x + factor * IRFFN(LayerNorm(x)), or the LPU of that, and the statistics (6, channels) of the three BatchNorms.

    Takes x (B, H, W, C), contiguous; the factor (B,) of each image's branch, or None for 1; six tensors, running mean and variance of each
    BatchNorm, or None where the batch's statistics shall serve; :class:`Options`; and the :class:`Parameters` one by one.

    Kept for the backward pass: x, u, y, without ``recompute`` h, and vectors, with or without an LPU, whose input is made again on load. Gradients are
    computed only where they are needed, once: they cannot be differentiated again.
    """

    @staticmethod
    def forward(ctx, x: Tensor, factor: Tensor | None, m1, v1, m2, v2, m3, v3, options: Options, *parameters):
        p = Parameters(*parameters)
        eps, groups = options.eps, options.groups
        plan1, plan2, plan3 = (
            BatchNormPlan(eps[i], mean, variance, groups[i - 1])
            for i, (mean, variance) in enumerate(((m1, v1), (m2, v2), (m3, v3)), 1)
        )
        weight, bias = _folded(p, options.dtype)
        h, partials, counts = kernels.expand(x, weight, bias, eps[0], m1 is None)
        n1 = statistics(plan1, partials, counts, p.bn1_weight, p.bn1_bias)
        u, partials, counts = kernels.dw(h, n1, p.dw_weight, p.dw_bias, m2 is None)
        n2 = statistics(plan2, partials, counts, p.bn2_weight, p.bn2_bias)
        projection = p.project_weight.flatten(1).to(options.dtype)
        y, partials, counts = kernels.project(u, n2, projection, p.project_bias, m3 is None)
        n3 = statistics(plan3, partials, counts, p.bn3_weight, p.bn3_bias)
        if p.lpu_weight is None:
            out = kernels.output(y, n3, factor, x if options.shortcut else None)
        else:
            out = output_lpu(y, n3, factor, x, p.lpu_weight, p.lpu_bias)
        ctx.save_for_backward(x, factor, None if options.recompute else h, u, y, n1, n2, n3, *parameters)
        ctx.options = options
        ctx.frozen = (m1 is not None, m2 is not None, m3 is not None)
        ctx.mark_non_differentiable(n1, n2, n3)
        return out, n1, n2, n3

    @staticmethod
    def backward(ctx, grad: Tensor, *_: Tensor):
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise second_derivative_error("IRFFN")
        x, factor, h, u, y, n1, n2, n3, *parameters = ctx.saved_tensors
        p, options = Parameters(*parameters), ctx.options
        groups = options.groups
        need_x, need = ctx.needs_input_grad[0], Parameters(*ctx.needs_input_grad[9:])
        need_expansion = any((need.norm_weight, need.norm_bias, need.expand_weight, need.expand_bias))
        need_h = need_x or need_expansion
        need_u = need_h or any((need.bn1_weight, need.bn1_bias, need.dw_weight, need.dw_bias))
        need_projection = any((need.bn2_weight, need.bn2_bias, need.project_weight, need.project_bias))
        d: dict[str, Tensor] = {}
        dx = None

        grad = grad.contiguous()
        if p.lpu_weight is None:
            s3 = kernels.output_sums(grad, y, n3, factor)
        else:
            c, needs = x.shape[3], (need_x or any(need[:-2]), need.lpu_weight, need.lpu_bias)
            grad, sums = output_lpu_gradient(grad, y, n3, factor, x, p.lpu_weight, *needs)
            s3, d["lpu_weight"], d["lpu_bias"] = sums.split(
                [n * c if needed else 0 for n, needed in zip((2, 9, 1), needs)]
            )
            s3 = s3.view(2, c if needs[0] else 0)
        d["bn3_bias"], d["bn3_weight"] = s3.unbind()
        if need_u or need_projection:
            total3, s2 = reduced_sums(s3, groups[2]), None
            if need_projection or not ctx.frozen[1]:
                weight = p.project_weight.flatten(1)
                dy, d["project_weight"], d["project_bias"], s2 = kernels.project_weight(
                    grad, y, n3, total3, factor, u, n2, weight, p.bn2_weight, p.bn2_bias
                )
                d["bn2_bias"], d["bn2_weight"] = s2.unbind()
            else:
                dy = kernels.output_gradient(grad, y, n3, total3, factor)
        if need_u:
            projection = p.project_weight.flatten(1).to(options.dtype)
            total = None if ctx.frozen[1] or s2 is None else reduced_sums(s2, groups[1])
            weight, bias = _folded(p, options.dtype)
            if h is None:
                h, _, _ = kernels.expand(x, weight, bias, options.eps[0], False)
            # The gradient of u, as large as u, has no name: nothing keeps it longer than it is read.
            dt, sums = kernels.dw_gradient(kernels.project_input(dy, projection, u, n2, total), h, n1, p.dw_weight)
            r = n1.shape[1]
            s1, d["dw_bias"], d["dw_weight"] = sums[: 2 * r].view(2, r), sums[2 * r : 3 * r], sums[3 * r :]
            d["bn1_bias"], d["bn1_weight"] = s1.unbind()
            if need_h:
                total = reduced_sums(s1, groups[0])
                passed = grad if options.shortcut else None
                dx, row_moments = kernels.expand_input(dt, h, n1, total, weight, x, passed, options.eps[0])
                if need_expansion:
                    d["expand_weight"], d["expand_bias"], s0 = kernels.expand_weight(
                        dt, h, n1, total, x, row_moments, p.expand_weight.flatten(1), p.norm_weight, p.norm_bias
                    )
                    d["norm_bias"], d["norm_weight"] = s0.unbind()
        found = (
            d[name].to(parameter.dtype).view_as(parameter) if needed and parameter is not None else None
            for name, parameter, needed in zip(Parameters._fields, p, need)
        )
        return dx if need_x else None, None, None, None, None, None, None, None, None, *found


def _folded(p: Parameters, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The expansion with LayerNorm's affine part in it (docs/math.md, section 10): weight (R, C) in ``dtype``, bias (R,) float32."""
    weight = p.expand_weight.flatten(1).float()
    bias = weight.new_zeros(len(weight)) if p.expand_bias is None else p.expand_bias.float()
    if p.norm_bias is not None:
        bias = bias + (weight * p.norm_bias.float()).sum(1)  # no matrix product: autocast would round it
    if p.norm_weight is not None:
        weight = weight * p.norm_weight.float()
    return weight.to(dtype), bias
