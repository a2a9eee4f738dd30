"""The CMT model: CNNs meet vision transformers (Guo et al., CVPR 2022)."""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from cmt_fast.models.config import STAGES, read_config
from cmt_fast.models.grids import StageGrid, image_size, stage_grids
from cmt_fast.modules import Block, PatchEmbed
from cmt_fast.modules.block import run_blocks
from cmt_fast.ops.activated_conv.api import activated_conv
from cmt_fast.ops.attention.relative_pos import resize_relative_pos
from cmt_fast.ops.autocast import autocast_dtype, product_dtype
from cmt_fast.ops.checks import not_plain, shape_of
from cmt_fast.ops.layout import nchw, nhwc


class CMT(nn.Module):
    """CMT with the original's constructor arguments, attributes, parameter names and initialisation.

    Any input of at least 31 pixels a side works (for the published reductions): the position bias is resized on the fly
    where the input is not ``img_size``.

    Args:
        img_size: side in pixels, or (height, width), for which the position bias tables are made.
        in_chans: channels of the input.
        num_classes: outputs of the classifier; 0 for none.
        embed_dims, num_heads, mlp_ratios, depths, sr_ratios: one value a stage. An IRFFN has ``int(dim * ratio)`` hidden
            channels; keys and values are reduced ``sr_ratio`` times in each direction.
        stem_channel: channels of the three stem convolutions.
        fc_dim: channels of the 1x1 convolution before the pooling.
        qkv_bias, qk_scale, qk_ratio: see :class:`cmt_fast.modules.LMHSA`.
        representation_size: width of a linear + tanh layer before the classifier, or None.
        drop_rate: dropout inside the blocks (not of the classifier: that is ``dp``).
        attn_drop_rate: dropout of the attention weights.
        drop_path_rate: stochastic depth of the last block; it grows linearly from 0 at the first.
        hybrid_backbone: accepted for compatibility; the original ignores it too. Must be None.
        norm_layer: makes a block's norms; by default LayerNorm with eps 1e-6.
        dp: dropout before the classifier.
        global_pool: ``"avg"``, or ``""`` to leave the map unpooled (needs ``num_classes=0``).
        decay_relative_pos: whether weight decay applies to the position bias tables, as in the original; by default
            :meth:`no_weight_decay` names them.

    Raises:
        ValueError: on arguments that contradict each other; the message says which.
    """

    def __init__(
        self,
        img_size: int | Sequence[int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dims: Sequence[int] = (46, 92, 184, 368),
        stem_channel: int = 16,
        fc_dim: int = 1280,
        num_heads: Sequence[int] = (1, 2, 4, 8),
        mlp_ratios: Sequence[float] = (3.6, 3.6, 3.6, 3.6),
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        representation_size: int | None = None,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        hybrid_backbone: None = None,
        norm_layer: Callable[[int], nn.Module] | None = None,
        depths: Sequence[int] = (2, 2, 10, 2),
        qk_ratio: int = 1,
        sr_ratios: Sequence[int] = (8, 4, 2, 1),
        dp: float = 0.1,
        global_pool: str = "avg",
        decay_relative_pos: bool = False,
    ) -> None:
        super().__init__()
        if hybrid_backbone is not None:
            raise ValueError("hybrid_backbone is not supported (the original ignores it); leave it out")
        _check_integers(1, in_chans=in_chans, stem_channel=stem_channel, fc_dim=fc_dim, qk_ratio=qk_ratio)
        _check_integers(0, num_classes=num_classes, representation_size=representation_size or 0)
        _check_stages(int, embed_dims=embed_dims, num_heads=num_heads, depths=depths, sr_ratios=sr_ratios)
        _check_stages((int, float), mlp_ratios=mlp_ratios)
        if not all(int(dim * ratio) for dim, ratio in zip(embed_dims, mlp_ratios)):
            raise ValueError(
                f"mlp_ratios {mlp_ratios!r} leave a stage of embed_dims {embed_dims!r} without hidden channels"
            )
        _check_rates(drop_rate=drop_rate, attn_drop_rate=attn_drop_rate, drop_path_rate=drop_path_rate, dp=dp)
        if norm_layer is not None and not callable(norm_layer):
            raise TypeError(f"norm_layer must make a module from a number of channels, got {norm_layer!r}")
        _check_pool(global_pool, num_classes)

        self.img_size = image_size(img_size)
        self.in_chans = in_chans
        self.num_classes = num_classes
        self.num_features = self.embed_dim = embed_dims[-1]
        self.embed_dims = tuple(embed_dims)
        self.depths = tuple(depths)
        self.sr_ratios = tuple(sr_ratios)
        self.head_hidden_size = representation_size or fc_dim
        self.global_pool = global_pool
        self.decay_relative_pos = decay_relative_pos
        self.grad_checkpointing = False
        self.low_residual = True
        self.stages: tuple[str, ...] = STAGES
        self.feature_info = [
            dict(num_chs=dim, reduction=4 * 2**i, module=f"blocks_{stage}")
            for i, (stage, dim) in enumerate(zip(STAGES, embed_dims))
        ]
        norm_layer = norm_layer or partial(nn.LayerNorm, eps=1e-6)
        grids = stage_grids(self.img_size, sr_ratios)

        # Modules are created in the original's order, so that a seed gives the original's weights.
        self.stem_conv1 = nn.Conv2d(in_chans, stem_channel, kernel_size=3, stride=2, padding=1)
        self.stem_relu1 = nn.GELU()
        self.stem_norm1 = nn.BatchNorm2d(stem_channel, eps=1e-5)
        self.stem_conv2 = nn.Conv2d(stem_channel, stem_channel, kernel_size=3, padding=1)
        self.stem_relu2 = nn.GELU()
        self.stem_norm2 = nn.BatchNorm2d(stem_channel, eps=1e-5)
        self.stem_conv3 = nn.Conv2d(stem_channel, stem_channel, kernel_size=3, padding=1)
        self.stem_relu3 = nn.GELU()
        self.stem_norm3 = nn.BatchNorm2d(stem_channel, eps=1e-5)
        for stage, grid, channels, dim in zip(STAGES, grids, (stem_channel, *embed_dims), embed_dims):
            self.add_module(f"patch_embed_{stage}", PatchEmbed(grid.query, in_chans=channels, embed_dim=dim))
        for stage, grid, heads in zip(STAGES, grids, num_heads):
            table = torch.randn(heads, grid.num_queries, grid.num_keys)
            self.register_parameter(f"relative_pos_{stage}", nn.Parameter(table))
        drop_path = torch.linspace(0, drop_path_rate, sum(depths), device="cpu").tolist()  # also when built on "meta"
        for i, stage in enumerate(STAGES):
            blocks = [
                Block(
                    dim=embed_dims[i],
                    num_heads=num_heads[i],
                    mlp_ratio=mlp_ratios[i],
                    qkv_bias=qkv_bias,
                    qk_scale=qk_scale,
                    drop=drop_rate,
                    attn_drop=attn_drop_rate,
                    drop_path=drop_path[sum(depths[:i]) + j],
                    norm_layer=norm_layer,
                    qk_ratio=qk_ratio,
                    sr_ratio=sr_ratios[i],
                )
                for j in range(depths[i])
            ]
            self.add_module(f"blocks_{stage}", nn.ModuleList(blocks))
        if representation_size:
            self.pre_logits: nn.Module = nn.Sequential(
                OrderedDict(fc=nn.Linear(fc_dim, representation_size), act=nn.Tanh())
            )
        else:
            self.pre_logits = nn.Identity()
        self._fc: nn.Module = nn.Conv2d(embed_dims[-1], fc_dim, kernel_size=1)
        self._bn: nn.Module = nn.BatchNorm2d(fc_dim, eps=1e-5)
        self._swish: nn.Module = nn.SiLU()
        self._avg_pooling: nn.Module = nn.AdaptiveAvgPool2d(1)
        self._drop: nn.Module = nn.Dropout(dp)
        self.head: nn.Module = nn.Linear(self.head_hidden_size, num_classes) if num_classes > 0 else nn.Identity()
        self.apply(_init_weights)

    # ---- saving and loading ------------------------------------------------------------------------------------------

    @property
    def config(self) -> dict[str, Any]:
        """Constructor arguments that build a model like this one, as plain data (see :func:`read_config`).

        Raises:
            ValueError: if there are none, as after :meth:`prune_intermediate_layers`.
        """
        return read_config(self)

    def load_pretrained(self, path: str, prefix: str = "") -> None:
        """Load a checkpoint; called by timm for its ``pretrained=True``. ``prefix`` is accepted for timm."""
        from cmt_fast.models.checkpoint import load_checkpoint  # which imports this module

        load_checkpoint(self, path, adapt_in_chans=True)

    # ---- what timm's tools ask a model -------------------------------------------------------------------------------

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that weight decay should skip: the position bias tables, unless ``decay_relative_pos``."""
        return set() if self.decay_relative_pos else {f"relative_pos_{stage}" for stage in self.stages}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns that sort parameter names into layers, for layer-wise learning rate decay (timm's convention).

        A group is a block, or a whole stage if ``coarse``; patch embedding and bias table belong to the stage's first, the
        layers between the last block and the classifier to the last. timm gives what no pattern matches, the classifier,
        a group of its own.
        """
        matcher: dict[str, Any] = {"stem": r"^stem_"}
        for stage in self.stages:
            before = rf"^(?:patch_embed|relative_pos)_{stage}"
            if coarse:
                matcher[f"blocks_{stage}"] = [(rf"{before}|^blocks_{stage}", None)]
            else:
                matcher[f"blocks_{stage}"] = [(rf"^blocks_{stage}\.(\d+)", None), (before, (0,))]
        matcher["neck"] = [(r"^(?:_fc|_bn|pre_logits)", (99999,))]
        return matcher

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass instead of storing its activations.

        Unlike plain ``torch.utils.checkpoint``, BatchNorm statistics are updated once a step, not twice.
        """
        self.grad_checkpointing = enable

    def set_low_residual(self, enable: bool = True) -> None:
        """Under autocast, keep the residual stream of the blocks in autocast's 16 bits, the default; without autocast this does nothing.

        The original's stream is float32 there, because LayerNorm returns float32: with ``False`` every block reads and writes twice the
        bytes, and keeps them for the backward pass. In 16 bits each of the three sums of a block is rounded; norms, statistics and sums
        inside of the operations stay float32. What it costs in accuracy: docs/training.md.
        """
        self.low_residual = enable

    def get_classifier(self) -> nn.Module:
        """The last linear layer, or an Identity without classes."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by a new one for ``num_classes`` (0 for none), initialised as at construction."""
        pool = self.global_pool if global_pool is None else global_pool
        _check_integers(0, num_classes=num_classes)
        _check_pool(pool, num_classes)
        self.num_classes, self.global_pool = num_classes, pool
        self.head = nn.Identity()
        if num_classes > 0:
            where = self.stem_conv1.weight
            self.head = nn.Linear(self.head_hidden_size, num_classes, device=where.device, dtype=where.dtype)
            self.head.apply(_init_weights)

    @torch.no_grad()
    def set_input_size(self, img_size: int | Sequence[int]) -> None:
        """Make ``img_size`` the model's own: its position bias tables are resized once, into new parameters."""
        size = image_size(img_size)
        for stage, old, new in zip(self.stages, self._own_grids(), stage_grids(size, self.sr_ratios)):
            table = resize_relative_pos(self._part("relative_pos", stage), *old, *new)
            self.register_parameter(f"relative_pos_{stage}", nn.Parameter(table.clone()))
            self._part("patch_embed", stage).grid_size = new.query
        self.img_size = size

    # ---- forward -----------------------------------------------------------------------------------------------------

    def forward_stem(self, x: Tensor) -> Tensor:
        """Three 3x3 convolutions, each followed by GELU and BatchNorm. (B, in_chans, H, W) -> (B, stem, H / 2, W / 2).

        A part for those who want it alone: :meth:`forward` gives the last GELU and BatchNorm to the first patch embedding.
        """
        return self.stem_norm3(self.stem_relu3(self._stem_convolutions(x)))

    def forward_stage(
        self, stage: str, x: Tensor, grid: StageGrid, own: StageGrid, before: Sequence[nn.Module] = ()
    ) -> Tensor:
        """Patch embedding and blocks of one stage. (B, C, H, W) -> (B, C', H / 2, W / 2), channels_last in memory.

        ``before``: activation and BatchNorm that x is to pass first, see :class:`cmt_fast.modules.PatchEmbed`.
        """
        table = self._part("relative_pos", stage)
        bias = resize_relative_pos(table, *own, *grid)
        x, (h, w) = self._embedded(stage, x, before)
        blocks = self._part("blocks", stage)
        if self.grad_checkpointing and torch.is_grad_enabled():
            for block in blocks:
                x = _checkpointed(block, x, h, w, bias)
        else:
            x = run_blocks(blocks, x, h, w, bias)
        return x.transpose(1, 2).unflatten(2, (h, w))

    def _forward_stages(self, x: Tensor, count: int) -> Iterator[Tensor]:
        grids = self._check_input(x)
        x = self._stem_convolutions(x)
        before: Sequence[nn.Module] = (self.stem_relu3, self.stem_norm3)
        for stage, grid, own in zip(self.stages[:count], grids, self._own_grids()):
            x = self.forward_stage(stage, x, grid, own, before)
            before = ()
            yield x

    def forward_features(self, x: Tensor) -> Tensor:
        """The last stage's map: (B, in_chans, H, W) -> (B, embed_dims[-1], H / 32, W / 32).

        By timm's convention the map is not pooled; the original's pooled vector is
        ``forward_head(forward_features(x), pre_logits=True)``.
        """
        *_, x = self._forward_stages(x, len(self.stages))
        return x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """1x1 convolution, BatchNorm, swish, average pool, dropout, classifier.

        Args:
            x: (B, embed_dims[-1], h, w), as :meth:`forward_features` returns.
            pre_logits: stop before the classifier.

        Returns:
            (B, num_classes), or (B, head_hidden_size) before the classifier or without classes.
        """
        x = self._swish(self._bn(self._fc(x)))
        if self.global_pool:
            x = self._avg_pooling(x).flatten(1)
        x = self.pre_logits(self._drop(x))
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        """Class scores: (B, in_chans, H, W) -> (B, num_classes)."""
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Feature maps of the stages, by timm's convention.

        Args:
            x: (B, in_chans, H, W).
            indices: which stages: a list (negative counts from the end), the last n if an integer, all if None.
            norm: accepted for timm; CMT has no final norm.
            stop_early: do not run stages after the last one asked for.
            output_fmt: only ``"NCHW"``.
            intermediates_only: leave out the final map.

        Returns:
            The maps, (B, C, H / r, W / r) each; or (final map, maps).
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt must be 'NCHW', got {output_fmt!r}")
        take = feature_indices(indices, len(self.stages))
        count = max(take) + 1 if stop_early else len(self.stages)
        maps = list(self._forward_stages(x, count))
        chosen = [maps[i] for i in take]
        return chosen if intermediates_only else (maps[-1], chosen)

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove the stages after the last of ``indices``, and the head (timm's convention). Returns the indices."""
        take = feature_indices(indices, len(self.stages))
        for stage in self.stages[max(take) + 1 :]:
            for name in (f"patch_embed_{stage}", f"relative_pos_{stage}", f"blocks_{stage}"):
                delattr(self, name)
        self.stages = self.stages[: max(take) + 1]
        if prune_head:
            self._fc = self._bn = self._swish = self._avg_pooling = self.pre_logits = nn.Identity()
            self.reset_classifier(0)
        return take

    # ---- inside ------------------------------------------------------------------------------------------------------

    def _part(self, name: str, stage: str) -> Any:
        return getattr(self, f"{name}_{stage}")

    def _stem_convolutions(self, x: Tensor) -> Tensor:
        """What :meth:`forward_stem` does up to the third convolution."""
        if x.is_cuda or x.is_meta:  # one copy for what the convolution wants there: NHWC, in autocast's dtype
            dtype = x.dtype if not_plain("", self.stem_conv1, nn.Conv2d) else product_dtype(x)
            x = x.to(dtype, memory_format=torch.channels_last)
        x = nhwc(self.stem_conv1(x))
        x = activated_conv(x, act=self.stem_relu1, bn=self.stem_norm1, conv=self.stem_conv2)
        return nchw(activated_conv(x, act=self.stem_relu2, bn=self.stem_norm2, conv=self.stem_conv3))

    def _embedded(self, stage: str, x: Tensor, before: Sequence[nn.Module]) -> tuple[Tensor, tuple[int, int]]:
        """Tokens of a stage in the dtype of its residual stream, and their grid; what takes the place of a plain PatchEmbed gets x alone."""
        embed = self._part("patch_embed", stage)
        dtype = autocast_dtype(x) if self.low_residual else None
        if not not_plain("", embed, PatchEmbed):
            return embed(x, before=before, dtype=dtype)
        for part in before:
            x = part(x)
        x, grid = embed(x)
        return x if dtype is None else x.to(dtype), grid

    def _own_grids(self) -> list[StageGrid]:
        return stage_grids(self.img_size, self.sr_ratios)

    def _check_input(self, x: Tensor) -> list[StageGrid]:
        if not isinstance(x, Tensor) or x.dim() != 4 or x.shape[1] != self.in_chans:
            hint = "; add the batch dimension with x.unsqueeze(0)" if isinstance(x, Tensor) and x.dim() == 3 else ""
            raise ValueError(f"the input must have shape (B, {self.in_chans}, H, W), got {shape_of(x)}{hint}")
        if not x.is_floating_point():
            raise TypeError(f"the input must be floating point, got {x.dtype}: scale and normalise the image first")
        weight = self.stem_conv1.weight
        if x.device != weight.device:
            raise ValueError(f"the input is on {x.device} but the model is on {weight.device}; move one of them")
        if x.dtype != weight.dtype and autocast_dtype(x) is None:
            raise TypeError(
                f"the input is {x.dtype} but the model is {weight.dtype}: use input.to({weight.dtype}), model.to({x.dtype}) or autocast"
            )
        return stage_grids((x.shape[2], x.shape[3]), self.sr_ratios)


def feature_indices(indices: int | Sequence[int] | None, count: int) -> list[int]:
    """Resolve timm-style indices of ``count`` feature maps to a list of 0 .. count - 1.

    Raises:
        ValueError: if one is out of range.
        TypeError: if they are no integers.
    """
    if indices is None:
        return list(range(count))
    if isinstance(indices, int):
        if not 1 <= indices <= count:
            raise ValueError(f"indices must be a list, or the number of last maps wanted (1 to {count}), got {indices}")
        return list(range(count - indices, count))
    if isinstance(indices, str) or not all(isinstance(i, int) for i in indices):
        raise TypeError(f"indices must be a list of integers, or an integer, got {indices!r}")
    resolved = [i + count if i < 0 else i for i in indices]
    if not resolved or not all(0 <= i < count for i in resolved):
        raise ValueError(f"indices must name stages 0 to {count - 1} (or -{count} to -1), got {list(indices)}")
    return resolved


def _check_integers(least: int, **values: Any) -> None:
    for name, value in values.items():
        if not isinstance(value, int):
            raise TypeError(f"{name} must be an integer, got {value!r}")
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")


def _check_stages(kind: Any, **values: Any) -> None:
    for name, value in values.items():
        four = isinstance(value, Sequence) and len(value) == 4
        if not four or not all(isinstance(v, kind) and v > 0 for v in value):
            number = "integers" if kind is int else "numbers"
            raise ValueError(f"{name} must hold four positive {number}, one a stage, got {value!r}")


def _check_rates(**values: Any) -> None:
    for name, value in values.items():
        if not isinstance(value, (int, float)) or not 0 <= value < 1:
            raise ValueError(f"{name} must be a probability in [0, 1), got {value!r}")


def _check_pool(global_pool: str, num_classes: int) -> None:
    if global_pool not in ("avg", ""):
        raise ValueError(f"global_pool must be 'avg' or '' (none), got {global_pool!r}")
    if not global_pool and num_classes > 0:
        raise ValueError(
            f"global_pool='' needs num_classes=0: the classifier takes pooled vectors, got num_classes={num_classes}"
        )


def _init_weights(module: nn.Module) -> None:
    """The original's initialisation; ``fan_out`` of a depthwise convolution ignores its groups there too."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
    elif isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out")
    elif isinstance(module, (nn.LayerNorm, nn.BatchNorm2d)):
        if module.weight is not None:
            nn.init.ones_(module.weight)
    else:
        return
    if module.bias is not None:
        nn.init.zeros_(module.bias)


@contextlib.contextmanager
def _scratch_statistics(block: nn.Module) -> Iterator[None]:
    """Let the BatchNorms of ``block`` update copies of their running statistics, which are thrown away."""
    norms = [m for m in block.modules() if isinstance(m, _BatchNorm)]
    kept = [dict(norm._buffers) for norm in norms]
    for norm, buffers in zip(norms, kept):
        norm._buffers.update({name: None if b is None else b.clone() for name, b in buffers.items()})
    try:
        yield
    finally:
        for norm, buffers in zip(norms, kept):
            norm._buffers.update(buffers)


def _checkpointed(block: nn.Module, x: Tensor, h: int, w: int, bias: Tensor) -> Tensor:
    """Run ``block`` without storing activations; its recomputation must not update the BatchNorm statistics again."""
    if torch.compiler.is_compiling():  # the compiler moves updates out of the recomputed region by itself
        return checkpoint(block, x, h, w, bias, use_reentrant=False)
    contexts = (contextlib.nullcontext(), _scratch_statistics(block))
    return checkpoint(block, x, h, w, bias, use_reentrant=False, context_fn=lambda: contexts)
