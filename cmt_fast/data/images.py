"""Reading images of any kind as 8-bit grey or RGB, and finding them in folders."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

#: Endings of files that count as images in a folder. A file that is named itself may have any ending.
EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".gif")


def read_image(path: str | Path, channels: int = 3) -> Image.Image:
    """Read a file as an 8-bit image, upright by its EXIF orientation.

    Transparent parts become white. 16-bit grey images are scaled to 8 bits (Pillow alone would clip them).

    Args:
        path: the file.
        channels: 1 for grey, 3 for RGB.

    Raises:
        OSError: if the file cannot be read or is no image.
        ValueError: if its pixels have no defined range (floating point, or more than 16 bits).
    """
    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file)
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:  # SyntaxError: Pillow on some broken files
        raise OSError(f"cannot read the image {path}: {error}") from error
    if image.mode == "F" or (image.mode == "I" and _outside_16_bits(image)):
        raise ValueError(f"{path}: pixels of mode {image.mode!r} have no defined range; save it with 8 or 16 bits")
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image).astype(np.float32) / 257).round().astype(np.uint8))
    elif image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("L" if channels == 1 else "RGB")


def _outside_16_bits(image: Image.Image) -> bool:
    pixels = np.asarray(image)
    return bool(pixels.min() < 0 or pixels.max() > 65535)


def find_images(paths: Sequence[str | Path]) -> list[Path]:
    """Files as given, and for each folder every image below it, in order of name.

    Raises:
        FileNotFoundError: if a path does not exist, or a folder holds no image.
    """
    found: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.suffix.lower() in EXTENSIONS and p.is_file())
            if not inside:
                raise FileNotFoundError(f"{path} holds no image (endings looked for: {' '.join(EXTENSIONS)})")
            found += inside
        elif path.exists():
            found.append(path)
        else:
            raise FileNotFoundError(f"no file or folder {path}")
    return found
