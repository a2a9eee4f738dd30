"""From an image to the tensor a model was trained on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from itertools import chain
from typing import Any

from PIL import Image, ImageOps
from torch import Tensor

Transform = Callable[[Image.Image], Tensor]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Preprocess:
    """What happens to an image before the model; it is saved with a trained model.

    Attributes:
        img_size: (height, width) in pixels.
        mean, std: of each channel, for values in 0..1; their number is the model's ``in_chans``.
        interpolation: of the resize.
        crop_pct: share of the resized image that the centre crop keeps. The original resizes to ``int(256 / 224 * size)``.
    """

    img_size: tuple[int, int] = (224, 224)
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    interpolation: str = "bicubic"
    crop_pct: float = 0.875

    @property
    def channels(self) -> int:
        return len(self.mean)

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> Preprocess:
        """The inverse of :meth:`as_dict`."""
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in saved.items()}
        return cls(**values)

    def as_dict(self) -> dict[str, Any]:
        """Lists, numbers and strings only, so that a checkpoint can hold it."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    def evaluation(self) -> Transform:
        """Resize, centre crop, normalise: an image -> (channels, H, W) float32."""
        return self._create(is_training=False, crop_pct=self.crop_pct)

    def training(self, auto_augment: str | None, erase: float, color_jitter: float) -> Transform:
        """Random crop, flip, ``auto_augment`` (timm's notation), colour jitter, random erasing: -> (channels, H, W) float32."""
        transform = self._create(
            is_training=True, auto_augment=auto_augment, re_prob=erase, re_mode="pixel", color_jitter=color_jitter
        )
        # At the highest magnitudes timm asks Pillow to keep 0 bits, which Pillow 13 refuses.
        for step in transform.transforms:
            for op in [*getattr(step, "ops", []), *chain(*getattr(step, "policy", []))]:
                if op.name.startswith("Posterize"):
                    op.aug_fn = posterize
        return transform

    def _create(self, **options: Any) -> Any:
        try:
            from timm.data import create_transform
        except ImportError as error:
            raise ImportError("preprocessing images needs timm: pip install 'cmt-fast[train]'") from error

        return create_transform(
            input_size=(self.channels, *self.img_size),
            mean=self.mean,
            std=self.std,
            interpolation=self.interpolation,
            **options,
        )


def posterize(image: Image.Image, bits_to_keep: int, **_: Any) -> Image.Image:
    """Keep the highest bits of each channel, at least one."""
    return ImageOps.posterize(image, min(max(bits_to_keep, 1), 8))
