"""Packed models in one safetensors file: the tensors by their place in the program, everything else as JSON metadata."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cmt_fast._version import __version__
from cmt_fast.inference import program
from cmt_fast.inference.program import PackedModel
from cmt_fast.models.checkpoint_io import CheckpointError, write_atomically

#: Counted up whenever a file written now could not be read, or would compute something else, before.
FORMAT = 1

#: The metadata entry that makes a safetensors file a packed model.
PACKED_KEY = "cmt_fast.packed"
_KINDS = {
    kind.__name__: kind
    for kind in (
        program.PackedModel,
        program.Stage,
        program.Block,
        program.Stem,
        program.PatchEmbed,
        program.LPU,
        program.KV,
        program.Attention,
        program.Expand,
        program.DepthwiseProject,
        program.Head,
    )
}


def save_packed(packed: PackedModel, path: str | os.PathLike, **extra: Any) -> Path:
    """Save a packed model; a file that was there is replaced at once or not at all.

    Args:
        packed: from :func:`pack`.
        path: the safetensors file to write; its folder must exist.
        **extra: further entries that JSON can hold (``class_names=[...]``, ``preprocess={...}``);
            ``cmt_fast.read_checkpoint(path).extra`` has them.

    Returns:
        The path written.

    Raises:
        TypeError: if JSON cannot hold an entry.
        OSError: if the file cannot be written.
        ImportError: without safetensors.
    """
    try:
        from safetensors.torch import save
    except ImportError as error:
        raise ImportError("saving a packed model needs safetensors: pip install 'cmt-fast[checkpoints]'") from error
    tensors: dict[str, Tensor] = {}
    tree = take_apart(packed, "", tensors)
    metadata = {name: json.dumps(value) for name, value in extra.items()}
    metadata[PACKED_KEY] = json.dumps({"format": FORMAT, "version": __version__, "program": tree})
    data = save(tensors, metadata=metadata)
    return write_atomically(path, lambda file: file.write(data))


def load_packed(path: str | os.PathLike, *, device: torch.device | str = "cpu") -> PackedModel:
    """Load what :func:`save_packed` wrote, bit for bit.

    Args:
        path: the file.
        device: where to put the tensors.

    Raises:
        CheckpointError: if the file is incomplete, is no packed model, or was written by a newer format; the message says
            which, and what to do.
        OSError: if it is missing or unreadable.
        ImportError: without safetensors.
    """
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise ImportError("loading a packed model needs safetensors: pip install 'cmt-fast[checkpoints]'") from error
    path = Path(path).expanduser()
    if path.is_dir():
        raise IsADirectoryError(f"expected a file of save_packed, got the folder {path}")
    if not path.exists():
        raise FileNotFoundError(f"there is no file {path} (working directory: {Path.cwd()})")
    try:
        with safe_open(str(path), framework="pt", device=str(device)) as file:
            metadata = file.metadata() or {}
            names = file.keys() if PACKED_KEY in metadata else ()
            # Copied: the file's mapping is aligned to 8 bytes, and would change or vanish with the file.
            tensors = {name: file.get_tensor(name).clone() for name in names}
    except SafetensorError as error:
        raise CheckpointError(
            f"{path} is not a complete safetensors file ({error}): save or copy the packed model again"
        ) from error
    if PACKED_KEY not in metadata:
        raise CheckpointError(
            f"{path} holds no packed model: if it is a checkpoint, pack(cmt_fast.load_model(path)) packs it"
        )
    try:
        content = json.loads(metadata[PACKED_KEY])
        format_, version = content["format"], content["version"]
        if format_ > FORMAT:
            raise CheckpointError(
                f"{path} was written by cmt_fast {version} in format {format_}, newer than the {FORMAT} that cmt_fast {__version__} "
                "reads: upgrade cmt_fast, or pack the model again with this version"
            )
        packed = put_together(content["program"], tensors)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(
            f"{path} is damaged, its program does not fit together ({error}): pack the model again"
        ) from error
    if not isinstance(packed, PackedModel):
        raise CheckpointError(f"{path} is damaged, it holds a {type(packed).__name__}: pack the model again")
    return packed


def take_apart(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """What JSON can hold of ``value``: its tensors are moved into ``tensors`` under dotted names."""
    if isinstance(value, Tensor):
        tensors[name] = value
        return {"tensor": name}
    if dataclasses.is_dataclass(value):
        prefix = f"{name}." if name else ""
        fields = {
            f.name: take_apart(getattr(value, f.name), prefix + f.name, tensors) for f in dataclasses.fields(value)
        }
        return {"step": type(value).__name__, **fields}
    if isinstance(value, tuple):
        return [take_apart(item, f"{name}.{i}", tensors) for i, item in enumerate(value)]
    return value


def put_together(tree: Any, tensors: dict[str, Tensor]) -> Any:
    """The inverse of :func:`take_apart`."""
    if isinstance(tree, list):
        return tuple(put_together(item, tensors) for item in tree)
    if not isinstance(tree, dict):
        return tree
    if "tensor" in tree:
        return tensors[tree["tensor"]]
    fields = {name: put_together(item, tensors) for name, item in tree.items() if name != "step"}
    return _KINDS[tree["step"]](**fields)
