"""Images that are decoded on access."""

import logging
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from lightning_rkd.data.datasets.decoding import decode_as, find_damaged

_log = logging.getLogger(__name__)


class ImageFiles:
    """Stand-in for the (N, C, H, W) uint8 tensor of all images: ``files[rows]`` decodes these rows.

    Every image is resized to ``size`` x ``size`` (without cropping). Several rows are decoded in threads, or, in a
    worker of a loader, one after another.

    ``sizes`` are the bytes of every file, (N,) int64, which identify the content without reading it.
    """

    def __init__(self, paths: Sequence[Path], size: int, channels: int = 3) -> None:
        self.paths = list(paths)
        self.shape = torch.Size((len(self.paths), channels, size, size))
        self.sizes = _file_sizes(self.paths)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, rows: Tensor) -> Tensor:
        """Decode rows, any integer tensor (M,), into (M, C, H, W) uint8."""
        return torch.from_numpy(decode_as([self.paths[i] for i in rows.tolist()], *self.shape[1:3]))


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


def find_intact(paths: Sequence[Path]) -> list[int]:
    """Read all images and return the numbers of those that can be decoded; a warning in the log names the others."""
    bad = find_damaged(paths)
    if bad:
        _log.warning("%d damaged images are left out:\n%s", len(bad), "\n".join(bad.values()))
    return [i for i in range(len(paths)) if i not in bad]


def load_files(
    paths: Sequence[Path], size: int, channels: int = 3, in_memory: bool = True, skip_damaged: bool = False
) -> tuple[Tensor | ImageFiles, Tensor]:
    """Open images, decoded now or on access, and return them with the numbers of their files, (M,) int64.

    Missing files are an error. So are damaged ones, unless ``skip_damaged``, which reads all files first and leaves out
    those that cannot be decoded, with a warning in the log that names them.
    """
    _file_sizes(paths)
    kept = find_intact(paths) if skip_damaged else list(range(len(paths)))
    chosen = [paths[i] for i in kept]
    if not in_memory:
        return ImageFiles(chosen, size, channels), torch.tensor(kept)
    return torch.from_numpy(decode_as(chosen, channels, size)), torch.tensor(kept)
