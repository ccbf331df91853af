"""Checks of what is to be shown, and images as matplotlib takes them."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
from torch import Tensor


def check(labels: Tensor, embeddings: Mapping[str, Tensor], **others: Tensor) -> None:
    """Refuse what is empty, or of different lengths."""
    if not embeddings:
        raise ValueError("nothing to show: no embeddings")
    lengths = {name: len(x) for name, x in {"labels": labels, **others, **embeddings}.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"labels and embeddings are of different lengths: {lengths}")
    if len(labels) < 2:
        raise ValueError(f"nothing to show: {len(labels)} samples")


def pictures(images: Tensor) -> npt.NDArray[np.float32]:
    """(N, C, H, W), bytes or 0 to 1 -> (N, H, W) or (N, H, W, 3), 0 to 1."""
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise ValueError(f"images must be (N, 1, H, W) or (N, 3, H, W), got {tuple(images.shape)}")
    pixels = images.float() if images.is_floating_point() else images.float() / 255
    shown: npt.NDArray[np.float32] = pixels.clamp(0, 1).movedim(1, 3).squeeze(3).cpu().numpy()
    return shown
