"""Fitting a state dict to a model: names, classifier, input channels, position bias. The model is only looked at."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from cmt_fast.models.checkpoint_io import CheckpointError
from cmt_fast.models.cmt import CMT, STAGES
from cmt_fast.models.grids import Grid, StageGrid, image_size, stage_grids
from cmt_fast.models.variants import VARIANTS
from cmt_fast.ops.attention.relative_pos import resize_relative_pos

# What torch.compile, DDP, FSDP and activation checkpointing put between the parts of a name.
_WRAPPERS = frozenset({"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
_ANCHOR = "stem_conv1.weight"
_HEAD = ("_fc", "_bn", "pre_logits", "head")


@dataclass
class LoadReport:
    """What :func:`cmt_fast.load_checkpoint` did beside copying; printable.

    Attributes:
        source: the file, and the entry in it.
        loaded: how many tensors were loaded.
        resized: bias tables that were resized, with their shape in the file and in the model.
        adapted: weights adapted to other input channels, with both shapes.
        skipped: names that were not loaded, with the reason.
    """

    source: str
    loaded: int = 0
    resized: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=dict)
    adapted: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"loaded {self.loaded} tensors from {self.source}"]
        lines += [f"resized {name}: {old} -> {new}" for name, (old, new) in self.resized.items()]
        lines += [f"adapted {name}: {old} -> {new}" for name, (old, new) in self.adapted.items()]
        for reason in dict.fromkeys(self.skipped.values()):
            names = [name for name, why in self.skipped.items() if why == reason]
            lines.append(f"skipped {_some(names)}: {reason}")
        return "\n".join(lines)


def find_cmt(model: nn.Module) -> CMT:
    """The CMT inside DDP, ``torch.compile``, an EMA, a :class:`cmt_fast.CMTFeatures` or timm's feature wrapper.

    Raises:
        TypeError: if there is none.
    """
    inner: Any = model
    while not isinstance(inner, CMT):
        for name in ("_orig_mod", "module", "model", "ema"):
            if isinstance(getattr(inner, name, None), nn.Module):
                inner = getattr(inner, name)
                break
        else:
            raise TypeError(f"expected a cmt_fast.CMT, or a wrapper of one, got {type(model).__name__}")
    return inner


def clean_names(state: Mapping[str, Any]) -> dict[str, Any]:
    """``state`` with the names of a bare CMT: without what DDP, ``torch.compile`` or an enclosing module put before them.

    Raises:
        CheckpointError: if two names become one.
    """
    cleaned = {".".join(part for part in name.split(".") if part not in _WRAPPERS): v for name, v in state.items()}
    anchor = next((name for name in cleaned if name.endswith("." + _ANCHOR)), _ANCHOR)
    prefix = anchor.removesuffix(_ANCHOR)
    if all(name.startswith(prefix) for name in cleaned):
        cleaned = {name.removeprefix(prefix): value for name, value in cleaned.items()}
    if len(cleaned) < len(state):
        raise CheckpointError(
            "some weights occur twice, with and without a wrapper's prefix (module., _orig_mod.): save one of the two state dicts"
        )
    return cleaned


def fit_state_dict(
    model: CMT,
    state: Mapping[str, Any],
    *,
    source: str = "the state dict",
    img_size: int | Sequence[int] | None = None,
    adapt_in_chans: bool = False,
) -> tuple[dict[str, Tensor], LoadReport]:
    """Make ``state`` fit ``model``: everything of the result has a name and the shape of the model's.

    Args:
        model: the target; not changed.
        state: names to tensors.
        source: what to call ``state`` in messages.
        img_size: for which image the bias tables of ``state`` are made; inferred, if it was square, when not given.
        adapt_in_chans: sum or repeat the first convolution's weights where the number of input channels differs.

    Raises:
        CheckpointError: if anything but the bias tables' size and the classifier does not match; every name is listed.
    """
    state = clean_names(state)
    targets = clean_names(model.state_dict())
    report = LoadReport(source)
    state = _without_removed(model, state, report)
    targets = _without_classifier(model, state, targets, report)
    if adapt_in_chans:
        _adapt_stem(state, targets, report)
    tables = {
        stage: state[f"relative_pos_{stage}"]
        for stage in model.stages
        if _is_table(state.get(f"relative_pos_{stage}"), targets[f"relative_pos_{stage}"])
    }
    _check_match(model, state, targets, {f"relative_pos_{stage}" for stage in tables}, source)
    for stage, (old, new) in _grids(model, tables, targets, img_size, source).items():
        name = f"relative_pos_{stage}"
        if old != new:
            state[name] = resize_relative_pos(tables[stage].to(targets[name].dtype), *old, *new)
            report.resized[name] = (tuple(tables[stage].shape), tuple(targets[name].shape))
    report.loaded = len(targets)
    return {name: state[name] for name in targets}, report


def _without_removed(model: CMT, state: dict[str, Any], report: LoadReport) -> dict[str, Any]:
    """Leave out the weights of stages and of a head that the model no longer has (a feature extractor)."""
    gone = {part: "the model has no head" for part in _HEAD if isinstance(model._fc, nn.Identity)}
    for stage in STAGES:
        if stage not in model.stages:
            for part in ("patch_embed", "relative_pos", "blocks"):
                gone[f"{part}_{stage}"] = f"the model has no stage {stage}"
    for name in state:
        part = name.partition(".")[0]
        if part in gone:
            report.skipped[name] = gone[part]
    return {name: value for name, value in state.items() if name not in report.skipped}


def _without_classifier(
    model: CMT, state: dict[str, Any], targets: dict[str, Tensor], report: LoadReport
) -> dict[str, Tensor]:
    """Skip the classifier, on both sides, where the numbers of classes differ. Returns what is still to be loaded."""
    weight = state.get("head.weight")
    classes = weight.shape[0] if isinstance(weight, Tensor) and weight.dim() == 2 else 0
    target = targets.get("head.weight")
    width_differs = target is not None and isinstance(weight, Tensor) and weight.shape[1:] != target.shape[1:]
    if classes == model.num_classes or width_differs:
        return targets
    names = ("head.weight", "head.bias")
    reason = f"the file has {classes} classes, the model {model.num_classes}"
    if model.num_classes > 0:
        reason += "; the model keeps its own classifier"
    for name in names:
        if name in state or name in targets:
            report.skipped[name] = reason
        state.pop(name, None)
    return {name: value for name, value in targets.items() if name not in names}


def _adapt_stem(state: dict[str, Any], targets: dict[str, Tensor], report: LoadReport) -> None:
    weight, target = state.get(_ANCHOR), targets[_ANCHOR]
    if not isinstance(weight, Tensor) or weight.dim() != 4 or weight.shape[1] == target.shape[1]:
        return
    old, new = weight.shape[1], target.shape[1]
    if new == 1:
        adapted = weight.float().sum(1, keepdim=True)
    else:
        adapted = weight.float().repeat(1, math.ceil(new / old), 1, 1)[:, :new] * (old / new)
    state[_ANCHOR] = adapted.to(weight.dtype)
    report.adapted[_ANCHOR] = (tuple(weight.shape), tuple(adapted.shape))


def _is_table(value: Any, target: Tensor) -> bool:
    return isinstance(value, Tensor) and value.dim() == 3 and value.shape[0] == target.shape[0]


def _grids(
    model: CMT,
    tables: dict[str, Tensor],
    targets: dict[str, Tensor],
    img_size: int | Sequence[int] | None,
    source: str,
) -> dict[str, tuple[StageGrid, StageGrid]]:
    """Per stage the grids of the table in the file and of the model's."""
    shapes = {stage: (table.shape[1], table.shape[2]) for stage, table in tables.items()}
    own = dict(zip(STAGES, stage_grids(model.img_size, model.sr_ratios)))
    if img_size is not None:
        size = image_size(img_size)
    elif all(tables[stage].shape == targets[f"relative_pos_{stage}"].shape for stage in tables):
        return {}
    else:
        side = 4 * math.isqrt(shapes["a"][0])  # stage a has a token every four pixels
        size = (side, side)
    grids = _matching_grids(size, model.sr_ratios, shapes)
    if grids is None:
        odd = [stage for stage in tables if tables[stage].shape != targets[f"relative_pos_{stage}"].shape]
        if len(odd) == 1 and img_size is None and not _is_near(model, shapes):
            name, shape = f"relative_pos_{odd[0]}", tuple(tables[odd[0]].shape)
            raise CheckpointError(
                f"{name} {shape} of {source} belongs to no image size, and the model's is {tuple(targets[name].shape)}, as "
                "every other table's size is the model's: the file is damaged or was edited"
            )
        found = ", ".join(f"relative_pos_{stage} {tuple(table.shape)}" for stage, table in tables.items())
        problem = (
            "do not belong to a square image: pass source_img_size=(height, width), the size the weights were trained at"
            if img_size is None
            else f"do not belong to an image of {size[0]} x {size[1]} pixels: pass the size the weights were trained at"
        )
        raise CheckpointError(f"the position bias tables of {source} ({found}) {problem}")
    return {stage: (grids[stage], own[stage]) for stage in tables}


def _is_near(model: CMT, shapes: dict[str, tuple[int, int]]) -> bool:
    """Whether the tables may be of an image that differs by one token of stage a, the finest, in height or width."""
    height, width = model.img_size
    near = [(height + dy, width + dx) for dy in (-4, 0, 4) for dx in (-4, 0, 4)]
    return any(_matching_grids(size, model.sr_ratios, shapes) is not None for size in near)


def _matching_grids(
    size: Grid, sr_ratios: Sequence[int], shapes: dict[str, tuple[int, int]]
) -> dict[str, StageGrid] | None:
    try:
        grids = dict(zip(STAGES, stage_grids(size, sr_ratios)))
    except ValueError:  # too small for these reductions
        return None
    fit = all((grids[stage].num_queries, grids[stage].num_keys) == shape for stage, shape in shapes.items())
    return grids if fit else None


def _check_match(
    model: CMT, state: dict[str, Any], targets: dict[str, Tensor], resizable: set[str], source: str
) -> None:
    missing = [name for name in targets if name not in state]
    unexpected = [name for name in state if name not in targets]
    different = []
    for name, target in targets.items():
        value = state.get(name)
        if name not in state or name in resizable:
            continue
        if not isinstance(value, Tensor):
            different.append(f"{name} ({type(value).__name__} in the file, a tensor in the model)")
        elif value.shape != target.shape:
            different.append(f"{name} ({tuple(value.shape)} in the file, {tuple(target.shape)} in the model)")
        elif value.is_floating_point() != target.is_floating_point():
            different.append(f"{name} ({value.dtype} in the file, {target.dtype} in the model)")
    if not (missing or unexpected or different):
        return
    lines = [f"{source} does not match the model, which was left as it is:"]
    for what, names in (("missing", missing), ("unexpected", unexpected), ("of other shape or type", different)):
        if names:
            lines.append(f"  {len(names)} {what}: {_some(names)}")
    lines.append(f"  {_likely_cause(model, state, targets, different)}")
    raise CheckpointError("\n".join(lines))


def _some(names: Sequence[str], limit: int = 10) -> str:
    return ", ".join(names[:limit]) + (f", ... ({len(names)} in all)" if len(names) > limit else "")


def _likely_cause(model: CMT, state: dict[str, Any], targets: dict[str, Tensor], different: list[str]) -> str:
    if not set(state) & set(targets):
        return (
            "No name is one of a CMT's: are these weights of another network, or is key= the wrong entry of the file?"
        )
    theirs, ours = layout_of(state), layout_of(targets)
    if theirs != ours:
        return f"Likely cause: these are weights of {describe_layout(theirs)}, the model is {describe_layout(ours)}."
    if len(different) == 1 and different[0].startswith(_ANCHOR):
        return (
            f"Likely cause: the model has in_chans={model.in_chans}; adapt_in_chans=True adapts the first convolution."
        )
    return "Likely cause: the model was built with other arguments, or the file is not of a complete CMT."


def layout_of(state: Mapping[str, Any]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(embed_dims, depths) as the names and shapes tell; 0 for what is not there."""
    dims, depths = [], []
    for stage in STAGES:
        weight = state.get(f"patch_embed_{stage}.proj.weight")
        dims.append(weight.shape[0] if isinstance(weight, Tensor) and weight.dim() == 4 else 0)
        depths.append(len({name.split(".")[1] for name in state if name.startswith(f"blocks_{stage}.")}))
    return tuple(dims), tuple(depths)


def describe_layout(layout: tuple[tuple[int, ...], tuple[int, ...]]) -> str:
    """What a layout is called: ``a cmt_s``, or its widths and depths."""
    for name, variant in VARIANTS.items():
        if (variant.config["embed_dims"], variant.config["depths"]) == layout:
            return f"a {name}"
    return f"a CMT with embed_dims {layout[0]} and depths {layout[1]}"
