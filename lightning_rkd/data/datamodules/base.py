"""Base of the data modules: disjoint parts, resumable training batches, indexed evaluation batches."""

import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Subset

from lightning_rkd.data.datamodules.splits import ClassSplit, check_disjoint, split_classes, split_samples
from lightning_rkd.data.datasets.files import ImageFiles
from lightning_rkd.data.datasets.images import AugmentedSubset, ImageSet, QuerySubset
from lightning_rkd.data.indexing import with_indices
from lightning_rkd.data.resumable_loader import ResumableLoader
from lightning_rkd.data.samplers.pk import PKBatchSampler
from lightning_rkd.data.transforms.augment import Augment
from lightning_rkd.data.transforms.crop import CentreCrop, Crop
from lightning_rkd.utils.distributed import rank_and_size
from lightning_rkd.utils.private import import_pytorch_lightning, replaces_samplers

if not TYPE_CHECKING:
    pytorch_lightning = import_pytorch_lightning()

    class LightningDataModule(LightningDataModule, pytorch_lightning.LightningDataModule):
        """Data module for the Trainer and the LightningCLI of ``lightning`` and of ``pytorch_lightning``."""


_log = logging.getLogger(__name__)


class LabelledImages(NamedTuple):
    """A whole data set.

    Attributes:
        images: (N, C, H, W), uint8.
        labels: Class of every image, (N,), int64.
        class_names: Name of every class.
        test: Images of an official test part, (N,), bool: they test and do nothing else; ``None`` without such a part.
        is_query: Images that are queries when they test, (N,), bool, the others being their gallery.
    """

    images: Tensor | ImageFiles
    labels: Tensor
    class_names: list[str]
    test: Tensor | None = None
    is_query: Tensor | None = None


class ImageDataModule(LightningDataModule, ABC):
    """Images divided into training, validation and test; a data set implements one method, :meth:`load`.

    Samples are ``(x, y)``. By default *classes* are divided, for retrieval among unseen classes: training classes have
    the numbers 0 to ``num_train_classes - 1``, and batches are P classes by K samples. With ``split_by="samples"`` all
    parts hold all classes, for classification, and batches are P K samples drawn without regard to their class. All
    three sets are views of one root data set, so an index means the same image everywhere.

    Order and augmentation of the training batches depend on (seed, epoch, index) alone, and the loader's position is
    part of Lightning's checkpoints: a resumed run equals the uninterrupted run, with any number of workers. Validation,
    test and prediction batches (of the test set) are :class:`~lightning_rkd.data.indexing.IndexedBatch`.

    Args:
        classes_per_batch: P, per device; N ways of few-shot episodes, with shots + queries as ``samples_per_class``
            (see :func:`~lightning_rkd.data.episode_sampler`). ``None`` takes as many as there are, up to 24.
        samples_per_class: K; ``None`` fills a batch of 120, as far as a typical class has the samples.
        batches_per_epoch: Batches per epoch and device; ``None`` draws about as many samples as there are.
        eval_batch_size: Batch size of validation, test and prediction.
        num_workers: Worker processes per loader; 0 is usually fastest for images in memory.
        seed: Seed of order and augmentation.
        split_seed: Seed of the division, so that runs with other ``seed`` share test classes that a teacher has not
            been trained on.
        validation: Part of the classes (samples) that validate.
        test: Part of the classes (samples) that test.
        augment: Augmentation of training batches; ``None`` takes what suits the data.
        split_by: ``"classes"`` or ``"samples"``.
        views: Number of augmented versions of each training image, used in turn, epoch by epoch, for which
            :class:`~lightning_rkd.CachedTeacher` can keep outputs; ``None`` never repeats one.

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
        *,
        classes_per_batch: int | None = 24,
        samples_per_class: int | None = 5,
        batches_per_epoch: int | None = None,
        eval_batch_size: int = 512,
        num_workers: int = 0,
        seed: int = 0,
        split_seed: int = 0,
        validation: float = 0.15,
        test: float = 0.25,
        augment: Augment | Crop | None = None,
        split_by: Literal["classes", "samples"] = "classes",
        views: int | None = None,
    ) -> None:
        super().__init__()
        if split_by not in ("classes", "samples"):
            raise ValueError(f"split_by must be 'classes' or 'samples', got {split_by!r}")
        if eval_batch_size < 1:
            raise ValueError(f"eval_batch_size must be at least 1, got {eval_batch_size}")
        self.classes_per_batch, self.samples_per_class = classes_per_batch, samples_per_class
        self.batches_per_epoch, self.eval_batch_size, self.num_workers = batches_per_epoch, eval_batch_size, num_workers
        self.seed, self.split_seed, self.validation, self.test = seed, split_seed, validation, test
        self.augment, self.split_by, self.views = augment, split_by, views
        self._ready = False

    @abstractmethod
    def load(self) -> LabelledImages:
        """Read the whole data set, the same on every rank."""

    def split(self, data: LabelledImages) -> ClassSplit:
        """Divide the classes among training, validation and test."""
        return split_classes(range(len(data.class_names)), self.validation, self.test, self.split_seed)

    def suggest_augment(self, data: LabelledImages) -> Augment | Crop:
        """Choose the augmentation where the user passes none."""
        return Augment(rotation=8, scale=0.1, shear=0.1, shift=0.08, flip=data.images.shape[1] == 3)

    def statistics(self, data: LabelledImages, train: list[int]) -> tuple[Sequence[float], Sequence[float]]:
        """Compute the mean and standard deviation per channel that images are normalised with.

        They are parts of the full range, from at most 5,000 training rows.
        """
        some = data.images[torch.tensor(train[:: max(1, len(train) // 5000)])].double() / 255
        std = some.std(dim=(0, 2, 3), correction=0)
        return some.mean(dim=(0, 2, 3)).tolist(), torch.where(std > 0, std, 1.0).tolist()

    def centre_crop(self) -> CentreCrop | None:
        """Choose the crop of images that no augmentation has cropped."""
        return None

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of the networks' inputs, after ``setup``."""
        channels, height, width = (int(n) for n in self.root.images.shape[1:])
        if self.root.transform is None:
            return channels, height, width
        return channels, min(height, self.root.transform.size), min(width, self.root.transform.size)

    def setup(self, stage: str | None = None) -> None:
        """Load and divide the data, once."""
        if self._ready:
            return
        data = self.load()
        if self.split_by == "classes":
            split = check_disjoint(self.split(data), data.class_names)
            order = [*split.train, *split.validation, *split.test]
            labels, (train, val, test) = _renumbered(data.labels, split, len(data.class_names), data.test)
            self.num_train_classes = len(split.train)
        else:
            order, labels = list(range(len(data.class_names))), data.labels
            official = None if data.test is None else data.test.tolist()
            train, val, test = split_samples(labels.tolist(), self.validation, self.test, self.split_seed, official)
            self.num_train_classes = len(order)
        mean, std = self.statistics(data, train)
        self.root = ImageSet(data.images, labels, mean, std, self.centre_crop())
        augment = self.augment if self.augment is not None else self.suggest_augment(data)
        self.train_set = AugmentedSubset(self.root, train, augment, self.seed, self.views)
        self.val_set = Subset(self.root, val)
        is_query = data.is_query if self.split_by == "classes" else None
        self.test_set = Subset(self.root, test) if is_query is None else QuerySubset(self.root, test, is_query)
        self.class_names = [data.class_names[c] for c in order]
        self._choose_sizes(labels[train])
        self._ready = True

    def _choose_sizes(self, labels: Tensor) -> None:
        if self.classes_per_batch is None:
            self.classes_per_batch = max(1, min(24, self.num_train_classes // rank_and_size()[1]))
        counts = torch.bincount(labels)
        if self.samples_per_class is None:
            self.samples_per_class = max(2, min(int(counts.median()), 120 // self.classes_per_batch))
        few = (counts < self.samples_per_class).nonzero().flatten().tolist()
        if few and self.split_by == "classes":
            _log.info(
                "%d of %d training classes have fewer than samples_per_class=%d samples, so batches repeat some: %s",
                len(few), len(counts), self.samples_per_class, ", ".join(self.class_names[c] for c in few[:3]),
            )  # fmt: skip

    def train_dataloader(self) -> DataLoader[Any]:
        """Augmented batches, with their indices where a loss of the run needs them."""
        if self.trainer is not None and replaces_samplers(self.trainer):
            raise ValueError(
                f"{type(self).__name__} divides its batches among devices itself, and Lightning would put its own "
                "sampler in between: pass Trainer(use_distributed_sampler=False), or "
                "--trainer.use_distributed_sampler=false on the command line"
            )
        assert self.classes_per_batch is not None
        assert self.samples_per_class is not None
        labels, p, k = self.root.labels[self.train_set.indices], self.classes_per_batch, self.samples_per_class
        if self.split_by == "samples":  # with every sample a class of its own, classes do not matter to the sampler
            rows, needed = len(labels), p * k * rank_and_size()[1]
            if rows < needed:
                raise ValueError(
                    f"batches of classes_per_batch x samples_per_class = {p} x {k} on {rank_and_size()[1]} device(s) "
                    f"need at least {needed} training samples, and there are {rows}: lower either"
                )
            labels, p, k = torch.arange(rows), p * k, 1
        sampler = PKBatchSampler(labels, p, k, self.seed, self.batches_per_epoch)
        loader = ResumableLoader(self.train_set, batch_sampler=sampler, **self._loading())
        parts = (getattr(self.trainer, "lightning_module", None), *getattr(self.trainer, "callbacks", ()))
        return with_indices(loader) if any(getattr(part, "needs_indices", False) for part in parts) else loader

    def val_dataloader(self) -> Any:
        """Validation images with their indices; no loader where there are none."""
        return self._evaluate(self.val_set) if len(self.val_set) else []

    def test_dataloader(self) -> DataLoader[Any]:
        """Test images with their indices."""
        return self._evaluate(self.test_set)

    predict_dataloader = test_dataloader

    def _evaluate(self, data: Dataset[Any]) -> DataLoader[Any]:
        rank, size = rank_and_size()
        sampler: Any = DistributedSampler(data, size, rank, shuffle=False) if size > 1 else None
        return with_indices(DataLoader(data, self.eval_batch_size, sampler=sampler, **self._loading()))

    def _loading(self) -> dict[str, Any]:
        return {
            "num_workers": self.num_workers,
            "persistent_workers": self.num_workers > 0,
            "pin_memory": torch.cuda.is_available(),
        }


def _renumbered(
    labels: Tensor, split: ClassSplit, classes: int, official: Tensor | None = None
) -> tuple[Tensor, list[list[int]]]:
    """Labels with the training classes first, then validation and test classes; and the rows of each part.

    Where there is an official test part, test classes consist of its images, and the others of the other images.
    """
    order = [*split.train, *split.validation, *split.test]
    numbers = torch.full((classes,), -1)
    numbers[torch.tensor(order)] = torch.arange(len(order))
    new = numbers[labels]
    ends = torch.tensor([len(split.train), len(split.train) + len(split.validation), len(order)])
    part = torch.where(new < 0, -1, torch.bucketize(new, ends, right=True))
    if official is not None:
        part = torch.where((part == 2) == official, part, -1)
    return new, [torch.nonzero(part == i).flatten().tolist() for i in range(3)]
