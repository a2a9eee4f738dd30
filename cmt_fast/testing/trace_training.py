"""Every kernel of a training step in its order, and what is kept for the backward pass, counted on tensors without memory."""

from __future__ import annotations

import contextlib
import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cmt_fast.backend import use_backend
from cmt_fast.models.cmt import CMT
from cmt_fast.ops._triton.launch import record_launches
from cmt_fast.testing.cuda_autocast import CudaAutocast
from cmt_fast.testing.original_order import OriginalOrder
from cmt_fast.testing.precision import Precision
from cmt_fast.testing.trace import Kernel, Tracer


@dataclass(frozen=True)
class TrainingTrace:
    """A forward and a backward pass.

    Attributes:
        kernels: of both, in their order; none of an optimizer.
        saved: bytes that are kept from the forward for the backward pass, each storage once; without parameters.
    """

    kernels: list[Kernel]
    saved: int


def trace_training(model: CMT, batch: int, p: Precision, *, original: bool = False) -> TrainingTrace:
    """The kernels of a training step of ``model`` on a batch on a GPU, with tiles for an H100, from images to the gradients of parameters.

    Args:
        model: on any device, not changed; ``set_low_residual``, ``set_grad_checkpointing`` and ``recompute`` of its IRFFNs count.
        p: images and parameters in its dtype; its autocast is CUDA's.
        original: of the original's order in plain PyTorch instead, all in stage ``a``.
    """
    model = copy.deepcopy(model).to("meta", p.dtype).train()
    images = torch.empty(batch, model.in_chans, *model.img_size, dtype=p.dtype, device="meta")
    mixed = CudaAutocast(p.autocast) if p.autocast else contextlib.nullcontext()
    parameters = {_storage(parameter) for parameter in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(x: Tensor) -> Tensor:
        if _storage(x) not in parameters:
            kept[_storage(x)] = x.untyped_storage()  # held, so that its number stays its own
        return x

    with record_launches() as launches, _TrainingTracer(launches) as tracer, use_backend("auto"):
        tracer.step = "forward"
        with mixed, torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            out = _original(model, images) if original else _fused(model, images, tracer)
        tracer.step = "backward"
        out.backward(torch.empty_like(out))
    return TrainingTrace(tracer.kernels, sum(storage.nbytes() for storage in kept.values()))


def _original(model: CMT, images: Tensor) -> Tensor:
    with use_backend("reference"):
        return OriginalOrder(model)(images)


def _fused(model: CMT, images: Tensor, tracer: _TrainingTracer) -> Tensor:
    """``model(images)``, telling the tracer which stage runs, forward and backward."""

    def runs(stage: int) -> None:
        tracer.stages = stage

    for stage, x in enumerate(model._forward_stages(images, len(model.stages)), 1):
        x.register_hook(lambda _, stage=stage: runs(stage))
        runs(min(stage + 1, len(model.stages)))  # the head belongs to the last
    return model.forward_head(x)


class _TrainingTracer(Tracer):
    """Labels what our operators launch by their names."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        namespace, _, name = func.name().partition("::")
        if namespace != "cmt_fast_triton":
            return super().__torch_dispatch__(func, types, args, kwargs)
        outer, self.step = self.step, name.partition(".")[0]
        try:
            result = super().__torch_dispatch__(func, types, args, kwargs)
            self._take()
            return result
        finally:
            self.step = outer


def _storage(x: Tensor) -> int:
    return x.untyped_storage()._cdata
