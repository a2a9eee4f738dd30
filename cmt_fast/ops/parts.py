"""What a fused sub-layer does with the modules around its products, and why it may not: the same in every sub-layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cmt_fast.ops._triton.reasons import DTYPES
from cmt_fast.ops.autocast import autocast_dtype, product_dtype
from cmt_fast.ops.checks import PLAIN_DROP_PATHS, not_plain

#: A part that may be any callable in the reference.
Part = Callable[[Tensor], Tensor] | None


def is_identity(part: Part) -> bool:
    """Whether ``part`` does nothing: it is missing, or a plain ``nn.Identity``."""
    return part is None or (isinstance(part, nn.Module) and not not_plain("", part, nn.Identity))


def gelu_reasons(name: str, part: Part) -> list[str]:
    """Reasons against a kernel that computes the exact GELU in the place of ``part``."""
    if part is F.gelu:
        return []
    if isinstance(part, nn.GELU) and not not_plain(name, part, nn.GELU) and part.approximate == "none":
        return []
    return [f"{name} must be the exact GELU, F.gelu or a plain nn.GELU, got {part!r}"]


def dtype_reasons(x: Tensor, *, weights: Sequence[Tensor], norms: Sequence[Tensor]) -> list[str]:
    """Reasons against dtypes that PyTorch's own operations would not take: parameters of norms may be float32 beside 16-bit maps."""
    low = product_dtype(x)
    mixed = autocast_dtype(x) is not None
    known = {torch.float32, low} if mixed else {x.dtype}
    dtypes = {x.dtype, *(p.dtype for p in weights)}
    if low in DTYPES and dtypes <= known and {p.dtype for p in norms} <= known | {torch.float32}:
        return []
    names = ", ".join(sorted({str(t.dtype) for t in (x, *weights, *norms)}))
    return [
        "x and the parameters must have one dtype (norms may be float32), or under autocast float32 or autocast's, "
        f"got {names}"
    ]


def dropout_reasons(name: str, part: Part) -> list[str]:
    """Reasons against a kernel that passes over ``part``, which drops elements: an empty list where it drops none."""
    if is_identity(part):
        return []
    if not isinstance(part, nn.Dropout) or not_plain(name, part, nn.Dropout):
        return [f"{name} is a {type(part).__name__} or has hooks: kernels do not know what it does"]
    return [f"{name} drops with p = {part.p}, which needs plain PyTorch"] if part.training and part.p > 0 else []


def drop_path_reasons(part: Part) -> list[str]:
    """Reasons against a kernel that multiplies the branch of each image by the factor that ``part`` draws."""
    if is_identity(part):
        return []
    if isinstance(part, nn.Module):
        return not_plain("drop_path", part, *PLAIN_DROP_PATHS)
    return [f"drop_path is a {type(part).__name__}: kernels do not know what it does"]


def drop_path_factors(part: Part, x: Tensor, dtype: torch.dtype) -> Tensor | None:
    """The factors (B,) of the branches of x (B, H, W, C), drawn by ``part`` itself as it would for a branch in ``dtype``; None for 1."""
    if part is None or is_identity(part) or not getattr(part, "training", True):
        return None
    return part(x.new_ones(len(x), 1, 1, 1, dtype=dtype)).flatten()
