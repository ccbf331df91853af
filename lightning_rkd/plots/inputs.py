"""Checks of embeddings and images before drawing."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
from torch import Tensor


def check_embeddings(embeddings: Mapping[str, Tensor], **others: Tensor) -> dict[str, Tensor]:
    """Embeddings without gradients, in float64, on the CPU.

    Raises:
        ValueError: There are none, they have different lengths, fewer than two rows, or numbers that are not finite.
    """
    if not embeddings:
        raise ValueError("nothing to show: no embeddings")
    lengths = {name: len(x) for name, x in {**others, **embeddings}.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"{', '.join([*others, 'embeddings'])} are of different lengths: {lengths}")
    plain = {name: x.detach().double().cpu() for name, x in embeddings.items()}
    for name, x in plain.items():
        if x.ndim != 2:
            raise ValueError(f"embeddings must be (N, D), got {tuple(x.shape)} of {name!r}")
        if len(x) < 2:
            raise ValueError(f"nothing to show: {len(x)} samples")
        if not (finite := x.isfinite().all(1)).all():
            raise ValueError(
                f"the embeddings of {name!r} hold NaN or infinity, first in row {int(finite.int().argmin())}, and "
                "cannot be drawn"
            )
    return plain


def to_pixels(images: Tensor) -> npt.NDArray[np.float32]:
    """Images (N, C, H, W), uint8 or in 0 to 1 -> (N, H, W) or (N, H, W, 3) in 0 to 1."""
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise ValueError(f"images must be (N, 1, H, W) or (N, 3, H, W), got {tuple(images.shape)}")
    pixels = images.float() if images.is_floating_point() else images.float() / 255
    array: npt.NDArray[np.float32] = pixels.clamp(0, 1).movedim(1, 3).squeeze(3).cpu().numpy()
    return array
