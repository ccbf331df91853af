"""What all data modules share: disjoint classes, P-by-K training batches, indexed evaluation batches."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Subset

from lightning_rkd.data.augment import Augment
from lightning_rkd.data.images import AugmentedSubset, ImageSet
from lightning_rkd.data.indices import with_indices
from lightning_rkd.data.loader import ResumableLoader
from lightning_rkd.data.sampling import PKBatchSampler
from lightning_rkd.data.splits import ClassSplit, split_classes
from lightning_rkd.distributed import rank_and_size


class LabelledImages(NamedTuple):
    """A whole data set: images (N, C, H, W) uint8, classes (N,) int64, and the name of every class."""

    images: Tensor
    labels: Tensor
    class_names: list[str]


class DisjointClassesDataModule(LightningDataModule, ABC):
    """Images whose training, validation and test classes are disjoint; a data set is one method, :meth:`load`.

    Samples are ``(x, y)``. Classes are renumbered so that the training classes come first, 0 to
    ``num_train_classes - 1``. All three sets are views of one root data set, so an index means the same image
    everywhere. Validation classes are taken out of the training side; the test classes are never looked at.

    Order and augmentation of the training batches depend on (seed, epoch, index) alone, and the loader's position is
    part of Lightning's checkpoints: a resumed run is the uninterrupted run, with any number of workers. Validation,
    test and prediction batches (prediction shows the test set) are
    :class:`~lightning_rkd.data.indices.IndexedBatch`.

    Args:
        classes_per_batch: P, per device; ``None`` takes as many as there are, up to 24.
        samples_per_class: K; ``None`` fills a batch of 120, as far as a typical class has the samples.
        batches_per_epoch: Batches per epoch and device; ``None`` shows about as many samples as there are.
        eval_batch_size: Batch size of validation, test and prediction.
        num_workers: Worker processes per loader; the images are in memory, so 0 is usually fastest.
        seed: Of order and augmentation.
        split_seed: Of the division of the classes, apart from ``seed``, so that runs with other seeds may share a
            teacher without its having seen their test classes.
        validation: Part of all classes that validate.
        test: Part of all classes that test.
        augment: What training batches go through; ``None`` takes what suits the data.

    Attributes:
        train_set: Augmented training images, after ``setup``.
        val_set: Validation images, after ``setup``.
        test_set: Test images, after ``setup``.
        root: The data set that all three are views of.
        class_names: Name of every class, training classes first.
        num_train_classes: Number of training classes.
    """

    root: ImageSet
    train_set: AugmentedSubset
    val_set: Subset[tuple[Tensor, int]]
    test_set: Subset[tuple[Tensor, int]]
    class_names: list[str]
    num_train_classes: int

    def __init__(
        self,
        classes_per_batch: int | None = 24,
        samples_per_class: int | None = 5,
        batches_per_epoch: int | None = None,
        eval_batch_size: int = 512,
        num_workers: int = 0,
        seed: int = 0,
        split_seed: int = 0,
        validation: float = 0.15,
        test: float = 0.25,
        augment: Augment | None = None,
    ) -> None:
        super().__init__()
        if eval_batch_size < 1:
            raise ValueError(f"eval_batch_size must be at least 1, got {eval_batch_size}")
        self.classes_per_batch = classes_per_batch
        self.samples_per_class = samples_per_class
        self.batches_per_epoch = batches_per_epoch
        self.eval_batch_size = eval_batch_size
        self.num_workers = num_workers
        self.seed = seed
        self.split_seed = split_seed
        self.validation, self.test = validation, test
        self.augment = augment
        self._ready = False

    @abstractmethod
    def load(self) -> LabelledImages:
        """The whole data set, the same on every rank."""

    def split(self, data: LabelledImages) -> ClassSplit:
        """Which classes train, validate and test."""
        return split_classes(range(len(data.class_names)), self.validation, self.test, self.split_seed)

    def suggest_augment(self, data: LabelledImages) -> Augment:
        """The augmentation when none was asked for."""
        return Augment(rotation=8, scale=0.1, shear=0.1, shift=0.08, flip=data.images.shape[1] == 3)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of the images, after ``setup``."""
        channels, height, width = self.root.images.shape[1:]
        return int(channels), int(height), int(width)

    def setup(self, stage: str | None = None) -> None:
        """Load and divide the data, once."""
        if self._ready:
            return
        data = self.load()
        split = self.split(data)
        order = [*split.train, *split.validation, *split.test]
        renumbered = torch.full((len(data.class_names),), -1)
        renumbered[torch.tensor(order)] = torch.arange(len(order))
        labels = renumbered[data.labels]
        ends = torch.tensor([len(split.train), len(split.train) + len(split.validation), len(order)])
        part = torch.where(labels < 0, -1, torch.bucketize(labels, ends, right=True))
        train, val, test = (torch.nonzero(part == i).flatten().tolist() for i in range(3))
        mean, std = _channel_statistics(data.images, train)
        self.root = ImageSet(data.images, labels, mean, std)
        augment = self.augment if self.augment is not None else self.suggest_augment(data)
        self.train_set = AugmentedSubset(self.root, train, augment, self.seed)
        self.val_set, self.test_set = Subset(self.root, val), Subset(self.root, test)
        self.class_names, self.num_train_classes = [data.class_names[c] for c in order], len(split.train)
        self._choose_sizes(labels[train])
        self._ready = True

    def _choose_sizes(self, labels: Tensor) -> None:
        if self.classes_per_batch is None:
            self.classes_per_batch = max(1, min(24, self.num_train_classes // rank_and_size()[1]))
        if self.samples_per_class is None:
            typical = int(torch.bincount(labels).median())
            self.samples_per_class = max(2, min(typical, 120 // self.classes_per_batch))

    def train_dataloader(self) -> DataLoader[Any]:
        """Augmented batches of P classes with K samples each."""
        self._refuse_foreign_sampler()
        assert self.classes_per_batch is not None
        assert self.samples_per_class is not None
        sampler = PKBatchSampler(
            self.root.labels[self.train_set.indices],
            self.classes_per_batch,
            self.samples_per_class,
            self.seed,
            self.batches_per_epoch,
        )
        return ResumableLoader(self.train_set, batch_sampler=sampler, **self._loading())

    def val_dataloader(self) -> DataLoader[Any]:
        """Images of validation classes, with their indices."""
        return self._evaluate(self.val_set)

    def test_dataloader(self) -> DataLoader[Any]:
        """Images of unseen classes, with their indices."""
        return self._evaluate(self.test_set)

    def predict_dataloader(self) -> DataLoader[Any]:
        """The test set."""
        return self._evaluate(self.test_set)

    def _evaluate(self, data: Dataset[Any]) -> DataLoader[Any]:
        rank, size = rank_and_size()
        sampler: DistributedSampler[Any] | None = None
        if size > 1:
            sampler = DistributedSampler(data, size, rank, shuffle=False)
        return with_indices(DataLoader(data, self.eval_batch_size, sampler=sampler, **self._loading()))

    def _loading(self) -> dict[str, Any]:
        return {
            "num_workers": self.num_workers,
            "persistent_workers": self.num_workers > 0,
            "pin_memory": torch.cuda.is_available(),
        }

    def _refuse_foreign_sampler(self) -> None:
        connector = getattr(self.trainer, "_accelerator_connector", None)
        if getattr(connector, "is_distributed", False) and getattr(connector, "use_distributed_sampler", False):
            raise ValueError(
                f"{type(self).__name__} divides its batches among devices itself, and Lightning would put its own "
                "sampler in between: pass Trainer(use_distributed_sampler=False), or "
                "--trainer.use_distributed_sampler=false on the command line"
            )


def _channel_statistics(images: Tensor, rows: list[int]) -> tuple[list[float], list[float]]:
    """Mean and standard deviation per channel, as parts of the full range, from at most 5,000 rows."""
    some = images[torch.tensor(rows[:: max(1, len(rows) // 5000)])].double() / 255
    std = some.std(dim=(0, 2, 3), correction=0)
    return some.mean(dim=(0, 2, 3)).tolist(), torch.where(std > 0, std, 1.0).tolist()
