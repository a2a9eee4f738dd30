"""Multiply-adds and parameters of a CMT: the paper's formulas, and the exact figures of each layer.

A multiply-add (MAC) is one multiplication and one addition, the unit of the paper's "FLOPs" column. Biases, norms,
activations, softmax and residual additions are elementwise work and count as none, here as in the paper.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

import torch
from torch import nn

from cmt_fast.models.cmt import CMT
from cmt_fast.models.features import CMTFeatures
from cmt_fast.models.grids import Grid, StageGrid, image_size, stage_grids
from cmt_fast.models.variants import VARIANTS

# ---- the paper's formulas (its complexity analysis; eq. 16 is the CMT block) --------------------------------------------
# n tokens, d channels, r expansion of the feed-forward network, k reduction of keys and values; all return MACs.


def mhsa_macs(n: int, d: int, d_k: int | None = None, d_v: int | None = None) -> float:
    """Multi-head self-attention: ``2 n d (d_k + d_v) + n^2 (d_k + d_v)``; ``d_k`` and ``d_v`` are ``d`` if not given."""
    both = (d if d_k is None else d_k) + (d if d_v is None else d_v)
    return 2 * n * d * both + n**2 * both


def ffn_macs(n: int, d: int, r: float = 4) -> float:
    """Feed-forward network of a transformer: ``2 n d^2 r``."""
    return 2 * n * d**2 * r


def transformer_block_macs(n: int, d: int) -> float:
    """Transformer block with d = d_k = d_v and r = 4: ``12 n d^2 + 2 n^2 d``."""
    return mhsa_macs(n, d) + ffn_macs(n, d)


def lpu_macs(n: int, d: int) -> float:
    """Local perception unit, a depthwise 3x3 convolution: ``9 n d``."""
    return 9 * n * d


def lmhsa_macs(n: int, d: int, k: int) -> float:
    """Lightweight multi-head self-attention: ``2 n d^2 (1 + 1/k^2) + 2 n^2 d / k^2``.

    The formula leaves out the k x k depthwise convolution that makes keys and values (``n d`` for k > 1).
    """
    return 2 * n * d**2 * (1 + 1 / k**2) + 2 * n**2 * d / k**2


def irffn_macs(n: int, d: int, r: float = 4) -> float:
    """Inverted residual feed-forward network: ``2 r n d^2 + 9 r n d``, in the paper with r = 4: ``8 n d^2 + 36 n d``."""
    return 2 * r * n * d**2 + 9 * r * n * d


def cmt_block_macs(n: int, d: int, k: int) -> float:
    """CMT block with r = 4 (eq. 16): ``10 n d^2 (1 + 0.2 / k^2) + 2 n^2 d / k^2 + 45 n d``.

    The sum of :func:`lpu_macs`, :func:`lmhsa_macs` and :func:`irffn_macs`; it leaves out what :func:`lmhsa_macs` does.
    """
    return 10 * n * d**2 * (1 + 0.2 / k**2) + 2 * n**2 * d / k**2 + 45 * n * d


# ---- exact figures -----------------------------------------------------------------------------------------------------

#: Kinds of layers that multiply, in the order in which reports list them. The other kinds (``batchnorm``,
#: ``layernorm``, ``gelu``, ``softmax``, ``swish``, ``tanh``, ``position bias``) have elements or parameters but no MACs.
MAC_KINDS = ("stem", "patch embed", "depthwise", "projection", "attention", "pointwise", "head")


@dataclass(frozen=True)
class Layer:
    """One step of the forward pass, for one image.

    Attributes:
        name: the module's name in the model (the prefix of its state-dict keys); the three steps of an attention
            are ``<attn>.qk``, ``<attn>.softmax`` and ``<attn>.av``.
        kind: one of :data:`MAC_KINDS`, or the name of an elementwise step. Convolutions of the stem, the patch
            embeddings and the head have those kinds; ``depthwise`` are the 3x3 convolutions of LPU and IRFFN and the k x k
            reduction of keys and values, ``projection`` q, k, v and the output, ``attention`` the two
            products with the attention weights, ``pointwise`` the 1x1 convolutions of the IRFFN.
        shape: of the output, channels last, without the batch: (H, W, C), (heads, N, M) or (C,).
        macs: multiply-adds an image.
        params: elements of its parameters.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    macs: int
    params: int

    @property
    def elements(self) -> int:
        """Elements of the output of one image: the evaluations of an elementwise step."""
        return prod(self.shape)

    @property
    def stage(self) -> str:
        """``stem``, the stage's letter ``a`` to ``d``, or ``head``."""
        part = self.name.split(".")[0]
        if part.startswith("stem_"):
            return "stem"
        prefix, _, letter = part.rpartition("_")
        return letter if prefix in ("patch_embed", "relative_pos", "blocks") else "head"


class Totals(NamedTuple):
    """Sums over layers: multiply-adds an image, parameters, and output elements an image."""

    macs: int
    params: int
    elements: int


def layers(
    model: str | CMT | CMTFeatures | None = None, *, img_size: int | Sequence[int] | None = None, **config: Any
) -> list[Layer]:
    """Every layer of a CMT with its multiply-adds and parameters, in forward order. No forward pass is run.

    Args:
        model: a variant's name, a model, or None for the configuration given by ``config`` alone.
        img_size: side in pixels or (height, width). By default a variant's published resolution, a model's own size,
            or the constructor's. A model keeps its own bias tables, whatever the input; a name or configuration is
            counted as built for ``img_size``.
        **config: arguments of :class:`cmt_fast.CMT`; with a variant's name they replace the variant's.

    Raises:
        ValueError: if the name is unknown, the configuration contradicts itself, or ``config`` comes with a model.
    """
    model = _resolve(model, img_size, config)
    size = model.img_size if img_size is None else image_size(img_size)
    return list(_Walk(model).run(size))


def total(
    model: str | CMT | CMTFeatures | None = None, *, img_size: int | Sequence[int] | None = None, **config: Any
) -> Totals:
    """Multiply-adds an image, parameters and output elements of a whole CMT; arguments as :func:`layers`."""
    return add(layers(model, img_size=img_size, **config))


def add(chosen: Iterable[Layer]) -> Totals:
    """Sum of some layers."""
    chosen = list(chosen)
    return Totals(
        sum(layer.macs for layer in chosen),
        sum(layer.params for layer in chosen),
        sum(layer.elements for layer in chosen),
    )


def by_kind(chosen: Iterable[Layer]) -> dict[str, Totals]:
    """Sums of each kind that occurs: those of :data:`MAC_KINDS` first, then the others in forward order.

    ``by_kind(layers("cmt_s"))["gelu"].elements`` is the number of GELU evaluations an image.
    """
    chosen = list(chosen)
    present = dict.fromkeys(layer.kind for layer in chosen)
    order = [kind for kind in MAC_KINDS if kind in present] + [kind for kind in present if kind not in MAC_KINDS]
    return {kind: add(layer for layer in chosen if layer.kind == kind) for kind in order}


def by_stage(chosen: Iterable[Layer]) -> dict[str, Totals]:
    """Sums of stem, each stage (``a`` to ``d``) and head, in forward order."""
    chosen = list(chosen)
    return {
        stage: add(layer for layer in chosen if layer.stage == stage)
        for stage in dict.fromkeys(layer.stage for layer in chosen)
    }


def _resolve(
    model: str | CMT | CMTFeatures | None, img_size: int | Sequence[int] | None, config: dict[str, Any]
) -> CMT:
    if isinstance(model, CMTFeatures):
        model = model.model
    if isinstance(model, CMT):
        if config:
            raise ValueError(f"a model has its configuration already, got {', '.join(config)} too; pass a name instead")
        return model
    if isinstance(model, str):
        if model not in VARIANTS:
            raise ValueError(f"unknown model {model!r}; expected one of {', '.join(VARIANTS)}")
        variant = VARIANTS[model]
        config = {"img_size": variant.resolution, **variant.config, **config}
    elif model is not None:
        raise ValueError(f"model must be a variant's name or a CMT, got {type(model).__name__}")
    if img_size is not None:
        config["img_size"] = img_size
    with torch.device("meta"):  # shapes only: no memory, no random numbers
        return CMT(**config)


class _Walk:
    """Lists the layers of a model in forward order; sizes come from its parameters' shapes and the grids."""

    def __init__(self, model: CMT) -> None:
        self.model = model

    def product(self, name: str, kind: str, *grid: int) -> Layer:
        """A convolution or linear layer: each weight is used once at every output position of ``grid``."""
        module = self.model.get_submodule(name)
        assert isinstance(module, (nn.Conv2d, nn.Linear)), f"{name} is a {type(module).__name__}"
        weight = module.weight
        return Layer(name, kind, (*grid, weight.shape[0]), weight.numel() * prod(grid), _params(module))

    def elementwise(self, name: str, kind: str, *shape: int) -> Layer:
        return Layer(name, kind, shape, 0, _params(self.model.get_submodule(name)))

    def run(self, size: Grid) -> Iterator[Layer]:
        model = self.model
        grids = stage_grids(size, model.sr_ratios)
        yield from self.stem(((size[0] + 1) // 2, (size[1] + 1) // 2))
        for stage, grid in zip(model.stages, grids):
            embed = self.product(f"patch_embed_{stage}.proj", "patch embed", *grid.query)
            yield embed
            yield self.elementwise(f"patch_embed_{stage}.norm", "layernorm", *embed.shape)
            table = model.get_parameter(f"relative_pos_{stage}")
            yield Layer(f"relative_pos_{stage}", "position bias", tuple(table.shape), 0, table.numel())
            blocks = model.get_submodule(f"blocks_{stage}")
            for i, _ in enumerate(blocks.children()):
                yield from self.block(f"blocks_{stage}.{i}", grid)
        if isinstance(model._fc, nn.Conv2d):
            yield from self.head(grids[-1].query)

    def stem(self, grid: Grid) -> Iterator[Layer]:
        for i in (1, 2, 3):
            conv = self.product(f"stem_conv{i}", "stem", *grid)
            yield conv
            yield self.elementwise(f"stem_relu{i}", "gelu", *conv.shape)
            yield self.elementwise(f"stem_norm{i}", "batchnorm", *conv.shape)

    def block(self, name: str, grid: StageGrid) -> Iterator[Layer]:
        lpu = self.product(f"{name}.proj", "depthwise", *grid.query)
        yield lpu
        yield self.elementwise(f"{name}.norm1", "layernorm", *lpu.shape)
        yield from self.attention(f"{name}.attn", grid)
        yield self.elementwise(f"{name}.norm2", "layernorm", *lpu.shape)
        expand = self.product(f"{name}.mlp.conv1.0", "pointwise", *grid.query)
        yield expand
        yield self.elementwise(f"{name}.mlp.conv1.1", "gelu", *expand.shape)
        yield self.elementwise(f"{name}.mlp.conv1.2", "batchnorm", *expand.shape)
        yield self.product(f"{name}.mlp.proj", "depthwise", *grid.query)
        yield self.elementwise(f"{name}.mlp.proj_act", "gelu", *expand.shape)
        yield self.elementwise(f"{name}.mlp.proj_bn", "batchnorm", *expand.shape)
        project = self.product(f"{name}.mlp.conv2.0", "pointwise", *grid.query)
        yield project
        yield self.elementwise(f"{name}.mlp.conv2.1", "batchnorm", *project.shape)

    def attention(self, name: str, grid: StageGrid) -> Iterator[Layer]:
        attn: Any = self.model.get_submodule(name)
        q = self.product(f"{name}.q", "projection", *grid.query)
        yield q
        if attn.sr is not None:
            reduction = self.product(f"{name}.sr.0", "depthwise", *grid.key)
            yield reduction
            yield self.elementwise(f"{name}.sr.1", "batchnorm", *reduction.shape)
        yield self.product(f"{name}.k", "projection", *grid.key)
        v = self.product(f"{name}.v", "projection", *grid.key)
        yield v
        weights = (attn.num_heads, grid.num_queries, grid.num_keys)
        pairs = grid.num_queries * grid.num_keys
        yield Layer(f"{name}.qk", "attention", weights, pairs * q.shape[-1], 0)
        yield Layer(f"{name}.softmax", "softmax", weights, 0, 0)
        yield Layer(f"{name}.av", "attention", (*grid.query, v.shape[-1]), pairs * v.shape[-1], 0)
        yield self.product(f"{name}.proj", "projection", *grid.query)

    def head(self, grid: Grid) -> Iterator[Layer]:
        fc = self.product("_fc", "head", *grid)
        yield fc
        yield self.elementwise("_bn", "batchnorm", *fc.shape)
        yield self.elementwise("_swish", "swish", *fc.shape)
        if not isinstance(self.model.pre_logits, nn.Identity):
            hidden = self.product("pre_logits.fc", "head")
            yield hidden
            yield self.elementwise("pre_logits.act", "tanh", *hidden.shape)
        if self.model.num_classes > 0:
            yield self.product("head", "head")


def _params(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
