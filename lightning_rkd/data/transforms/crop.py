"""Crops: random for training, central for evaluation."""

from dataclasses import dataclass
from typing import Literal

import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_rkd.data.transforms.augment import keyed_uniform


@dataclass(frozen=True)
class Crop:
    """A square at a random place and a random horizontal flip, drawn independently for every image.

    ``Crop(32, padding=4, flip=True)`` is usual for classifiers on CIFAR, ``Crop(224, flip=True)`` on images of
    256 x 256 for metric learning.

    Attributes:
        size: Height and width of the square.
        padding: Pixels added on each edge beforehand.
        fill: Padding mode: ``"zero"`` is black, ``"reflect"`` mirrors the image.
        flip: Whether half of the images are mirrored left to right.

    Reference:
        He, Zhang, Ren and Sun 2015, Deep Residual Learning for Image Recognition, arXiv:1512.03385, section 4.2, for
        padding by 4; Park, Kim, Lu and Cho 2019, Relational Knowledge Distillation, arXiv:1904.05068, for the crop.

    Example:
        >>> image = torch.arange(16.0).view(1, 1, 4, 4) / 15
        >>> part = Crop(2)(image, 0, [7])
        >>> part.shape, bool((part == Crop(2)(image, 0, [7])).all())
        (torch.Size([1, 1, 2, 2]), True)
    """

    size: int
    padding: int = 0
    fill: Literal["zero", "reflect"] = "zero"
    flip: bool = False

    def __post_init__(self) -> None:
        if self.size < 1 or self.padding < 0:
            raise ValueError(f"size must be at least 1 and padding at least 0, got {self.size} and {self.padding}")
        if self.fill not in ("zero", "reflect"):
            raise ValueError(f"fill must be 'zero' or 'reflect', got {self.fill!r}")

    def __call__(self, images: Tensor, *key: int | npt.ArrayLike) -> Tensor:
        """Crop images (N, C, H, W) at places that keys draw, integers or arrays of N integers."""
        if self.padding:
            images = F.pad(images, [self.padding] * 4, mode="constant" if self.fill == "zero" else "reflect")
        height, width = images.shape[-2:]
        if min(height, width) < self.size:
            raise ValueError(
                f"Crop(size={self.size}) needs images at least that large, and these are {height} x {width} with "
                f"padding={self.padding}: take a smaller size, or pad"
            )
        draws = keyed_uniform(3, *key)
        places = torch.tensor([height - self.size + 1, width - self.size + 1])
        corners = (draws[:, :2] * places).long().minimum(places - 1).tolist()
        parts = [x[:, t : t + self.size, s : s + self.size] for x, (t, s) in zip(images, corners, strict=True)]
        if self.flip:
            mirrored = (draws[:, 2] < 0.5).tolist()
            parts = [x.flip(-1) if m else x for x, m in zip(parts, mirrored, strict=True)]
        return torch.stack(parts)


@dataclass(frozen=True)
class CentreCrop:
    """The square in the middle, as torchvision's ``center_crop``; smaller images are unchanged.

    Attributes:
        size: Height and width of the square.

    Example:
        >>> CentreCrop(2)(torch.arange(16).view(1, 1, 4, 4)).flatten().tolist()
        [5, 6, 9, 10]
    """

    size: int

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"size must be at least 1, got {self.size}")

    def __call__(self, images: Tensor) -> Tensor:
        """(N, C, H, W) to (N, C, size, size)."""
        top, left = (max(0, round((length - self.size) / 2)) for length in images.shape[-2:])
        return images[..., top : top + self.size, left : left + self.size]
