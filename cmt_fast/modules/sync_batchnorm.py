"""BatchNorm over several processes, on any device."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cmt_fast.ops.checks import PLAIN_BATCH_NORMS


class SyncBatchNorm(nn.BatchNorm2d):
    """BatchNorm2d over the processes of a group, on any device and process-group backend.

    ``nn.SyncBatchNorm`` refuses a CPU. Here the batch's mean and variance are summed over the processes by two
    differentiable all-reduces (mean first, then squared distances from it, so nothing cancels); processes may hold
    batches of different sizes. Without a process group, or in eval mode, it is ``nn.BatchNorm2d``.
    """

    process_group: dist.ProcessGroup | None = None

    def forward(self, input: Tensor) -> Tensor:
        if not (self.training and dist.is_initialized()):
            return super().forward(input)
        from torch.distributed.nn.functional import all_reduce  # importing it generates and loads a module

        self._check_input_dim(input)
        group = self.process_group if self.process_group is not None else dist.group.WORLD
        x = input if input.dtype == torch.float64 else input.float()
        count = x.new_tensor([x.numel() / x.shape[1]])
        total = all_reduce(torch.cat([x.sum((0, 2, 3)), count]), group=group)
        mean, count = total[:-1] / total[-1], total[-1].detach()
        centred = x - mean.view(1, -1, 1, 1)
        var = all_reduce(centred.square().sum((0, 2, 3)), group=group) / count
        self._update_statistics(mean.detach(), var.detach(), count)
        y = centred * torch.rsqrt(var + self.eps).view(1, -1, 1, 1)
        if self.affine:
            y = y * self.weight.view(1, -1, 1, 1) + self.bias.view(1, -1, 1, 1)
        return y.to(input.dtype)

    def _update_statistics(self, mean: Tensor, var: Tensor, count: Tensor) -> None:
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked.add_(1)
        momentum = 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        unbiased = var * (count / (count - 1))
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), momentum)
        self.running_var.lerp_(unbiased.to(self.running_var.dtype), momentum)


PLAIN_BATCH_NORMS.append(SyncBatchNorm)


def convert_sync_batchnorm(module: nn.Module, process_group: dist.ProcessGroup | None = None) -> nn.Module:
    """Make the BatchNorms of ``module`` synchronise over ``process_group`` (by default all processes), in place.

    Like ``nn.SyncBatchNorm.convert_sync_batchnorm``, and that is what a module whose parameters are on a GPU gets;
    elsewhere each ``nn.BatchNorm2d`` becomes a :class:`SyncBatchNorm` with the same parameters, buffers and keys.
    Call it before wrapping ``module`` in ``DistributedDataParallel``. Returns ``module``.
    """
    if any(p.is_cuda for p in module.parameters()):
        return nn.SyncBatchNorm.convert_sync_batchnorm(module, process_group)
    for child in module.modules():
        if type(child) is nn.BatchNorm2d:
            child.__class__ = SyncBatchNorm  # same state, other forward
            child.process_group = process_group  # type: ignore[assignment]
    return module
