"""What a training folder must hold, reading images, and the digits."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from cmt_fast.data.digits import digits_preprocess, load_digit_images
from cmt_fast.data.images import find_images, read_image
from cmt_fast.data.preprocess import Preprocess
from cmt_fast.training.config import TrainConfig
from cmt_fast.training.data import load_data, val_loader
from cmt_fast.training.distributed import Processes

pytestmark = pytest.mark.needs("timm", "torchvision")


def remove(*parts):
    return lambda root: shutil.rmtree(root.joinpath(*parts))


def empty(*parts):
    return lambda root: [p.unlink() for p in root.joinpath(*parts).iterdir()]


def only_red(root):
    for part in ("train", "val"):
        for name in ("blue", "green"):
            shutil.rmtree(root / part / name)


@pytest.mark.parametrize(
    "damage, error, message",
    [
        (remove(), FileNotFoundError, "no folder .*; training needs DATA/train/CLASS/image.jpg"),
        (remove("train"), FileNotFoundError, "has no folder 'train'"),
        (remove("val"), FileNotFoundError, "has no folder 'val'"),
        (lambda root: [shutil.rmtree(p) for p in (root / "train").iterdir()], FileNotFoundError, "no class folders"),
        (empty("train", "red"), FileNotFoundError, "no images in .*train/red"),
        (remove("val", "green"), ValueError, "only train has green"),
        (remove("train", "blue"), ValueError, "only val has blue"),
        (only_red, ValueError, "at least two classes, .* has only red"),
    ],
)
def test_damaged_folders(tmp_path, make_images, damage, error, message):
    root = make_images(tmp_path / "images", {"train": 1, "val": 1})
    damage(root)
    with pytest.raises(error, match=message):
        load_data(TrainConfig(str(root), model="cmt_digits"))


def test_batch_larger_than_the_data(tiny):
    with pytest.raises(ValueError, match="batch_size must be at most the 24 training images"):
        load_data(tiny(batch_size=32))


def test_folder(tiny):
    data = load_data(tiny())
    assert data.class_names == ["blue", "green", "red"]
    image, label = data.train[0]
    assert image.shape == (3, 32, 32) and image.dtype == torch.float32 and label == 0


def test_every_held_out_image_is_seen_once_by_some_process(tiny):
    config = tiny(batch_size=2)
    data = load_data(config)
    seen = [classes for rank in range(5) for _, classes in val_loader(data, config, Processes(rank, 5), pin=False)]
    assert torch.cat(seen).bincount().tolist() == [4, 4, 4]


def test_digits_are_split_evenly():
    train, train_classes = load_digit_images(held_out=False)
    held_out, classes = load_digit_images(held_out=True)
    assert (len(train), len(held_out)) == (1347, 450)
    assert len({image.tobytes() for image in train + held_out}) == 1797  # no image is on both sides
    for digit in range(10):
        assert abs(classes.count(digit) - train_classes.count(digit) / 3) < 2


def test_digits_tensor():
    images, _ = load_digit_images(held_out=True)
    tensor = digits_preprocess(32).evaluation()(images[0])
    assert tensor.shape == (1, 32, 32) and -1 <= tensor.min() < -0.9 < 0.5 < tensor.max() <= 1


def ramp(mode):
    grey = np.linspace(0, 255, 64).astype(np.uint8).reshape(8, 8)
    if mode in ("I;16", "I"):
        deep = np.linspace(0, 65535, 64).reshape(8, 8)
        return Image.fromarray(deep.astype(np.uint16 if mode == "I;16" else np.int32))
    return Image.fromarray(grey).convert(mode)


@pytest.mark.parametrize("mode, ending", [("L", "png"), ("RGB", "png"), ("1", "png"), ("P", "gif"), ("RGBA", "png"), ("LA", "png"), ("CMYK", "tif"), ("I;16", "png"), ("I", "tif")])  # fmt: skip
@pytest.mark.parametrize("channels", [1, 3])
def test_reads_every_kind_of_image(tmp_path, mode, ending, channels):
    path = tmp_path / f"image.{ending}"
    ramp(mode).save(path)
    image = read_image(path, channels)
    assert image.mode == {1: "L", 3: "RGB"}[channels]
    expected = np.asarray(ramp("1" if mode == "1" else "L").convert("L"), dtype=int)
    assert np.abs(np.asarray(image.convert("L"), dtype=int) - expected).max() <= 1


def test_transparent_is_white(tmp_path):
    Image.new("RGBA", (4, 4), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    assert read_image(tmp_path / "clear.png").getpixel((0, 0)) == (255, 255, 255)


def test_exif_orientation(tmp_path):
    image = Image.new("RGB", (6, 4))
    exif = image.getexif()
    exif[0x0112] = 6  # turn by 90 degrees
    image.save(tmp_path / "photo.jpg", exif=exif)
    assert read_image(tmp_path / "photo.jpg").size == (4, 6)


def test_pixels_without_a_range(tmp_path):
    Image.fromarray(np.zeros((4, 4), np.float32)).save(tmp_path / "float.tif")
    with pytest.raises(ValueError, match="no defined range"):
        read_image(tmp_path / "float.tif")


def test_truncated_image_is_named(tmp_path):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 50, 3), dtype=np.uint8))
    image.save(tmp_path / "whole.png")
    (tmp_path / "half.png").write_bytes((tmp_path / "whole.png").read_bytes()[:3000])
    for name in ("half.png", "gone.png"):
        with pytest.raises(OSError, match=f"cannot read the image .*{name}"):
            read_image(tmp_path / name)


def test_finds_images(tmp_path):
    (tmp_path / "deep").mkdir()
    for name in ("b.PNG", "deep/a.jpg", "note.txt"):
        (tmp_path / name).write_bytes(b"")
    assert [p.name for p in find_images([tmp_path])] == ["b.PNG", "a.jpg"]
    assert find_images([tmp_path / "note.txt"]) == [tmp_path / "note.txt"]
    with pytest.raises(FileNotFoundError, match="no file or folder"):
        find_images([tmp_path / "gone"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="holds no image"):
        find_images([tmp_path / "empty"])


@pytest.mark.parametrize("policy", ["rand-m10-inc1", "rand-m9-mstd0.5-inc1", "original", "augmix-m10", ""])
def test_every_augmentation_at_full_strength(policy):
    """timm's posterize asks Pillow for 0 bits, which Pillow 13 refuses."""
    transform = Preprocess(img_size=(32, 32)).training(policy or None, erase=0.5, color_jitter=0.4)
    ops = [op for step in transform.transforms for op in getattr(step, "ops", [])]
    ops += [op for step in transform.transforms for sub in getattr(step, "policy", []) for op in sub]
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8))
    assert len(ops) > 5 or not policy
    for op in ops:
        op.prob, op.magnitude, op.magnitude_std = 1.0, 10, 0
        assert op(image).size == image.size
    assert transform(image).shape == (3, 32, 32)


def test_preprocess_survives_a_dict():
    preprocess = Preprocess(img_size=(160, 192), crop_pct=0.9)
    assert Preprocess.from_dict(preprocess.as_dict()) == preprocess
