"""Transforms from the student's images to those of a teacher of another resolution or normalisation."""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_rkd.data.transforms.base import map_tensors

Statistics = tuple[float | list[float], float | list[float]]
"""Mean and standard deviation of normalised images, each one number or one for each channel."""


class Resize(nn.Module):
    """Resizing of images with antialiasing, as torchvision's; images of the size pass unchanged.

    Shapes: images (N, C, H, W), alone or in nested inputs -> (N, C, height, width).

    Args:
        size: Height and width, or one number for both.
        interpolation: ``"bicubic"`` or ``"bilinear"``.

    Example:
        >>> Resize(8)(torch.rand(2, 3, 4, 4)).shape
        torch.Size([2, 3, 8, 8])
    """

    def __init__(self, size: int | tuple[int, int], interpolation: Literal["bicubic", "bilinear"] = "bicubic") -> None:
        super().__init__()
        if interpolation not in ("bicubic", "bilinear"):
            raise ValueError(f"Resize: interpolation must be 'bicubic' or 'bilinear', got {interpolation!r}")
        self.size = (size, size) if isinstance(size, int) else (size[0], size[1])
        self.interpolation = interpolation

    def extra_repr(self) -> str:
        """The settings, for ``print``."""
        return f"{self.size}, {self.interpolation!r}"

    def forward(self, inputs: Any) -> Any:
        """Resize all images in the inputs."""
        return _map_images(inputs, self._resize, "Resize")

    def _resize(self, x: Tensor) -> Tensor:
        if x.shape[2:] == self.size:
            return x
        wide = x.to(torch.promote_types(x.dtype, torch.float32))  # on CPUs antialiasing has no half precision
        return F.interpolate(wide, self.size, mode=self.interpolation, antialias=True).to(x.dtype)


class Renormalize(nn.Module):
    r"""Images normalised with the student's statistics, normalised with the teacher's instead.

    .. math:: y = \frac{x \sigma_s + \mu_s - \mu_t}{\sigma_t}

    Shapes: images (N, C, H, W), alone or in nested inputs -> the same. Grey images (N, 1, H, W) become (N, C, H, W) for
    a teacher of C channels.

    Args:
        student: Mean and standard deviation that the images have been normalised with; ``(0, 1)`` for images from 0
            to 1.
        teacher: Mean and standard deviation that the teacher has been trained with.

    Example:
        >>> x = torch.tensor([-1.0, 1.0]).reshape(1, 1, 1, 2)  # black and white
        >>> Renormalize(student=(0.5, 0.5), teacher=(0.25, 0.25))(x).flatten()
        tensor([-1.,  3.])
    """

    def __init__(self, student: Statistics, teacher: Statistics) -> None:
        super().__init__()
        for name, value in (("student", student), ("teacher", teacher)):
            if not isinstance(value, list | tuple) or len(value) != 2:
                raise ValueError(f"Renormalize: {name} must be (mean, std), got {value!r}")
            if bool((torch.tensor(value[1]) <= 0).any()):
                raise ValueError(f"Renormalize: the standard deviation of {name} must be positive, got {value[1]!r}")
        (mean, std), (to_mean, to_std) = (
            [torch.tensor(x, dtype=torch.float64).reshape(-1, 1, 1) for x in pair] for pair in (student, teacher)
        )
        self.student = mean.flatten().tolist(), std.flatten().tolist()
        self.teacher = to_mean.flatten().tolist(), to_std.flatten().tolist()
        if len(widths := {x.numel() for x in (mean, std, to_mean, to_std)} - {1}) > 1:
            raise ValueError(
                "Renormalize: statistics must be single numbers, or one for each of the same channels, got "
                f"{self.extra_repr()}"
            )
        self.channels = max(widths, default=1)
        # not buffers, which a cast to half precision would round
        self.scale, self.shift = (std / to_std).float(), ((mean - to_mean) / to_std).float()

    def extra_repr(self) -> str:
        """The settings, for ``print``."""
        return f"student={self.student}, teacher={self.teacher}"

    def forward(self, inputs: Any) -> Any:
        """Renormalise all images in the inputs."""
        return _map_images(inputs, self._renormalize, "Renormalize")

    def _renormalize(self, x: Tensor) -> Tensor:
        if self.channels > 1 and x.shape[1] not in (1, self.channels):
            raise ValueError(
                f"Renormalize: expected images of 1 or {self.channels} channels, as many as the statistics have, got "
                f"{tuple(x.shape)}; convert them first, transform=[..., Renormalize(...)]"
            )
        scale, shift = (each.to(x.device, non_blocking=True) for each in (self.scale, self.shift))
        return (x.to(torch.promote_types(x.dtype, torch.float32)) * scale + shift).to(x.dtype)


def _map_images(inputs: Any, function: Callable[[Tensor], Tensor], who: str) -> Any:
    """Apply a function to the floating-point images in nested inputs, of which there must be one."""
    found = []

    def apply(x: Tensor, name: str) -> Tensor:
        if x.ndim != 4 or not x.is_floating_point():
            return x
        found.append(name)
        return function(x)

    result = map_tensors(inputs, apply)
    if not found:
        kind = f"{inputs.dtype} of shape {tuple(inputs.shape)}" if isinstance(inputs, Tensor) else type(inputs).__name__
        raise TypeError(f"{who}: expected floating-point images (N, C, H, W) in the teacher's inputs, got {kind}")
    return result
