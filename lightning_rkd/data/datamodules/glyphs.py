"""Glyphs of many scripts, drawn with the fonts that matplotlib ships: a data set that needs no download."""

import hashlib
import logging
import os
import tempfile
import unicodedata
import zipfile
import zlib
from functools import lru_cache
from pathlib import Path
from typing import Any

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
"""The distortion that makes the samples of a glyph differ, applied once, when the data set is made."""


class GlyphDataModule(ImageDataModule):
    """525 glyphs (Latin, Greek, Cyrillic, Armenian, Georgian) x 12 faces, distorted, grey, 28 x 28.

    Glyphs that some face draws alike, pixel for pixel, are one class: Latin A represents Greek Alpha and Cyrillic A
    too. Glyphs with accents are left out. Deterministic; rendered in about a second, then read from a cache file.

    Args:
        image_size: Height and width of the images.
        max_classes: Use fewer glyphs, evenly spread over the scripts.
        cache_dir: Folder of the rendered glyphs; ``~/.cache/lightning_rkd`` by default.
        kwargs: Arguments of :class:`~lightning_rkd.data.ImageDataModule`.

    Example:
        >>> data = GlyphDataModule(max_classes=20, classes_per_batch=4, samples_per_class=3)
        >>> data.setup()
        >>> x, y = next(iter(data.train_dataloader()))
        >>> x.shape, data.num_train_classes, data.class_names[0]
        (torch.Size([12, 1, 28, 28]), 12, 'A')
    """

    def __init__(
        self,
        *,
        image_size: int = 28,
        max_classes: int | None = None,
        cache_dir: str | Path | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
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
        """Read or render the glyphs, in the order of their code points."""
        images, glyphs = _load_glyphs(self.image_size, self.cache_dir)
        if self.max_classes is not None:
            kept = np.linspace(0, len(glyphs) - 1, min(self.max_classes, len(glyphs))).round().astype(int)
            images, glyphs = images[torch.from_numpy(kept)], "".join(glyphs[i] for i in kept)
        labels = torch.arange(len(glyphs)).repeat_interleave(images.shape[1])
        return LabelledImages(images.flatten(0, 1).unsqueeze(1), labels, list(glyphs))


@lru_cache(maxsize=2)
def _load_glyphs(size: int, cache_dir: Path | None) -> tuple[Tensor, str]:
    """Distorted glyphs (classes, faces, size, size), from the cache where it is sound, and their characters."""
    path = (cache_dir or _default_cache()) / f"glyphs-{_fingerprint(size)}.npz"
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as content:  # CRCs are checked in reading
            images, glyphs = torch.from_numpy(content["images"]), str(content["glyphs"])
        if images.shape != (len(glyphs), len(FACES), size, size) or images.dtype != torch.uint8:
            raise ValueError(f"unexpected content: {images.dtype} {tuple(images.shape)}")
        return images, glyphs
    except FileNotFoundError:
        pass
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        _log.warning("%s cannot be used (%s); drawing the glyphs again", path, error)
    clean, glyphs = render_glyphs(2 * size)
    images = _distort(clean)
    try:
        _write(path, images=images.numpy(), glyphs=np.array(glyphs))
    except OSError as error:
        _log.warning("the glyphs could not be kept in %s (%s); they will be drawn again next time", path, error)
    return images, glyphs


def render_glyphs(size: int) -> tuple[npt.NDArray[np.uint8], str]:
    """Draw every glyph in every face, white on black, without those that look like an earlier one.

    Returns the images (classes, faces, size, size) and one character per class.
    """
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    drawable = [set(FT2Font(str(folder / f"{face}.ttf")).get_charmap()) for face in FACES]
    glyphs = [
        chr(code)
        for code in sorted(set.intersection(*drawable))
        if unicodedata.category(chr(code)) in ("Lu", "Ll", "Lt", "Lo") and not unicodedata.decomposition(chr(code))
    ]
    images = np.zeros((len(glyphs), len(FACES), size, size), dtype=np.uint8)
    for f, face in enumerate(FACES):
        # the plain layout engine is the one every Pillow has
        font = ImageFont.truetype(str(folder / f"{face}.ttf"), round(0.68 * size), layout_engine=ImageFont.Layout.BASIC)
        for i, glyph in enumerate(glyphs):
            canvas = Image.new("L", (size, size))
            ImageDraw.Draw(canvas).text((size / 2, 0.7 * size), glyph, font=font, fill=255, anchor="ms")
            images[i, f] = np.asarray(canvas)
    kept: list[int] = []
    seen: list[set[bytes]] = [set() for _ in FACES]
    for i in range(len(glyphs)):
        drawn = [image.tobytes() for image in images[i]]
        if images[i].any(axis=(1, 2)).all() and not any(d in s for d, s in zip(drawn, seen, strict=True)):
            kept.append(i)
            for d, s in zip(drawn, seen, strict=True):
                s.add(d)
    return images[kept], "".join(glyphs[i] for i in kept)


def _distort(clean: npt.NDArray[np.uint8]) -> Tensor:
    """Distort every sample differently, then halve height and width."""
    classes, faces, size, _ = clean.shape
    pixels = torch.from_numpy(clean).view(classes * faces, 1, size, size)
    shape, noise = Augment(**{**DISTORTION.__dict__, "noise": 0.0}), Augment(noise=DISTORTION.noise)
    small = []
    for start in range(0, len(pixels), 1024):
        rows = range(start, min(start + 1024, len(pixels)))
        bent = F.avg_pool2d(shape(pixels[start : start + 1024].float() / 255, 0, rows), 2)
        small.append((noise(bent, 1, rows) * 255).round().to(torch.uint8))
    return torch.cat(small).view(classes, faces, size // 2, size // 2)


def _fingerprint(size: int) -> str:
    """Name of the cache file, from everything that its content depends on."""
    parts = (2, size, FACES, DISTORTION, matplotlib.__version__, PIL.__version__, unicodedata.unidata_version)
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def _default_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lightning_rkd"


def _write(path: Path, **arrays: npt.NDArray[np.generic]) -> None:
    """Write into a temporary folder of this process's own, then move: a reader never finds half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        part = Path(folder, path.name)
        np.savez_compressed(part, allow_pickle=False, **arrays)
        os.replace(part, path)
