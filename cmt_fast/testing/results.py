"""What every result file says about its machine, and how files are written."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch

from cmt_fast._version import __version__


def machine(device: torch.device | str = "cpu") -> dict[str, Any]:
    """The machine, versions and commit that a measurement belongs to, as plain JSON values."""
    device = torch.device(device)
    facts: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": device.type,
        "cpu": _cpu_model(),
        "simd": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "os": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "cmt_fast": __version__,
        "commit": _commit(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {
            "gpu": properties.name,
            "gpu_memory_gib": round(properties.total_memory / 2**30, 1),
            "capability": f"{properties.major}.{properties.minor}",
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "driver": _nvidia_smi("driver_version"),
            "clocks_power": clocks_power(),
        }
    return facts


def clocks_power() -> str | None:
    """Of the first GPU, as it is: SM clock, its maximum, memory clock, power, its limit, temperature. Nothing is set."""
    return _nvidia_smi("clocks.sm,clocks.max.sm,clocks.mem,power.draw,power.limit,temperature.gpu")


def device_name(facts: dict[str, Any]) -> str:
    """The name of the device that was measured: the GPU's, or the CPU's model."""
    return str(facts.get("gpu") or facts["cpu"])


#: A list of nothing but numbers, which JSON's indentation would give a line each.
_NUMBERS = re.compile(r"\[\s+[-+.\deE]+(,\s+[-+.\deE]+)*\s+\]")


def error_line(error: BaseException) -> str:
    """Its type and the first line of its message, if it has one: ``ValueError: what was wrong``."""
    return ": ".join([type(error).__name__, *str(error).strip().splitlines()[:1]])


def check_folder(path: str | os.PathLike[str]) -> None:
    """Require the folder that ``path`` is to be written to, before the work of which it will hold the results.

    Raises:
        FileNotFoundError: if the folder does not exist.
    """
    folder = Path(path).absolute().parent
    if not folder.is_dir():
        raise FileNotFoundError(f"the folder {folder} does not exist: create it first")


def write_json(path: str | os.PathLike[str], data: object) -> None:
    """Write ``data`` as JSON to ``path``, whole or not at all, in a folder that exists. NaN and infinity become null."""
    path = Path(path)
    check_folder(path)
    text = json.dumps(_finite(data), indent=1, allow_nan=False) + "\n"
    text = _NUMBERS.sub(lambda match: " ".join(match[0].split()), text)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _finite(data: object) -> object:
    if isinstance(data, float):
        return data if abs(data) < float("inf") else None
    if isinstance(data, dict):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [_finite(value) for value in data]
    return data


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    for line in lines:
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit of the checkout that cmt_fast runs from, with ``+`` if files differ from it; of a copy without
    ``.git`` what ``CMT_FAST_COMMIT`` says, or None."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return os.environ.get("CMT_FAST_COMMIT")
    commit = _run("git", "-C", str(root), "rev-parse", "--short=12", "HEAD")
    dirty = _run("git", "-C", str(root), "status", "--porcelain", "--untracked-files=no")
    return commit and commit + ("+" if dirty else "")


def _nvidia_smi(fields: str) -> str | None:
    """Of the first GPU, as it is: nothing is set."""
    return _run("nvidia-smi", "-i", "0", f"--query-gpu={fields}", "--format=csv,noheader")


def _run(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
