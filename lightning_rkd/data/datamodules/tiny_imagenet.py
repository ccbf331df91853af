"""Tiny-ImageNet-200."""

from typing import ClassVar

from lightning_rkd.data.datamodules.archived import Listing, OfficialDataModule
from lightning_rkd.data.datasets.archives import Archive, read_table

ARCHIVE = Archive(
    "tiny-imagenet-200.zip",
    "tiny-imagenet-200",
    "http://cs231n.stanford.edu/tiny-imagenet-200.zip",
    "90528d7ca1a48142e341f4ef8d21d0de",  # from public loaders; not checked against the file
    "http://cs231n.stanford.edu/tiny-imagenet-200.zip",  # not checked
)


class TinyImageNetDataModule(OfficialDataModule):
    """Tiny-ImageNet-200: 64 x 64, 200 classes with 500 training images and 50 validation images each.

    The published validation images (``val``) test, as the labels of the test images are not public; validation images
    are taken from the training images. With ``split_by="classes"`` training images of the first 100 classes (in the
    order of ``wnids.txt``, sorted) train and validate, and ``val`` images of the last 100 test.

    Training pads by 4, crops 64 x 64 at random and mirrors half of the images. Images are kept in memory (1.4 GB). All
    arguments are those of :class:`~lightning_rkd.data.OfficialDataModule`.

    Reference:
        Le and Yang 2015, Tiny ImageNet Visual Recognition Challenge.
    """

    title: ClassVar[str] = "Tiny-ImageNet-200"
    counts: ClassVar[dict[str, int]] = {"images": 110_000, "test images": 10_000, "classes": 200}
    sizes: ClassVar[tuple[int, int]] = (64, 64)
    padding: ClassVar[int] = 4
    small: ClassVar[bool] = True

    def read_lists(self) -> Listing:
        """Read ``wnids.txt``, the folders under ``train``, and ``val/val_annotations.txt``."""
        needs = ["wnids.txt", "train", "val/val_annotations.txt", "val/images"]
        folder = ARCHIVE.unpack(self.folder, needs, self.download, self.check)
        names = sorted(name for (name,) in read_table(folder / "wnids.txt", 1))
        train = [(path, name) for name in names for path in sorted((folder / "train" / name).glob("images/*"))]
        marked = read_table(folder / "val" / "val_annotations.txt", 3)
        rows = train + [(folder / "val" / "images" / file, name) for file, name, _ in marked]
        half, official = len(names) // 2, [row >= len(train) for row in range(len(rows))]
        return Listing.from_names(rows, train=names[:half], test=names[half:], official=official)
