"""Repairs of Triton's interpreter, which is for checking kernels without a GPU."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any


@cache
def repair_interpreter() -> None:
    """Let loops run to a bound that a kernel computes, and make calls of jit functions cheap."""
    from triton.runtime import interpreter

    _repair_bounds(interpreter)
    _patch_once_a_launch(interpreter)


def _repair_bounds(interpreter: Any) -> None:
    """Triton (3.6) turns a loop's bound, an array of one element, into a Python integer in a way that numpy refuses from version 2.4 on."""
    patch = interpreter._patch_lang_tensor

    def patch_with_index(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch_with_index


def _patch_once_a_launch(interpreter: Any) -> None:
    """Triton (3.6) replaces the functions of its language for the length of a launch, and then again for each call of a jit function in it:
    two thirds of the time of a kernel with loops. Here functions of one file share what the first of them needed."""
    patch: Callable[[Any], Any] = interpreter._patch_lang
    launch: Callable[..., Any] = interpreter.GridExecutor.__call__
    patched: set[int] = set()

    def patch_once(function: Any) -> Any:
        if (file := id(function.__globals__)) in patched:
            return None
        patched.add(file)
        return patch(function)

    def launch_afresh(self: Any, *args: Any, **kwargs: Any) -> Any:
        patched.clear()
        return launch(self, *args, **kwargs)

    interpreter._patch_lang = patch_once
    interpreter.GridExecutor.__call__ = launch_afresh
