"""From a trained CMT to a packed program: fold, absorb, pad, round. Free of any backend."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cmt_fast.inference import fold, program
from cmt_fast.inference.packable import check_packable
from cmt_fast.inference.program import PackedModel, Padding, round_up
from cmt_fast.models.cmt import CMT
from cmt_fast.models.features import CMTFeatures
from cmt_fast.models.grids import StageGrid, image_size, stage_grids
from cmt_fast.modules import LMHSA, Block, PatchEmbed
from cmt_fast.ops.attention.relative_pos import resize_relative_pos

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@torch.no_grad()
def pack(
    model: CMT | CMTFeatures,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
    img_size: int | Sequence[int] | None = None,
    pad: Padding | None = None,
    absorb: Collection[str] | None = None,
    base2: bool = False,
) -> PackedModel:
    """Pack a CMT for inference; ``model`` is not changed and its parameters are not shared.

    Exact in real arithmetic against ``model.eval()``, whatever mode ``model`` is in: everything is folded in float64 and
    rounded once. In the result are no LayerNorm affine but those of the patch embeddings, no BatchNorm but the affines that a
    zero padding follows, no bias of k or v.

    Args:
        model: a CMT or CMTFeatures itself, not wrapped; of an original instance, ``cmt_fast.accelerate(model)``.
        dtype: of matrices and maps: float64, float32, bfloat16 or float16.
        device: where to put the program; by default where the model is.
        img_size: side in pixels, or (height, width), to make the position bias tables for; by default the model's own. Other
            sizes run too, with the tables resized from these at each call.
        pad: multiples that widths are padded to, ``Padding()`` by default.
        absorb: stages (of ``"abcd"``) whose query and output projections are put into the keys and values; by default
            those where that takes fewer multiply-adds at ``img_size``: a and b of the published variants.
        base2: count the attention's logits in powers of 2, for kernels that have exp2.

    Returns:
        The program; :func:`run` runs it, :func:`save_packed` saves it.

    Raises:
        TypeError: if ``model`` is not a CMT or CMTFeatures.
        ValueError: if a part of it is not what a CMT is built of (another norm layer, a hook, a replaced module, BatchNorm
            without running statistics), if its head was removed, if it holds no data (device ``meta``), if a folded weight is
            not finite in ``dtype``, or on an argument; the message says which.
    """
    cmt, out_indices = _parts(model)
    features = isinstance(model, CMTFeatures)
    check_packable(cmt, head=not features)
    if dtype not in _DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(map(str, _DTYPES))}, got {dtype}")
    if any(tensor.is_meta for tensor in cmt.state_dict().values()):
        raise ValueError("the model is on the meta device and holds no weights: load a checkpoint before packing")
    if absorb is not None and not set(absorb) <= set(cmt.stages):
        raise ValueError(f"absorb must name stages of {', '.join(cmt.stages)}, got {absorb!r}")
    size = cmt.img_size if img_size is None else image_size(img_size)
    packer = _Packer(pad or Padding(), dtype, torch.device(device) if device else cmt.stem_conv1.weight.device)

    last_norm = fold.batch_norm(cmt.stem_norm3)
    stages = []
    grids = zip(stage_grids(cmt.img_size, cmt.sr_ratios), stage_grids(size, cmt.sr_ratios))
    for stage, (own, grid) in zip(cmt.stages, grids):
        blocks: Any = getattr(cmt, f"blocks_{stage}")
        table = resize_relative_pos(fold.exact(getattr(cmt, f"relative_pos_{stage}")), *own, *grid)
        absorbed = absorption_pays(blocks[0].attn, grid) if absorb is None else stage in absorb
        embed = packer.patch_embed(getattr(cmt, f"patch_embed_{stage}"), last_norm if stage == "a" else None)
        stages.append(
            program.Stage(
                patch_embed=embed,
                table=packer.matrix(table * fold.logit_unit(base2)),
                blocks=tuple(packer.block(block, absorbed, base2) for block in blocks),
            )
        )
    return PackedModel(
        stem=packer.stem(cmt),
        stages=tuple(stages),
        head=None if features else packer.head(cmt),
        out_indices=out_indices,
        img_size=size,
        in_chans=cmt.in_chans,
    )


def absorption_pays(attn: LMHSA, grid: StageGrid) -> bool:
    """Whether absorbing the query and output projections takes fewer multiply-adds an image.

    Plain: a query costs its projection, its logits, its weighted sum and the output projection; a key its k and v. Absorbed: a
    query costs M logits and a weighted sum of C channels a head, a key two C x C products a head.
    """
    n, m, h = grid.num_queries, grid.num_keys, attn.num_heads
    c, q = attn.proj.out_features, attn.qk_dim
    plain = n * (c * q + q * m + c * m + c * c) + m * c * (q + c)
    absorbed = 2 * n * h * m * c + 2 * m * h * c * c
    return absorbed < plain


def _parts(model: nn.Module) -> tuple[CMT, tuple[int, ...]]:
    """The CMT inside, and the stages whose maps are wanted (none: class scores)."""
    if type(model) is CMTFeatures:
        if model._forward_hooks or model._forward_pre_hooks or "forward" in vars(model):
            raise ValueError("this model cannot be packed: it has hooks or a replaced forward. Remove them first")
        return model.model, model.out_indices
    if not isinstance(model, CMT):
        raise TypeError(
            f"expected a cmt_fast.CMT or CMTFeatures, got {type(model).__name__}: of a wrapped model pass what is inside, such as "
            "model.module; of an instance of the original class cmt_fast.accelerate(model)"
        )
    if isinstance(model._fc, nn.Identity):
        raise ValueError("the head of this model was removed: pack cmt_fast.CMTFeatures, which returns the maps")
    return model, ()


class _Packer:
    """Folds the modules with :mod:`fold`, then pads and rounds."""

    def __init__(self, pad: Padding, dtype: torch.dtype, device: torch.device) -> None:
        self.pad, self.dtype, self.device = pad, dtype, device
        self.wide = dtype if dtype.itemsize >= 4 else torch.float32

    def stem(self, cmt: CMT) -> program.Stem:
        channels = self.pad.channels

        def weight(conv: nn.Conv2d, inner: int) -> Tensor:
            w = fold.exact(conv.weight).permute(0, 2, 3, 1)  # (S, 3, 3, C_in)
            return self.matrix(_pad(_pad(w, 0, channels), -1, inner))

        norm1, norm2 = fold.batch_norm(cmt.stem_norm1), fold.batch_norm(cmt.stem_norm2)
        return program.Stem(
            weight1=weight(cmt.stem_conv1, 1),
            bias1=self.vector(fold.bias_of(cmt.stem_conv1), channels),
            scale1=self.vector(norm1.scale, channels),
            shift1=self.vector(norm1.shift, channels),
            weight2=weight(cmt.stem_conv2, channels),
            bias2=self.vector(fold.bias_of(cmt.stem_conv2), channels),
            scale2=self.vector(norm2.scale, channels),
            shift2=self.vector(norm2.shift, channels),
            weight3=weight(cmt.stem_conv3, channels),
            bias3=self.vector(fold.bias_of(cmt.stem_conv3), channels),
        )

    def patch_embed(self, embed: PatchEmbed, previous: fold.Affine | None) -> program.PatchEmbed:
        """``previous``: an affine of the input, which folds because patches have no padding."""
        channels = self.pad.channels
        weight = fold.exact(embed.proj.weight).permute(0, 2, 3, 1)  # (C, 2, 2, C_in)
        patches = fold.Linear(weight.flatten(1), fold.bias_of(embed.proj))
        if previous is not None:
            patches = fold.before(fold.Affine(previous.scale.repeat(4), previous.shift.repeat(4)), patches)
        norm = fold.layer_norm(embed.norm)
        return program.PatchEmbed(
            weight=self.matrix(_pad(_pad_groups(patches.weight, 1, 4, channels), 0, channels)),
            bias=self.vector(patches.bias, channels),
            scale=self.vector(norm.scale, channels),
            shift=self.vector(norm.shift, channels),
            channels=len(norm.scale),
            eps=embed.norm.eps,
        )

    def block(self, block: Block, absorbed: bool, base2: bool) -> program.Block:
        norm1, norm2 = fold.layer_norm(block.norm1), fold.layer_norm(block.norm2)
        reduction, left = fold.reduction(block.attn, norm1)
        keys = fold.attention(block.attn, norm1, left, base2)
        attend = self.absorbed if absorbed else self.projected
        kv, query, out = attend(keys, block.attn.num_heads)
        channels, hidden = self.pad.channels, self.pad.hidden
        bn1, bn2, bn3 = (fold.batch_norm(bn) for bn in (block.mlp.conv1[2], block.mlp.proj_bn, block.mlp.conv2[1]))
        expand = fold.before(norm2, fold.linear(block.mlp.conv1[0]))
        project = fold.after(fold.before(bn2, fold.linear(block.mlp.conv2[0])), bn3)
        return program.Block(
            lpu=program.LPU(
                taps=self.vector(fold.taps(block.proj, shortcut=True), channels),
                bias=self.vector(fold.bias_of(block.proj), channels),
                reduction=None if reduction is None else self.vector(reduction, channels),
                reduce=block.attn.sr_ratio,
                channels=len(norm1.scale),
                eps=_eps(block.norm1),
            ),
            kv=kv,
            attention=program.Attention(
                query_weight=query and query.weight,
                query_bias=query and query.bias,
                out_weight=out,
                out_bias=self.vector(keys.out.bias, channels),
                heads=block.attn.num_heads,
                base2=base2,
                channels=len(norm1.scale),
                eps=_eps(block.norm1),
            ),
            expand=program.Expand(
                weight=self.matrix(_pad(_pad(expand.weight, 0, hidden), 1, channels)),
                bias=self.vector(expand.bias, hidden),
                scale=self.vector(bn1.scale, hidden),
                shift=self.vector(bn1.shift, hidden),
                channels=len(norm2.scale),
                eps=_eps(block.norm2),
            ),
            depthwise_project=program.DepthwiseProject(
                taps=self.vector(fold.taps(block.mlp.proj, shortcut=True), hidden),
                bias=self.vector(fold.bias_of(block.mlp.proj), hidden),
                weight=self.matrix(_pad(_pad(project.weight, 0, channels), 1, hidden)),
                out_bias=self.vector(project.bias, channels),
            ),
        )

    def projected(self, keys: fold.Keys, heads: int) -> tuple[program.KV, fold.Linear | None, Tensor | None]:
        """The K/V step, the query's layer and the output weight, padded head by head."""
        channels, head = self.pad.channels, self.pad.head
        key, value = (_pad_groups(weight, 0, heads, head) for weight in (keys.key, keys.value))
        kv = program.KV(
            weight=self.matrix(_pad(torch.cat([key, value]), 1, channels)),
            heads=heads,
            key_dim=len(key) // heads,
            value_dim=len(value) // heads,
            bias_dim=0,
        )
        query = fold.Linear(
            weight=self.matrix(_pad(_pad_groups(keys.query.weight, 0, heads, head), 1, channels)),
            bias=self.vector(_pad_groups(keys.query.bias, 0, heads, head), 1),
        )
        return kv, query, self.matrix(_pad(_pad_groups(keys.out.weight, 1, heads, head), 0, channels))

    def absorbed(self, keys: fold.Keys, heads: int) -> tuple[program.KV, fold.Linear | None, Tensor | None]:
        """The K/V step; there is no query and no output weight."""
        channels = self.pad.channels
        key, value, bias = fold.absorb(keys, heads)
        key, value = (_pad_groups(weight, 0, heads, channels) for weight in (key, value))
        width = len(key) // heads
        bias = _pad(bias, 0, channels)
        kv = program.KV(
            weight=self.matrix(_pad(torch.cat([key, value, bias]), 1, channels)),
            heads=heads,
            key_dim=width,
            value_dim=width,
            bias_dim=len(bias),
        )
        return kv, None, None

    def head(self, cmt: CMT) -> program.Head:
        channels = self.pad.channels
        first = fold.after(fold.linear(cmt._fc), fold.batch_norm(cmt._bn))
        hidden = fold.linear(cmt.pre_logits[0]) if isinstance(cmt.pre_logits, nn.Sequential) else None
        classes = fold.linear(cmt.head) if isinstance(cmt.head, nn.Linear) else None
        return program.Head(
            weight=self.matrix(_pad(_pad(first.weight, 0, channels), 1, channels)),
            bias=self.vector(first.bias, channels),
            hidden_weight=hidden and self.matrix(_pad(_pad(hidden.weight, 0, channels), 1, channels)),
            hidden_bias=hidden and self.vector(hidden.bias, channels),
            class_weight=classes and self.matrix(_pad(classes.weight, 1, channels)),
            class_bias=classes and self.vector(classes.bias, 1),
            features=len((hidden or first).bias),
            pool=bool(cmt.global_pool),
        )

    def matrix(self, x: Tensor) -> Tensor:
        """In the dtype of the program."""
        return self._place(x, self.dtype)

    def vector(self, x: Tensor, multiple: int) -> Tensor:
        """A bias, affine or taps, (..., channels), padded and in at least float32."""
        return self._place(_pad(x, -1, multiple), self.wide)

    def _place(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        result = x.to(self.device, dtype).contiguous()
        if not bool(result.isfinite().all()):
            raise ValueError(
                f"a folded weight is not finite in {dtype} (largest magnitude {x.abs().max().item():.3g}): check the model's "
                "weights, or pack in a dtype of wider range (bfloat16, float32)"
            )
        return result


def _pad(x: Tensor, dim: int, multiple: int) -> Tensor:
    """Zeros after ``dim``, up to a multiple."""
    dim %= x.dim()
    return F.pad(x, (0, 0) * (x.dim() - 1 - dim) + (0, round_up(x.shape[dim], multiple) - x.shape[dim]))


def _pad_groups(x: Tensor, dim: int, groups: int, multiple: int) -> Tensor:
    """Zeros after each of the ``groups`` equal parts of ``dim``: heads, or the pixels of a patch."""
    return _pad(x.unflatten(dim, (groups, -1)), dim + 1, multiple).flatten(dim, dim + 1)


def _eps(norm: nn.Module) -> float:
    assert isinstance(norm, nn.LayerNorm)  # check_packable saw to it
    return norm.eps
