"""An IRFFN with what a block puts around it, for the tests of its training kernels."""

import contextlib
from collections.abc import Iterator

import pytest
import torch
from layers import made
from torch import Tensor, nn

import cmt_fast
from cmt_fast.modules import IRFFN
from cmt_fast.ops import checks
from cmt_fast.ops.depthwise import configs
from cmt_fast.ops.irffn import train_configs


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


def made_layer(*shape: int, hidden: int, dtype: torch.dtype = torch.float32, **options) -> tuple[SubLayer, Tensor]:
    return made(SubLayer(shape[3], hidden, **options), *shape, dtype=dtype)


def parts(**changes) -> dict:
    layer, _ = made_layer(2, 3, 4, 5, hidden=6)
    (expand, act1, bn1), (project, bn3) = layer.mlp.conv1, layer.mlp.conv2
    return dict(
        expand=expand, act1=act1, bn1=bn1, dw=layer.mlp.proj, act2=layer.mlp.proj_act, bn2=layer.mlp.proj_bn,
        project=project, bn3=bn3, norm=layer.norm,
    ) | changes  # fmt: skip


@contextlib.contextmanager
def few_programs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The Triton kernels on tiles as for small grids of few programs, which take less time here; ``Factors`` is a drop path."""
    monkeypatch.setattr(train_configs, "PROGRAMS", 2)
    monkeypatch.setattr(checks, "PLAIN_DROP_PATHS", [*checks.PLAIN_DROP_PATHS, Factors])
    monkeypatch.setattr("cmt_fast.ops.parts.PLAIN_DROP_PATHS", checks.PLAIN_DROP_PATHS)
    forget()
    with cmt_fast.use_backend("triton"):
        yield
    forget()


def forget() -> None:
    """What tiles were chosen."""
    for name in ("product_config", "expand_input_config", "weight_config", "strip_config"):
        getattr(train_configs, name).cache_clear()
    configs.conv3x3_backward_config.cache_clear()
