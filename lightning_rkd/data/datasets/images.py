"""Images as bytes or files, and subsets of them: augmented for training, or with marks of queries."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset

from lightning_rkd.data.datasets.files import ImageFiles
from lightning_rkd.data.samplers.pk import Draw
from lightning_rkd.data.transforms.augment import Augment
from lightning_rkd.data.transforms.crop import CentreCrop, Crop
from lightning_rkd.utils.types import QuerySample


class ImageSet(Dataset[tuple[Tensor, int]]):
    """Images, one byte a value; a sample is ``(x, y)`` with x normalised per channel.

    Args:
        images: (N, C, H, W), uint8, in memory or as files that are decoded on access.
        labels: (N,), int64.
        mean: Per channel, as a part of the full range; 0 by default.
        std: Per channel, as a part of the full range; 1 by default.
        transform: Crop of the middle of every image, unless an augmentation has cropped it before.

    Example:
        >>> data = ImageSet(torch.full((3, 1, 2, 2), 255, dtype=torch.uint8), torch.tensor([0, 0, 1]), mean=(0.5,))
        >>> x, y = data[2]
        >>> x.flatten().tolist(), y
        ([0.5, 0.5, 0.5, 0.5], 1)
    """

    def __init__(
        self,
        images: Tensor | ImageFiles,
        labels: Tensor,
        mean: Sequence[float] = (0.0,),
        std: Sequence[float] = (1.0,),
        transform: CentreCrop | None = None,
    ) -> None:
        if isinstance(images, Tensor) and (images.ndim != 4 or images.dtype != torch.uint8):
            raise ValueError(f"images must be uint8 (N, C, H, W), got {images.dtype} {tuple(images.shape)}")
        if labels.shape != images.shape[:1]:
            raise ValueError(f"labels must be ({len(images)},), one per image; got {tuple(labels.shape)}")
        self.images, self.labels = images, labels.to(torch.int64)
        self.transform = transform
        if isinstance(images, ImageFiles):
            self.sizes = images.sizes  # an attribute, as fingerprints take the content of a data set from those
        self.mean, self.std = (torch.tensor(v, dtype=torch.float32).view(-1, 1, 1) for v in (mean, std))

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[Tensor, int]]:
        """A whole batch at once; PyTorch's loaders prefer this."""
        rows = torch.tensor([int(i) for i in indices])
        return self.make_samples(self.pixels(rows), rows)

    def pixels(self, rows: Tensor) -> Tensor:
        """Images of these rows before cropping and normalisation, (N, C, H, W), float32 in 0 to 1."""
        return self.images[rows].float() / 255

    def make_samples(self, pixels: Tensor, rows: Tensor) -> list[tuple[Tensor, int]]:
        """Crop and normalise pixels in 0 to 1, each with its label."""
        if self.transform is not None:
            pixels = self.transform(pixels)
        return list(zip((pixels - self.mean) / self.std, self.labels[rows].tolist(), strict=True))


class AugmentedSubset(Subset[tuple[Tensor, int]]):
    """Rows of an :class:`ImageSet` for training: every epoch yields another random version of each image.

    The version depends on ``(seed, epoch, row, occurrence)`` alone, where the epoch comes with the index
    (:class:`~lightning_rkd.data.Draw`; a plain integer counts as epoch 0) and the occurrence numbers repetitions of a
    row within a batch. So worker processes, batch composition and resuming do not matter.

    Args:
        dataset: The root data set.
        indices: Its rows.
        augment: The augmentation.
        seed: Its seed.
        views: Number of versions of each image: epoch e yields version e modulo ``views``, and repetitions of a row
            within a batch are alike, so that teacher outputs can be cached. ``None`` never repeats one.
    """

    dataset: ImageSet

    def __init__(
        self,
        dataset: ImageSet,
        indices: Sequence[int],
        augment: Augment | Crop,
        seed: int = 0,
        views: int | None = None,
    ) -> None:
        super().__init__(dataset, indices)
        if views is not None and views < 1:
            raise ValueError(f"views must be at least 1, or None for new ones in every epoch; got {views}")
        self.augment, self.seed, self.views = augment, seed, views

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[Tensor, int]]:
        """A whole batch at once; PyTorch's loaders prefer this."""
        rows = [int(self.indices[i]) for i in indices]
        epochs = [i.epoch if isinstance(i, Draw) else 0 for i in indices]
        seen: dict[int, int] = {}
        occurrences = []
        for row in rows:
            occurrences.append(seen.get(row, 0))
            seen[row] = occurrences[-1] + 1
        if self.views is not None:
            epochs, occurrences = [epoch % self.views for epoch in epochs], [0] * len(rows)
        pixels = self.augment(self.dataset.pixels(torch.tensor(rows)), self.seed, epochs, rows, occurrences)
        return self.dataset.make_samples(pixels, torch.tensor(rows))


class QuerySubset(Subset[Any]):
    """Rows of a data set whose samples are marked as queries: :class:`~lightning_rkd.utils.types.QuerySample`.

    Args:
        dataset: Any data set of ``(x, y)``.
        indices: Its rows.
        is_query: Marks the queries among all rows of the data set, (N,), bool.

    Example:
        >>> from torch.utils.data import DataLoader
        >>> data = ImageSet(torch.zeros(3, 1, 2, 2, dtype=torch.uint8), torch.tensor([0, 1, 1]))
        >>> batch = next(iter(DataLoader(QuerySubset(data, [1, 2], torch.tensor([False, True, False])), batch_size=2)))
        >>> batch.labels, batch.is_query
        (tensor([1, 1]), tensor([ True, False]))
    """

    def __init__(self, dataset: Dataset[Any], indices: Sequence[int], is_query: Tensor) -> None:
        super().__init__(dataset, indices)
        self.is_query = is_query

    def __getitem__(self, index: Any) -> Any:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[Any]:
        """A whole batch at once; PyTorch's loaders prefer this."""
        marks = self.is_query[torch.tensor([int(self.indices[i]) for i in indices])].tolist()
        return [QuerySample(x, y, mark) for (x, y), mark in zip(super().__getitems__(indices), marks, strict=True)]
