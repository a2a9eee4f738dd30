"""What ``--checkpoint``, ``--model`` and ``--pretrained`` name: a trained model that knows its classes and its preprocessing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import torch
import typer

from cmt_fast.data.class_names import imagenet_class_names
from cmt_fast.data.preprocess import Preprocess
from cmt_fast.inference import PackedModel, load_packed, pack
from cmt_fast.inference.packed_io import PACKED_KEY
from cmt_fast.models.checkpoint import load_checkpoint, load_model, read_checkpoint
from cmt_fast.models.checkpoint_fit import describe_layout, layout_of
from cmt_fast.models.checkpoint_io import Checkpoint
from cmt_fast.models.cmt import CMT
from cmt_fast.models.create import create
from cmt_fast.models.features import CMTFeatures
from cmt_fast.models.variants import VARIANTS

CheckpointOption = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Weights saved by cmt-fast train (with the model's layout, class names and preprocessing inside), a packed "
        "model (cmt-fast export --format packed), or the original's file together with --model.",
    ),
]
ModelOption = Annotated[str | None, typer.Option(help=f"Which model: {', '.join(VARIANTS)}.")]
PretrainedOption = Annotated[
    bool, typer.Option("--pretrained", help="Use the original's published ImageNet weights of --model.")
]
DtypeOption = Annotated[
    str,
    typer.Option(
        help="Of weights and maps: float32, bfloat16, float16, or auto: a packed file's own, else bfloat16 or float16 on a GPU "
        "and float32 on a CPU."
    ),
]

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Trained:
    """A model that can name what it sees."""

    model: CMT | PackedModel
    class_names: list[str]
    preprocess: Preprocess


def load_trained(
    checkpoint: Path | None, model: str | None, pretrained: bool, img_size: int | None, device: torch.device
) -> Trained:
    """The model asked for, in eval mode; only a packed one is on ``device`` already.

    Raises:
        ValueError: if the options do not name trained weights, or contradict each other.
        CheckpointError, OSError: if the weights cannot be read or do not fit.
    """
    if model is not None and model not in VARIANTS:
        raise ValueError(f"unknown model {model!r}; expected one of {', '.join(VARIANTS)}")
    if checkpoint is not None and pretrained:
        raise ValueError("--checkpoint and --pretrained both name weights; choose one")
    if checkpoint is None and not (model and pretrained):
        raise ValueError(
            "which weights? Give --checkpoint FILE (of cmt-fast train), or --model cmt_s --pretrained for the published ones"
        )
    if checkpoint is None:
        assert model is not None
        trained = _published(model)
    else:
        trained = _from_file(checkpoint, model, device)
    loaded = trained.model
    if isinstance(loaded, PackedModel):
        if img_size is not None and loaded.img_size != (img_size, img_size):
            height, width = loaded.img_size
            raise ValueError(
                f"{checkpoint} is packed for {height} x {width} pixels, but --img-size says {img_size}: export it again from its "
                "checkpoint with that size"
            )
        return trained
    if img_size is not None:
        loaded.set_input_size(img_size)
        trained = replace(trained, preprocess=replace(trained.preprocess, img_size=(img_size, img_size)))
    loaded.eval()
    return trained


def packed_model(model: CMT | CMTFeatures | PackedModel, dtype: str, device: torch.device) -> PackedModel:
    """``model`` packed in the dtype that ``--dtype`` names.

    Raises:
        ValueError: if there is no such dtype, or the model is packed in another one, or cannot be packed.
    """
    if dtype not in (*_DTYPES, "auto"):
        raise ValueError(f"--dtype must be {', '.join(_DTYPES)} or auto, got {dtype!r}")
    if isinstance(model, PackedModel):
        if dtype != "auto" and _DTYPES[dtype] != model.dtype:
            own = str(model.dtype).removeprefix("torch.")
            raise ValueError(f"the file is packed in {own}, but --dtype says {dtype}: leave --dtype out")
        return model
    return pack(model, dtype=_DTYPES[dtype] if dtype != "auto" else _best_dtype(device), device=device)


def _best_dtype(device: torch.device) -> torch.dtype:
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16


def _published(name: str) -> Trained:
    model = create(name, pretrained=True)
    assert isinstance(model, CMT)
    return Trained(model, imagenet_class_names(), Preprocess(img_size=model.img_size))


def _from_file(path: Path, name: str | None, device: torch.device) -> Trained:
    content = read_checkpoint(path, mmap=True)
    model = _packed(path, name, device) if PACKED_KEY in content.extra else _cmt(content, path, name)
    saved = content.extra.get("preprocess")
    if saved is not None:
        preprocess = Preprocess.from_dict(saved)
    elif model.in_chans == 3:
        preprocess = Preprocess(img_size=model.img_size)
    else:
        raise ValueError(
            f"{path} does not record its preprocessing, and there is none to assume for {model.in_chans} channels: "
            'save_checkpoint(model, path, preprocess={"img_size": [H, W], "mean": [...], "std": [...]})'
        )
    return Trained(model, _class_names(content.extra.get("class_names"), _num_classes(model)), preprocess)


def _packed(path: Path, name: str | None, device: torch.device) -> PackedModel:
    if name is not None:
        raise ValueError(f"{path} is a packed model, which says itself what it computes: leave --model out")
    return load_packed(path, device=device)


def _cmt(content: Checkpoint, path: Path, name: str | None) -> CMT:
    if content.config is not None:
        model = load_model(path)
        held, asked = layout_of(model.state_dict()), VARIANTS[name].config if name else None
        if asked and held != (asked["embed_dims"], asked["depths"]):
            raise ValueError(f"{path} holds {describe_layout(held)}, but --model says {name}: leave --model out")
        return model
    if name is None:
        raise ValueError(f"{path} does not say which model it holds: give --model too, one of {', '.join(VARIANTS)}")
    head = content.state_dict.get("head.weight", content.state_dict.get("module.head.weight"))
    built = create(name, num_classes=1000 if head is None else head.shape[0], img_size=VARIANTS[name].resolution)
    assert isinstance(built, CMT)
    load_checkpoint(built, path)
    return built


def _num_classes(model: CMT | PackedModel) -> int:
    if isinstance(model, CMT):
        return model.num_classes
    return 0 if model.head is None or model.head.class_bias is None else len(model.head.class_bias)


def _class_names(saved: Sequence[str] | None, count: int) -> list[str]:
    if saved is not None:
        return list(saved)
    return imagenet_class_names() if count == 1000 else [f"class {i}" for i in range(count)]
