"""The attention sub-layer in training as one autograd function."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cmt_fast.ops.batch_norm.schema import batch_norm_gradient_sums_triton
from cmt_fast.ops.batch_norm.training import BatchNormPlan, reduced_sums, statistics
from cmt_fast.ops.checks import second_derivative_error
from cmt_fast.ops.lmhsa.reduce_schema import norm_reduce_backward_triton, norm_reduce_triton, normalise_triton
from cmt_fast.ops.lmhsa.schema import lmhsa_core_bwd, lmhsa_core_fwd


class LMHSAFunction(torch.autograd.Function):
    """x + drop_path(LMHSA(LN(x))) of a map x (B, H, W, C), and the statistics (6, C) of the reduction's BatchNorm.

    The arguments of ``forward``, in its order: x; the table (h, N, M); stochastic depth's factors (B,) or None; weight and bias (or None) of the norm,
    of q, k, v and the output projection, of the reduction's convolution and of its BatchNorm (all None without a reduction); the running mean and
    variance that BatchNorm shall use, or None; and numbers.

    Kept for the backward pass: x, the reduced map, keys and values, the logarithms of softmax's sums, and vectors. Gradients are computed only
    where they are needed.
    """

    @staticmethod
    def forward(
        ctx,
        x: Tensor,
        table: Tensor,
        row_scale: Tensor | None,
        norm_weight: Tensor | None,
        norm_bias: Tensor | None,
        q_weight: Tensor,
        q_bias: Tensor | None,
        k_weight: Tensor,
        k_bias: Tensor | None,
        v_weight: Tensor,
        v_bias: Tensor | None,
        proj_weight: Tensor,
        proj_bias: Tensor | None,
        conv_weight: Tensor | None,
        conv_bias: Tensor | None,
        bn_weight: Tensor | None,
        bn_bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        dtype: torch.dtype,
        norm_eps: float | None,
        bn_eps: float,
        group: Any,
        scale: float,
        shortcut: bool,
    ) -> tuple[Tensor, Tensor]:
        norm = (norm_weight, norm_bias, norm_eps)
        k = 1 if conv_weight is None else conv_weight.shape[-1]
        moments = k > 1 and running_mean is None
        reduced, partials, counts = norm_reduce_triton(x, *norm, _taps(conv_weight), conv_bias, k, dtype, moments)
        source, stats = reduced, partials.new_empty(0)
        if k > 1:
            plan = BatchNormPlan(bn_eps, running_mean, running_var, group)
            stats = statistics(plan, partials, counts, bn_weight, bn_bias)
            source = normalise_triton(reduced, stats)
        kv_weight, kv_bias = torch.cat([k_weight, v_weight]).to(dtype), None
        if k_bias is not None and v_bias is not None:
            kv_bias = torch.cat([k_bias, v_bias]).to(dtype)
        keys_values = F.linear(source.flatten(1, 2), kv_weight, kv_bias)
        z, lse = lmhsa_core_fwd(
            x.flatten(1, 2),
            *norm,
            q_weight.to(dtype),
            q_bias,
            keys_values,
            table,
            proj_weight.to(dtype),
            proj_bias,
            row_scale,
            scale,
            shortcut,
        )
        ctx.save_for_backward(
            *(
                x,
                table,
                row_scale,
                norm_weight,
                norm_bias,
                q_weight,
                q_bias,
                k_weight,
                v_weight,
                proj_weight,
                conv_weight,
            ),
            *(reduced if k > 1 else None, stats, keys_values, lse),
        )
        ctx.numbers = (dtype, norm_eps, group, running_mean is not None, scale, shortcut)
        ctx.mark_non_differentiable(stats)
        return z.unflatten(1, x.shape[1:3]), stats

    @staticmethod
    def backward(ctx, grad: Tensor, _: Tensor):
        if torch.is_grad_enabled():
            raise second_derivative_error("attention sub-layer")
        x, table, row_scale, norm_weight, norm_bias, q_weight, q_bias, *rest = ctx.saved_tensors
        k_weight, v_weight, proj_weight, conv_weight, reduced, stats, keys_values, lse = rest
        dtype, norm_eps, group, frozen, scale, shortcut = ctx.numbers
        needs = ctx.needs_input_grad
        need_x, need_table, _, *need_norm = needs[:5]
        need_q, need_q_bias, need_k, need_k_bias, need_v, need_v_bias = needs[5:11]
        need_proj, need_proj_bias = needs[11:13]
        need_conv, need_bn = any(needs[13:15]), any(needs[15:17])
        need_normal = need_x or any(need_norm)  # the gradient of LN(x)
        need_source = need_normal or need_conv or need_bn  # of what keys and values are made of
        need_kv = need_source or need_k or need_v or need_k_bias or need_v_bias
        norm = (norm_weight, norm_bias, norm_eps)
        k = 1 if conv_weight is None else conv_weight.shape[-1]

        query_grad, kv_grad, d_table, d_q, d_q_bias, d_proj, d_proj_bias = lmhsa_core_bwd(
            grad.flatten(1, 2),
            x.flatten(1, 2),
            *norm,
            q_weight.to(dtype),
            q_bias,
            keys_values,
            table,
            proj_weight.to(dtype),
            row_scale,
            lse,
            scale,
            (need_normal, need_kv, need_table, need_q, need_q_bias, need_proj, need_proj_bias),
        )
        widths = [len(k_weight), len(v_weight)]
        d_k = d_v = d_k_bias = d_v_bias = None
        if need_k or need_v:
            source = normalise_triton(reduced, stats) if k > 1 else _normal(x, norm, dtype)
            d_k, d_v = (kv_grad.flatten(0, 1).t() @ source.flatten(0, 2)).split(widths)
        if need_k_bias or need_v_bias:
            d_k_bias, d_v_bias = kv_grad.sum((0, 1), dtype=torch.float32).split(widths)

        source_grad = kv_grad @ torch.cat([k_weight, v_weight]).to(dtype) if need_source else None
        sums = total = None
        if k > 1 and (need_bn or (need_source and not frozen)):
            sums = batch_norm_gradient_sums_triton(source_grad, reduced, stats)
            total = reduced_sums(sums, group)
        d_bn_bias, d_bn_weight = (None, None) if sums is None else sums
        d_x = d_norm_weight = d_norm_bias = d_conv_weight = d_conv_bias = None
        if need_normal or need_conv:
            d_x, d_norm, d_conv = norm_reduce_backward_triton(
                x,
                grad if shortcut and need_x else None,
                query_grad.view_as(x) if need_normal else None,
                source_grad,
                reduced,
                stats if k > 1 else None,
                total,
                *norm,
                _taps(conv_weight),
                k,
                (need_x, any(need_norm), need_conv),
            )
            if any(need_norm):
                d_norm_weight, d_norm_bias = d_norm
            if need_conv:
                d_conv_weight, d_conv_bias = d_conv[:-1].t().reshape_as(conv_weight), d_conv[-1]
        found = (
            *(d_x, d_table, None, d_norm_weight, d_norm_bias),
            *(d_q, d_q_bias, d_k, d_k_bias, d_v, d_v_bias, d_proj, d_proj_bias),
            *(d_conv_weight, d_conv_bias, d_bn_weight, d_bn_bias),
        )
        needed = (g if need else None for g, need in zip(found, needs))
        return *needed, None, None, None, None, None, None, None, None


def _normal(x: Tensor, norm: tuple[Tensor | None, Tensor | None, float | None], dtype: torch.dtype) -> Tensor:
    """LN(x), x (B, H, W, C): a reduction by 1."""
    return norm_reduce_triton(x, *norm, None, None, 1, dtype, False)[0]


def _taps(weight: Tensor | None) -> Tensor | None:
    """(C, 1, k, k) -> (k * k, C)."""
    return None if weight is None else weight.flatten(1).t().contiguous()
