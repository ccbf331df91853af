"""Any folder of images: a class is the folder that directly holds its images."""

import logging
import os
from collections.abc import Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from lightning_rkd.data.datamodules.base import ImageDataModule, LabelledImages
from lightning_rkd.data.datamodules.splits import ClassSplit, check_disjoint, split_classes
from lightning_rkd.data.datasets.decoding import decode, open_image
from lightning_rkd.data.datasets.files import find_intact

_log = logging.getLogger(__name__)

SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})
_PART_NAMES = frozenset({"train", "training", "val", "valid", "validation", "test", "testing"})


class ImageFolderDataModule(ImageDataModule):
    """Images under a folder, at any depth; classes are divided into training, validation and unseen test classes.

    A class is the folder that directly holds the images, named by its path below the folder that holds all classes
    (``apple``, or ``Greek/character01`` where there are several alphabets). All images are decoded once, resized to
    ``image_size`` x ``image_size`` (without cropping) and kept in memory as bytes. Images stay grey if all of them
    are. A class with a single image can only train: there is nothing to retrieve in it. Hidden files and files that
    are no images are ignored.

    Args:
        root: The folder.
        test_root: A second folder, of images that test and do nothing else, such as ``cifar100/test`` beside
            ``cifar100/train``; classes have the same names in both. With ``split_by="classes"`` the test classes
            consist of images of this folder, the others of images of ``root``; with ``split_by="samples"`` ``test``
            has no effect.
        image_size: Height and width of the images; ``None`` takes the median of those found, at most 64.
        skip_damaged: Whether to read all images first and leave out damaged ones; an error otherwise.
        max_images_per_class: Largest number of images of a class, chosen by ``split_seed``.
        splits: Classes of each part, instead of a random division: names or patterns such as ``"Greek/*"`` under the
            keys ``test``, ``validation`` and ``train``. Classes under no key train, unless ``train`` is given; without
            ``validation``, those classes are drawn from the training classes.
        classes_per_batch: P, per device; ``None`` takes as many as there are, up to 24.
        samples_per_class: K; ``None`` fills a batch of 120, as far as a typical class has the images.
        kwargs: Arguments of :class:`~lightning_rkd.data.ImageDataModule`.

    Raises:
        FileNotFoundError: The folder does not exist, or holds no images.
        ValueError: Fewer than 6 classes with two images, the same classes under ``train`` and ``test``, an image that
            cannot be read, or ``splits`` that match nothing or the same class twice.
    """

    def __init__(
        self,
        root: str | Path,
        *,
        test_root: str | Path | None = None,
        image_size: int | None = None,
        skip_damaged: bool = False,
        max_images_per_class: int | None = None,
        splits: Mapping[str, Sequence[str]] | None = None,
        classes_per_batch: int | None = None,
        samples_per_class: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(classes_per_batch=classes_per_batch, samples_per_class=samples_per_class, **kwargs)
        for name, number in {"image_size": image_size, "max_images_per_class": max_images_per_class}.items():
            if number is not None and number < 1:
                raise ValueError(f"{name} must be at least 1, got {number}")
        if splits is not None and self.split_by != "classes":
            raise ValueError("splits divides classes, so it goes with split_by='classes'")
        if splits is not None and (unknown := set(splits) - {"train", "validation", "test"}):
            raise ValueError(f"splits takes the keys train, validation and test, got {sorted(unknown)}")
        if splits is not None and not splits.get("test"):
            raise ValueError("splits must name the classes under the key test")
        self.folder = Path(root).expanduser()
        self.test_folder = None if test_root is None else Path(test_root).expanduser()
        self.image_size, self.skip_damaged = image_size, skip_damaged
        self.max_images_per_class, self.splits = max_images_per_class, splits

    def load(self) -> LabelledImages:
        """Decode all images."""
        files = find_images(self.folder, self.skip_damaged)
        tests = {} if self.test_folder is None else find_images(self.test_folder, self.skip_damaged)
        names = sorted({*files, *tests})
        if self.split_by == "samples" and (unknown := [name for name in tests if name not in files]):
            raise ValueError(
                f"test_root {self.test_folder} holds the class {unknown[0]!r}, which root {self.folder} lacks, so that "
                "nothing can be learnt of it: classes must have the same names in both"
            )
        _check_classes(self.folder, {name: [*files.get(name, ()), *tests.get(name, ())] for name in names})
        rng = np.random.default_rng(self.split_seed)
        parts = [[self._limited(part.get(name, []), rng) for name in names] for part in (files, tests)]
        paths = [path for part in parts for group in part for path in group]
        images = decode(paths, self.image_size if self.image_size is not None else suggest_size(paths))
        counts = torch.tensor([[len(group) for group in part] for part in parts])
        labels = torch.repeat_interleave(torch.arange(len(names)).repeat(2), counts.flatten())
        official = None if self.test_folder is None else torch.arange(len(paths)) >= counts[0].sum()
        return LabelledImages(torch.from_numpy(images), labels, names, official)

    def _limited(self, paths: list[Path], rng: np.random.Generator) -> list[Path]:
        if self.max_images_per_class is None or len(paths) <= self.max_images_per_class:
            return paths
        return [paths[i] for i in sorted(rng.choice(len(paths), self.max_images_per_class, replace=False))]

    def split(self, data: LabelledImages) -> ClassSplit:
        """Divide at random or by ``splits``; classes with one image always train."""
        counts = torch.bincount(data.labels, minlength=len(data.class_names)).tolist()
        single = [c for c, n in enumerate(counts) if n < 2]
        if self.splits is not None:
            return _given_split(self.splits, data.class_names, single, self.validation, self.split_seed)
        if single:
            _log.info("%d classes hold one image, so they only train: %s ...", len(single), data.class_names[single[0]])
        several = [c for c, n in enumerate(counts) if n >= 2]
        part = split_classes(several, self.validation, self.test, self.split_seed)
        return part._replace(train=sorted(part.train + single))


def find_images(root: Path, skip_damaged: bool = False) -> dict[str, list[Path]]:
    """Find the images of every class, in alphabetical order, by the path below the folder that holds all classes.

    With ``skip_damaged`` all images are read, and damaged ones are left out and listed in the log.
    """
    if not root.is_dir():
        raise FileNotFoundError(
            f"there is no folder {root}" + (": it is a file" if root.exists() else f" (seen from {Path.cwd()})")
        )
    classes: dict[str, list[Path]] = {}
    for folder, below, names in os.walk(root, followlinks=True):
        below[:] = sorted(name for name in below if not name.startswith((".", "__MACOSX")))
        found = [
            Path(folder, name)
            for name in sorted(names)
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in SUFFIXES
        ]
        if found:
            classes[folder] = found
    if not classes:
        raise FileNotFoundError(f"no images under {root}, at any depth, with suffixes {', '.join(sorted(SUFFIXES))}")
    if skip_damaged:
        every = [path for paths in classes.values() for path in paths]
        intact = {every[i] for i in find_intact(every)}
        left = {folder: [path for path in paths if path in intact] for folder, paths in classes.items()}
        classes = {folder: paths for folder, paths in left.items() if paths}
    shared = os.path.commonpath(classes)
    return {Path(folder).relative_to(shared).as_posix(): classes[folder] for folder in sorted(classes)}


def _check_classes(root: Path, files: Mapping[str, Sequence[Path]]) -> None:
    usable = sum(len(paths) >= 2 for paths in files.values())
    if usable < 6:
        raise ValueError(
            f"{root} holds {len(files)} classes, {usable} of them with two images or more, and at least 6 are needed: "
            "two each to train, validate and test. A class is a folder that directly holds its images"
        )
    bare: dict[str, str] = {}
    for name in files:
        parts = name.split("/")
        part = next((i for i, word in enumerate(parts) if word.lower() in _PART_NAMES), len(parts))
        without = "/".join(parts[:part] + parts[part + 1 :])
        if without and without in bare:
            raise ValueError(
                f"{bare[without]!r} and {name!r} under {root} look like one class in two parts of a data set, and "
                "would count as two: point root at one of the parts, and test_root, if wanted, at the other"
            )
        bare[without] = name


def suggest_size(paths: Sequence[Path]) -> int:
    """Median of the images' mean height and width, at most 64, from the headers of at most 500 of them."""
    sizes = []
    for path in paths[:: max(1, len(paths) // 500)]:
        with open_image(path) as image:
            sizes.append(sum(image.size) / 2)
    return max(8, min(64, round(median(sizes))))


def _given_split(
    splits: Mapping[str, Sequence[str]], names: Sequence[str], single: Sequence[int], validation: float, seed: int
) -> ClassSplit:
    chosen: dict[str, list[int]] = {}
    for key, patterns in splits.items():
        chosen[key] = []
        for pattern in patterns:
            found = [c for c, name in enumerate(names) if fnmatch(name, pattern)]
            if not found:
                raise ValueError(
                    f"splits: no class matches {pattern!r} under {key!r}; there are {', '.join(names[:8])} ..."
                )
            chosen[key] += [c for c in found if c not in chosen[key]]
    for key in ("validation", "test"):
        if alone := set(chosen.get(key, ())) & set(single):
            raise ValueError(f"splits: {names[min(alone)]!r} under {key!r} holds one image: nothing can be retrieved")
    taken = {*chosen["test"], *chosen.get("validation", ())}
    train = chosen.get("train", [c for c in range(len(names)) if c not in taken])
    if "validation" not in chosen:
        order = np.random.default_rng(seed).permutation([c for c in train if c not in set(single)]).tolist()
        chosen["validation"] = order[: max(2, round(validation * len(train)))]
        train = [c for c in train if c not in set(chosen["validation"])]
    split = check_disjoint(ClassSplit(sorted(train), sorted(chosen["validation"]), sorted(chosen["test"])), names)
    for key, classes in split._asdict().items():
        if len(classes) < 2:
            raise ValueError(f"splits: {len(classes)} classes for {key}, and at least 2 are needed")
    return split
