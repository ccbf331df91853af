"""Letters of many scripts, drawn with the fonts that matplotlib ships: a data set that needs no download."""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
import unicodedata
import zipfile
import zlib
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import PIL
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn import functional as F

from lightning_rkd.data.datamodules.base import ImageDataModule, LabelledImages
from lightning_rkd.data.transforms.augment import Augment
from lightning_rkd.utils.imports import require

matplotlib = require("matplotlib", extra="plots")
FT2Font = require("matplotlib.ft2font", extra="plots").FT2Font

_log = logging.getLogger(__name__)

FACES = tuple(
    f"DejaVu{family}{style}"
    for family, styles in {
        "Sans": ("", "-Oblique", "-Bold", "-BoldOblique"),
        "SansMono": ("", "-Oblique", "-Bold", "-BoldOblique"),
        "Serif": ("", "-Italic", "-Bold", "-BoldItalic"),
    }.items()
    for style in styles
)
"""The faces, and so the number of samples of a class."""

DISTORTION = Augment(rotation=20, scale=0.25, shear=0.3, shift=0.1, noise=0.2)
"""What makes every sample of a letter different, once, when the data set is made."""


class GlyphDataModule(ImageDataModule):
    """525 letters (Latin, Greek, Cyrillic, Armenian, Georgian) x 12 faces, distorted, grey, 28 x 28.

    Letters that some face draws alike, pixel for pixel, are one class: Latin A stands for Alpha and the Cyrillic A.
    Letters with accents are left out. Deterministic; rendered in about a second, then read from a cache file.

    Args:
        image_size: Side of the images.
        max_classes: Use fewer letters, evenly spread over the scripts.
        cache_dir: Where the rendered letters are kept; ``~/.cache/lightning_rkd`` by default.
        classes_per_batch: P, per device.
        samples_per_class: K.
        batches_per_epoch: Batches per epoch and device; ``None`` shows about as many samples as there are.
        eval_batch_size: Batch size of validation, test and prediction.
        num_workers: Worker processes per loader.
        seed: Of order and augmentation.
        split_seed: Of the division of the letters.
        validation: Part of all letters that validate.
        test: Part of all letters that test.
        augment: What training batches go through.
        split_by: Whether "classes" (letters nobody trained on are tested) or "samples" are divided.

    Example:
        >>> data = GlyphDataModule(max_classes=20, classes_per_batch=4, samples_per_class=3)
        >>> data.setup()
        >>> x, y = next(iter(data.train_dataloader()))
        >>> x.shape, data.num_train_classes, data.class_names[0]
        (torch.Size([12, 1, 28, 28]), 12, 'A')
    """

    def __init__(
        self,
        image_size: int = 28,
        max_classes: int | None = None,
        cache_dir: str | Path | None = None,
        classes_per_batch: int | None = 24,
        samples_per_class: int | None = 5,
        batches_per_epoch: int | None = None,
        eval_batch_size: int = 512,
        num_workers: int = 0,
        seed: int = 0,
        split_seed: int = 0,
        validation: float = 0.15,
        test: float = 0.25,
        augment: Augment | None = None,
        split_by: Literal["classes", "samples"] = "classes",
        views: int | None = None,
    ) -> None:
        super().__init__(
            classes_per_batch, samples_per_class, batches_per_epoch, eval_batch_size, num_workers, seed, split_seed,
            validation, test, augment, split_by, views,
        )  # fmt: skip
        if image_size < 8:
            raise ValueError(f"image_size must be at least 8 pixels, got {image_size}")
        if max_classes is not None and max_classes < 6:
            raise ValueError(f"max_classes must be at least 6, two each to train, validate and test; got {max_classes}")
        self.image_size, self.max_classes = image_size, max_classes
        self.cache_dir = Path(cache_dir) if cache_dir is not None else None

    def prepare_data(self) -> None:
        """Render into the cache."""
        self.load()

    def load(self) -> LabelledImages:
        """Letters in the order of their code points."""
        images, letters = _letters(self.image_size, self.cache_dir)
        if self.max_classes is not None:
            kept = np.linspace(0, len(letters) - 1, min(self.max_classes, len(letters))).round().astype(int)
            images, letters = images[torch.from_numpy(kept)], "".join(letters[i] for i in kept)
        labels = torch.arange(len(letters)).repeat_interleave(images.shape[1])
        return LabelledImages(images.flatten(0, 1).unsqueeze(1), labels, list(letters))


@lru_cache(maxsize=2)
def _letters(side: int, cache_dir: Path | None) -> tuple[Tensor, str]:
    """Distorted letters (classes, faces, side, side), from the cache where it is sound, and their characters."""
    path = (cache_dir or _default_cache()) / f"glyphs-{_fingerprint(side)}.npz"
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as content:  # CRCs are checked in reading
            images, letters = torch.from_numpy(content["images"]), str(content["letters"])
        if images.shape != (len(letters), len(FACES), side, side) or images.dtype != torch.uint8:
            raise ValueError(f"unexpected content: {images.dtype} {tuple(images.shape)}")
        return images, letters
    except FileNotFoundError:
        pass
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        _log.warning("%s cannot be used (%s); drawing the letters again", path, error)
    clean, letters = render_letters(2 * side)
    images = _distort(clean)
    try:
        _write(path, images=images.numpy(), letters=np.array(letters))
    except OSError as error:
        _log.warning("the letters could not be kept in %s (%s); they will be drawn again next time", path, error)
    return images, letters


def render_letters(side: int) -> tuple[npt.NDArray[np.uint8], str]:
    """Every letter in every face, white on black, without those that look like an earlier one.

    Returns:
        Images (classes, faces, side, side), and one character per class.
    """
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    shown = [set(FT2Font(str(folder / f"{face}.ttf")).get_charmap()) for face in FACES]
    letters = [
        chr(code)
        for code in sorted(set.intersection(*shown))
        if unicodedata.category(chr(code)) in ("Lu", "Ll", "Lt", "Lo") and not unicodedata.decomposition(chr(code))
    ]
    images = np.zeros((len(letters), len(FACES), side, side), dtype=np.uint8)
    for f, face in enumerate(FACES):
        # the plain layout engine is the one every Pillow has
        font = ImageFont.truetype(str(folder / f"{face}.ttf"), round(0.68 * side), layout_engine=ImageFont.Layout.BASIC)
        for i, letter in enumerate(letters):
            canvas = Image.new("L", (side, side))
            ImageDraw.Draw(canvas).text((side / 2, 0.7 * side), letter, font=font, fill=255, anchor="ms")
            images[i, f] = np.asarray(canvas)
    kept: list[int] = []
    seen: list[set[bytes]] = [set() for _ in FACES]
    for i in range(len(letters)):
        drawn = [image.tobytes() for image in images[i]]
        if images[i].any(axis=(1, 2)).all() and not any(d in s for d, s in zip(drawn, seen, strict=True)):
            kept.append(i)
            for d, s in zip(drawn, seen, strict=True):
                s.add(d)
    return images[kept], "".join(letters[i] for i in kept)


def _distort(clean: npt.NDArray[np.uint8]) -> Tensor:
    """Every sample its own distortion, from twice the size down to the size of the data set."""
    classes, faces, side, _ = clean.shape
    pixels = torch.from_numpy(clean).view(classes * faces, 1, side, side)
    shape, noise = Augment(**{**DISTORTION.__dict__, "noise": 0.0}), Augment(noise=DISTORTION.noise)
    small = []
    for start in range(0, len(pixels), 1024):
        rows = range(start, min(start + 1024, len(pixels)))
        bent = F.avg_pool2d(shape(pixels[start : start + 1024].float() / 255, 0, rows), 2)
        small.append((noise(bent, 1, rows) * 255).round().to(torch.uint8))
    return torch.cat(small).view(classes, faces, side // 2, side // 2)


def _fingerprint(side: int) -> str:
    """Names a cache file after everything its content depends on."""
    parts = (1, side, FACES, DISTORTION, matplotlib.__version__, PIL.__version__, unicodedata.unidata_version)
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def _default_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lightning_rkd"


def _write(path: Path, **arrays: npt.NDArray[np.generic]) -> None:
    """Write under a temporary name, then rename: a reader never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            np.savez_compressed(file, allow_pickle=False, **arrays)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
