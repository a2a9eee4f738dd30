"""The built-in data set: scikit-learn's 1797 handwritten digits (UCI, 8x8 grey), which ship inside that package."""

from __future__ import annotations

import numpy as np
from PIL import Image

from cmt_fast.data.preprocess import Preprocess, Transform

#: Share of the images held out, and the seed of the split. The split does not depend on the training's seed.
HELD_OUT, SPLIT_SEED = 0.25, 0


def digits_preprocess(img_size: int) -> Preprocess:
    """Grey, resized to ``img_size`` pixels, nothing cropped."""
    return Preprocess(img_size=(img_size, img_size), mean=(0.5,), std=(0.5,), crop_pct=1.0)


def load_digit_images(held_out: bool) -> tuple[list[Image.Image], list[int]]:
    """Images (8x8, mode L) and classes 0 to 9: the 449 held out, or the other 1348. Every class is split alike.

    Raises:
        ImportError: without scikit-learn.
    """
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise ImportError("the built-in digits need scikit-learn: pip install 'cmt-fast[train]'") from error

    digits = load_digits()
    grey = (digits.images * (255 / 16)).round().astype(np.uint8)  # [1797, 8, 8], 17 levels of ink
    train, test, train_classes, test_classes = train_test_split(
        grey, digits.target, test_size=HELD_OUT, stratify=digits.target, random_state=SPLIT_SEED
    )
    kept, classes = (test, test_classes) if held_out else (train, train_classes)
    return [Image.fromarray(image) for image in kept], [int(c) for c in classes]


def digits_augmentation(preprocess: Preprocess) -> Transform:
    """Small turns, shifts and scalings; no flips, which would change what a digit means."""
    from torchvision.transforms import v2

    small = v2.RandomAffine(
        degrees=10, translate=(0.1, 0.1), scale=(0.9, 1.1), interpolation=v2.InterpolationMode.BILINEAR
    )
    resize = v2.Resize(preprocess.img_size, v2.InterpolationMode.BICUBIC)
    return v2.Compose([resize, small, preprocess.evaluation()])
