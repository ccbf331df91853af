"""CIFAR-10 and CIFAR-100, from their authors' archives for Python."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from lightning_rkd.data.datamodules.base import ImageDataModule, LabelledImages
from lightning_rkd.data.datamodules.splits import ClassSplit, hold_out
from lightning_rkd.data.datasets.archives import Archive, check_counts, check_md5, unpacked
from lightning_rkd.data.transforms.augment import Augment
from lightning_rkd.data.transforms.crop import Crop

_PAGE = "https://www.cs.toronto.edu/~kriz/cifar.html"
# names, addresses and checksums as torchvision has them
_ARCHIVES = {
    10: Archive(
        "cifar-10-python.tar.gz", "cifar-10-batches-py", _PAGE, "c58f30108f718f92721af3b95e74349a",
        "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
    ),
    100: Archive(
        "cifar-100-python.tar.gz", "cifar-100-python", _PAGE, "eb9058c3a382ffc7106e4002c42a8d85",
        "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz",
    ),
}  # fmt: skip
_TRAIN = {
    10: {
        "data_batch_1": "c99cafc152244af753f735de768cd75f",
        "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
        "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
        "data_batch_4": "634d18415352ddfa80567beed471001a",
        "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
    },
    100: {"train": "16019d7e3df5f24257cddd939b257f8d"},
}
_TEST = {
    10: {"test_batch": "40351d587109b95175f43aff81a1287e"},
    100: {"test": "f0ef6b0ae62326f3e7ffdfab6717acfc"},
}
_META = {
    10: ("batches.meta", "5ff9c542aee3614f3951f8cda6e48888", "label_names"),
    100: ("meta", "7973b15100ade9c7d40fb424638fde48", "fine_label_names"),
}


class CIFARDataModule(ImageDataModule):
    """CIFAR-10 or CIFAR-100: 32 x 32, colour, 50,000 training and 10,000 test images.

    With ``split_by="samples"`` this is classification: the official test images test. With ``split_by="classes"`` it is
    retrieval among unseen classes: training images of the first half of the classes (of CIFAR-100 the first 50 in
    alphabetical order) train and validate, *test images* of the second half test.

    Training pads by 4, crops 32 x 32 at random and mirrors half of the images.

    Args:
        root: The folder with the archive (``cifar-100-python.tar.gz``), or with what it holds.
        classes: 10 or 100.
        check: Whether numbers of images and classes, and checksums, must be the published ones.
        download: Whether to fetch the archive.
        classes_per_batch: P, per device; ``None`` takes as many as there are, up to 24.
        samples_per_class: K.
        batches_per_epoch: Batches per epoch and device; ``None`` shows about as many images as there are.
        eval_batch_size: Batch size of validation, test and prediction.
        num_workers: Worker processes per loader; the images are in memory, so 0 is usually fastest.
        seed: Of order and augmentation.
        split_seed: Of what is taken out of the training side for validation.
        validation: Part of the training classes (samples) that validate; 0 for none.
        augment: What training batches go through.
        split_by: Whether ``"classes"`` are divided, for retrieval, or ``"samples"``, for classification.
        views: How many augmented versions of each training image there are.

    Raises:
        FileNotFoundError: A missing archive, or one that was unpacked in part.
        ValueError: A wrong checksum, a wrong number of images, or a file that is none of CIFAR's.

    Reference:
        Krizhevsky 2009, Learning Multiple Layers of Features from Tiny Images.
    """

    def __init__(
        self,
        root: str | Path,
        classes: Literal[10, 100] = 100,
        check: bool = True,
        download: bool = False,
        classes_per_batch: int | None = None,
        samples_per_class: int | None = 5,
        batches_per_epoch: int | None = None,
        eval_batch_size: int = 512,
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
        if classes not in (10, 100):
            raise ValueError(f"classes must be 10 or 100, got {classes}")
        self.folder, self.classes, self.check, self.download = Path(root).expanduser(), classes, check, download

    def _content(self) -> Path:
        needs = [_META[self.classes][0], *_TRAIN[self.classes], *_TEST[self.classes]]
        return unpacked(_ARCHIVES[self.classes], self.folder, needs, self.download, self.check)

    def prepare_data(self) -> None:
        """Fetch and unpack, once per machine."""
        self._content()

    def load(self) -> LabelledImages:
        """Training images, then test images, each in the order of the archive."""
        folder = self._content()
        meta, md5, key = _META[self.classes]
        names = self._read(folder / meta, md5)[key]
        parts = [self._read(folder / file, md5) for part in (_TRAIN, _TEST) for file, md5 in part[self.classes].items()]
        pixels = np.concatenate([part["data"] for part in parts])
        labels = [label for part in parts for label in part["labels" if self.classes == 10 else "fine_labels"]]
        tests = len(parts[-1]["data"])
        official = torch.arange(len(labels)) >= len(labels) - tests
        if self.check:
            found = {"images": len(labels), "test images": tests, "classes": len(set(labels))}
            expected = {"images": 60_000, "test images": 10_000, "classes": self.classes}
            check_counts(f"CIFAR-{self.classes}", folder, found, expected)
        return LabelledImages(torch.from_numpy(pixels).view(-1, 3, 32, 32), torch.tensor(labels), names, official)

    def _read(self, path: Path, md5: str) -> dict[str, Any]:
        if self.check:
            check_md5(path, md5)
        try:
            with path.open("rb") as file:
                content = _ArraysOnly(file, encoding="latin1").load()
        except (pickle.UnpicklingError, EOFError, ValueError) as error:
            raise ValueError(f"{path} is not CIFAR's, or is damaged ({error}): extract the archive again") from error
        return dict(content)

    def split(self, data: LabelledImages) -> ClassSplit:
        """The first half of the classes trains, but for some that validate, and the second tests."""
        classes = range(len(data.class_names))
        return hold_out(classes[: len(classes) // 2], classes[len(classes) // 2 :], self.validation, self.split_seed)

    def suggest_augment(self, data: LabelledImages) -> Crop:
        """Padding by 4, a random crop, mirrored in half of the cases."""
        return Crop(32, padding=4, flip=True)


class _ArraysOnly(pickle.Unpickler):
    """Reads lists, dictionaries, text and arrays, and runs nothing."""

    def find_class(self, module: str, name: str) -> Any:
        if module.startswith("numpy") and name in ("_reconstruct", "ndarray", "dtype"):
            if name == "_reconstruct":
                return np.ndarray.__reduce__(np.empty(0))[0]
            return getattr(np, name)
        if (module, name) == ("_codecs", "encode"):
            return str.encode
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")
