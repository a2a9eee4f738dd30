"""Which implementation runs an operation, and why.

Three backends exist: ``reference`` (plain PyTorch; runs everywhere and is the specification),
``triton`` (GPU kernels) and ``native`` (the compiled library of ``csrc/``). Each operation asks
:func:`select` with one list of reasons per candidate: an empty list means "can run this call".
The same lists serve the automatic choice, the error of an explicit choice, :func:`explain` and
``cmt-fast info``, so they can never tell different stories.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch

#: The order in which ``auto`` tries them. ``reference`` can run every call, so it is last.
BACKENDS = ("triton", "native", "reference")

Reasons = Callable[[], list[str]]


class BackendError(RuntimeError):
    """An explicitly chosen backend cannot run a call; the message lists every reason."""


def _checked(name: str, source: str) -> str:
    if name not in ("auto", *BACKENDS):
        valid = ", ".join(repr(b) for b in ("auto", *BACKENDS))
        raise ValueError(f"{source} must be one of {valid}, got {name!r}")
    return name


# Process-wide, as the flags of torch.backends are: a plain global is what torch.compile can guard on.
# The environment's value is checked when it is first used: importing a package must not fail because of a typo.
_setting: str = os.environ.get("CMT_FAST_BACKEND", "auto")
_recorder: Explanation | None = None
_warned: set[str] = set()


def get_backend() -> str:
    """The process-wide setting: ``"auto"`` or the name of a backend.

    Raises:
        ValueError: if the environment variable ``CMT_FAST_BACKEND`` set it to something else.
    """
    return _checked(_setting, "the environment variable CMT_FAST_BACKEND")


def set_backend(name: str) -> None:
    """Set the backend for every following call in this process; ``"auto"`` restores the default.

    Raises:
        ValueError: if ``name`` is no backend; the message lists the valid names.
    """
    global _setting
    _setting = _checked(name, "backend")


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Context manager form of :func:`set_backend`: ``with use_backend("reference"): ...``.

    The setting is the process's, not the thread's: of threads that use this at once the last one to leave decides. Give
    single calls of :mod:`cmt_fast.functional` their ``backend=`` instead.
    """
    previous = get_backend()
    set_backend(name)
    try:
        yield
    finally:
        set_backend(previous)


def select(
    op: str,
    candidates: Mapping[str, Reasons],
    requested: str | None = None,
    *,
    device: torch.device | None = None,
) -> str:
    """Choose the backend of one call.

    Args:
        op: name of the operation, for messages.
        candidates: for each backend that implements ``op`` beside the reference, a function that
            returns the reasons why it cannot run this call.
        requested: backend asked for by this call; ``None`` takes the process-wide setting.
        device: where the inputs are. A CUDA call that ``auto`` leaves to the reference is reported once.

    Raises:
        BackendError: if a backend was asked for by name and has reasons against this call.
    """
    wanted = get_backend() if requested is None else _checked(requested, "backend")
    against: dict[str, list[str]] = {}
    chosen = "reference"
    for name in BACKENDS[:-1] if wanted == "auto" else (wanted,):
        if name == "reference":
            break
        against[name] = candidates[name]() if name in candidates else [f"this version has no {name} kernel for {op}"]
        if not against[name]:
            chosen = name
            break
    if wanted not in ("auto", chosen):
        raise BackendError(
            f"backend {wanted!r} cannot run {op}: {'; '.join(against[wanted])}. "
            'Use backend="auto" to let cmt_fast choose, or backend="reference" for plain PyTorch.'
        )
    record(op, chosen, against)
    if chosen == "reference" and wanted == "auto" and device is not None and device.type == "cuda":
        _warn_once(op, against)
    return chosen


def joins(op: str, reasons: Reasons, requested: str | None = None) -> bool:
    """Whether the Triton kernels shall run ``op``, which is several operations one after the other.

    If not, each of them chooses for itself, and tells its own reasons.

    Args:
        op, requested: of :func:`select`.
        reasons: returns those against the kernels of the whole.
    """
    wanted = get_backend() if requested is None else _checked(requested, "backend")
    if wanted not in ("auto", "triton") or reasons():
        return False
    record(op, "triton", {})
    return True


def record(op: str, chosen: str, against: Mapping[str, list[str]]) -> None:
    """Tell :func:`explain`, if it listens, what ran. For what chose its backend before the call."""
    if _recorder is not None:
        _recorder.add(op, chosen, against)


def _warn_once(op: str, against: Mapping[str, list[str]]) -> None:
    if op in _warned or torch.compiler.is_compiling():
        return
    _warned.add(op)
    reasons = "; ".join(f"{name}: {', '.join(why)}" for name, why in against.items())
    warnings.warn(f"cmt_fast runs {op} on the GPU with plain PyTorch ({reasons})", stacklevel=4)


@dataclass
class Explanation:
    """What :func:`explain` found: per operation, the backend that ran, how often, and the reasons against the others."""

    calls: Counter[tuple[str, str]] = field(default_factory=Counter)
    against: dict[tuple[str, str], Mapping[str, list[str]]] = field(default_factory=dict)

    def add(self, op: str, chosen: str, against: Mapping[str, list[str]]) -> None:
        self.calls[op, chosen] += 1
        self.against.setdefault((op, chosen), against)

    def __str__(self) -> str:
        lines = []
        for (op, chosen), count in self.calls.items():
            lines.append(f"{op}: {chosen} ({count} call{'s' if count > 1 else ''})")
            for name, why in self.against[op, chosen].items():
                lines += [f"    not {name}: {reason}" for reason in why]
        return "\n".join(lines) or "no cmt_fast operation ran"


def explain(function: Callable, *args, **kwargs) -> Explanation:
    """Run ``function(*args, **kwargs)`` and tell which backend ran each operation, and why no faster one did.

    >>> print(cmt_fast.explain(model, image))            # doctest: +SKIP
    """
    global _recorder
    previous, _recorder = _recorder, Explanation()
    try:
        function(*args, **kwargs)
        return _recorder
    finally:
        _recorder = previous


def _installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ImportError:  # from an import hook that blocks it
        return False


_TRITON_INSTALLED = _installed("triton")


def interpreting() -> bool:
    """Whether ``TRITON_INTERPRET`` is set: Triton's kernels then run in its interpreter, on CPU tensors too."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")


def machine_reasons(backend: str) -> list[str]:
    """Why ``backend`` cannot run anything in this process; an empty list if it can. Touches no GPU state."""
    match _checked(backend, "backend"):
        case "triton":
            reasons = []
            if not _TRITON_INSTALLED:
                reasons.append("triton is not installed (pip install triton)")
            if not torch.cuda.is_available() and not interpreting():
                reasons.append("no CUDA device is visible")
            return reasons
        case "native":
            from cmt_fast import _native

            return _native.reasons()
        case _:
            return []
