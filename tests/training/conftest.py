"""Small images and settings that train in a second."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cmt_fast.training.config import TrainConfig

COLOURS = {"blue": (40, 60, 200), "green": (40, 190, 60), "red": (200, 50, 40)}
TINY = dict(embed_dims=[8, 16, 16, 32], depths=[1, 1, 1, 1], num_heads=[1, 2, 2, 4], stem_channel=8, fc_dim=32)


def write_images(root: Path, counts: dict[str, int], size: int = 40) -> Path:
    """Noisy images of one colour a class: ``counts`` of them under ``train`` and ``val``."""
    rng = np.random.default_rng(0)
    for part, count in counts.items():
        for name, colour in COLOURS.items():
            folder = root / part / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = np.clip(np.array(colour) + rng.normal(0, 30, (size, size + 8, 3)), 0, 255)
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.png")
    return root


@pytest.fixture
def make_images() -> Callable[[Path, dict[str, int]], Path]:
    """:func:`write_images`."""
    return write_images


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 training and 12 held-out images of three classes."""
    return write_images(tmp_path_factory.mktemp("images"), {"train": 8, "val": 4})


@pytest.fixture
def tiny(image_folder: Path, tmp_path: Path) -> Callable[..., TrainConfig]:
    """Settings of a run of a second; keywords replace them."""

    def make(**changes: object) -> TrainConfig:
        settings: dict = dict(
            data=str(image_folder),
            output=str(tmp_path / "run"),
            model="cmt_digits",
            model_args=dict(TINY),
            epochs=2,
            batch_size=8,
            lr=2e-3,
            warmup_epochs=0.5,
            auto_augment="",
            erase=0.0,
            device="cpu",
        )
        return TrainConfig(**{**settings, **changes})

    return make
