"""BatchNorm over several processes, on any device."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce


class SyncBatchNorm(nn.SyncBatchNorm):
    """``nn.SyncBatchNorm`` that also works on a CPU (gloo), where torch's own raises.

    On a GPU torch's implementation runs. On a CPU the batch's mean and variance are summed over the processes by two
    differentiable all-reduces (mean first, then squared distances from it, so nothing cancels).
    """

    def forward(self, input: Tensor) -> Tensor:
        if input.is_cuda or not (self.training and dist.is_initialized()):
            return super().forward(input)
        self._check_input_dim(input)
        dims = [d for d in range(input.dim()) if d != 1]
        shape = [1, -1] + [1] * (input.dim() - 2)
        group = self.process_group if self.process_group is not None else dist.group.WORLD
        x = input.double() if input.dtype == torch.float64 else input.float()
        count = torch.tensor([x.numel() / x.shape[1]], dtype=x.dtype)
        total = all_reduce(torch.cat([x.sum(dims), count]), group=group)
        mean, count = total[:-1] / total[-1], total[-1].detach()
        var = all_reduce((x - mean.view(shape)).square().sum(dims), group=group) / count
        if self.track_running_stats:
            self._update_running(mean.detach(), var.detach(), float(count))
        y = (x - mean.view(shape)) * torch.rsqrt(var + self.eps).view(shape)
        if self.affine:
            y = y * self.weight.view(shape) + self.bias.view(shape)
        return y.to(input.dtype)

    def _update_running(self, mean: Tensor, var: Tensor, count: float) -> None:
        assert self.num_batches_tracked is not None and self.running_mean is not None and self.running_var is not None
        self.num_batches_tracked.add_(1)
        momentum = 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        unbiased = var * (count / max(count - 1.0, 1.0))
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), momentum)
        self.running_var.lerp_(unbiased.to(self.running_var.dtype), momentum)


def convert_sync_batchnorm(module: nn.Module, process_group: dist.ProcessGroup | None = None) -> nn.Module:
    """``nn.SyncBatchNorm.convert_sync_batchnorm`` for any device: returns ``module`` with its BatchNorms synchronised."""
    module = nn.SyncBatchNorm.convert_sync_batchnorm(module, process_group)
    for child in module.modules():
        if type(child) is nn.SyncBatchNorm:
            child.__class__ = SyncBatchNorm  # same state, other forward
    return module
