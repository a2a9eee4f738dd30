"""What a fused sub-layer does with a BatchNorm module: the rules of ``nn.BatchNorm2d`` and ``nn.SyncBatchNorm``, kernels apart.

A sub-layer reads the module once (:func:`batch_norm_plan`), passes the plan to its autograd Function, which calls :func:`statistics` in
its forward and :func:`reduced_sums` in its backward pass, and updates the module's buffers after the Function (:func:`update_running`), as
``nn.BatchNorm2d`` does in its forward: under activation checkpointing a recomputation updates them again, as a plain BatchNorm's (unless PyTorch stops
it before, having recomputed all that was kept; ``CMT.set_grad_checkpointing`` updates once, always).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cmt_fast.ops.batch_norm.schema import batch_norm_statistics_triton, merge_moments_triton
from cmt_fast.ops.checks import PLAIN_BATCH_NORMS, not_plain


@dataclass(frozen=True)
class BatchNormPlan:
    """What a BatchNorm does in one call.

    Attributes:
        eps: the module's.
        mean, variance: running statistics to normalise with; None to take those of the batch.
        group: processes whose batches count as one; None for this process alone.
    """

    eps: float
    mean: Tensor | None
    variance: Tensor | None
    group: Any


def batch_norm_reasons(name: str, bn: nn.Module, channels: int) -> list[str]:
    """Reasons why a kernel may not do what the module ``bn`` does to a map of ``channels``; an empty list if one may."""
    reasons = not_plain(name, bn, *PLAIN_BATCH_NORMS)
    if isinstance(bn, nn.modules.batchnorm._BatchNorm) and bn.num_features != channels:
        reasons.append(f"{name} must have {channels} channels, got {bn.num_features}")
    return reasons


def batch_norm_plan(bn: nn.modules.batchnorm._BatchNorm, size: Sequence[int]) -> BatchNormPlan:
    """Of the BatchNorm ``bn`` for a map (B, C, H, W) of this size.

    Raises:
        ValueError: in training, if there is one value a channel (``nn.BatchNorm2d``'s own error).
    """
    if not bn.training and bn.running_mean is not None and bn.running_var is not None:
        return BatchNormPlan(bn.eps, bn.running_mean, bn.running_var, None)
    group: Any = None
    if bn.training and type(bn) is not nn.BatchNorm2d and dist.is_available() and dist.is_initialized():
        group = bn.process_group if bn.process_group is not None else dist.group.WORLD
        group = group if dist.get_world_size(group) > 1 else None
    if bn.training and group is None and size[0] * size[2] * size[3] == 1:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {torch.Size(size)}")
    return BatchNormPlan(bn.eps, None, None, group)


def statistics(
    plan: BatchNormPlan, partials: Tensor | None, counts: Tensor | None, weight: Tensor | None, bias: Tensor | None
) -> Tensor:
    """The statistics (6, C) float32 that ``plan`` asks for (``schema.py`` names the rows).

    Args:
        partials, counts: the moments of a kernel's tiles, (P, 2, C) and (P,) float32; not read, and may be None, where running statistics serve.
        weight, bias: BatchNorm's, (C,) or None.
    """
    if plan.mean is not None and plan.variance is not None:
        return _frozen(plan.mean, plan.variance, weight, bias, plan.eps)
    assert partials is not None and counts is not None
    if plan.group is not None:
        partials, counts = _gathered(plan.group, *merge_moments_triton(partials, counts))
    return batch_norm_statistics_triton(partials, counts, weight, bias, plan.eps)


def reduced_sums(sums: Tensor, group: Any) -> Tensor:
    """The sums (2, C) over the batch that the gradient of BatchNorm's input needs, of the sums over this process's batch.

    ``group``: of the plan. The sums themselves are the gradients of bias and weight: DDP averages them, as all gradients of parameters.
    """
    if group is None:
        return sums
    total = sums.clone()
    dist.all_reduce(total, group=group)
    return total


@torch.no_grad()
def update_running(bn: nn.modules.batchnorm._BatchNorm, statistics: Tensor) -> None:
    """Update the buffers of ``bn`` with the statistics (6, C) of a batch, as its own forward would in its mode."""
    if not (bn.training and bn.track_running_stats):
        return
    momentum: float | Tensor = 0.0 if bn.momentum is None else bn.momentum
    if bn.num_batches_tracked is not None:
        bn.num_batches_tracked.add_(1)
        if bn.momentum is None:  # cumulative average; a tensor, as a number would wait for the device
            momentum = 1.0 / bn.num_batches_tracked
    for running, batch in ((bn.running_mean, statistics[0]), (bn.running_var, statistics[1])):
        if running is not None:
            running.copy_(running.to(batch.dtype).lerp(batch, momentum))  # 16-bit buffers are rounded once


def _frozen(mean: Tensor, variance: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """The statistics of running mean and variance (C,): constants, of which no pixel has a share."""
    mean, variance = mean.float(), variance.float()
    rstd = torch.rsqrt(variance + eps)
    scale = rstd if weight is None else rstd * weight.float()
    added = torch.zeros_like(mean) if bias is None else bias.float()
    return torch.stack([mean, variance, rstd, scale, added, torch.zeros_like(mean)])


def _gathered(group: Any, partials: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Moments (1, 2, C) and count (1,) of each process -> (processes, 2, C) and (processes,), in the order of their ranks."""
    own = torch.cat([counts, partials.flatten()])
    every = own.new_empty(dist.get_world_size(group), own.numel())
    dist.all_gather_into_tensor(every.view(-1), own, group=group)
    return every[:, 1:].unflatten(1, partials.shape[1:]), every[:, 0]
