"""The steps of a packed model on a GPU: Triton kernels where there are some that can run a call, plain PyTorch elsewhere."""

from __future__ import annotations

from torch import Tensor

from cmt_fast.backend import select
from cmt_fast.inference import program, torch_steps
from cmt_fast.inference.torch_steps import StepFunctions
from cmt_fast.ops.lpu.reasons import lpu_reduce_reasons
from cmt_fast.ops.lpu.schema import lpu_reduce_triton


def lpu(step: program.LPU, x: Tensor) -> tuple[Tensor, Tensor]:
    """(B, H, W, C) -> the same shape, and its reduction (B, H // k, W // k, C)."""
    parameters = (step.taps, step.bias, step.reduction)
    candidates = {"triton": lambda: lpu_reduce_reasons(x, *parameters, step.reduce)}
    if select("packed lpu", candidates, device=x.device) == "triton":
        return lpu_reduce_triton(x, *parameters, step.reduce, step.channels, step.eps)
    return torch_steps.lpu(step, x)


#: The best function for each step. ``use_backend("triton")`` insists on kernels, ``use_backend("reference")`` on plain PyTorch.
TRITON = StepFunctions(lpu=lpu)
