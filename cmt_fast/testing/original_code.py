"""The original's own code, which is not part of this project, where the user has a checkout of it."""

from __future__ import annotations

import importlib.util
import os
import sys
import warnings
from pathlib import Path
from types import ModuleType

from torch import nn

from cmt_fast.models.cmt import CMT
from cmt_fast.models.config import read_config


def original_folder() -> str | None:
    """Of the original's ``cmt.py``, where the user says that there is one."""
    return os.environ.get("CMT_FAST_ORIGINAL")


def load_original() -> ModuleType:
    """Its module ``cmt``.

    Raises:
        FileNotFoundError: if ``CMT_FAST_ORIGINAL`` is not set, or its folder has no ``cmt.py``.
        ImportError: without timm, which the original needs.
    """
    folder = original_folder()
    path = Path(folder or "", "cmt.py")
    if not folder or not path.is_file():
        raise FileNotFoundError(
            f"CMT_FAST_ORIGINAL must name the folder of the original's cmt.py, got {folder or 'nothing'}: "
            "git clone https://github.com/ggjy/CMT.pytorch"
        )
    spec = importlib.util.spec_from_file_location("original_cmt", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["original_cmt"] = module  # timm's register_model looks the module up
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it imports timm by its old paths and overwrites registered names
        spec.loader.exec_module(module)
    return module


def original_model(model: CMT) -> nn.Module:
    """The original's own model on the parameters and buffers of ``model``, in its mode: what trains one trains the other.

    Raises:
        ValueError: if the original has no such model: unequal sides, or other than three input channels.
        FileNotFoundError, ImportError: see :func:`load_original`.
    """
    config = read_config(model)
    height, width = config.pop("img_size")
    if height != width or config.pop("in_chans") != 3:
        raise ValueError(
            f"the original takes square images of three channels, not {model.in_chans} x {height} x {width}"
        )
    ours_alone = {name: config.pop(name) for name in ("global_pool", "decay_relative_pos")}
    assert ours_alone["global_pool"] == "avg"
    theirs: nn.Module = load_original().CMT(img_size=height, **config)
    for name, module in theirs.named_modules():
        own = model.get_submodule(name)
        module._parameters.update(own._parameters)
        module._buffers.update(own._buffers)
    return theirs.train(model.training)
