"""The four models in timm's registry: ``timm.create_model("cmt_s")``. Importing this module needs timm and registers them.

By timm's convention a model is made for the resolution of its published weights, ``img_size`` chooses another. Dropout keeps
the original's names: ``drop_rate`` is inside the blocks, ``dp`` before the classifier.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from timm.models._builder import build_model_with_cfg
from timm.models._registry import generate_default_cfgs, register_model
from torch import Tensor, nn

from cmt_fast.models.checkpoint_fit import clean_names, fit_state_dict
from cmt_fast.models.checkpoint_io import local_file
from cmt_fast.models.cmt import CMT
from cmt_fast.models.create import default_cfg
from cmt_fast.models.variants import VARIANTS

default_cfgs = generate_default_cfgs({name: default_cfg(name) for name in VARIANTS})


def _fit(state: Mapping[str, Any], model: CMT) -> dict[str, Tensor]:
    """Resize the bias tables of weights that timm itself reads (``pretrained_cfg_overlay=dict(file=...)``)."""
    fitted, _ = fit_state_dict(model, state, adapt_in_chans=True)
    stem = "stem_conv1.weight"
    return {**fitted, stem: clean_names(state)[stem]}  # timm adapts the input channels


def _create(name: str, pretrained: bool, **kwargs: Any) -> nn.Module:
    if pretrained and not any(kwargs.get(other) for other in ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir")):
        local_file(VARIANTS[name].url)  # to where timm looks first; a failure says what to do, which timm's does not
    return build_model_with_cfg(
        CMT,
        name,
        pretrained,
        pretrained_filter_fn=_fit,
        feature_cfg=dict(out_indices=(0, 1, 2, 3), feature_cls="getter"),
        **{**VARIANTS[name].config, **kwargs},
    )


@register_model
def cmt_ti(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """CMT-Ti for timm; see :func:`cmt_fast.cmt_ti`."""
    return _create("cmt_ti", pretrained, **kwargs)


@register_model
def cmt_xs(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """CMT-XS for timm; see :func:`cmt_fast.cmt_xs`."""
    return _create("cmt_xs", pretrained, **kwargs)


@register_model
def cmt_s(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """CMT-S for timm; see :func:`cmt_fast.cmt_s`."""
    return _create("cmt_s", pretrained, **kwargs)


@register_model
def cmt_b(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """CMT-B for timm; see :func:`cmt_fast.cmt_b`."""
    return _create("cmt_b", pretrained, **kwargs)
