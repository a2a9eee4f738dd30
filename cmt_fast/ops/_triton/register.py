"""Registering a launcher as the implementation of an operator, without importing Triton before it is called."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch

#: What runs each operator, by its name.
IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {}


def implement(op: str, launcher: str) -> None:
    """Make ``launcher`` what runs ``cmt_fast_triton::<op>`` on CUDA, and on the CPU in Triton's interpreter.

    Args:
        op: name of an operator that is defined already; its arguments are the launcher's, a tensor first.
        launcher: ``module:function``, imported at the first call.
    """
    module, _, function = launcher.partition(":")

    def run(*args: Any) -> Any:
        with torch.cuda.device_of(args[0]):  # where Triton launches; nothing for a tensor on the CPU
            return getattr(importlib.import_module(module), function)(*args)

    IMPLEMENTATIONS[op] = run
    for key in ("CUDA", "CPU"):
        torch.library.impl(f"cmt_fast_triton::{op}", key, run)
