"""Birds: CUB-200-2011."""

from __future__ import annotations

from typing import ClassVar

from lightning_rkd.data.datamodules.archived import Listing, OfficialDataModule
from lightning_rkd.data.datasets.archives import Archive, check_counts, unpacked
from lightning_rkd.data.datasets.tables import rows_of

ARCHIVE = Archive(
    "CUB_200_2011.tgz",
    "CUB_200_2011",
    "https://www.vision.caltech.edu/datasets/cub_200_2011/",
    "97eceeb196236b17998738112f37df78",  # as the RKD authors' loader has it; not checked against the file
    "https://data.caltech.edu/records/65de6-vp158/files/CUB_200_2011.tgz",  # not checked
)


class CUBDataModule(OfficialDataModule):
    """CUB-200-2011: 11,788 pictures of 200 species of birds.

    With ``split_by="classes"`` the first 100 species train and validate, and the last 100 test. With
    ``split_by="samples"`` the official test images (``train_test_split.txt``) test. Images are 256 x 256, of which
    networks see 224 x 224; they stay on disk unless ``in_memory`` (2.3 GB). All arguments are those of
    :class:`~lightning_rkd.data.OfficialDataModule`.

    Raises:
        FileNotFoundError: A missing archive, or one that was unpacked in part.
        ValueError: A wrong checksum or a wrong number of images; a damaged image.

    Reference:
        Wah, Branson, Welinder, Perona and Belongie 2011, The Caltech-UCSD Birds-200-2011 Dataset; Song, Xiang, Jegelka
        and Savarese 2016, arXiv:1511.06452, for the split by classes.
    """

    title: ClassVar[str] = "CUB-200-2011"

    def listing(self) -> Listing:
        """By ``images.txt``, ``image_class_labels.txt`` and ``classes.txt``."""
        needs = ["images.txt", "image_class_labels.txt", "classes.txt", "train_test_split.txt", "images"]
        folder = unpacked(ARCHIVE, self.folder, needs, self.download, self.check)
        files = dict(rows_of(folder / "images.txt", 2))
        classes = dict(rows_of(folder / "image_class_labels.txt", 2))
        trains = dict(rows_of(folder / "train_test_split.txt", 2))
        names = [name for _, name in rows_of(folder / "classes.txt", 2)]
        if self.check:
            check_counts(
                self.title, folder, {"images": len(files), "classes": len(names)}, {"images": 11_788, "classes": 200}
            )
        half = len(names) // 2
        return Listing(
            [folder / "images" / path for path in files.values()],
            [int(classes[i]) - 1 for i in files],
            names,
            range(half),
            range(half, len(names)),
            official=[trains[i] == "0" for i in files] if self.split_by == "samples" else None,
        )
