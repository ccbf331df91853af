"""What data sets share whose archives hold one file per image and say which class and part each belongs to."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Literal, NamedTuple

import torch

from lightning_rkd.data.datamodules.base import ImageDataModule, LabelledImages
from lightning_rkd.data.datamodules.splits import ClassSplit, hold_out
from lightning_rkd.data.datasets.files import load_files
from lightning_rkd.data.transforms.augment import Augment
from lightning_rkd.data.transforms.crop import CentreCrop, Crop

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""What networks that learnt on ImageNet expect images to be normalised with."""


class Listing(NamedTuple):
    """What an archive says of its images.

    Attributes:
        paths: N files.
        labels: Their classes, N numbers.
        class_names: Name of every class.
        train: The training classes.
        test: The test classes.
        validation: The validation classes, where they are published; otherwise they come out of the training classes.
        official: Which images are test images, where the split is one of images.
        is_query: Which images ask, where others are their gallery.
    """

    paths: list[Path]
    labels: list[int]
    class_names: list[str]
    train: Sequence[int]
    test: Sequence[int]
    validation: Sequence[int] | None = None
    official: list[bool] | None = None
    is_query: list[bool] | None = None


class OfficialDataModule(ImageDataModule):
    """Base of the data sets with one file per image; a data set is one method, :meth:`listing`, and its sizes.

    Images are brought to ``image_size`` x ``image_size`` without cropping. Training crops a square of ``crop_size`` at
    random and mirrors half of the images, validation and test take the middle. Networks see them normalised as
    ImageNet's.

    Args:
        root: The folder with the archive, or with what it holds.
        image_size: Side that images are brought to; ``None`` takes what is usual for the data set.
        crop_size: Side of what networks see; ``None`` takes what is usual for the data set.
        in_memory: Whether images are decoded once and kept as bytes, or decoded whenever they are asked for, which
            wants ``num_workers``; ``None`` keeps small data sets.
        skip_damaged: Whether to read all images first and leave out those that are damaged; an error otherwise.
        check: Whether numbers of images and classes, and checksums, must be the published ones.
        download: Whether to fetch the archive, where there is a direct address.
        classes_per_batch: P, per device.
        samples_per_class: K.
        batches_per_epoch: Batches per epoch and device; ``None`` shows about as many images as there are.
        eval_batch_size: Batch size of validation, test and prediction.
        num_workers: Worker processes per loader.
        seed: Of order and augmentation.
        split_seed: Of what is taken out of the training side for validation.
        validation: Part of the training classes (samples) that validate; 0 for none.
        augment: What training batches go through.
        split_by: Whether ``"classes"`` are divided, for retrieval, or ``"samples"``, for classification.
        views: How many augmented versions of each training image there are.
    """

    title: ClassVar[str]
    sizes: ClassVar[tuple[int, int]] = (256, 224)
    """Usual sides of the images and of what is cropped out of them."""
    padding: ClassVar[int] = 0
    small: ClassVar[bool] = False
    """Whether all images together fit into memory easily."""

    def __init__(
        self,
        root: str | Path,
        image_size: int | None = None,
        crop_size: int | None = None,
        in_memory: bool | None = None,
        skip_damaged: bool = False,
        check: bool = True,
        download: bool = False,
        classes_per_batch: int | None = 24,
        samples_per_class: int | None = 5,
        batches_per_epoch: int | None = None,
        eval_batch_size: int = 128,
        num_workers: int = 0,
        seed: int = 0,
        split_seed: int = 0,
        validation: float = 0.15,
        augment: Augment | Crop | None = None,
        split_by: Literal["classes", "samples"] = "classes",
        views: int | None = None,
    ) -> None:
        super().__init__(
            classes_per_batch, samples_per_class, batches_per_epoch, eval_batch_size, num_workers, seed, split_seed,
            validation, 0.25, augment, split_by, views,
        )  # fmt: skip
        self.image_size = image_size if image_size is not None else self.sizes[0]
        self.crop_size = crop_size if crop_size is not None else min(self.image_size, self.sizes[1])
        if not 1 <= self.crop_size <= self.image_size:
            raise ValueError(f"crop_size must be from 1 to image_size={self.image_size}, got {self.crop_size}")
        self.folder = Path(root).expanduser()
        self.in_memory = in_memory if in_memory is not None else self.small
        self.skip_damaged, self.check, self.download = skip_damaged, check, download
        self._listing: Listing | None = None

    @abstractmethod
    def listing(self) -> Listing:
        """Find the archive's content, check it, and read its lists."""

    def prepare_data(self) -> None:
        """Fetch and unpack, once per machine."""
        self.listing()

    def load(self) -> LabelledImages:
        """Read the lists, and the images where they are kept in memory."""
        found = self._listing = self.listing()
        images, kept = load_files(found.paths, self.image_size, 3, self.in_memory, self.skip_damaged)
        official, is_query = (
            None if marks is None else torch.tensor(marks)[kept] for marks in (found.official, found.is_query)
        )
        return LabelledImages(images, torch.tensor(found.labels)[kept], found.class_names, official, is_query)

    def split(self, data: LabelledImages) -> ClassSplit:
        """The published one; validation classes are drawn from the training classes where none are published."""
        found = self._listing if self._listing is not None else self.listing()
        if found.validation is not None:
            return ClassSplit(list(found.train), list(found.validation), list(found.test))
        return hold_out(found.train, found.test, self.validation, self.split_seed)

    def suggest_augment(self, data: LabelledImages) -> Crop:
        """A random crop, mirrored in half of the cases."""
        return Crop(self.crop_size, self.padding, flip=True)

    def statistics(self, data: LabelledImages, train: list[int]) -> tuple[Sequence[float], Sequence[float]]:
        """ImageNet's, as published."""
        return IMAGENET_MEAN, IMAGENET_STD

    def centre_crop(self) -> CentreCrop | None:
        """The middle of the image, where it is larger than what networks see."""
        return CentreCrop(self.crop_size) if self.crop_size < self.image_size else None
