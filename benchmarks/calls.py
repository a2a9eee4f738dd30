"""From a case to calls that a clock can time, and to what they have to do."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.utils.flop_counter import FlopCounterMode

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


def count_flops(call: Callable[[], object]) -> int:
    """Of its matrix products and convolutions, 2 a multiply-add. ``call`` runs once, without gradients."""
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def work(case: Case, p: Precision, device: torch.device, mode: str) -> tuple[int, int]:
    """What a case has to do: (bytes, operations of matrix products and convolutions).

    Inputs and parameters are read and outputs written, each once. Training reads inputs and parameters once more in the backward
    pass, with the output's gradient, and writes the others'; the two gradients of a product take as many operations each as it does.
    """
    module, inputs = case.instance(p, device)
    module.train(mode == "training")
    with FlopCounterMode(display=False) as counter, use_backend("reference"), p.context(device):
        written = module(*inputs.values()).nbytes
    read, flops = sum(t.nbytes for t in (*inputs.values(), *module.parameters())), counter.get_total_flops()
    return (3 * read + 2 * written, 3 * flops) if mode == "training" else (read + written, flops)
