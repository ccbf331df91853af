"""Decoding of image files into arrays of bytes."""

import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch.utils.data import get_worker_info

_T = TypeVar("_T")


def decode(paths: Sequence[Path], size: int) -> npt.NDArray[np.uint8]:
    """Decode images into (N, C, size, size); C is 1 if all of them are grey, else 3."""
    images = list(_mapped(lambda path: read_image(path, size), paths))
    channels = max(1 if pixels.ndim == 2 else 3 for pixels in images)
    return np.stack([convert_channels(pixels, channels) for pixels in images])


def decode_as(paths: Sequence[Path], channels: int, size: int) -> npt.NDArray[np.uint8]:
    """Decode images into (N, channels, size, size), without a second copy of all of them."""
    pixels = np.empty((len(paths), channels, size, size), np.uint8)

    def fill(i: int) -> None:
        pixels[i] = convert_channels(read_image(paths[i], size), channels)

    list(_mapped(fill, range(len(paths))))
    return pixels


def find_damaged(paths: Sequence[Path]) -> dict[int, str]:
    """Read all files and return the numbers of those that cannot be decoded, each with its error message."""

    def look(path: Path) -> str | None:
        try:
            read_image(path, 8)
        except ValueError as error:
            return str(error)
        return None

    return {i: error for i, error in enumerate(_mapped(look, paths)) if error is not None}


def convert_channels(pixels: npt.NDArray[np.uint8], channels: int) -> npt.NDArray[np.uint8]:
    """Convert the result of :func:`read_image` to (1, size, size), grey by ITU-R 601, or to (3, size, size)."""
    if channels == 1 and pixels.ndim == 3:
        pixels = np.asarray(Image.fromarray(pixels).convert("L"))
    if pixels.ndim == 2:
        return np.broadcast_to(pixels, (channels, *pixels.shape))
    return pixels.transpose(2, 0, 1)


def _mapped(work: Callable[..., _T], items: Iterable[object]) -> Iterable[_T]:
    """``map`` in threads, as Pillow decodes without Python's lock; in a loader's worker the ordinary ``map``."""
    if get_worker_info() is not None:
        return map(work, items)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return list(pool.map(work, items))


def read_image(path: Path, size: int) -> npt.NDArray[np.uint8]:
    """Decode an image, upright and resized, into (size, size) if it is grey, else (size, size, 3)."""
    upright = open_upright(path, size)
    if upright.size != (size, size):
        upright = upright.resize((size, size), Image.Resampling.BILINEAR, reducing_gap=3.0)
    pixels = np.asarray(upright)
    if pixels.ndim == 3 and (pixels[..., :1] == pixels[..., 1:]).all():
        return pixels[..., 0]
    return pixels


def open_upright(path: Path, size: int | None = None) -> Image.Image:
    """Decode an image, upright, on white where it is transparent, as ``"L"`` if it is grey, else ``"RGB"``.

    With ``size`` JPEG is decoded at a fraction of its size, at least that large.
    """
    with open_image(path) as image:
        try:
            if size is not None:
                image.draft(None, (size, size))
            if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
                ImageOps.exif_transpose(image, in_place=True)
            upright: Image.Image = image
            if upright.mode.startswith("I"):  # 16 bits per pixel
                upright = Image.fromarray((np.asarray(upright) >> 8).clip(0, 255).astype(np.uint8))
            elif upright.mode in ("LA", "PA", "RGBA") or "transparency" in upright.info:
                paper = Image.new("RGBA", upright.size, "white")
                upright = Image.alpha_composite(paper, upright.convert("RGBA"))
            return upright.convert("L" if upright.mode in ("1", "L") else "RGB")
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise _unreadable(path, error) from error


def open_image(path: Path) -> Image.Image:
    """Read the header of an image file."""
    try:
        return Image.open(path)
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> ValueError:
    return ValueError(
        f"{path} cannot be read as an image ({error}): repair it, take it out of the folder, or leave out all damaged "
        "images with skip_damaged=True (--skip-damaged)"
    )
