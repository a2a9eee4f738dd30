"""Reading a model's constructor arguments back from its modules."""

from __future__ import annotations

from typing import Any

from torch import nn

STAGES = ("a", "b", "c", "d")


def read_config(model: Any, *, any_norm: bool = False) -> dict[str, Any]:
    """Constructor arguments of :class:`cmt_fast.CMT` that build a model of the same layout; plain data only.

    Works on any model with the original's attributes, so it also reads an instance of the original class. The arguments
    come from the first block of each stage; that all blocks are alike is not checked here.

    Args:
        model: a CMT, ours or the original's.
        any_norm: accept blocks whose norms are not the default ones, which no plain data can describe.

    Raises:
        ValueError: if no arguments build such a model: stages or the head were removed, or the blocks' norms are not the
            default ones (``norm_layer`` is code, not data).
        AttributeError: if ``model`` does not have the layout at all.
    """
    stem = model.stem_conv1
    missing = [stage for stage in STAGES if not hasattr(model, f"blocks_{stage}")]
    if missing or isinstance(model._fc, nn.Identity):
        gone = f"stages {', '.join(missing)}" if missing else "the head"
        raise ValueError(f"no constructor arguments build this model: {gone} were removed from it")
    first = [getattr(model, f"blocks_{stage}")[0] for stage in STAGES]
    last = getattr(model, f"blocks_{STAGES[-1]}")[-1]
    dims = [getattr(model, f"patch_embed_{stage}").proj.out_channels for stage in STAGES]
    norms = {f"{type(norm).__name__} eps {getattr(norm, 'eps', None)}" for b in first for norm in (b.norm1, b.norm2)}
    if not any_norm and norms != {"LayerNorm eps 1e-06"}:
        raise ValueError(
            f"the blocks' norms are not the default LayerNorm with eps 1e-6 but {', '.join(sorted(norms))}"
        )
    return {
        "img_size": _img_size(model),
        "in_chans": stem.in_channels,
        "num_classes": getattr(model.head, "out_features", 0),
        "embed_dims": dims,
        "stem_channel": stem.out_channels,
        "fc_dim": model._fc.out_channels,
        "num_heads": [block.attn.num_heads for block in first],
        "mlp_ratios": [_ratio(dim, block.mlp.proj.in_channels) for dim, block in zip(dims, first)],
        "qkv_bias": first[0].attn.q.bias is not None,
        "qk_scale": _qk_scale(dims, [block.attn for block in first]),
        "representation_size": None if isinstance(model.pre_logits, nn.Identity) else model.pre_logits[0].out_features,
        "drop_rate": first[0].mlp.drop.p,
        "attn_drop_rate": first[0].attn.attn_drop.p,
        "drop_path_rate": getattr(last.drop_path, "drop_prob", 0.0),
        "depths": [len(getattr(model, f"blocks_{stage}")) for stage in STAGES],
        "qk_ratio": _qk_ratio(dims, [block.attn.qk_dim for block in first]),
        "sr_ratios": [block.attn.sr_ratio for block in first],
        "dp": model._drop.p,
        "global_pool": getattr(model, "global_pool", "avg"),
        "decay_relative_pos": "relative_pos_a" not in getattr(model, "no_weight_decay", set)(),
    }


def _img_size(model: Any) -> list[int]:
    if hasattr(model, "img_size"):
        return list(model.img_size)
    return [2 * side for side in model.patch_embed_a.img_size]  # the original keeps the size of the stem's output


def _ratio(dim: int, hidden: int) -> float:
    """The shortest decimal r with ``int(dim * r) == hidden``: 165 hidden channels of 46 are 3.6, not 3.587."""
    for digits in range(8):
        ratio = round(hidden / dim, digits)
        if int(dim * ratio) == hidden:
            return ratio
    return (hidden + 0.5) / dim


def _qk_scale(dims: list[int], attentions: list[Any]) -> float | None:
    if all(attn.scale == (dim // attn.num_heads) ** -0.5 for dim, attn in zip(dims, attentions)):
        return None
    scales = {attn.scale for attn in attentions}
    if len(scales) > 1:
        raise ValueError(f"the stages have different qk_scale ({', '.join(map(str, sorted(scales)))})")
    return scales.pop()


def _qk_ratio(dims: list[int], qk_dims: list[int]) -> int:
    for ratio in range(1, min(dims) + 1):
        if [dim // ratio for dim in dims] == qk_dims:
            return ratio
    raise ValueError(f"no qk_ratio gives q and k {qk_dims} channels where the stages have {dims}")
