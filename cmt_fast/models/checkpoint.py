"""Loading weights into a model and saving them."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cmt_fast._version import __version__
from cmt_fast.models.checkpoint_fit import LoadReport, clean_names, find_cmt, fit_state_dict
from cmt_fast.models.checkpoint_io import (
    METADATA_KEY,
    Checkpoint,
    CheckpointError,
    check_plain,
    is_state_dict,
    read_checkpoint,
    write_atomically,
)
from cmt_fast.models.cmt import CMT
from cmt_fast.models.grids import image_size

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "LoadReport",
    "load_checkpoint",
    "load_model",
    "read_checkpoint",
    "save_checkpoint",
]

_log = logging.getLogger(__name__)


def load_checkpoint(
    model: nn.Module,
    path_or_url: str | os.PathLike,
    *,
    key: str | None = None,
    adapt_in_chans: bool = False,
    source_img_size: int | Sequence[int] | None = None,
    progress: bool = True,
) -> LoadReport:
    """Load weights into ``model``: all of them or, on any error, none.

    Reads the original's files, :func:`save_checkpoint`'s, timm's and bare state dicts, of ``torch.save`` or safetensors,
    with or without the prefixes of DDP and ``torch.compile``. Position bias tables of another input size are resized
    (:func:`cmt_fast.functional.resize_relative_pos`); a classifier of another number of classes is skipped with a
    warning. Nothing else may differ. The model keeps its dtype and device.

    Args:
        model: a CMT or :class:`cmt_fast.CMTFeatures` (which takes what it still has), bare or wrapped.
        path_or_url: a file, or an http(s) URL, which is downloaded once into torch's hub directory.
        key: entry of the file to take, such as ``"model_ema"``; by default ``"model"``, see :func:`read_checkpoint`.
        adapt_in_chans: fit the first convolution to another number of input channels: its weights are summed for one
            channel, else repeated and rescaled (timm's rule).
        source_img_size: image size of the weights, for files that do not record it and were not made for a square.
        progress: show a bar when downloading.

    Returns:
        What was resized, adapted and skipped; ``print`` it.

    Raises:
        CheckpointError: if the file is no checkpoint, cannot be downloaded, or does not match; every name is listed.
        OSError: if the file is missing or unreadable.
        TypeError: if ``model`` holds no CMT, or a state dict is given instead of a file.
    """
    cmt = find_cmt(model)
    if isinstance(path_or_url, Mapping):
        raise TypeError(
            f"expected a path or URL, got a {type(path_or_url).__name__}, not a file: load a state dict with "
            "model.load_state_dict(state_dict), or pass the path of its file"
        )
    if cmt.stem_conv1.weight.is_meta:
        raise CheckpointError("the model has no memory yet (device meta): call model.to_empty(device=...) first")
    checkpoint = read_checkpoint(path_or_url, key=key, progress=progress, mmap=True)
    return _load(cmt, checkpoint, source_img_size, adapt_in_chans)


def _load(
    model: CMT, checkpoint: Checkpoint, source_img_size: int | Sequence[int] | None = None, adapt_in_chans: bool = False
) -> LoadReport:
    size = checkpoint.img_size
    if source_img_size is not None:
        given = image_size(source_img_size)
        if size not in (None, given):
            raise CheckpointError(
                f"{checkpoint.path} records img_size {size}, but source_img_size says {given}: leave it out"
            )
        size = given
    source = f"{checkpoint.path}" + (f" [{checkpoint.key}]" if checkpoint.key else "")
    state, report = fit_state_dict(
        model, checkpoint.state_dict, source=source, img_size=size, adapt_in_chans=adapt_in_chans
    )
    targets = clean_names(model.state_dict())
    with torch.no_grad():
        for name, value in state.items():
            targets[name].copy_(value)
    for line in str(report).splitlines():
        _log.log(logging.WARNING if line.startswith("skipped head") else logging.INFO, line)
    return report


def load_model(path_or_url: str | os.PathLike, *, key: str | None = None, progress: bool = True) -> CMT:
    """Build and load the model of a file written by :func:`save_checkpoint`, in eval mode and in the dtype saved.

    What else the file holds (``class_names``) is in ``read_checkpoint(path).extra``.

    Raises:
        CheckpointError: as :func:`load_checkpoint`, and if the file does not say how its model is built.
        OSError: if the file is missing or unreadable.
    """
    checkpoint = read_checkpoint(path_or_url, key=key, progress=progress, mmap=True)
    if checkpoint.config is None:
        raise CheckpointError(
            f"{checkpoint.path} does not record its model's arguments (save_checkpoint writes them for complete models): "
            "build the model yourself, then load_checkpoint(model, path)"
        )
    try:
        with torch.device("meta"):  # every value comes from the file: initialise nothing
            model = CMT(**checkpoint.config)
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f"the arguments that {checkpoint.path} records (written by version {checkpoint.version}) do not build a CMT: {error}"
        ) from error
    weight = checkpoint.state_dict.get("stem_conv1.weight")
    if isinstance(weight, Tensor) and weight.is_floating_point():
        model.to(weight.dtype)
    model.to_empty(device="cpu")
    report = _load(model, checkpoint)
    if report.skipped:
        raise CheckpointError(f"{checkpoint.path} is not complete: {report}")
    return model.eval()


def save_checkpoint(
    model: nn.Module, path: str | os.PathLike, *, model_ema: nn.Module | Mapping | None = None, **extra: Any
) -> Path:
    """Save ``model`` and whatever is needed to build it again; a file that was there is replaced at once or not at all.

    The file is ``torch.save`` of ``{"model", "model_ema"?, "cmt_fast": {"version", "img_size", "config"}, **extra}``, or
    safetensors (weights, and the rest as JSON metadata) if ``path`` ends in ``.safetensors``.

    Args:
        model: a CMT or :class:`cmt_fast.CMTFeatures`, bare or wrapped by DDP or ``torch.compile``.
        path: the file to write; its folder must exist.
        model_ema: an averaged copy of the model, or its state dict.
        **extra: further entries: tensors, numbers, strings and containers of them (``class_names=[...]``).

    Returns:
        The path written.

    Raises:
        TypeError: if ``extra`` holds what a safe loader would refuse; the message names the place.
        ValueError: if the names of ``model_ema`` are not those of ``model``.
        OSError: if the file cannot be written.
    """
    cmt = find_cmt(model)
    if METADATA_KEY in extra:
        raise ValueError(f"the name {METADATA_KEY!r} is reserved for the file's metadata")
    try:
        config = cmt.config
    except ValueError as error:
        _log.warning("load_model will not be able to build this model: %s", error)
        config = None
    content: dict[str, Any] = {
        "model": _weights(cmt),
        METADATA_KEY: {"version": __version__, "img_size": list(cmt.img_size), "config": config},
    }
    if model_ema is not None:
        ema = _weights(find_cmt(model_ema) if isinstance(model_ema, nn.Module) else model_ema)
        for what, names in (("lacks", content["model"].keys() - ema), ("also holds", ema.keys() - content["model"])):
            if names:
                raise ValueError(f"model_ema is not of this model: it {what} {', '.join(sorted(names)[:10])}")
        content["model_ema"] = ema
    for name, value in extra.items():
        check_plain(value, name)
    content.update(extra)
    if Path(path).suffix == ".safetensors":
        data = _as_safetensors(content)
        return write_atomically(path, lambda file: file.write(data))
    return write_atomically(path, lambda file: torch.save(content, file))


def _weights(model: CMT | Mapping) -> dict[str, Tensor]:
    state = model.state_dict() if isinstance(model, CMT) else model
    if not is_state_dict(state):
        raise TypeError(f"model_ema must be a model or a state dict, got {type(model).__name__}")
    return {name: value.detach() for name, value in clean_names(state).items()}


def _as_safetensors(content: dict[str, Any]) -> bytes:
    try:
        from safetensors.torch import save
    except ImportError as error:
        raise ImportError("saving safetensors needs safetensors: pip install 'cmt-fast[checkpoints]'") from error
    if "model_ema" in content:
        raise ValueError("a .safetensors file holds one set of weights: save model_ema to a file of its own")
    tensors = {name: value.contiguous() for name, value in content.pop("model").items()}
    try:
        metadata = {name: json.dumps(value) for name, value in content.items()}
    except TypeError as error:
        raise TypeError(
            f"a .safetensors file holds weights and JSON, but {error}: save to a .pth file instead"
        ) from error
    return save(tensors, metadata=metadata)
