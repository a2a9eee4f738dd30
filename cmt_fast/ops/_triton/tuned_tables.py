"""Tables of measured launch configurations: where they are, when they hold, and what they say.

One file a GPU model, named after it: the user's, which ``cmt-fast tune`` writes, and before it is asked any that the package ships. A table holds for the GPU
and the Triton version that it was measured with, an entry as long as the source of its kernel is the same. Files are read at the first launch
on a GPU, once. A file that cannot be used is a warning, never an error: the rules stand without it.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import inspect
import json
import os
import re
import threading
import warnings
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from cmt_fast.ops._triton.device import DeviceLimits

#: Of the files. Another one is not read.
FORMAT = 1

#: Tables that the package comes with.
SHIPPED = Path(__file__).parents[2] / "tuning" / "tables"

_lock = threading.RLock()
_tables: dict[DeviceLimits, list[Table]] = {}
_warned: set[str] = set()


@dataclass
class Table:
    """One file.

    Attributes:
        path: where it is, or will be.
        data: its JSON: what it was measured with, and ``kernels``, by ``module:function`` the hash of the ``source`` and, by key, the ``launches``.
        problem: why it cannot be used as a whole, or None.
    """

    path: Path
    data: dict[str, Any] = field(default_factory=dict)
    problem: str | None = None

    def __str__(self) -> str:
        """Whether and how far it is used, in a line."""
        if self.problem:
            return f"{self.path}: not used, it {self.problem}"
        stale = [kernel.partition(":")[2] for kernel in self.stale_kernels()]
        changed = f"; measured before these changed, so not used: {', '.join(stale)}" if stale else ""
        return f"{self.path}: {self.launches()} launches in use{changed}"

    def entries(self, kernel: str) -> dict[str, dict[str, Any]]:
        """What was measured of a kernel, by key; nothing if it has changed since."""
        kernels = self.data.get("kernels", {})
        return kernels[kernel]["launches"] if kernel in kernels and not self.is_stale(kernel) else {}

    def add(self, kernel: str, key: str, entry: dict[str, Any]) -> None:
        """Put in what was measured; it drops what was measured before the kernel changed."""
        if not self.entries(kernel):
            self.data["kernels"][kernel] = {"source": source_hash(kernel), "launches": {}}
        self.data["kernels"][kernel]["launches"][key] = entry

    def is_stale(self, kernel: str) -> bool:
        """Whether a kernel's entries cannot be used: it has changed, or is no more."""
        kernels = self.data.get("kernels", {})
        return kernel in kernels and kernels[kernel]["source"] != source_hash(kernel)

    def stale_kernels(self) -> list[str]:
        """All of which :meth:`is_stale` is true."""
        return [kernel for kernel in self.data.get("kernels", {}) if self.is_stale(kernel)]

    def launches(self) -> int:
        """How many entries can be used."""
        return sum(len(self.entries(kernel)) for kernel in self.data.get("kernels", {})) if not self.problem else 0


def user_folder() -> Path | None:
    """Where the user's tables are; None if ``CMT_FAST_TUNING`` is ``off``, and no table is used."""
    setting = os.environ.get("CMT_FAST_TUNING", "")
    if setting == "off":
        return None
    if setting:
        return Path(setting).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "cmt_fast", "tuning")


def file_name(device: str) -> str:
    """Of the table of a GPU model: ``NVIDIA H100 80GB HBM3`` has ``NVIDIA_H100_80GB_HBM3.json``."""
    return re.sub(r"[^A-Za-z0-9.-]+", "_", device) + ".json"


def empty_table(path: Path, limits: DeviceLimits) -> Table:
    """One to measure into."""
    return Table(path, {**_measured_with(limits), "kernels": {}})


def read_table(path: Path, limits: DeviceLimits) -> Table:
    """The table of a file; with its problem, if it has one. Raises nothing."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        _check(data)
    except (OSError, ValueError, RecursionError) as error:
        return Table(path, problem=f"cannot be read: {error}")
    for name, expected in _measured_with(limits).items():
        if data[name] != expected:
            return Table(path, data, f"was measured with {name} {data[name]}, and this is {name} {expected}")
    return Table(path, data)


def find_tables(limits: DeviceLimits) -> list[Table]:
    """The files there are for a GPU, the user's first, as they are now."""
    folder = user_folder()
    if folder is None or not limits.name:
        return []
    paths = [where / file_name(limits.name) for where in (folder, SHIPPED)]
    return [read_table(path, limits) for path in paths if os.path.lexists(path)]


def look_up(limits: DeviceLimits, kernel: str, key: str) -> dict[str, Any] | None:
    """The fields of the configuration that was measured best; None where nothing was measured, or nothing better than the rule."""
    for table in _read_once(limits):
        if table.problem:
            continue
        entry = table.entries(kernel).get(key)
        if entry is not None:
            return entry["config"]
        if table.is_stale(kernel):
            warn_once(
                f"{table.path} was measured before {kernel} changed, so its rule is used: `cmt-fast tune` measures again"
            )
    return None


def warn_once(message: str) -> None:
    """In a process."""
    with _lock:
        if message in _warned:
            return
        _warned.add(message)
    warnings.warn(f"cmt_fast: {message}", stacklevel=2)


def forget() -> None:
    """Read the files again when they are needed, and warn again."""
    with _lock:
        _tables.clear()
        _warned.clear()


@lru_cache
def source_hash(kernel: str) -> str:
    """Of the source of a kernel, ``module:function``, and all jit functions that it calls; empty if there is none to be found."""
    module, _, name = kernel.partition(":")
    digest, seen, found = hashlib.sha256(), set(), []
    try:
        found.append(getattr(importlib.import_module(module), name).fn)
        while found:
            function = found.pop()
            if function not in seen:
                seen.add(function)
                digest.update(inspect.getsource(function).encode())
                names = sorted(function.__code__.co_names)
                found += [called.fn for called in map(function.__globals__.get, names) if hasattr(called, "fn")]
    except (ImportError, AttributeError, ValueError, OSError):
        return ""
    return digest.hexdigest()[:16]


def _read_once(limits: DeviceLimits) -> list[Table]:
    with _lock:
        if limits not in _tables:
            _tables[limits] = find_tables(limits)
            for table in _tables[limits]:
                if table.problem:
                    warn_once(f"{table.path} is not used, it {table.problem}. `cmt-fast tune --check` says more")
            _warn_of_nothing(limits)
        return _tables[limits]


def _warn_of_nothing(limits: DeviceLimits) -> None:
    """A folder that the user names, and that has no table, is a mistake; the default one need not have any."""
    folder = user_folder()
    if limits.name and folder and os.environ.get("CMT_FAST_TUNING") and not (folder / file_name(limits.name)).exists():
        warn_once(
            f"CMT_FAST_TUNING is {folder}, which has no table {file_name(limits.name)}: `cmt-fast tune` writes it"
        )


def _measured_with(limits: DeviceLimits) -> dict[str, Any]:
    """What must be the same for a table to hold."""
    return {
        "format": FORMAT,
        "device": limits.name,
        "arch": limits.arch,
        "multiprocessors": limits.multiprocessors,
        "shared_memory": limits.shared_memory,
        "triton": _triton_version(),
    }


def _triton_version() -> str:
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return "none"


def _check(data: Any) -> None:
    """Require the structure of a table, and leave nothing to fail later."""

    def require(condition: bool, what: str) -> None:
        if not condition:
            raise ValueError(f"expected {what}")

    require(isinstance(data, dict), "a JSON object")
    missing = {"format", "device", "arch", "multiprocessors", "shared_memory", "triton", "kernels"} - data.keys()
    require(not missing, f"the keys {', '.join(sorted(missing))}")
    require(isinstance(data["kernels"], dict), "an object at kernels")
    for kernel, measured in data["kernels"].items():
        require(
            isinstance(measured, dict) and measured.keys() >= {"source", "launches"}, f"source and launches of {kernel}"
        )
        require(isinstance(measured["launches"], dict), f"an object at launches of {kernel}")
        for key, entry in measured["launches"].items():
            config = entry.get("config", "") if isinstance(entry, dict) else ""
            require(config is None or isinstance(config, dict), f"a config, or null, of {kernel} for {key}")
