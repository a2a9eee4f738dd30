"""An IRFFN with what a block puts around it, for the tests of its training kernels, and what a step of it gives."""

import copy

import torch
from torch import Tensor, nn

from cmt_fast.modules import IRFFN
from cmt_fast.testing.inputs import randomise


class Factors(nn.Module):
    """A drop path whose draw is known."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        factors = torch.tensor([2.0, 0.0, 0.5], dtype=x.dtype).repeat(len(x))[: len(x)]
        return x * factors.view(-1, 1, 1, 1)


class SubLayer(nn.Module):
    """The IRFFN with what a block puts around it, on a map."""

    def __init__(
        self,
        dim: int,
        hidden: int,
        drop_path: nn.Module | None = None,
        shortcut: bool = True,
        frozen: bool = False,
    ) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = IRFFN(dim, hidden)
        # Some of the few values of a channel lie all in GELU's tail: an eps bounds what divides them, and each has its own.
        self.mlp.conv1[2].eps, self.mlp.proj_bn.eps, self.mlp.conv2[1].eps = 0.03, 0.05, 0.02
        self.drop_path, self.shortcut, self.frozen = drop_path, shortcut, frozen

    def train(self, mode: bool = True) -> "SubLayer":
        super().train(mode)
        self.mlp.proj_bn.train(mode and not self.frozen)
        return self

    def forward(self, x: Tensor) -> Tensor:
        around = dict(norm=self.norm, drop_path=self.drop_path, shortcut=self.shortcut)
        return self.mlp(x.flatten(1, 2), *x.shape[1:3], **around).unflatten(1, x.shape[1:3])


def draw(generator: torch.Generator, low: int, high: int) -> int:
    return int(torch.randint(low, high + 1, (), generator=generator))


def made(*shape: int, hidden: int, dtype: torch.dtype = torch.float32, **options) -> tuple[SubLayer, Tensor]:
    generator = torch.Generator().manual_seed(0)
    layer = randomise(SubLayer(shape[3], hidden, **options), generator).to(dtype)
    return layer, torch.randn(shape, generator=generator).to(dtype)


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


def parts(**changes) -> dict:
    layer, _ = made(2, 3, 4, 5, hidden=6)
    (expand, act1, bn1), (project, bn3) = layer.mlp.conv1, layer.mlp.conv2
    return dict(
        expand=expand, act1=act1, bn1=bn1, dw=layer.mlp.proj, act2=layer.mlp.proj_act, bn2=layer.mlp.proj_bn,
        project=project, bn3=bn3, norm=layer.norm,
    ) | changes  # fmt: skip
