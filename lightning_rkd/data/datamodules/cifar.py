"""CIFAR-10 and CIFAR-100, from their authors' archives for Python."""

import pickle
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torchvision.datasets import CIFAR10, CIFAR100

from lightning_rkd.data.datamodules.base import ImageDataModule, LabelledImages
from lightning_rkd.data.datamodules.splits import ClassSplit, halve, hold_out
from lightning_rkd.data.datasets.archives import Archive, check_counts, check_md5
from lightning_rkd.data.transforms.crop import Crop


class CIFARDataModule(ImageDataModule):
    """CIFAR-10 or CIFAR-100: 32 x 32, colour, 50,000 training and 10,000 test images.

    With ``split_by="samples"`` this is classification: the official test images test. With ``split_by="classes"`` it is
    retrieval among unseen classes: training images of the first half of the classes (of CIFAR-100 the first 50 in
    alphabetical order) train and validate, *test images* of the second half test.

    Training pads by 4, crops 32 x 32 at random and mirrors half of the images.

    Args:
        root: The folder with the archive (``cifar-100-python.tar.gz``), or with its content.
        classes: 10 or 100.
        check: Whether numbers of images and classes, and checksums, must be the published ones.
        download: Whether to download the archive.
        classes_per_batch: P, per device; ``None`` takes as many as there are, up to 24.
        kwargs: Arguments of :class:`~lightning_rkd.data.ImageDataModule`, save for ``test``: the test part is
            published. ``validation`` is a part of the training classes (samples); 0 for none.

    Reference:
        Krizhevsky 2009, Learning Multiple Layers of Features from Tiny Images.
    """

    def __init__(
        self,
        root: str | Path,
        *,
        classes: Literal[10, 100] = 100,
        check: bool = True,
        download: bool = False,
        classes_per_batch: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(classes_per_batch=classes_per_batch, test=0.25, **kwargs)
        if classes not in (10, 100):
            raise ValueError(f"classes must be 10 or 100, got {classes}")
        self.folder, self.classes, self.check, self.download = Path(root).expanduser(), classes, check, download
        self._tables = CIFAR10 if classes == 10 else CIFAR100  # names, address and checksums

    def _unpack(self) -> Path:
        tables = self._tables
        page = "https://www.cs.toronto.edu/~kriz/cifar.html"
        archive = Archive(tables.filename, tables.base_folder, page, tables.tgz_md5, tables.url)
        files = [file for file, _ in (*tables.train_list, *tables.test_list)]
        return archive.unpack(self.folder, [tables.meta["filename"], *files], self.download, self.check)

    def prepare_data(self) -> None:
        """Download and unpack, once per machine."""
        self._unpack()

    def load(self) -> LabelledImages:
        """Read training images, then test images, each in the order of the archive."""
        folder, tables = self._unpack(), self._tables
        names = self._read(folder / tables.meta["filename"], tables.meta["md5"])[tables.meta["key"]]
        parts = [self._read(folder / file, md5) for file, md5 in (*tables.train_list, *tables.test_list)]
        pixels = np.concatenate([part["data"] for part in parts])
        labels = [label for part in parts for label in part["labels" if self.classes == 10 else "fine_labels"]]
        tests = len(parts[-1]["data"])
        if self.check:
            found = {"images": len(labels), "test images": tests, "classes": len(set(labels))}
            expected = {"images": 60_000, "test images": 10_000, "classes": self.classes}
            check_counts(f"CIFAR-{self.classes}", folder, found, expected)
        official = torch.arange(len(labels)) >= len(labels) - tests
        return LabelledImages(torch.from_numpy(pixels).view(-1, 3, 32, 32), torch.tensor(labels), names, official)

    def _read(self, path: Path, md5: str) -> dict[str, Any]:
        if self.check:
            check_md5(path, md5)
        try:
            with path.open("rb") as file:
                return dict(_ArraysOnly(file, encoding="latin1").load())
        except (pickle.UnpicklingError, EOFError, ValueError) as error:
            raise ValueError(f"{path} is not CIFAR's, or is damaged ({error}): extract the archive again") from error

    def split(self, data: LabelledImages) -> ClassSplit:
        """The first half of the classes for training and validation, the second half for the test."""
        return hold_out(*halve(data.class_names), self.validation, self.split_seed)

    def suggest_augment(self, data: LabelledImages) -> Crop:
        """Padding by 4, a random crop, and mirroring half of the images."""
        return Crop(32, padding=4, flip=True)


class _ArraysOnly(pickle.Unpickler):
    """Reads lists, dictionaries, text and arrays, and calls nothing else: ``check=False`` verifies no checksum."""

    def find_class(self, module: str, name: str) -> Any:
        if module.startswith("numpy") and name in ("ndarray", "dtype"):
            return getattr(np, name)
        if module.startswith("numpy") and name == "_reconstruct":
            return np.ndarray.__reduce__(np.empty(0))[0]
        if (module, name) == ("_codecs", "encode"):
            return str.encode
        raise pickle.UnpicklingError(f"it refers to {module}.{name}")
