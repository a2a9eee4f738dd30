"""From a case to calls that a clock can time."""

from __future__ import annotations

from collections.abc import Callable

import torch

from cmt_fast.backend import BACKENDS, use_backend
from cmt_fast.testing.inputs import Case
from cmt_fast.testing.precision import Precision

MODES = ("inference", "training")


def make_call(case: Case, provider: str, p: Precision, device: torch.device, mode: str) -> Callable[[], object]:
    """One call of ``case`` by ``provider``: the forward pass, in training also the gradients of every input and parameter."""
    module, inputs = case.instance(p, device)
    module.train(mode == "training")
    call = torch.compile(module, dynamic=False) if provider == "compile" else module
    backend = provider if provider in BACKENDS else "reference"
    leaves = [x.requires_grad_(mode == "training") for x in inputs.values()]

    def inference() -> object:
        with use_backend(backend), torch.inference_mode(), p.context(device):
            return call(*leaves)

    if mode == "inference":
        return inference
    wanted = [*leaves, *module.parameters()]
    with torch.no_grad(), use_backend("reference"), p.context(device):
        grad = torch.randn_like(module(*leaves))

    def training() -> object:
        with use_backend(backend):
            with p.context(device):
                output = call(*leaves)
            return torch.autograd.grad(output, wanted, grad)

    return training
