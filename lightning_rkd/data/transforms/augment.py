"""Random augmentation of images as a pure function of a key: the same in any batch and any process."""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

_STEP = 0x9E3779B97F4A7C15


def keyed_uniform(count: int, *key: int | npt.ArrayLike) -> Tensor:
    """Uniform numbers in [0, 1) that depend on a key alone, by the counter-based generator SplitMix64.

    Integers or arrays of N integers, broadcast against one another, give (N, count), float32. There is no state, so the
    order of calls, worker processes and the other rows of a batch do not matter.

    Reference:
        Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014.
    """
    words = np.broadcast_arrays(*(np.atleast_1d(np.asarray(word, dtype=np.int64)) for word in key))
    state = np.zeros(words[0].shape, dtype=np.uint64)
    for word in words:
        state = _mix((state ^ word.astype(np.uint64)) + np.uint64(_STEP))
    numbers = _mix(state[:, None] + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(_STEP))
    return torch.from_numpy((numbers >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-24))


def _mix(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@dataclass(frozen=True)
class Augment:
    """Random affine change, horizontal flip and noise, drawn independently for every image.

    Attributes:
        rotation: Largest angle in either direction, in degrees.
        scale: Largest relative change of size: 0.1 draws factors between 1/1.1 and 1.1.
        shear: Largest horizontal shear in either direction, as a slope.
        shift: Largest translation in either direction, as a part of height and width.
        flip: Whether half of the images are mirrored left to right.
        contrast: Largest relative change of contrast, and largest change of brightness as a part of the full range.
        noise: Standard deviation of Gaussian noise, as a part of the full range.

    Example:
        >>> image = torch.zeros(1, 1, 8, 8)
        >>> image[..., 3:5, 3:5] = 1
        >>> moved = Augment(shift=0.25)(image, 0, [7])
        >>> moved.shape, bool((moved == Augment(shift=0.25)(image, 0, [7])).all())
        (torch.Size([1, 1, 8, 8]), True)
    """

    rotation: float = 0.0
    scale: float = 0.0
    shear: float = 0.0
    shift: float = 0.0
    flip: bool = False
    contrast: float = 0.0
    noise: float = 0.0

    def __post_init__(self) -> None:
        for name in ("rotation", "scale", "shear", "shift", "contrast", "noise"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")

    def __call__(self, images: Tensor, *key: int | npt.ArrayLike) -> Tensor:
        """Augment images (N, C, H, W) in 0 to 1 with the draws of keys, integers or arrays of N integers."""
        draws = keyed_uniform(8, *key).to(images.dtype)
        spread = 2 * draws - 1
        if self.rotation or self.scale or self.shear or self.shift or self.flip:
            images = self._warp(images, draws, spread)
        if self.contrast:
            gain, lift = 1 + self.contrast * spread[:, 5], self.contrast * spread[:, 6]
            images = (images - 0.5) * gain.view(-1, 1, 1, 1) + 0.5 + lift.view(-1, 1, 1, 1)
        if self.noise:
            images = images + self.noise * _gaussian(images, *key)
        return images.clamp(0, 1)

    def _warp(self, images: Tensor, draws: Tensor, spread: Tensor) -> Tensor:
        angle = spread[:, 0] * math.radians(self.rotation)
        factor = torch.exp(-spread[:, 1] * math.log1p(self.scale))
        shear, dx, dy = self.shear * spread[:, 2], 2 * self.shift * spread[:, 3], 2 * self.shift * spread[:, 4]
        cos, sin = factor * angle.cos(), factor * angle.sin()
        mirror = 1 - 2 * (draws[:, 7] < 0.5 * self.flip)
        height, width = images.shape[-2:]
        y = ((2 * torch.arange(height, dtype=images.dtype) + 1) / height - 1).view(1, -1, 1)
        x = ((2 * torch.arange(width, dtype=images.dtype) + 1) / width - 1).view(1, 1, -1)
        cos, sin, shear, dx, dy, mirror = (v.view(-1, 1, 1) for v in (cos, sin, shear, dx, dy, mirror))
        # elementwise on purpose: a matrix product may round differently for another batch size
        source_x = mirror * (cos * x + (shear * cos - sin) * y + dx)
        source_y = sin * x + (shear * sin + cos) * y + dy
        grid = torch.stack((source_x, source_y), dim=-1)
        return F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)


def _gaussian(images: Tensor, *key: int | npt.ArrayLike) -> Tensor:
    """Box and Muller's transform of keyed uniform numbers."""
    size = images[0].numel()
    u = keyed_uniform(2 * ((size + 1) // 2), 1, *key).view(len(images), 2, -1)
    radius, turn = (-2 * (1 - u[:, 0]).log()).sqrt(), 2 * math.pi * u[:, 1]
    normal = torch.cat((radius * turn.cos(), radius * turn.sin()), dim=1)
    return normal[:, :size].view_as(images).to(images.dtype)
