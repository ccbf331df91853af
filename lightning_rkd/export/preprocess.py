"""Preprocessing of a student's inputs, which is exported with it: images, texts and vectors."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from lightning_rkd.export import use
from lightning_rkd.utils.imports import require

TOKENIZER = "tokenizer.json"
_LUMINANCE = (0.299, 0.587, 0.114)  # Pillow's, ITU-R 601


class Preprocess(ABC):
    """Function from a list of items to a network's inputs, which ``config.json`` of an export describes."""

    kind: ClassVar[str]

    @abstractmethod
    def __call__(self, items: Any) -> Tensor | dict[str, Tensor]:
        """Inputs of the network: a tensor (N, ...), or tensors by keyword."""

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """Settings, as in ``config.json``."""

    @abstractmethod
    def describe(self) -> str:
        """One sentence for the model card."""

    def save(self, folder: Path) -> None:  # noqa: B027 - most have none
        """Write the files that the settings do not hold."""


@dataclass(frozen=True)
class ImagePreprocess(Preprocess):
    """Images, scaled to a size and normalised.

    Items are images of Pillow, their paths or arrays of bytes (H, W, C); or a tensor (N, C, H, W) of bytes, or of
    numbers from 0 to 1. Grey images and colours are converted into one another. Images of Pillow are resized by Pillow,
    tensors by PyTorch, whose numbers differ by rounding.

    Args:
        size: Height and width.
        mean: Mean of each channel, pixels from 0 to 1; its length is the number of channels, 1 or 3.
        std: Standard deviation of each channel.
        crop: Share of the shorter edge that is kept, such as 0.875.
        interpolation: ``"bicubic"`` or ``"bilinear"``.
        fit: ``"cover"`` keeps the proportions and cuts off what lies beyond the size; ``"stretch"`` does not.

    Example:
        >>> from PIL import Image
        >>> preprocess = ImagePreprocess((4, 4), mean=(0.5,), std=(0.5,))
        >>> x = preprocess([Image.new("RGB", (12, 8), "white")])
        >>> x.shape, x.unique()
        (torch.Size([1, 1, 4, 4]), tensor([1.]))
    """

    kind: ClassVar[str] = "image"

    size: tuple[int, int]
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    crop: float = 1.0
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    fit: Literal["cover", "stretch"] = "cover"

    def __post_init__(self) -> None:
        channels = np.shape(self.mean)
        if channels not in ((1,), (3,)) or np.shape(self.std) != channels or min(self.std) <= 0:
            raise ValueError(
                f"mean and positive std are needed as tuples of 1 or 3 channels, got {self.mean} and {self.std}"
            )
        if isinstance(self.size, int) or len(self.size) != 2 or min(self.size) < 1 or not 0 < self.crop <= 1:
            raise ValueError(f"size (height, width) and a crop up to 1 are needed, got {self.size} and {self.crop}")
        if self.interpolation not in ("bicubic", "bilinear"):
            raise ValueError(f"interpolation must be 'bicubic' or 'bilinear', got {self.interpolation!r}")
        if self.fit not in ("cover", "stretch"):
            raise ValueError(f"fit must be 'cover' or 'stretch', got {self.fit!r}")

    def __call__(self, items: Any) -> Tensor:
        """Normalised images (N, C, H, W)."""
        return self.normalize(self.resize(items) if isinstance(items, Tensor) else self.read_pixels(items))

    def read_pixels(self, items: Sequence[Any]) -> Tensor:
        """Images as bytes (N, C, H, W), before :meth:`normalize`."""
        return torch.from_numpy(use.read_pixels(items, self.config()))

    def normalize(self, pixels: Tensor) -> Tensor:
        """Images of bytes, or of numbers from 0 to 1, with mean and standard deviation taken out."""
        scaled = pixels if pixels.is_floating_point() else pixels.float() / 255
        mean, std = (scaled.new_tensor(x).view(-1, 1, 1) for x in (self.mean, self.std))
        return (scaled - mean) / std

    def resize(self, images: Tensor) -> Tensor:
        """A tensor of images (N, C, H, W), as numbers from 0 to 1."""
        if images.ndim != 4 or images.shape[1] not in (1, 3):
            raise ValueError(f"expected images (N, C, H, W) of 1 or 3 channels, got {tuple(images.shape)}")
        x = images if images.is_floating_point() else images.float() / 255
        if x.numel() and not -0.1 < float(x.min()) <= float(x.max()) < 1.1:
            raise ValueError(
                f"expected bytes, or pixels from 0 to 1, and got {float(x.min()):.3g} to {float(x.max()):.3g}: "
                "undo the normalisation, or call the network itself, student.network(images)"
            )
        if x.shape[1] != len(self.mean):
            grey, weights = x.shape[1] == 1, x.new_tensor(_LUMINANCE)
            x = x.expand(-1, 3, -1, -1) if grey else torch.einsum("nchw,c->nhw", x, weights)[:, None]
        (height, width), (h, w) = self.size, x.shape[2:]
        ratio = min(h / height, w / width)
        ratios = (ratio, ratio) if self.fit == "cover" else (h / height, w / width)
        rows, columns = (
            _weigh_pixels(n, size, self.crop * one * size, self.interpolation).to(x)
            for n, size, one in zip((h, w), self.size, ratios, strict=True)
        )
        return (rows @ x @ columns.T).clamp(0, 1)

    def config(self) -> dict[str, Any]:
        """Settings, as in ``config.json``."""
        return {
            "kind": self.kind, "size": list(self.size), "mean": list(self.mean), "std": list(self.std),
            "crop": self.crop, "interpolation": self.interpolation, "fit": self.fit,
        }  # fmt: skip

    def describe(self) -> str:
        """One sentence for the model card."""
        cut = "" if self.crop == 1 else f", of which the inner {self.crop:.1%} are kept,"
        size = f"{self.size[0]} x {self.size[1]} pixels"
        if self.fit == "stretch":
            return f"images are stretched ({self.interpolation}){cut} to {size} and normalised"
        return f"images are scaled ({self.interpolation}){cut} to cover {size}, cut to them and normalised"


def _weigh_pixels(pixels: int, size: int, length: float, interpolation: str) -> Tensor:
    """Weights (size, pixels) with which Pillow resizes the central ``length`` of a line of pixels to another size."""
    scale = length / size
    centres = (pixels - length) / 2 + (torch.arange(size, dtype=torch.float64) + 0.5) * scale
    d = ((torch.arange(pixels) + 0.5 - centres[:, None]) / max(scale, 1)).abs()
    if interpolation == "bilinear":
        weights = (1 - d).clamp(min=0)
    else:  # bicubic, a = -1/2
        weights = torch.where(d < 1, (1.5 * d - 2.5) * d**2 + 1, ((-0.5 * d + 2.5) * d - 4) * d + 2) * (d < 2)
    return weights / weights.sum(1, keepdim=True)


@dataclass(frozen=True)
class PiecesPreprocess(Preprocess):
    """Texts as rows of a table: words in lower case and their pieces of four characters, (N, T), ended by zeros.

    Pieces are hashed by CRC-32, alike on all machines, or looked up in a vocabulary, whose first entry has row 1; those
    that it lacks are left out. For :class:`~lightning_rkd.models.HashedText`.

    Args:
        rows: Rows of the table, of which row 0 is padding.
        vocabulary: Words and pieces; ``None`` hashes.
        longest: Number of pieces after which a text is cut off.

    Example:
        >>> PiecesPreprocess(rows=2048)(["My card", "a"])
        tensor([[1001,   56,  959,  143,  959, 1162],
                [ 223,    0,    0,    0,    0,    0]])
    """

    kind: ClassVar[str] = "pieces"

    rows: int = 2048
    vocabulary: tuple[str, ...] | None = None
    longest: int = 512

    def __post_init__(self) -> None:
        if self.rows < 2 or self.longest < 1:
            raise ValueError(f"rows must be at least 2 and longest at least 1, got {self.rows} and {self.longest}")
        if self.vocabulary is not None and len(self.vocabulary) >= self.rows:
            raise ValueError(f"a vocabulary of {len(self.vocabulary)} needs as many rows and one more, got {self.rows}")

    @classmethod
    def from_texts(cls, texts: Sequence[str], rows: int = 2048, longest: int = 512) -> PiecesPreprocess:
        """Vocabulary of the words and pieces that most of the texts have.

        Example:
            >>> PiecesPreprocess.from_texts(["my card", "my cat"], rows=3).vocabulary
            ('<my>', 'my')
        """
        counts = Counter(piece for text in texts for piece in set(use.split_text(text)))
        ranked = sorted(counts, key=lambda piece: (-counts[piece], piece))
        return cls(rows, tuple(ranked[: rows - 1]), longest)

    @cached_property
    def _function(self) -> Any:
        return use.make_preprocess(self.config(), "")

    def __call__(self, items: Sequence[str]) -> Tensor:
        """Rows (N, T), int64."""
        return torch.from_numpy(self._function(items))

    def config(self) -> dict[str, Any]:
        """Settings, as in ``config.json``."""
        vocabulary = None if self.vocabulary is None else list(self.vocabulary)
        return {"kind": self.kind, "rows": self.rows, "longest": self.longest, "vocabulary": vocabulary}

    def describe(self) -> str:
        """One sentence for the model card."""
        known = self.vocabulary
        how = f"hashed to {self.rows - 1:,} rows" if known is None else f"of {len(known):,} known ones"
        return f"texts are split into words and their pieces of four characters, {how}"


class TokensPreprocess(Preprocess):
    """Texts as ``input_ids`` and ``attention_mask``, (N, T) each, by a tokenizer of Hugging Face, which is saved along.

    Args:
        tokenizer: A fast tokenizer of transformers, a ``tokenizers.Tokenizer``, or the path of its ``tokenizer.json``.
        longest: Number of tokens after which a text is cut off.
        padding: Token that fills up shorter texts, where the mask is 0; ``None`` takes the tokenizer's.

    Raises:
        TypeError: A tokenizer without a ``tokenizer.json``, such as those in plain Python.
    """

    kind: ClassVar[str] = "tokens"

    def __init__(self, tokenizer: Any, longest: int = 256, padding: int | None = None) -> None:
        tokenizers = require("tokenizers", extra="transformers")
        own = getattr(tokenizer, "backend_tokenizer", tokenizer)
        if isinstance(own, str | Path) and not Path(own).is_file():
            raise FileNotFoundError(
                f"there is no file {str(own)!r}: pass the path of a {TOKENIZER}, or a tokenizer, "
                "AutoTokenizer.from_pretrained(name)"
            )
        text = Path(own).read_text(encoding="utf-8") if isinstance(own, str | Path) else getattr(own, "to_str", str)()
        if not isinstance(own, str | Path | tokenizers.Tokenizer):
            raise TypeError(f"a {type(tokenizer).__name__} has no tokenizer.json: load its fast form, use_fast=True")
        own_padding = int(getattr(tokenizer, "pad_token_id", 0) or 0)
        self.longest, self.padding = longest, own_padding if padding is None else padding
        self._tokenizer = tokenizers.Tokenizer.from_str(text)  # a copy, since length and padding are set

    def __call__(self, items: Sequence[str]) -> dict[str, Tensor]:
        """Tokens and mask."""
        found = use.tokenize(items, self._tokenizer, self.longest, self.padding)
        return {name: torch.from_numpy(x) for name, x in found.items()}

    def config(self) -> dict[str, Any]:
        """Settings, as in ``config.json``."""
        return {"kind": self.kind, "longest": self.longest, "padding": self.padding}

    def describe(self) -> str:
        """One sentence for the model card."""
        return f"texts are cut into at most {self.longest} tokens of {TOKENIZER}"

    def save(self, folder: Path) -> None:
        """Write the tokenizer."""
        self._tokenizer.no_padding()
        (folder / TOKENIZER).write_text(self._tokenizer.to_str(), encoding="utf-8")


@dataclass(frozen=True)
class VectorPreprocess(Preprocess):
    """Vectors (N, width) as a tensor in float32.

    Example:
        >>> VectorPreprocess(2)([[1, 2]])
        tensor([[1., 2.]])
    """

    kind: ClassVar[str] = "vector"

    width: int

    def __call__(self, items: Any) -> Tensor:
        """The vectors."""
        rows = items.detach().cpu().numpy() if isinstance(items, Tensor) else items
        return torch.from_numpy(np.array(use.to_rows(rows, self.width)))

    def config(self) -> dict[str, Any]:
        """Settings, as in ``config.json``."""
        return {"kind": self.kind, "width": self.width}

    def describe(self) -> str:
        """One sentence for the model card."""
        return f"vectors have {self.width} columns"


def load_preprocess(config: dict[str, Any], folder: Path) -> Preprocess:
    """Preprocessing from its part of ``config.json`` and the files of an export."""
    settings: dict[str, Any] = {n: tuple(x) if isinstance(x, list) else x for n, x in config.items() if n != "kind"}
    if config["kind"] == "tokens":
        return TokensPreprocess(folder / TOKENIZER, **settings)
    classes: dict[str, type[Any]] = {x.kind: x for x in (ImagePreprocess, PiecesPreprocess, VectorPreprocess)}
    if config["kind"] not in classes:
        raise ValueError(f"this version knows no preprocessing of kind {config['kind']!r}: upgrade lightning-rkd")
    made: Preprocess = classes[config["kind"]](**settings)
    return made
