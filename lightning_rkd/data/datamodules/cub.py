"""Birds: CUB-200-2011."""

from typing import ClassVar

from lightning_rkd.data.datamodules.archived import Listing, OfficialDataModule
from lightning_rkd.data.datamodules.splits import halve
from lightning_rkd.data.datasets.archives import Archive, read_table

ARCHIVE = Archive(
    "CUB_200_2011.tgz",
    "CUB_200_2011",
    "https://www.vision.caltech.edu/datasets/cub_200_2011/",
    "97eceeb196236b17998738112f37df78",  # from the RKD authors' loader; not checked against the file
    "https://data.caltech.edu/records/65de6-vp158/files/CUB_200_2011.tgz",  # not checked
)


class CUBDataModule(OfficialDataModule):
    """CUB-200-2011: 11,788 pictures of 200 species of birds.

    With ``split_by="classes"`` the first 100 species train and validate, and the last 100 test. With
    ``split_by="samples"`` the official test images (``train_test_split.txt``) test. Images are 256 x 256, cropped to
    224 x 224; they stay on disk unless ``in_memory`` (2.3 GB). All arguments are those of
    :class:`~lightning_rkd.data.OfficialDataModule`.

    Reference:
        Wah, Branson, Welinder, Perona and Belongie 2011, The Caltech-UCSD Birds-200-2011 Dataset; Song, Xiang, Jegelka
        and Savarese 2016, arXiv:1511.06452, for the split by classes.
    """

    title: ClassVar[str] = "CUB-200-2011"
    counts: ClassVar[dict[str, int]] = {"images": 11_788, "classes": 200}

    def read_lists(self) -> Listing:
        """Read ``images.txt``, ``image_class_labels.txt``, ``classes.txt`` and ``train_test_split.txt``."""
        needs = ["images.txt", "image_class_labels.txt", "classes.txt", "train_test_split.txt", "images"]
        folder = ARCHIVE.unpack(self.folder, needs, self.download, self.check)
        files, classes, trains = (dict(read_table(folder / name, 2)) for name in (needs[0], needs[1], needs[3]))
        names = [name for _, name in read_table(folder / "classes.txt", 2)]
        return Listing(
            [folder / "images" / path for path in files.values()],
            [int(classes[i]) - 1 for i in files],
            names,
            *halve(names),
            official=[trains[i] == "0" for i in files] if self.split_by == "samples" else None,
        )
