"""Base of the data sets whose archives hold one file per image and lists of their classes and parts."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch

from lightning_rkd.data.datamodules.base import ImageDataModule, LabelledImages
from lightning_rkd.data.datamodules.splits import ClassSplit, hold_out
from lightning_rkd.data.datasets.archives import check_counts
from lightning_rkd.data.datasets.files import load_files
from lightning_rkd.data.transforms.crop import CentreCrop, Crop

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Normalisation of images for networks that were trained on ImageNet."""


class Listing(NamedTuple):
    """Content of an archive's lists: files, their classes by number and name, and the classes of every part.

    Validation classes are taken from the training classes where none are published. ``official`` marks the test images,
    where images are divided, ``is_query`` the queries among them, where the others are their gallery.
    """

    paths: list[Path]
    labels: list[int]
    class_names: list[str]
    train: Sequence[int]
    test: Sequence[int]
    validation: Sequence[int] | None = None
    official: list[bool] | None = None
    is_query: list[bool] | None = None

    @classmethod
    def from_names(
        cls,
        rows: Sequence[tuple[Path, Any]],
        official: list[bool] | None = None,
        is_query: list[bool] | None = None,
        **parts: Collection[Any],
    ) -> Listing:
        """Listing of files and the names of their classes, which are numbered in order, and of the classes by part."""
        names = sorted(set().union(*parts.values()))
        number = {name: c for c, name in enumerate(names)}
        numbers: dict[str, Any] = {part: sorted(number[name] for name in chosen) for part, chosen in parts.items()}
        paths, labels = [path for path, _ in rows], [number[name] for _, name in rows]
        return cls(paths, labels, [str(name) for name in names], official=official, is_query=is_query, **numbers)


class OfficialDataModule(ImageDataModule):
    """Base of the data sets with one file per image; a data set is one method, :meth:`read_lists`, and its sizes.

    Images are resized to ``image_size`` x ``image_size`` without cropping. Training crops a square of ``crop_size`` at
    random and mirrors half of the images, validation and test crop the middle. Images are normalised as ImageNet's.

    Args:
        root: The folder with the archive, or with its content.
        image_size: Height and width of the resized images; ``None`` takes what is usual for the data set.
        crop_size: Height and width of the networks' inputs; ``None`` takes what is usual for the data set.
        in_memory: Whether images are decoded once and kept as bytes, or decoded on access, which needs
            ``num_workers``; ``None`` keeps small data sets.
        skip_damaged: Whether to read all images first and leave out damaged ones; an error otherwise.
        check: Whether numbers of images and classes, and checksums, must be the published ones.
        download: Whether to download the archive, where there is a direct address.
        eval_batch_size: Batch size of validation, test and prediction.
        kwargs: Arguments of :class:`~lightning_rkd.data.ImageDataModule`, save for ``test``: the test part is
            published. ``validation`` is a part of the training classes (samples); 0 for none.

    Raises:
        FileNotFoundError: A missing list, image or archive, or an archive that was unpacked in part.
        ValueError: A wrong checksum or number of images, a class in two parts, or a damaged image.
    """

    title: ClassVar[str]
    counts: ClassVar[Mapping[str, int]]
    """Published numbers of images and classes."""
    sizes: ClassVar[tuple[int, int]] = (256, 224)
    """Usual ``image_size`` and ``crop_size``."""
    padding: ClassVar[int] = 0
    small: ClassVar[bool] = False
    """``True`` if all images together fit into memory easily."""

    def __init__(
        self,
        root: str | Path,
        *,
        image_size: int | None = None,
        crop_size: int | None = None,
        in_memory: bool | None = None,
        skip_damaged: bool = False,
        check: bool = True,
        download: bool = False,
        eval_batch_size: int = 128,
        **kwargs: Any,
    ) -> None:
        super().__init__(eval_batch_size=eval_batch_size, test=0.25, **kwargs)
        self.image_size = image_size if image_size is not None else self.sizes[0]
        self.crop_size = crop_size if crop_size is not None else min(self.image_size, self.sizes[1])
        if not 1 <= self.crop_size <= self.image_size:
            raise ValueError(f"crop_size must be from 1 to image_size={self.image_size}, got {self.crop_size}")
        self.folder = Path(root).expanduser()
        self.in_memory = in_memory if in_memory is not None else self.small
        self.skip_damaged, self.check, self.download = skip_damaged, check, download
        self._listing: Listing | None = None

    @abstractmethod
    def read_lists(self) -> Listing:
        """Find or unpack the archive and read its lists."""

    def prepare_data(self) -> None:
        """Download, unpack and check, once per machine."""
        listing = self._listing = self.read_lists()
        if self.check:
            found = {
                "images": len(listing.paths),
                "test images": sum(listing.official or ()),
                "queries": sum(listing.is_query or ()),
                "classes": len(listing.class_names),
                "training classes": len(listing.train),
                "validation classes": len(listing.validation or ()),
                "test classes": len(listing.test),
            }
            check_counts(self.title, self.folder, found, self.counts)

    def load(self) -> LabelledImages:
        """Read the lists, and the images where they are kept in memory."""
        self.prepare_data()
        assert self._listing is not None
        found = self._listing
        images, kept = load_files(found.paths, self.image_size, 3, self.in_memory, self.skip_damaged)
        official, is_query = (
            None if marks is None else torch.tensor(marks)[kept] for marks in (found.official, found.is_query)
        )
        return LabelledImages(images, torch.tensor(found.labels)[kept], found.class_names, official, is_query)

    def split(self, data: LabelledImages) -> ClassSplit:
        """The published one; validation classes are drawn from the training classes where none are published."""
        found = self._listing if self._listing is not None else self.read_lists()
        if found.validation is not None:
            return ClassSplit(list(found.train), list(found.validation), list(found.test))
        return hold_out(found.train, found.test, self.validation, self.split_seed)

    def suggest_augment(self, data: LabelledImages) -> Crop:
        """A random crop, and mirroring half of the images."""
        return Crop(self.crop_size, self.padding, flip=True)

    def statistics(self, data: LabelledImages, train: list[int]) -> tuple[Sequence[float], Sequence[float]]:
        """ImageNet's."""
        return IMAGENET_MEAN, IMAGENET_STD

    def centre_crop(self) -> CentreCrop | None:
        """The middle of the image, where it is larger than the networks' inputs."""
        return CentreCrop(self.crop_size) if self.crop_size < self.image_size else None
