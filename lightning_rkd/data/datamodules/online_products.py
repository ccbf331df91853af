"""Stanford Online Products."""

from typing import ClassVar

from lightning_rkd.data.datamodules.archived import Listing, OfficialDataModule
from lightning_rkd.data.datasets.archives import Archive, read_table

ARCHIVE = Archive(
    "Stanford_Online_Products.zip",
    "Stanford_Online_Products",
    "https://cvgl.stanford.edu/projects/lifted_struct/",
    "7f73d41a2f44250d4779881525aea32e",  # from the RKD authors' loader; not checked against the file
    "ftp://cs.stanford.edu/cs/cvgl/Stanford_Online_Products.zip",  # not checked
)


class OnlineProductsDataModule(OfficialDataModule):
    """Stanford Online Products: 120,053 pictures of 22,634 products, two to twelve of each.

    The 11,318 products of ``Ebay_train.txt`` train and validate, the 11,316 of ``Ebay_test.txt`` test. Products with
    fewer than ``samples_per_class`` pictures repeat some of them in a batch. Images are 256 x 256, cropped to
    224 x 224; they stay on disk unless ``in_memory`` (23.6 GB). All arguments are those of
    :class:`~lightning_rkd.data.OfficialDataModule`.

    Reference:
        Song, Xiang, Jegelka and Savarese 2016, Deep Metric Learning via Lifted Structured Feature Embedding,
        arXiv:1511.06452.
    """

    title: ClassVar[str] = "Stanford Online Products"
    counts: ClassVar[dict[str, int]] = {"images": 120_053, "training classes": 11_318, "test classes": 11_316}

    def read_lists(self) -> Listing:
        """Read ``Ebay_train.txt`` and ``Ebay_test.txt``."""
        folder = ARCHIVE.unpack(self.folder, ["Ebay_train.txt", "Ebay_test.txt"], self.download, self.check)
        parts = [read_table(folder / f"Ebay_{part}.txt", 4, skip=1) for part in ("train", "test")]
        train, test = ({int(product) for _, product, _, _ in part} for part in parts)
        rows = [(folder / path, int(product)) for part in parts for _, product, _, path in part]
        return Listing.from_names(rows, train=train, test=test)
