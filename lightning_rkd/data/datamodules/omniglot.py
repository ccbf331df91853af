"""Omniglot: handwritten characters of fifty alphabets."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torchvision.datasets import Omniglot

from lightning_rkd.data.datamodules.base import ImageDataModule, LabelledImages
from lightning_rkd.data.datamodules.folder import find_images
from lightning_rkd.data.datamodules.splits import ClassSplit, hold_out, split_classes
from lightning_rkd.data.datasets.archives import Archive, check_counts
from lightning_rkd.data.datasets.files import load_files
from lightning_rkd.data.transforms.augment import Augment

_PAGE = "https://github.com/brendenlake/omniglot"
_ARCHIVES = [
    Archive(f"{part}.zip", part, _PAGE, Omniglot.zips_md5[part], f"{Omniglot.download_url_prefix}/{part}.zip")
    for part in ("images_background", "images_evaluation")
]

VALIDATION = frozenset({"Armenian", "Bengali", "Early_Aramaic", "Hebrew", "Mkhedruli_(Georgian)"})
"""Validation alphabets of Vinyals' split, 172 characters."""
TEST = frozenset({
    "Kannada", "Keble", "Malayalam", "Manipuri", "Mongolian", "Old_Church_Slavonic_(Cyrillic)", "Oriya", "Sylheti",
    "Syriac_(Serto)", "Tengwar", "Tibetan", "ULOG",
})  # fmt: skip
"""Test alphabets of it; with characters 42 to 45 of Gurmukhi they are 423 characters. The other 1,028 train."""


class OmniglotDataModule(ImageDataModule):
    """Omniglot: 1,623 characters of 50 alphabets, each drawn by 20 people; white on black, 28 x 28, in memory.

    As in few-shot learning, every character rotated by 90, 180 and 270 degrees is a class of its own, in the same
    part as the upright one. ``root`` is any folder of alphabets, each a folder of characters, such as that of the
    published ``images_background`` and ``images_evaluation`` (or of their archives).

    Departures from Snell et al.: images are resized with smoothing, where theirs pick single pixels.

    Args:
        root: The folder.
        split: ``"vinyals"``: 1,028 characters train, 172 validate and 423 test; ``"background"``: alphabets of
            ``images_background`` train and validate, those of ``images_evaluation`` test; ``"alphabets"``: whole
            alphabets are divided at random, for any part of Omniglot.
        rotations: Whether rotated characters are classes too.
        image_size: Height and width of the images.
        check: Whether numbers of characters and images, and checksums, must be the published ones; not with
            ``split="alphabets"``.
        download: Whether to download the archives.
        skip_damaged: Whether to leave out damaged images; an error otherwise.
        kwargs: Arguments of :class:`~lightning_rkd.data.ImageDataModule`, save for ``split_by``: classes are divided.
            ``validation`` and ``test`` are parts of the alphabets.

    Reference:
        Lake, Salakhutdinov and Tenenbaum 2015, Human-level concept learning through probabilistic program induction,
        Science 350; Vinyals et al. 2016, arXiv:1606.04080, and Snell, Swersky and Zemel 2017, Prototypical Networks for
        Few-shot Learning, arXiv:1703.05175, for split and rotations.
    """

    def __init__(
        self,
        root: str | Path,
        *,
        split: Literal["vinyals", "background", "alphabets"] = "vinyals",
        rotations: bool = True,
        image_size: int = 28,
        check: bool = True,
        download: bool = False,
        skip_damaged: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(split_by="classes", **kwargs)
        if split not in ("vinyals", "background", "alphabets"):
            raise ValueError(f"split must be 'vinyals', 'background' or 'alphabets', got {split!r}")
        self.folder, self.division = Path(root).expanduser(), split
        self.rotations, self.image_size = rotations, image_size
        self.check, self.download, self.skip_damaged = check and split != "alphabets", download, skip_damaged

    def prepare_data(self) -> None:
        """Download and unpack, once per machine."""
        for archive in _ARCHIVES:
            wanted = self.download or (self.folder / archive.file).is_file()
            if wanted and not (self.folder / archive.folder).is_dir():
                archive.unpack(self.folder, (), self.download, self.check)

    def load(self) -> LabelledImages:
        """Read all characters upright, then rotated counter-clockwise by 90, 180 and 270 degrees."""
        self.prepare_data()
        for archive in _ARCHIVES if self.division == "background" or self.check else ():
            if not (part := self.folder / archive.folder).is_dir():
                raise FileNotFoundError(
                    f"there is neither {part} nor {archive.file} beside it: get {archive.file} from {_PAGE}, "
                    "or pass download=True; for a part of Omniglot pass split='alphabets'"
                )
        # alphabet and character, without the folders above
        files = {"/".join(path.split("/")[-2:]): paths for path, paths in find_images(self.folder).items()}
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
        rotated = torch.cat([images.rot90(turns, (2, 3)) for turns in range(4)])
        labels = torch.cat([labels + turns * len(names) for turns in range(4)])
        return LabelledImages(rotated, labels, [f"{name}/rot{90 * t:03d}" for t in range(4) for name in names])

    def split(self, data: LabelledImages) -> ClassSplit:
        """Divide by character or alphabet, all rotations alike."""
        alphabets = [name.split("/")[0] for name in data.class_names]
        if self.division == "vinyals":
            parts = [_vinyals(name) for name in data.class_names]
            return ClassSplit(*([c for c, part in enumerate(parts) if part == i] for i in range(3)))
        names = sorted(set(alphabets))
        if self.division == "alphabets":
            dealt = split_classes(range(len(names)), self.validation, self.test, self.split_seed)
        else:
            test = {path.name for path in (self.folder / "images_evaluation").iterdir()}
            first, second = ([i for i, name in enumerate(names) if (name in test) == part] for part in (False, True))
            dealt = hold_out(first, second, self.validation, self.split_seed)
        part_of = {names[i]: part for part, chosen in enumerate(dealt) for i in chosen}
        return ClassSplit(*([c for c, a in enumerate(alphabets) if part_of[a] == part] for part in range(3)))

    def suggest_augment(self, data: LabelledImages) -> Augment:
        """None: rotated characters are classes."""
        return Augment()

    def statistics(self, data: LabelledImages, train: list[int]) -> tuple[Sequence[float], Sequence[float]]:
        """No normalisation: ink is 1 and paper 0, as published."""
        return (0.0,), (1.0,)


def _vinyals(name: str) -> int:
    """0 for training, 1 for validation, 2 for test."""
    alphabet, character = name.split("/")[:2]
    if alphabet == "Gurmukhi":
        return 2 if int(character.removeprefix("character")) >= 42 else 0
    return 1 if alphabet in VALIDATION else 2 if alphabet in TEST else 0
