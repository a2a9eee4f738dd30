"""What the tests of kernels do with numbers and modules: draw them by seed, run a step of a module, compare two steps."""

import copy

import torch
from torch import Tensor, nn

from cmt_fast.testing.inputs import randomise


def draw(generator: torch.Generator, low: int, high: int) -> int:
    return int(torch.randint(low, high + 1, (), generator=generator))


def made(module: nn.Module, *shape: int, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Tensor]:
    """The module and an input of this shape, the same each time."""
    generator = torch.Generator().manual_seed(0)
    return randomise(module, generator).to(dtype), torch.randn(shape, generator=generator).to(dtype)


def gradient(out: Tensor) -> Tensor:
    """Of an output, the same each time."""
    return torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)


def results(layer: nn.Module, x: Tensor, grad: Tensor | None = None) -> dict[str, Tensor]:
    """Output, gradients that there are, and buffers, of a copy in its mode; buffers of ``layer`` itself stay."""
    layer, leaf = copy.deepcopy(layer), x.detach().clone()
    needs_x = x.requires_grad or all(p.requires_grad for p in layer.parameters())
    out = layer(leaf.requires_grad_(needs_x))
    if out.requires_grad:
        out.backward(gradient(out) if grad is None else grad)
    found = {"output": out.detach(), "x": leaf.grad} | {name: p.grad for name, p in layer.named_parameters()}
    return {name: g for name, g in found.items() if g is not None} | dict(layer.named_buffers())


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name]), name


class Adapter(nn.Conv2d):
    """A subclass may compute anything."""
