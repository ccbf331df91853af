"""Images that stay on disk until they are asked for."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lightning_rkd.data.datasets.decoding import damaged, decode_into

_log = logging.getLogger(__name__)


class ImageFiles:
    """Stands for the (N, C, H, W) uint8 tensor of all images: ``files[rows]`` decodes these rows, and no more.

    Every image is brought to ``side`` x ``side`` (without cropping). Several rows are decoded in threads, or, in a
    worker of a loader, one after another.

    Args:
        paths: The files.
        side: Side of the images.
        channels: 3, or 1 for grey.

    Attributes:
        paths: The files.
        shape: (N, C, H, W).
        sizes: Bytes of every file, (N,) int64: what is known of the content without reading it.

    Raises:
        FileNotFoundError: A file that is not there.
        ValueError: In decoding, a file that is no sound image, by name.
    """

    def __init__(self, paths: Sequence[Path], side: int, channels: int = 3) -> None:
        self.paths = list(paths)
        self.shape = torch.Size((len(self.paths), channels, side, side))
        self.sizes = file_sizes(self.paths)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, rows: Tensor) -> Tensor:
        """Decode rows, any integer tensor (M,), into (M, C, H, W) uint8."""
        chosen = [self.paths[i] for i in rows.tolist()]
        pixels = np.empty((len(chosen), *self.shape[1:]), np.uint8)
        decode_into(pixels, chosen)
        return torch.from_numpy(pixels)


def file_sizes(paths: Sequence[Path]) -> Tensor:
    """Bytes of every file, (N,) int64.

    Raises:
        FileNotFoundError: Files that are not there; it names the first.
    """
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
    paths: Sequence[Path], side: int, channels: int = 3, in_memory: bool = True, skip_damaged: bool = False
) -> tuple[Tensor | ImageFiles, Tensor]:
    """All images, in memory or on disk, and which of the files they are.

    Args:
        paths: The files.
        side: Side of the images.
        channels: 3, or 1 for grey.
        in_memory: Whether to decode everything now.
        skip_damaged: Whether to read all files first and to leave out those that cannot be decoded, with a warning in
            the log that names them.

    Returns:
        The images, and the numbers of their files, (M,) int64.

    Raises:
        FileNotFoundError: A file that is not there.
        ValueError: A damaged file, unless ``skip_damaged``; if not ``in_memory``, once it is asked for.
    """
    file_sizes(paths)
    kept = list(range(len(paths)))
    if skip_damaged and (bad := damaged(paths)):
        _log.warning("%d damaged images are left out:\n%s", len(bad), "\n".join(bad.values()))
        kept = [i for i in kept if i not in bad]
    chosen = [paths[i] for i in kept]
    if not in_memory:
        return ImageFiles(chosen, side, channels), torch.tensor(kept)
    pixels = np.empty((len(chosen), channels, side, side), np.uint8)
    decode_into(pixels, chosen)
    return torch.from_numpy(pixels), torch.tensor(kept)
