"""The data sets of a run and the loaders of its epochs."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Subset

from cmt_fast.data.digits import digits_augmentation, digits_preprocess, load_digit_images
from cmt_fast.data.images import EXTENSIONS, read_image
from cmt_fast.data.preprocess import Preprocess, Transform
from cmt_fast.training.config import TrainConfig
from cmt_fast.training.distributed import Processes

Example = tuple[Tensor, int]


@dataclass(frozen=True)
class Data:
    """Training and held-out images; an element is ((C, H, W) float32, class)."""

    train: Dataset[Example]
    val: Dataset[Example]
    train_count: int
    val_count: int
    class_names: list[str]
    preprocess: Preprocess


class ImageList(Dataset[Example]):
    """Images in memory, transformed each time they are asked for."""

    def __init__(self, images: Sequence[Image.Image], classes: Sequence[int], transform: Transform) -> None:
        self.images, self.classes, self.transform = images, classes, transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Example:
        return self.transform(self.images[index]), self.classes[index]


def load_data(config: TrainConfig) -> Data:
    """The data that ``config.data`` names.

    Raises:
        FileNotFoundError, ValueError: if a folder does not hold what training needs; the message says what to change.
    """
    size = config.constructor_args()["img_size"]
    data = _digits(size) if config.is_digits else _folder(config, size)
    if data.train_count < config.batch_size:
        raise ValueError(
            f"batch_size must be at most the {data.train_count} training images of {config.data}, got {config.batch_size}"
        )
    return data


def _digits(size: int) -> Data:
    preprocess = digits_preprocess(size)
    train = ImageList(*load_digit_images(held_out=False), digits_augmentation(preprocess))
    val = ImageList(*load_digit_images(held_out=True), preprocess.evaluation())
    return Data(train, val, len(train), len(val), [str(digit) for digit in range(10)], preprocess)


def _folder(config: TrainConfig, size: int) -> Data:
    try:
        from torchvision.datasets import ImageFolder
    except ImportError as error:
        raise ImportError("training from a folder needs torchvision: pip install 'cmt-fast[train]'") from error

    root = Path(config.data)
    check_folder(root)
    preprocess = Preprocess(img_size=(size, size))
    augmentation = preprocess.training(config.auto_augment or None, config.erase, config.color_jitter)
    train, val = (
        ImageFolder(root / part, transform=transform, loader=read_image, is_valid_file=is_image)
        for part, transform in (("train", augmentation), ("val", preprocess.evaluation()))
    )
    return Data(train, val, len(train), len(val), train.classes, preprocess)


def is_image(path: str) -> bool:
    """Whether the file's ending is an image's."""
    return path.lower().endswith(EXTENSIONS)


def check_folder(root: Path) -> None:
    """Check that ``root`` holds ``train/`` and ``val/`` with the same class folders, each with an image.

    Raises:
        FileNotFoundError: if a folder or its images are missing.
        ValueError: if the classes of the two differ or there is only one.
    """
    wanted = "training needs DATA/train/CLASS/image.jpg and DATA/val/CLASS/image.jpg (or DATA = digits)"
    if not root.is_dir():
        raise FileNotFoundError(f"no folder {root}; {wanted}")
    classes: dict[str, set[str]] = {}
    for part in ("train", "val"):
        folder = root / part
        if not folder.is_dir():
            raise FileNotFoundError(f"{root} has no folder {part!r}; {wanted}")
        classes[part] = {path.name for path in folder.iterdir() if path.is_dir()}
        if not classes[part]:
            raise FileNotFoundError(f"{folder} has no class folders; {wanted}")
        empty = sorted(name for name in classes[part] if not any(is_image(p.name) for p in (folder / name).rglob("*")))
        if empty:
            raise FileNotFoundError(
                f"no images in {_some([f'{folder}/{name}' for name in empty])} (endings: {' '.join(EXTENSIONS)})"
            )
    for part, other in (("train", "val"), ("val", "train")):
        only = sorted(classes[part] - classes[other])
        if only:
            raise ValueError(
                f"train and val must have the same classes, but only {part} has {_some(only)}: add or remove them"
            )
    if len(classes["train"]) < 2:
        raise ValueError(f"training needs at least two classes, {root} has only {_some(sorted(classes['train']))}")


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def train_loader(data: Data, config: TrainConfig, processes: Processes, epoch: int, pin: bool) -> DataLoader[Example]:
    """The batches of one epoch; their order and augmentation depend on (seed, epoch, rank) only."""
    sampler: DistributedSampler[Example] | None = None
    if processes.count > 1:
        sampler = DistributedSampler(data.train, processes.count, processes.rank, seed=config.seed, drop_last=True)
        sampler.set_epoch(epoch)
    return DataLoader(
        data.train,
        config.batch_size,
        shuffle=sampler is None,
        sampler=sampler,
        drop_last=True,
        num_workers=config.workers,
        worker_init_fn=ignore_interrupt,
        pin_memory=pin,
    )


def val_loader(data: Data, config: TrainConfig, processes: Processes, pin: bool) -> DataLoader[Example]:
    """The held-out images of this process: every ``count``-th, so that each is seen once."""
    mine = Subset(data.val, range(processes.rank, data.val_count, processes.count))
    return DataLoader(
        mine, 2 * config.batch_size, num_workers=config.workers, worker_init_fn=ignore_interrupt, pin_memory=pin
    )


def ignore_interrupt(worker: int) -> None:
    """Leave Ctrl-C to the main process, which ends its workers itself."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def steps_per_epoch(data: Data, config: TrainConfig, processes: Processes) -> int:
    """Steps of one epoch: incomplete batches are left out."""
    return data.train_count // processes.count // config.batch_size
