"""Checkpoint files: fetching, reading and writing them. What is inside is fitted to a model in checkpoint_fit."""

from __future__ import annotations

import argparse
import json
import logging
import os
import pickle
import re
import uuid
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlparse

import torch
from torch import Tensor

_log = logging.getLogger(__name__)

#: Where a file may keep its weights, in the order tried. The last two are exponential moving averages.
WEIGHT_KEYS = ("model", "state_dict", "model_ema", "state_dict_ema")
#: The entry that save_checkpoint adds: {"version", "img_size", "config"}.
METADATA_KEY = "cmt_fast"

# What weights_only=True reads beside containers; exact types, as a subclass (numpy.float64 is a float) pickles otherwise.
_PLAIN = (type(None), bool, int, float, complex, str, bytes, Tensor, torch.nn.Parameter, torch.Size, torch.dtype, torch.device)  # fmt: skip


class CheckpointError(RuntimeError):
    """A checkpoint cannot be fetched, read, or loaded into a model; the message says why and what to do."""


@dataclass
class Checkpoint:
    """What a file holds.

    Attributes:
        path: the file.
        key: the entry the weights were under; None if the file is a bare state dict.
        state_dict: the weights, names as in the file.
        img_size: (height, width) the position bias tables are made for, if the file says so.
        config: arguments of :class:`cmt_fast.CMT` that rebuild the model, if the file says so.
        version: the version of cmt_fast that wrote the file, if it did.
        extra: every other entry of the file (``class_names``, ``args``, ``optimizer``, ...).
    """

    path: Path
    key: str | None
    state_dict: dict[str, Any]
    img_size: tuple[int, int] | None = None
    config: dict[str, Any] | None = None
    version: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)


def read_checkpoint(
    path_or_url: str | os.PathLike, *, key: str | None = None, progress: bool = True, mmap: bool = False
) -> Checkpoint:
    """Read a checkpoint without a model. Nothing in the file is executed (``weights_only=True``).

    Args:
        path_or_url: a file of ``torch.save`` or safetensors, or an http(s) URL of one, which is downloaded once.
        key: the entry to take the weights from (``"model_ema"``); by default the first there is of ``model``,
            ``state_dict``, ``model_ema``, ``state_dict_ema``, or the file itself if it is a bare state dict.
        progress: show a bar when downloading.
        mmap: map the file into memory instead of reading it all; it must then not be changed in place.

    Raises:
        CheckpointError: if it is no checkpoint, holds objects other than tensors and plain data, or has no such ``key``.
        OSError: if the file is missing or unreadable.
    """
    path = local_file(path_or_url, progress)
    with open(path, "rb") as file:
        start = file.read(16)
    if path.suffix == ".safetensors" or start[8:10] == b'{"':
        content = _read_safetensors(path)
    else:
        content = _read_torch(path, start, mmap)
    if not isinstance(content, Mapping):
        raise CheckpointError(
            f"{path} holds a {type(content).__name__}, expected a state dict or a dict with one: "
            "save it with torch.save(model.state_dict(), path)"
        )
    content = dict(content)
    metadata = content.pop(METADATA_KEY, None) or {}
    key, state = _weights(content, key, path)
    size = metadata.get("img_size")
    return Checkpoint(
        path=path,
        key=key,
        state_dict=dict(state),
        img_size=None if size is None else (int(size[0]), int(size[1])),
        config=metadata.get("config"),
        version=metadata.get("version"),
        extra={} if key is None else {name: value for name, value in content.items() if name != key},
    )


def _weights(content: dict[str, Any], key: str | None, path: Path) -> tuple[str | None, Mapping[str, Any]]:
    holds = [name for name, value in content.items() if is_state_dict(value)]
    if key is None:
        for name in WEIGHT_KEYS:
            if name in holds:
                return name, content[name]
        if is_state_dict(content):
            return None, content
        hint = f"; choose one with key= of: {', '.join(holds)}" if holds else ""
        raise CheckpointError(
            f"{path} has no weights under {', '.join(WEIGHT_KEYS)} and is no state dict itself; "
            f"it holds: {_names(content)}{hint}"
        )
    if key in holds:
        return key, content[key]
    if key in content:
        what = "None (it was saved without)" if content[key] is None else f"a {type(content[key]).__name__}"
        problem = f"{key!r} of {path} is {what}, not a state dict"
    else:
        problem = f"{path} has no entry {key!r}"
    raise CheckpointError(f"{problem}; entries with weights: {', '.join(holds) or 'none'}")


def is_state_dict(value: Any) -> bool:
    """Whether ``value`` is a dict from names to values of which at least one is a tensor."""
    return (
        isinstance(value, Mapping)
        and all(isinstance(name, str) for name in value)
        and any(isinstance(item, Tensor) for item in value.values())
    )


def _names(content: Mapping[Any, Any]) -> str:
    shown = ", ".join(repr(name) for name in list(content)[:10])
    return f"{shown}, ... ({len(content)} entries)" if len(content) > 10 else shown or "nothing"


def _read_safetensors(path: Path) -> dict[str, Any]:
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise ImportError(f"reading {path} needs safetensors: pip install 'cmt-fast[checkpoints]'") from error
    try:
        with safe_open(str(path), framework="pt", device="cpu") as file:
            content: dict[str, Any] = {"model": {name: file.get_tensor(name) for name in file.keys()}}  # noqa: SIM118
            for name, text in (file.metadata() or {}).items():
                content[name] = _json_or_text(text)
    except SafetensorError as error:
        raise CheckpointError(f"{path} is not a complete safetensors file: {error}") from error
    if not isinstance(content.get(METADATA_KEY, {}), dict):
        del content[METADATA_KEY]  # another program's note under our name
    return content


def _json_or_text(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _read_torch(path: Path, start: bytes, mmap: bool) -> Any:
    if not start:
        raise CheckpointError(f"{path} is empty: copy or download it again")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            # Only the zip format of torch >= 1.6 can be mapped.
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap and start.startswith(b"PK"))
    except Exception as error:  # what is no pickle, or half of one, fails in any way
        refused = _refused_globals(path, error)
        if refused:
            raise CheckpointError(
                f"{path} holds objects that could run code when loaded ({', '.join(refused)}), so it is not read. Re-save "
                'only its tensors where you trust it: torch.save({"model": torch.load(path, weights_only=False)["model"]}, '
                "new_path)"
            ) from error
        # Not torch's advice to load without weights_only, which stands before the reason.
        lines = str(error).rpartition("WeightsUnpickler error: ")[2].splitlines()
        reason = next((line for line in lines if line and "weights_only" not in line), "not what torch.save writes")
        raise CheckpointError(
            f"{path} is not a checkpoint, or it is incomplete (it starts with {start!r}; {type(error).__name__}: {reason}): "
            "delete it and copy or download it again"
        ) from error


def _refused_globals(path: Path, error: Exception) -> list[str]:
    """The classes and functions because of which ``weights_only=True`` refused the file."""
    if not isinstance(error, pickle.UnpicklingError):
        return []
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # not for the format of torch < 1.6
        names = re.findall(r"GLOBAL (\S+)", str(error))
    return sorted(set(names) - {"argparse.Namespace"})


def local_file(path_or_url: str | os.PathLike, progress: bool = True) -> Path:
    """The path of a file, downloading it first if it is a URL and not yet in torch's hub directory.

    Raises:
        FileNotFoundError, IsADirectoryError: if there is no such file.
        CheckpointError: if the download fails; the message says how to do it by hand.
    """
    text = os.fspath(path_or_url)
    scheme = urlparse(text).scheme if "://" in text else ""
    if scheme in ("http", "https"):
        return _download(text, progress)
    if scheme:
        raise ValueError(f"expected a path or an http(s) URL, got {text!r}: download it and pass its path")
    path = Path(text).expanduser()
    if path.is_dir():
        raise IsADirectoryError(f"expected a checkpoint file, got the folder {path}")
    if not path.exists():
        raise FileNotFoundError(f"there is no file {path} (working directory: {Path.cwd()})")
    return path


def _download(url: str, progress: bool) -> Path:
    name = Path(urlparse(url).path).name
    if not name:
        raise ValueError(f"the URL must end in a file name, got {url!r}")
    path = Path(torch.hub.get_dir()) / "checkpoints" / name
    if path.exists():
        return path
    _log.info("downloading %s to %s", url, path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(path), progress=progress)
    except OSError as error:  # URLError, HTTPError, timeouts, a full disk
        raise CheckpointError(
            f"cannot download {url} ({error}). If this machine is offline, download that URL elsewhere, then either put "
            f"the file at {path} or pass its path instead of the URL"
        ) from error
    return path


def check_plain(value: Any, name: str) -> None:
    """Require what ``torch.load(weights_only=True)`` reads back: tensors and plain data.

    Raises:
        TypeError: naming the place of the first object that is neither.
    """
    if type(value) in (list, tuple, set):
        for i, item in enumerate(value):
            check_plain(item, f"{name}[{i}]")
    elif type(value) in (dict, OrderedDict, Counter):
        for k, item in value.items():
            check_plain(k, f"a key of {name}")
            check_plain(item, f"{name}[{k!r}]")
    elif type(value) not in _PLAIN:
        kind = f"{type(value).__module__}.{type(value).__qualname__}"
        raise TypeError(
            f"{name} is a {kind}, which a safe loader refuses: convert it to tensors, numbers, strings, lists or dicts "
            "(vars(namespace), str(path), scalar.item())"
        )


def write_atomically(path: str | os.PathLike, write: Callable[[IO[bytes]], object]) -> Path:
    """Let ``write`` fill a new file beside ``path``, then rename it to ``path``; on failure ``path`` is as it was.

    Raises:
        FileNotFoundError: if the folder does not exist.
        IsADirectoryError: if ``path`` is a folder.
    """
    path = Path(os.path.realpath(Path(path).expanduser()))  # through a link to its target
    if path.is_dir():
        raise IsADirectoryError(f"expected a file to write, got the folder {path}")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"the folder {path.parent} does not exist: create it first")
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with open(temporary, "xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path
