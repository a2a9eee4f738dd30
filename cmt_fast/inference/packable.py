"""Which models can be packed: folding reads parameters, so every module must compute what its class says."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from cmt_fast.models.cmt import CMT
from cmt_fast.modules import IRFFN, LMHSA, Block, DropPath, PatchEmbed, PointwiseConv, SyncBatchNorm
from cmt_fast.ops.checks import not_plain

# In eval mode all of these are the same affine.
_BATCH_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm, SyncBatchNorm)


def check_packable(model: CMT, head: bool) -> None:
    """Require every part of ``model`` to be the plain module that a CMT is built of, in its original settings.

    Args:
        model: the model to judge.
        head: whether its head is to be packed; otherwise it is not looked at.

    Raises:
        ValueError: naming every part that is not, and why.
    """
    parts = [(path, module) for path, module in model.named_modules() if head or not re.match(_HEAD, path)]
    reasons = [reason for path, module in parts for reason in _reasons(path, module)]
    if reasons:
        shown = "; ".join(reasons[:5]) + (f"; and {len(reasons) - 5} more" if len(reasons) > 5 else "")
        raise ValueError(f"this model cannot be packed: {shown}. Restore these parts, or run the model itself")


def _reasons(path: str, module: nn.Module) -> Iterator[str]:
    name = path or "the model"
    for pattern, kinds, check in _PARTS:
        if re.fullmatch(pattern, path):
            kind = type(module) if type(module) in kinds else kinds[0]
            reasons = not_plain(name, module, kind)
            yield from reasons
            if "forward" in vars(module):
                yield f"the forward of {name} was replaced"
            if not reasons and check is not None:
                yield from (f"{name} has {problem}" for problem in check(module))
            return
    yield f"{name} is no part of a CMT"


def _conv(kernel: int | None, stride: int = 1, padding: int = 0, depthwise: bool = False) -> Callable:
    """``kernel`` None: k of a reduction, whose stride is k too."""

    def check(conv: Any) -> Iterator[str]:
        k, s = (conv.kernel_size[0],) * 2 if kernel is None else (kernel, stride)
        groups = conv.in_channels if depthwise else 1
        expected: dict[str, Any] = dict(
            kernel_size=(k, k), stride=(s, s), padding=(padding, padding), dilation=(1, 1), groups=groups, padding_mode="zeros"
        )  # fmt: skip
        if depthwise:
            expected["out_channels"] = conv.in_channels
        for setting, value in expected.items():
            if getattr(conv, setting) != value:
                yield f"{setting} {getattr(conv, setting)}, expected {value}"

    return check


def _batch_norm(norm: Any) -> Iterator[str]:
    if norm.running_mean is None or norm.running_var is None:
        yield "no running statistics, so its result depends on the batch"


def _gelu(act: Any) -> Iterator[str]:
    if act.approximate != "none":
        yield f"approximate {act.approximate!r}, expected the exact GELU"


def _layer_norm(norm: Any) -> Iterator[str]:
    if len(norm.normalized_shape) != 1:
        yield f"normalized_shape {norm.normalized_shape}, expected the channels alone"


def _pool(pool: Any) -> Iterator[str]:
    if pool.output_size != 1:
        yield f"output_size {pool.output_size}, expected 1"


_B = r"blocks_[abcd]\.\d+"
_PARTS: tuple[tuple[str, tuple[type[nn.Module], ...], Callable[[Any], Iterator[str]] | None], ...] = (
    (r"", (CMT,), None),
    (r"stem_conv1", (nn.Conv2d,), _conv(3, stride=2, padding=1)),
    (r"stem_conv[23]", (nn.Conv2d,), _conv(3, padding=1)),
    (rf"stem_relu[123]|{_B}\.mlp\.(conv1\.1|proj_act)", (nn.GELU,), _gelu),
    (rf"stem_norm[123]|{_B}\.(attn\.sr\.1|mlp\.(conv1\.2|proj_bn|conv2\.1))", _BATCH_NORMS, _batch_norm),
    (r"patch_embed_[abcd]", (PatchEmbed,), None),
    (r"patch_embed_[abcd]\.proj", (nn.Conv2d,), _conv(2, stride=2)),
    (rf"patch_embed_[abcd]\.norm|{_B}\.norm[12]", (nn.LayerNorm,), _layer_norm),
    (r"blocks_[abcd]", (nn.ModuleList,), None),
    (_B, (Block,), None),
    (rf"{_B}\.proj|{_B}\.mlp\.proj", (nn.Conv2d,), _conv(3, padding=1, depthwise=True)),
    (rf"{_B}\.attn", (LMHSA,), None),
    (rf"{_B}\.attn\.(q|k|v|proj)|pre_logits\.fc", (nn.Linear,), None),
    (rf"{_B}\.attn\.sr|{_B}\.mlp\.conv[12]", (nn.Sequential,), None),
    (rf"{_B}\.attn\.sr\.0", (nn.Conv2d,), _conv(None, depthwise=True)),
    (rf"{_B}\.mlp", (IRFFN,), None),
    (rf"{_B}\.mlp\.conv[12]\.0", (PointwiseConv, nn.Conv2d), _conv(1)),
    (rf"{_B}\.(attn\.(attn|proj)_drop|mlp\.drop)|_drop", (nn.Dropout,), None),
    (rf"{_B}\.drop_path", (nn.Identity, DropPath), None),
    (r"_fc", (nn.Conv2d, PointwiseConv), _conv(1)),
    (r"_bn", _BATCH_NORMS, _batch_norm),
    (r"_swish", (nn.SiLU,), None),
    (r"_avg_pooling", (nn.AdaptiveAvgPool2d,), _pool),
    (r"pre_logits", (nn.Identity, nn.Sequential), None),
    (r"pre_logits\.act", (nn.Tanh,), None),
    (r"head", (nn.Linear, nn.Identity), None),
)
_HEAD = r"(_fc|_bn|_swish|_avg_pooling|_drop|pre_logits|head)(\.|$)"
