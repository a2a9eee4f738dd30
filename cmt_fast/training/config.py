"""The settings of a training run."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from cmt_fast.backend import machine_reasons
from cmt_fast.models.cmt import CMT
from cmt_fast.models.variants import VARIANTS

#: Small models for trying things out, beside the published variants: constructor arguments of :class:`cmt_fast.CMT`.
#: At 32 pixels the published reductions would leave one key; these leave 4x4, 4x4, 2x2 and 1x1.
SMALL_MODELS: dict[str, dict[str, Any]] = {
    "cmt_digits": dict(
        embed_dims=(24, 48, 96, 192), stem_channel=16, depths=(1, 1, 2, 1), sr_ratios=(2, 1, 1, 1), fc_dim=192
    )
}
AMP_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class TrainConfig:
    """Everything that decides what a run computes; plain data, saved with every checkpoint.

    Attributes:
        data: a folder with ``train/`` and ``val/``, or ``digits``.
        output: folder for checkpoints, history and plot.
        model: a published variant or one of :data:`SMALL_MODELS`.
        model_args: constructor arguments of :class:`cmt_fast.CMT` that replace the model's own.
        img_size: side in pixels; by default 32 for the digits and the variant's published size otherwise.
        pretrained: start from the original's published weights.
        init_from: start from this checkpoint.
        epochs: how often the model sees the training set.
        batch_size: images a step and process.
        lr: peak learning rate of AdamW, as given (not scaled by the batch size).
        min_lr: where the cosine ends.
        warmup_epochs: linear warm-up from ``min_lr`` to ``lr``; may be a fraction.
        weight_decay: not applied to biases, norms and the position bias tables.
        clip_grad: largest norm of the gradient; 0 for no clipping.
        label_smoothing: share of the target spread over all classes.
        mixup, cutmix: alpha of the Beta distribution; 0 for off.
        drop_path: stochastic depth of the last block.
        auto_augment: timm's notation, or "" for none. Folders only; the digits have their own augmentation.
        erase: probability of random erasing. Folders only.
        color_jitter: strength where ``auto_augment`` is off. Folders only.
        ema: keep a moving average of the weights, evaluate it and save it as the best model.
        ema_decay: its decay, reached by a warm-up.
        amp: ``off``, ``bf16``, ``fp16``, or ``auto``: bf16 on GPUs that have it, fp16 on others, off on a CPU.
        residual: under autocast the blocks' residual stream in autocast's 16 bits (``low``) or, as the original's, in float32 (``full``).
        channels_last: NHWC memory for the images.
        workers: processes that read images; 0 reads them in the main one.
        seed: of the weights, the order of the images and every augmentation.
        device: as torch names it, or ``auto``.
        backend: of cmt_fast's operations.
    """

    data: str
    output: str = "runs/train"
    model: str = "cmt_s"
    model_args: dict[str, Any] = field(default_factory=dict)
    img_size: int | None = None
    pretrained: bool = False
    init_from: str | None = None
    epochs: int = 300
    batch_size: int = 64
    lr: float = 1e-3
    min_lr: float = 1e-5
    warmup_epochs: float = 5.0
    weight_decay: float = 0.05
    clip_grad: float = 0.0
    label_smoothing: float = 0.1
    mixup: float = 0.0
    cutmix: float = 0.0
    drop_path: float = 0.1
    auto_augment: str = "rand-m9-mstd0.5-inc1"
    erase: float = 0.25
    color_jitter: float = 0.4
    ema: bool = False
    ema_decay: float = 0.9998
    amp: str = "auto"
    residual: str = "low"
    channels_last: bool = False
    workers: int = 0
    seed: int = 0
    device: str = "auto"
    backend: str = "auto"

    @property
    def is_digits(self) -> bool:
        return self.data == "digits"

    @property
    def mixes(self) -> bool:
        return self.mixup > 0 or self.cutmix > 0

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, saved: dict[str, Any]) -> TrainConfig:
        """The inverse of :meth:`as_dict`; names that this version does not know are an error.

        Raises:
            ValueError: naming them.
        """
        unknown = sorted(set(saved) - {f.name for f in fields(cls)})
        if unknown:
            raise ValueError(
                f"the checkpoint has training settings this version does not know: {', '.join(unknown)}; update cmt_fast"
            )
        return cls(**saved)

    def torch_device(self) -> torch.device:
        """The device asked for.

        Raises:
            ValueError: if torch does not know it, or it is not there.
        """
        return find_device(self.device)

    def amp_dtype(self, device: torch.device) -> torch.dtype | None:
        """Autocast's dtype on ``device``, or None without autocast."""
        if self.amp != "auto":
            return AMP_DTYPES.get(self.amp)
        if device.type != "cuda":
            return None
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16

    def constructor_args(self) -> dict[str, Any]:
        """Constructor arguments of the model without those that the data decides (classes and channels)."""
        own = SMALL_MODELS.get(self.model)
        args = dict(own if own is not None else VARIANTS[self.model].config)
        default_size = 32 if self.is_digits or own is not None else VARIANTS[self.model].resolution
        return {**args, "img_size": self.img_size or default_size, "drop_path_rate": self.drop_path, **self.model_args}

    def check(self) -> None:
        """Find every mistake that can be found before data or weights are read.

        Raises:
            ValueError: saying which setting is wrong, and what it may be.
            FileNotFoundError: if a file or folder is not there.
        """
        names = [*VARIANTS, *SMALL_MODELS]
        if self.model not in names:
            raise ValueError(f"unknown model {self.model!r}; expected one of {', '.join(names)}")
        for name in ("epochs", "lr"):
            _require(getattr(self, name) > 0, name, "positive", getattr(self, name))
        _require(self.batch_size >= 2, "batch_size", "at least 2 (BatchNorm needs two images)", self.batch_size)
        for name in ("min_lr", "warmup_epochs", "weight_decay", "clip_grad", "mixup", "cutmix", "workers", "seed"):
            _require(getattr(self, name) >= 0, name, "at least 0", getattr(self, name))
        for name in ("label_smoothing", "drop_path", "erase", "ema_decay"):
            _require(0 <= getattr(self, name) < 1, name, "in [0, 1)", getattr(self, name))
        _require(self.min_lr <= self.lr, "min_lr", f"at most lr ({self.lr})", self.min_lr)
        _require(
            self.warmup_epochs < self.epochs, "warmup_epochs", f"less than epochs ({self.epochs})", self.warmup_epochs
        )
        _require(self.amp in ("auto", "off", *AMP_DTYPES), "amp", "auto, off, bf16 or fp16", self.amp)
        _require(self.residual in ("full", "low"), "residual", "full or low", self.residual)
        if self.mixes and self.batch_size % 2:
            raise ValueError(f"mixup and cutmix pair the images: batch_size must be even, got {self.batch_size}")
        if self.pretrained and self.model not in VARIANTS:
            raise ValueError(f"there are no published weights of {self.model}; expected one of {', '.join(VARIANTS)}")
        if self.pretrained and self.init_from:
            raise ValueError("pretrained and init_from both give the first weights; choose one")
        if self.init_from and not Path(self.init_from).is_file():
            raise FileNotFoundError(f"init_from: no file {self.init_from}")
        device = self.torch_device()
        if device.type == "cpu" and self.amp == "fp16":
            raise ValueError("amp fp16 needs a GPU; on a CPU use bf16 or off")
        if self.backend != "auto":
            reasons = machine_reasons(self.backend)
            if reasons:
                raise ValueError(f"backend {self.backend!r} cannot run here: {'; '.join(reasons)}")
        with torch.device("meta"):
            CMT(**self.constructor_args())  # contradicting arguments and too small images raise here, without memory


def find_device(name: str) -> torch.device:
    """``auto`` (a GPU if there is one) or torch's name of a device.

    Raises:
        ValueError: if torch does not know it, or it is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device must be auto, cpu, cuda or cuda:N, got {name!r}") from error
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        raise ValueError(f"no device {name}: {torch.cuda.device_count()} CUDA devices are visible; use cpu or auto")
    return device


def _require(condition: bool, name: str, expected: str, value: object) -> None:
    if not condition:
        raise ValueError(f"{name} must be {expected}, got {value}")
