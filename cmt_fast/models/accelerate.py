"""Turning an instance of the original class into ours."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from cmt_fast.models.cmt import CMT
from cmt_fast.models.config import read_config
from cmt_fast.modules import IRFFN, LMHSA, Block, DropPath, PatchEmbed, PointwiseConv

# The original's names of the classes that have a forward of their own.
_ORIGINAL_NAMES = {CMT: "CMT", Block: "Block", LMHSA: "Attention", IRFFN: "Mlp", PatchEmbed: "PatchEmbed"}


def accelerate(model: nn.Module, *, strict: bool = True) -> CMT:
    """A :class:`cmt_fast.CMT` that shares every parameter and buffer with ``model``, an instance of the original class.

    The tensors are the very same objects: nothing is copied, an optimizer made before keeps working, and training one
    model trains the other. Train or eval mode, ``requires_grad``, dtype, device, dropout rates and ``eps`` are taken
    over module by module; weight decay of the bias tables stays as the original asks for it. Hooks, replaced modules
    and anything else that our forward would pass over is an error.

    Move and convert ``model`` before, and use one of the two models from then on: ``.double()`` or ``.to()`` of one gives
    it buffers of its own, so that the two no longer share their running statistics. ``nn.SyncBatchNorm`` comes after:
    accelerate first, then ``nn.SyncBatchNorm.convert_sync_batchnorm`` of the result.

    Args:
        model: the original, or any model with its attributes; not wrapped (pass ``model.module`` of a DDP). A
            :class:`cmt_fast.CMT` is returned as it is.
        strict: require the original's class names too (``CMT``, ``Block``, ``Attention``, ``Mlp``, ``PatchEmbed``), as a
            subclass may compute something else. With False the layout alone decides.

    Raises:
        TypeError: if ``model`` does not have the original's attributes.
        ValueError: if a part of it cannot be represented; the message names the part.
    """
    if isinstance(model, CMT):
        return model
    try:
        config = read_config(model, any_norm=True)
    except (AttributeError, IndexError) as error:
        raise TypeError(
            f"expected an instance of the original CMT class, got {type(model).__name__} ({error}); "
            "of a wrapped model pass what is inside, such as model.module"
        ) from error
    with torch.device("meta"):  # every tensor is replaced below: initialise nothing
        ours = CMT(**config)
    _take_over(ours, model, "", strict)
    for name in ("default_cfg", "pretrained_cfg"):
        if hasattr(model, name):
            setattr(ours, name, getattr(model, name))
    return ours


def _take_over(ours: nn.Module, theirs: nn.Module, path: str, strict: bool) -> None:
    """Give ``ours`` the tensors and settings of ``theirs``, part by part."""
    _check_plain(theirs, path)
    _check_kind(ours, theirs, path, strict)
    for kind in ("_parameters", "_buffers"):
        own, other = getattr(ours, kind), getattr(theirs, kind)
        expected, found = _shapes(own), _shapes(other)
        if expected != found:
            raise ValueError(f"{_at(path)} has the {kind[1:]} {found}, expected {expected}")
        own.update(other)
    ours.training = theirs.training
    own_children, children = dict(ours.named_children()), dict(theirs.named_children())
    if own_children.keys() != children.keys():
        different = ", ".join(sorted(own_children.keys() ^ children.keys()))
        raise ValueError(f"{_at(path)} is not built as the original's: it lacks, or has in addition, {different}")
    for name, child in own_children.items():
        if name == "drop_path":
            child = ours.drop_path = _drop_path(children[name], f"{path}{name}")
        _take_over(child, children[name], f"{path}{name}.", strict)


def _check_plain(module: nn.Module, path: str) -> None:
    """Refuse what calling ``module`` would do beside its class's forward."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    if any(getattr(module, name) for name in hooks):
        raise ValueError(f"{_at(path)} has hooks, which our forward does not call: remove them first")
    if "forward" in vars(module):
        raise ValueError(f"the forward of {_at(path)} was replaced, so what it computes is not known")


def _check_kind(ours: nn.Module, theirs: Any, path: str, strict: bool) -> None:
    """Require ``theirs`` to compute what ``ours`` does, after taking over its settings."""
    if type(ours) in _ORIGINAL_NAMES:
        name = _ORIGINAL_NAMES[type(ours)]
        if strict and type(theirs).__name__ != name:
            raise ValueError(
                f"{_at(path)} is of class {type(theirs).__name__}, expected the original's {name}; strict=False accepts it "
                "if it computes the same"
            )
        if isinstance(ours, LMHSA):
            ours.scale = float(theirs.scale)
            for attribute in ("num_heads", "qk_dim", "sr_ratio"):
                if getattr(ours, attribute) != getattr(theirs, attribute):
                    raise ValueError(
                        f"{_at(path)} has {attribute} {getattr(theirs, attribute)}, the first block of its stage "
                        f"{getattr(ours, attribute)}"
                    )
    elif isinstance(ours, nn.SiLU):
        _check_swish(theirs, path)
    elif not isinstance(ours, DropPath):
        expected = nn.Conv2d if isinstance(ours, PointwiseConv) else type(ours)
        if type(theirs) is nn.SyncBatchNorm:
            raise ValueError(
                f"{_at(path)} is a SyncBatchNorm, expected the original's {expected.__name__}: accelerate the model first, "
                "then convert the result with nn.SyncBatchNorm.convert_sync_batchnorm"
            )
        if type(theirs) not in (expected, type(ours)):
            raise ValueError(f"{_at(path)} is a {_name(theirs)}, expected the original's {expected.__name__}")
        settings: dict[type, tuple[str, ...]] = {
            nn.LayerNorm: ("eps",),
            _BatchNorm: ("eps", "momentum"),
            _DropoutNd: ("p",),
        }
        for kind, attributes in settings.items():
            if isinstance(ours, kind):
                for attribute in attributes:
                    setattr(ours, attribute, getattr(theirs, attribute))
        if not isinstance(ours, (nn.Sequential, nn.ModuleList)) and ours.extra_repr() != theirs.extra_repr():
            raise ValueError(f"{_at(path)} is {_name(theirs)}({theirs.extra_repr()}), expected ({ours.extra_repr()})")


def _drop_path(theirs: Any, path: str) -> nn.Module:
    if type(theirs) is nn.Identity:
        return nn.Identity()
    if type(theirs).__name__ != "DropPath" or not getattr(theirs, "scale_by_keep", True):
        raise ValueError(f"{path} is a {_name(theirs)}, expected an Identity or a DropPath that rescales what it keeps")
    return DropPath(theirs.drop_prob or 0.0)


def _check_swish(theirs: nn.Module, path: str) -> None:
    """The original writes swish as a class of its own: judge it by what it computes."""
    x = torch.linspace(-8, 8, 65)
    try:
        same = not list(theirs.parameters()) and torch.allclose(theirs(x), F.silu(x), rtol=1e-5, atol=1e-6)
    except Exception:
        same = False
    if not same:
        raise ValueError(f"{_at(path)} is a {_name(theirs)}, which does not compute swish, x * sigmoid(x)")


def _shapes(tensors: dict[str, Any]) -> dict[str, tuple[int, ...] | None]:
    return {name: None if tensor is None else tuple(tensor.shape) for name, tensor in tensors.items()}


def _name(module: nn.Module) -> str:
    return type(module).__name__


def _at(path: str) -> str:
    return path.rstrip(".") or "the model"
