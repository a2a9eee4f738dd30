"""The four published models as functions, with the original's names and arguments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from cmt_fast.models.checkpoint import load_checkpoint
from cmt_fast.models.cmt import CMT
from cmt_fast.models.features import CMTFeatures
from cmt_fast.models.variants import VARIANTS


def create(
    name: str,
    pretrained: bool = False,
    *,
    features_only: bool = False,
    out_indices: Sequence[int] | int | None = None,
    **kwargs: Any,
) -> nn.Module:
    """Build a published variant by name; see :func:`cmt_s` for the arguments.

    Raises:
        ValueError: if ``name`` is no variant (the message lists the names), or the arguments contradict each other.
        CheckpointError: if ``pretrained`` and the weights cannot be fetched.
    """
    if name not in VARIANTS:
        raise ValueError(f"unknown model {name!r}; expected one of {', '.join(VARIANTS)}")
    if out_indices is not None and not features_only:
        raise ValueError(f"out_indices needs features_only=True, got out_indices={out_indices!r} alone")
    variant = VARIANTS[name]
    config: dict[str, Any] = {**variant.config, **kwargs}
    config.setdefault("img_size", variant.resolution if pretrained else 224)
    cmt = CMT(**config)
    if pretrained:
        load_checkpoint(cmt, variant.url, adapt_in_chans=True)
    model: Any = CMTFeatures(cmt, len(cmt.stages) if out_indices is None else out_indices) if features_only else cmt
    # timm's tools look for both names; the size is the one the model is made for.
    model.default_cfg = model.pretrained_cfg = {**default_cfg(name), "input_size": (cmt.in_chans, *cmt.img_size)}
    return model


def default_cfg(name: str) -> dict[str, Any]:
    """What timm knows of a variant's published weights: where they are, and how images are prepared for them.

    The original evaluates on the centre crop of an image resized to 256 / 224 of the crop, so ``crop_pct`` is 0.875
    (its own ``default_cfg`` says 0.9 and 224 pixels for every variant).
    """
    side = VARIANTS[name].resolution
    return {
        "url": VARIANTS[name].url,
        "num_classes": 1000,
        "input_size": (3, side, side),
        "fixed_input_size": True,
        "pool_size": None,
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "first_conv": "stem_conv1",
        "classifier": "head",
        "custom_load": True,
    }


def cmt_ti(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """CMT-Ti: 9.5 M parameters, 0.64 GMAC at its published resolution of 160. Arguments as :func:`cmt_s`."""
    return create("cmt_ti", pretrained, **kwargs)


def cmt_xs(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """CMT-XS: 15.2 M parameters, 1.55 GMAC at its published resolution of 192. Arguments as :func:`cmt_s`."""
    return create("cmt_xs", pretrained, **kwargs)


def cmt_s(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """CMT-S: 26.3 M parameters, 4.03 GMAC at its published resolution of 224.

    Args:
        pretrained: load the original's published weights (downloaded once into torch's hub directory). They are fitted
            to another ``img_size`` and ``in_chans``; with another ``num_classes`` the classifier stays untrained.
        **kwargs: arguments of :class:`cmt_fast.CMT`. ``img_size`` is 224 if not given, as in the original; with
            ``pretrained`` it is the resolution of the published weights. ``features_only=True`` returns a
            :class:`cmt_fast.CMTFeatures` of the stages ``out_indices``.

    Dropout has the original's names, here and in ``timm.create_model``: ``drop_rate`` is the dropout inside the blocks
    (timm's models mean that of the classifier) and ``dp`` the classifier's.
    """
    return create("cmt_s", pretrained, **kwargs)


def cmt_b(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """CMT-B: 45.7 M parameters, 9.32 GMAC at its published resolution of 256. Arguments as :func:`cmt_s`."""
    return create("cmt_b", pretrained, **kwargs)
