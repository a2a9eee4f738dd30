"""A provider in a process of its own: seconds to the first result, and memory. Both depend on all that ran before.

``python -m cmt_fast.testing.fresh cmt_s original 8 float32 224 2`` is that process; it prints one line of JSON.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from cmt_fast.testing.benchmark import make_images, make_model
from cmt_fast.testing.precision import precision
from cmt_fast.testing.providers import PROVIDERS


@dataclass(frozen=True)
class Fresh:
    """What :func:`measure_fresh` found.

    Attributes:
        ready_s: seconds from a loaded model to the first result: packing, compiling or exporting, with empty caches, the
            imports that they need, and one call.
        kept_mib: what the process holds after that beyond what it held with the loaded model alone, in MiB: second copies of
            weights, compiled code. Negative where less; a provider that does not need the model has dropped it.
        peak_mib: what a further call needs at its peak beyond that, in MiB: activations and workspace.
    """

    ready_s: float
    kept_mib: float
    peak_mib: float


def measure_fresh(
    model: str, provider: str, batch: int, dtype: str, img_size: int, *, timeout: float | None = None
) -> Fresh:
    """Run a provider on a CPU in a new Python process, in inference, on as many threads as this one has.

    Args:
        model, provider, batch, dtype, img_size: as in :func:`cmt_fast.testing.benchmark.bench`.
        timeout: seconds after which to give up.

    Raises:
        ValueError: if the provider does not run in this precision.
        OSError: where the system does not tell a process's memory: anything but Linux.
        RuntimeError: if the provider fails; the message is its own.
        subprocess.TimeoutExpired: after ``timeout``.
    """
    if reason := PROVIDERS[provider].unsupported(precision(dtype), "inference"):
        raise ValueError(f"{provider}: {reason}")
    if not _STATUS.exists():
        raise OSError(f"memory is measured on Linux only: there is no {_STATUS}")
    command = [sys.executable, "-m", "cmt_fast.testing.fresh", model, provider, str(batch), dtype, str(img_size)]
    with tempfile.TemporaryDirectory(prefix="cmt-fast-fresh-") as cache:
        done = subprocess.run(
            [*command, str(torch.get_num_threads())],
            env=os.environ | {"TORCHINDUCTOR_CACHE_DIR": cache},
            capture_output=True,
            text=True,
            timeout=timeout,
        )
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1])
    return Fresh(**json.loads(done.stdout.strip().splitlines()[-1]))


def main(arguments: Sequence[str]) -> None:
    """The process itself."""
    name, provider_name, batch, dtype, size, threads = arguments
    torch.set_num_threads(int(threads))
    p, provider = precision(dtype), PROVIDERS[provider_name]
    model = make_model(name, int(size), p)
    images = make_images(int(batch), int(size), p).contiguous(memory_format=provider.memory_format)

    with torch.inference_mode():
        _release()
        loaded = _status("RssAnon")
        start = time.perf_counter()
        forward = provider.make(model, images, p)
        forward(images)
        ready = time.perf_counter() - start
        del model  # a provider that needs it holds it
        _release()
        kept = _status("RssAnon") - loaded
        _CLEAR_REFS.write_text("5", encoding="ascii")  # the peak starts again at what is resident now
        before = _status("VmRSS")
        forward(images)
        peak = _status("VmHWM") - before
    print(json.dumps(asdict(Fresh(ready, kept / 1024, peak / 1024))))


_STATUS, _CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def _status(field: str) -> int:
    """Memory of this process, in KiB."""
    for line in _STATUS.read_text(encoding="ascii").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1])
    raise OSError(f"{_STATUS} has no {field}")


def _release() -> None:
    """Hand what is freed back to the system, as far as the C library can."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


if __name__ == "__main__":
    main(sys.argv[1:])
