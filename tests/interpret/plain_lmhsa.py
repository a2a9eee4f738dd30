"""What the kernels of the attention sub-layer in training compute, as formulas in plain PyTorch of any dtype: to check them, and the autograd Function
between them, one by one. The signatures are the operators'."""

import torch
import torch.nn.functional as F
from torch import Tensor

from cmt_fast.ops.layout import nchw, nhwc


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float | None) -> Tensor:
    return x if eps is None else F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def reduce(y: Tensor, taps: Tensor | None, bias: Tensor | None, k: int) -> Tensor:
    if taps is None:
        return y
    return nhwc(F.conv2d(nchw(y), taps.t().reshape(-1, 1, k, k), bias, stride=k, groups=y.shape[-1])).contiguous()


def norm_reduce(x, norm_weight, norm_bias, eps, taps, bias, k, dtype, moments):
    reduced = reduce(layer_norm(x, norm_weight, norm_bias, eps), taps, bias, k).to(dtype)
    values = reduced.flatten(0, 2)
    mean = values.mean(0)
    partials = torch.stack([mean, (values - mean).square().sum(0)])[None]
    return reduced, partials, partials.new_tensor([len(values)])


def statistics(plan, partials, counts, weight, bias):
    if plan.mean is None:
        mean, variance, share = partials[0, 0], partials[0, 1] / counts, 1 / counts
    else:
        mean, variance, share = plan.mean, plan.variance, torch.zeros_like(counts)
    rstd = (variance + plan.eps).rsqrt()
    scale = rstd * weight
    return torch.stack([mean, variance, rstd, scale, bias.expand_as(mean), share.expand_as(mean)])


def normalise(x, stats):
    return (x - stats[0]) * stats[3] + stats[4]


def gradient_sums(grad, x, stats):
    grad = grad.reshape(-1, x.shape[-1])
    return torch.stack([grad.sum(0), (grad * (x.flatten(0, -2) - stats[0]) * stats[2]).sum(0)])


def norm_reduce_backward(
    x, grad, query_grad, reduced_grad, reduced, stats, sums, norm_weight, norm_bias, eps, taps, k, needs
):
    through = reduced_grad
    if k > 1:
        down = reduced_grad.view_as(reduced)
        through = stats[3] * down
        if sums is not None:
            normal = (reduced - stats[0]) * stats[2]
            through = stats[3] * (down - stats[5] * (sums[0] + normal * sums[1]))
    with torch.enable_grad():
        leaves = [None if t is None else t.detach().requires_grad_() for t in (x, norm_weight, norm_bias, taps)]
        y = layer_norm(*leaves[:3], eps)
        out = reduce(y, leaves[3], None, k)
    asked = [leaf for leaf in leaves if leaf is not None]
    found = iter(torch.autograd.grad([y, out], asked, [query_grad.view_as(y), through.view_as(out)], allow_unused=True))
    dx, dw, db, dtaps = (None if leaf is None else next(found) for leaf in leaves)
    dtaps = None if dtaps is None else torch.cat([dtaps, through.flatten(0, -2).sum(0)[None]])
    return dx if grad is None else dx + grad, torch.stack([dw, db]), dtaps


def _branch(y, query_weight, query_bias, keys_values, table, out_weight, out_bias, row_scale, scale):
    keys, values = keys_values.split([len(query_weight), out_weight.shape[1]], -1)
    q, k, v = (
        t.unflatten(-1, (len(table), -1)).transpose(1, 2) for t in (F.linear(y, query_weight, query_bias), keys, values)
    )
    weights = (scale * q @ k.mT + table).softmax(-1)
    z = F.linear((weights @ v).transpose(1, 2).flatten(2), out_weight, out_bias)
    return z if row_scale is None else z * row_scale.view(-1, 1, 1)


def core_fwd(x, norm_weight, norm_bias, eps, query_weight, query_bias, keys_values, table, out_weight, out_bias, row_scale, scale, shortcut):  # fmt: skip
    y = layer_norm(x, norm_weight, norm_bias, eps)
    z = _branch(y, query_weight, query_bias, keys_values, table, out_weight, out_bias, row_scale, scale)
    return (x + z if shortcut else z), x.new_empty(0)


def core_bwd(grad, x, norm_weight, norm_bias, eps, query_weight, query_bias, keys_values, table, out_weight, row_scale, lse, scale, needs):  # fmt: skip
    y = layer_norm(x, norm_weight, norm_bias, eps)
    with torch.enable_grad():
        parts = [t.detach().requires_grad_() for t in (y, keys_values, table, query_weight, query_bias, out_weight)]
        parts.append(torch.zeros_like(out_weight[:, 0]).requires_grad_())
        y, keys_values, table, query_weight, query_bias, out_weight, out_bias = parts
        z = _branch(y, query_weight, query_bias, keys_values, table, out_weight, out_bias, row_scale, scale)
    return torch.autograd.grad(z, parts, grad)
