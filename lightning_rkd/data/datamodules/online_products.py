"""Stanford Online Products."""

from __future__ import annotations

from typing import ClassVar

from lightning_rkd.data.datamodules.archived import Listing, OfficialDataModule
from lightning_rkd.data.datasets.archives import Archive, check_counts, unpacked
from lightning_rkd.data.datasets.tables import rows_of

ARCHIVE = Archive(
    "Stanford_Online_Products.zip",
    "Stanford_Online_Products",
    "https://cvgl.stanford.edu/projects/lifted_struct/",
    "7f73d41a2f44250d4779881525aea32e",  # as the RKD authors' loader has it; not checked against the file
    "ftp://cs.stanford.edu/cs/cvgl/Stanford_Online_Products.zip",  # not checked
)


class OnlineProductsDataModule(OfficialDataModule):
    """Stanford Online Products: 120,053 pictures of 22,634 things for sale, two to twelve of each.

    The 11,318 things of ``Ebay_train.txt`` train and validate, the 11,316 of ``Ebay_test.txt`` test. Things with fewer
    than ``samples_per_class`` pictures show some of them more than once in a batch. Images are 256 x 256, of which
    networks see 224 x 224; they stay on disk unless ``in_memory`` (23.6 GB). All arguments are those of
    :class:`~lightning_rkd.data.OfficialDataModule`.

    Raises:
        FileNotFoundError: A missing archive, or one that was unpacked in part.
        ValueError: A wrong checksum or a wrong number of images; a thing in both lists; a damaged image.

    Reference:
        Song, Xiang, Jegelka and Savarese 2016, Deep Metric Learning via Lifted Structured Feature Embedding,
        arXiv:1511.06452.
    """

    title: ClassVar[str] = "Stanford Online Products"

    def listing(self) -> Listing:
        """By ``Ebay_train.txt`` and ``Ebay_test.txt``."""
        folder = unpacked(ARCHIVE, self.folder, ["Ebay_train.txt", "Ebay_test.txt"], self.download, self.check)
        parts = [rows_of(folder / f"Ebay_{part}.txt", 4, skip=1) for part in ("train", "test")]
        things = [sorted({int(thing) for _, thing, _, _ in part}) for part in parts]
        names = sorted({*things[0], *things[1]})
        if self.check:
            found = {"training images": len(parts[0]), "test images": len(parts[1]), "classes": len(names)}
            expected = {"training images": 59_551, "test images": 60_502, "classes": 22_634}
            check_counts(self.title, folder, found, expected)
        number = {thing: c for c, thing in enumerate(names)}
        rows = parts[0] + parts[1]
        return Listing(
            [folder / path for *_, path in rows],
            [number[int(thing)] for _, thing, _, _ in rows],
            [str(thing) for thing in names],
            [number[thing] for thing in things[0]],
            [number[thing] for thing in things[1]],
        )
