"""Omniglot: handwritten characters of fifty alphabets."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from lightning_rkd.data.datamodules.base import ImageDataModule, LabelledImages
from lightning_rkd.data.datamodules.folder import find_images
from lightning_rkd.data.datamodules.splits import ClassSplit, hold_out, split_classes
from lightning_rkd.data.datasets.archives import Archive, check_counts, unpacked
from lightning_rkd.data.datasets.files import load_files
from lightning_rkd.data.transforms.augment import Augment
from lightning_rkd.data.transforms.crop import Crop

_PAGE = "https://github.com/brendenlake/omniglot"
_URL = "https://raw.githubusercontent.com/brendenlake/omniglot/master/python"
_PARTS = ("images_background", "images_evaluation")
# checksums and addresses as torchvision has them
_MD5 = ("68d2efa1b9178cc56df9314c21c6e718", "6b91aef0f799c5bb55b94e3f2daec811")
ARCHIVES = [
    Archive(f"{part}.zip", part, _PAGE, md5, f"{_URL}/{part}.zip") for part, md5 in zip(_PARTS, _MD5, strict=True)
]

VALIDATION = frozenset({"Armenian", "Bengali", "Early_Aramaic", "Hebrew", "Mkhedruli_(Georgian)"})
"""Alphabets that validate in Vinyals' split, 172 characters."""
TEST = frozenset({
    "Kannada", "Keble", "Malayalam", "Manipuri", "Mongolian", "Old_Church_Slavonic_(Cyrillic)", "Oriya", "Sylheti",
    "Syriac_(Serto)", "Tengwar", "Tibetan", "ULOG",
})  # fmt: skip
"""Alphabets that test in it; with characters 42 to 45 of Gurmukhi they are 423 characters. The other 1,028 train."""


class OmniglotDataModule(ImageDataModule):
    """Omniglot: 1,623 characters of 50 alphabets, each drawn by 20 people; white on black, 28 x 28, in memory.

    As few-shot learning has it, every character turned by 90, 180 and 270 degrees is a class of its own, in the same
    part as the upright one. Any folder of alphabets, each a folder of characters, does; ``images_background`` and
    ``images_evaluation`` (or the archives of that name) in it are what is published.

    Departures from Snell et al.: images are made smaller with smoothing, where theirs have single pixels picked.

    Args:
        root: The folder.
        split: ``"vinyals"``: 1,028 characters train, 172 validate and 423 test; ``"background"``: alphabets of
            ``images_background`` train and validate, those of ``images_evaluation`` test; ``"alphabets"``: whole
            alphabets are divided at random, for any part of Omniglot.
        rotations: Whether turned characters are classes too.
        image_size: Side of the images.
        check: Whether numbers of alphabets and characters, and checksums, must be the published ones; not with
            ``split="alphabets"``.
        download: Whether to fetch the archives.
        skip_damaged: Whether to leave out damaged images; an error otherwise.
        classes_per_batch: P, per device.
        samples_per_class: K.
        batches_per_epoch: Batches per epoch and device; ``None`` shows about as many images as there are.
        eval_batch_size: Batch size of validation, test and prediction.
        num_workers: Worker processes per loader; the images are in memory, so 0 is usually fastest.
        seed: Of order and augmentation.
        split_seed: Of the division of the alphabets.
        validation: Part of the alphabets that validate.
        test: Part of the alphabets that test, with ``split="alphabets"``.
        augment: What training batches go through; ``None`` leaves them as they are.
        views: How many augmented versions of each training image there are.

    Raises:
        FileNotFoundError: Missing archives, or no images.
        ValueError: A wrong checksum or number of characters, too few alphabets, or a damaged image.

    Reference:
        Lake, Salakhutdinov and Tenenbaum 2015, Human-level concept learning through probabilistic program induction,
        Science 350; Vinyals et al. 2016, arXiv:1606.04080, and Snell, Swersky and Zemel 2017, Prototypical Networks for
        Few-shot Learning, arXiv:1703.05175, for split and rotations.
    """

    def __init__(
        self,
        root: str | Path,
        split: Literal["vinyals", "background", "alphabets"] = "vinyals",
        rotations: bool = True,
        image_size: int = 28,
        check: bool = True,
        download: bool = False,
        skip_damaged: bool = False,
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
        views: int | None = None,
    ) -> None:
        super().__init__(
            classes_per_batch, samples_per_class, batches_per_epoch, eval_batch_size, num_workers, seed, split_seed,
            validation, test, augment, "classes", views,
        )  # fmt: skip
        if split not in ("vinyals", "background", "alphabets"):
            raise ValueError(f"split must be 'vinyals', 'background' or 'alphabets', got {split!r}")
        self.folder, self.division, self.rotations, self.image_size = (
            Path(root).expanduser(),
            split,
            rotations,
            image_size,
        )
        self.check, self.download, self.skip_damaged = check and split != "alphabets", download, skip_damaged

    def prepare_data(self) -> None:
        """Fetch and unpack, once per machine."""
        for archive in ARCHIVES:
            wanted = self.download or (self.folder / archive.file).is_file()
            if wanted and not (self.folder / archive.folder).is_dir():
                unpacked(archive, self.folder, [], self.download, self.check)

    def load(self) -> LabelledImages:
        """All characters upright, then all turned counter-clockwise by 90, 180 and 270 degrees."""
        self.prepare_data()
        for part in _PARTS if self.division == "background" or self.check else ():
            if not (self.folder / part).is_dir():
                raise FileNotFoundError(
                    f"there is neither {self.folder / part} nor {part}.zip beside it: get {part}.zip from {_PAGE}, "
                    "or pass download=True; for a part of Omniglot pass split='alphabets'"
                )
        files = {_name(name): paths for name, paths in find_images(self.folder).items()}
        names = sorted(files)
        if self.check:
            found = {"characters": len(names), "images": sum(len(paths) for paths in files.values())}
            check_counts("Omniglot", self.folder, found, {"characters": 1_623, "images": 32_460})
        paths = [path for name in names for path in files[name]]
        images, kept = load_files(paths, self.image_size, 1, True, self.skip_damaged)
        assert isinstance(images, Tensor)
        images = 255 - images  # ink is black in the archive
        labels = torch.repeat_interleave(torch.tensor([len(files[name]) for name in names]))[kept]
        if not self.rotations:
            return LabelledImages(images, labels, names)
        turned = torch.cat([images.rot90(turns, (2, 3)) for turns in range(4)])
        labels = torch.cat([labels + turns * len(names) for turns in range(4)])
        return LabelledImages(turned, labels, [f"{name}/rot{90 * t:03d}" for t in range(4) for name in names])

    def split(self, data: LabelledImages) -> ClassSplit:
        """By character or alphabet, whichever way a character is turned."""
        alphabets = [name.split("/")[0] for name in data.class_names]
        if self.division == "vinyals":
            parts = [_vinyals(name) for name in data.class_names]
            return ClassSplit(*([c for c, part in enumerate(parts) if part == i] for i in range(3)))
        names = sorted(set(alphabets))
        if self.division == "alphabets":
            dealt = split_classes(range(len(names)), self.validation, self.test, self.split_seed)
        else:
            tests = {path.name for path in (self.folder / _PARTS[1]).iterdir()}
            sides = [[i for i, name in enumerate(names) if (name in tests) == side] for side in (False, True)]
            dealt = hold_out(sides[0], sides[1], self.validation, self.split_seed)
        part_of = {names[i]: part for part, chosen in enumerate(dealt) for i in chosen}
        return ClassSplit(*([c for c, a in enumerate(alphabets) if part_of[a] == part] for part in range(3)))

    def suggest_augment(self, data: LabelledImages) -> Augment:
        """None: turned characters are classes."""
        return Augment()

    def statistics(self, data: LabelledImages, train: list[int]) -> tuple[Sequence[float], Sequence[float]]:
        """None: ink is 1 and paper 0, as published."""
        return (0.0,), (1.0,)


def _name(path: str) -> str:
    """Alphabet and character, whatever folders lie above."""
    return "/".join(path.split("/")[-2:])


def _vinyals(name: str) -> int:
    """0 for training, 1 for validation, 2 for test."""
    alphabet, character = name.split("/")[:2]
    if alphabet == "Gurmukhi":
        return 2 if int(character.removeprefix("character")) >= 42 else 0
    return 1 if alphabet in VALIDATION else 2 if alphabet in TEST else 0
