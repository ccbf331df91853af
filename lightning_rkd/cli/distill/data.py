"""Batches of the student's inputs."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from lightning_rkd.cli.distill.samples import Samples
from lightning_rkd.data.indexing import with_indices
from lightning_rkd.data.resumable_loader import ResumableLoader
from lightning_rkd.data.samplers.pk import Draw, PKBatchSampler
from lightning_rkd.data.transforms.crop import Crop
from lightning_rkd.export.preprocess import ImagePreprocess

_MEMORY = 2 * 2**30  # bytes of images that are kept
_EVAL_BATCH = 250


class StudentInputs(Dataset[Any]):
    """Samples as the student takes them; batches are built at once.

    Images are kept in memory where they fit, at the student's size, and are cropped and mirrored at random in training,
    as a function of (seed, epoch, row).

    Args:
        samples: The samples.
        preprocess: Function from a list of samples to the student's inputs.
        seed: Seed of the augmentation.
    """

    def __init__(self, samples: Samples, preprocess: Callable[[Any], Any], seed: int = 0) -> None:
        self.samples, self.preprocess, self.seed = samples, preprocess, seed
        self.channels_last = False
        self.augment: Crop | None = None
        self._pixels: Tensor | None = None
        if samples.kind == "image":
            example = preprocess(samples.fetch([0]))
            if isinstance(example, Tensor) and example.shape[2] == example.shape[3]:
                self.augment = Crop(example.shape[3], padding=max(1, example.shape[3] // 8), fill="reflect", flip=True)
            if isinstance(preprocess, ImagePreprocess) and example.numel() * len(samples) <= _MEMORY:
                starts = range(0, len(samples), _EVAL_BATCH)
                parts = [range(i, min(i + _EVAL_BATCH, len(samples))) for i in starts]
                self._pixels = torch.cat([preprocess.read_pixels(samples.fetch(part)) for part in parts])

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Any:
        return self.__getitems__([index])

    def __getitems__(self, indices: Sequence[int]) -> Any:
        """Inputs of these rows."""
        return self.batch([int(i) for i in indices])

    def batch(self, rows: Sequence[int], epochs: Sequence[int] | None = None) -> tuple[Any, ...]:
        """Inputs and labels of rows, augmented where their epochs are given."""
        if isinstance(self.preprocess, ImagePreprocess) and self._pixels is not None:
            x = self.preprocess.normalize(self._pixels[torch.tensor(rows)])
        else:
            x = self.preprocess(self.samples.fetch(rows))
        if epochs is not None and self.augment is not None:
            x = self.augment(x, self.seed, epochs, rows)
        x = to_channels_last(x) if self.channels_last else x
        return (x,) if self.samples.labels is None else (x, self.samples.labels[torch.tensor(rows)])


class TrainingRows(Subset[Any]):
    """Augmented rows of :class:`StudentInputs`."""

    dataset: StudentInputs

    def __getitems__(self, indices: list[int]) -> Any:
        """A batch."""
        rows = [int(self.indices[i]) for i in indices]
        return self.dataset.batch(rows, [i.epoch if isinstance(i, Draw) else 0 for i in indices])


def training_loader(inputs: StudentInputs, rows: Sequence[int], batch_size: int, seed: int) -> DataLoader[Any]:
    """Shuffled batches without regard to classes, whose order depends on (seed, epoch) alone.

    Raises:
        ValueError: Fewer rows than a batch.
    """
    if len(rows) < batch_size:
        raise ValueError(
            f"{len(rows)} training rows are fewer than a batch of {batch_size}: give more data, or --batch-size"
        )
    sampler = PKBatchSampler(torch.arange(len(rows)), batch_size, 1, seed)
    return with_indices(ResumableLoader(TrainingRows(inputs, rows), batch_sampler=sampler, collate_fn=_as_it_is))


def evaluation_loader(inputs: StudentInputs, rows: Sequence[int]) -> DataLoader[Any]:
    """Batches of rows in their order."""
    return with_indices(DataLoader(Subset(inputs, rows), _EVAL_BATCH, collate_fn=_as_it_is))


def to_channels_last(x: Any) -> Any:
    """Images (N, C, H, W) in that memory format, and anything else as it is."""
    return x.contiguous(memory_format=torch.channels_last) if isinstance(x, Tensor) and x.ndim == 4 else x


def _as_it_is(batch: Any) -> Any:
    return batch
