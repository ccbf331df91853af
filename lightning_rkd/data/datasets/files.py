"""Images that are decoded on access."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lightning_rkd.data.datasets.decoding import decode_into, find_damaged

_log = logging.getLogger(__name__)


class ImageFiles:
    """Stand-in for the (N, C, H, W) uint8 tensor of all images: ``files[rows]`` decodes these rows.

    Every image is resized to ``size`` x ``size`` (without cropping). Several rows are decoded in threads, or, in a
    worker of a loader, one after another.

    Args:
        paths: The files.
        size: Height and width of the images.
        channels: 3, or 1 for grey.

    Attributes:
        paths: The files.
        shape: (N, C, H, W).
        sizes: Bytes of every file, (N,) int64; they identify the content without reading it.

    Raises:
        FileNotFoundError: A missing file.
        ValueError: A damaged file, when it is decoded; the message names it.
    """

    def __init__(self, paths: Sequence[Path], size: int, channels: int = 3) -> None:
        self.paths = list(paths)
        self.shape = torch.Size((len(self.paths), channels, size, size))
        self.sizes = _file_sizes(self.paths)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, rows: Tensor) -> Tensor:
        """Decode rows, any integer tensor (M,), into (M, C, H, W) uint8."""
        return _decode([self.paths[i] for i in rows.tolist()], self.shape[1:])


def _decode(paths: Sequence[Path], shape: Sequence[int]) -> Tensor:
    pixels = np.empty((len(paths), *shape), np.uint8)
    decode_into(pixels, paths)
    return torch.from_numpy(pixels)


def _file_sizes(paths: Sequence[Path]) -> Tensor:
    sizes, missing = [], []
    for path in paths:
        try:
            sizes.append(os.stat(path).st_size)
        except FileNotFoundError:
            missing.append(path)
    if missing:
        raise FileNotFoundError(
            f"{missing[0]} is missing, and {len(missing)} of {len(paths)} images are: the archive seems to be half "
            "extracted; extract it again"
        )
    return torch.tensor(sizes, dtype=torch.int64)


def load_files(
    paths: Sequence[Path], size: int, channels: int = 3, in_memory: bool = True, skip_damaged: bool = False
) -> tuple[Tensor | ImageFiles, Tensor]:
    """Open images, in memory or on disk.

    Args:
        paths: The files.
        size: Height and width of the images.
        channels: 3, or 1 for grey.
        in_memory: Whether to decode everything now.
        skip_damaged: Whether to read all files first and leave out those that cannot be decoded, with a warning in
            the log that names them.

    Returns:
        The images, and the numbers of their files, (M,) int64.

    Raises:
        FileNotFoundError: A missing file.
        ValueError: A damaged file, unless ``skip_damaged``; if not ``in_memory``, on access.
    """
    _file_sizes(paths)
    kept = list(range(len(paths)))
    if skip_damaged and (bad := find_damaged(paths)):
        _log.warning("%d damaged images are left out:\n%s", len(bad), "\n".join(bad.values()))
        kept = [i for i in kept if i not in bad]
    chosen = [paths[i] for i in kept]
    if not in_memory:
        return ImageFiles(chosen, size, channels), torch.tensor(kept)
    return _decode(chosen, (channels, size, size)), torch.tensor(kept)
