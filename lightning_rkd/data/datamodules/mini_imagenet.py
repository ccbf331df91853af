"""miniImageNet, as Ravi and Larochelle divide it."""

from typing import ClassVar

from lightning_rkd.data.datamodules.archived import Listing, OfficialDataModule
from lightning_rkd.data.datasets.archives import read_table

PAGE = "https://github.com/twitter-research/meta-learning-lstm (the lists, in data/miniImagenet)"


class MiniImageNetDataModule(OfficialDataModule):
    """miniImageNet: 100 classes of ImageNet with 600 images each; 64 train, 16 validate and 20 test.

    ``root`` holds ``train.csv``, ``val.csv`` and ``test.csv`` (``filename,label``) and the folder ``images``. Images
    are resized to 84 x 84, not cropped, and kept in memory (1.3 GB); training mirrors half of them. The split is
    published, so ``split_by`` and ``validation`` have no effect. All arguments are those of
    :class:`~lightning_rkd.data.OfficialDataModule`; ``download`` has no effect, as ImageNet's licence forbids
    passing the images on.

    Reference:
        Vinyals, Blundell, Lillicrap, Kavukcuoglu and Wierstra 2016, Matching Networks for One Shot Learning,
        arXiv:1606.04080; Ravi and Larochelle 2017, Optimization as a Model for Few-Shot Learning, ICLR, for the split.
    """

    title: ClassVar[str] = "miniImageNet"
    counts: ClassVar[dict[str, int]] = {
        "images": 60_000, "training classes": 64, "validation classes": 16, "test classes": 20,
    }  # fmt: skip
    sizes: ClassVar[tuple[int, int]] = (84, 84)
    small: ClassVar[bool] = True

    def read_lists(self) -> Listing:
        """Read the three lists."""
        tables = {part: self.folder / f"{part}.csv" for part in ("train", "val", "test")}
        for path in (*tables.values(), self.folder / "images"):
            if not path.exists():
                raise FileNotFoundError(
                    f"{path} is missing: miniImageNet is train.csv, val.csv and test.csv from {PAGE}, and the folder "
                    "images with the pictures from ImageNet that they name"
                )
        parts = {part: read_table(path, 2, skip=1, separator=",") for part, path in tables.items()}
        classes = {part: {label for _, label in rows} for part, rows in parts.items()}
        rows = [(self.folder / "images" / file, label) for part in parts.values() for file, label in part]
        return Listing.from_names(rows, train=classes["train"], test=classes["test"], validation=classes["val"])
