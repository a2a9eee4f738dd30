"""A repair of Triton's interpreter, which is for checking kernels without a GPU."""

from __future__ import annotations

from functools import cache
from typing import Any


@cache
def repair_interpreter() -> None:
    """Let loops run to a bound that a kernel computes.

    Triton (3.6) turns the bound, an array of one element, into a Python integer in a way that numpy refuses from version 2.4 on.
    """
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patch_with_index(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch_with_index
