"""Stanford Cars, also known as Cars196."""

from pathlib import Path
from typing import Any, ClassVar

from lightning_rkd.data.datamodules.archived import Listing, OfficialDataModule
from lightning_rkd.data.datamodules.splits import halve
from lightning_rkd.data.datasets.archives import Archive, check_md5
from lightning_rkd.utils.imports import require

PAGE = "http://ai.stanford.edu/~jkrause/cars/car_dataset.html (gone at the time of writing, so look for a copy)"
IMAGES = Archive("car_ims.tgz", "car_ims", PAGE, "d5c8f0aa497503f355e17dc7886c3f14")
ANNOTATIONS_MD5 = "b407c6086d669747186bd1d764ff9dbc"
# both checksums from the RKD authors' loader; not checked against the files


class CarsDataModule(OfficialDataModule):
    """Cars196: 16,185 pictures of 196 makes of cars.

    With ``split_by="classes"`` the first 98 makes train and validate, and the last 98 test. With ``split_by="samples"``
    the official test images test. ``root`` holds one of the two official layouts: ``cars_annos.mat`` with ``car_ims``
    (or ``car_ims.tgz``), or ``cars_train``, ``cars_test`` and ``devkit`` with ``cars_test_annos_withlabels.mat`` in
    either place. Its lists are MATLAB files, which need SciPy.

    Images are 256 x 256, cropped to 224 x 224; they stay on disk unless ``in_memory`` (3.2 GB). All arguments
    are those of :class:`~lightning_rkd.data.OfficialDataModule`; ``download`` has no effect, as the publisher's
    addresses are gone.

    Reference:
        Krause, Stark, Deng and Fei-Fei 2013, 3D Object Representations for Fine-Grained Categorization; Song, Xiang,
        Jegelka and Savarese 2016, arXiv:1511.06452, for the split by classes.
    """

    title: ClassVar[str] = "Cars196"
    counts: ClassVar[dict[str, int]] = {"images": 16_185, "classes": 196}

    def read_lists(self) -> Listing:
        """Read ``cars_annos.mat``, or the lists of ``devkit``."""
        rows, names = self._read_two_parts() if (self.folder / "devkit").is_dir() else self._read_one_part()
        return Listing(
            [path for path, _, _ in rows],
            [c - 1 for _, c, _ in rows],
            names,
            *halve(names),
            official=[tests for *_, tests in rows] if self.split_by == "samples" else None,
        )

    def _read_one_part(self) -> tuple[list[tuple[Path, int, bool]], list[str]]:
        table = _present(self.folder / "cars_annos.mat")
        if self.check:
            check_md5(table, ANNOTATIONS_MD5)
        if not (self.folder / "car_ims").is_dir():
            IMAGES.unpack(self.folder, check=self.check)
        content = _matlab(table)
        rows = [
            (self.folder / str(row["relative_im_path"]), int(row["class"]), bool(row["test"]))
            for row in content["annotations"]
        ]
        return rows, [str(name) for name in content["class_names"]]

    def _read_two_parts(self) -> tuple[list[tuple[Path, int, bool]], list[str]]:
        devkit = self.folder / "devkit"
        labelled = "cars_test_annos_withlabels.mat"
        tables = {
            "cars_train": _present(devkit / "cars_train_annos.mat"),
            "cars_test": _present(devkit / labelled if (devkit / labelled).is_file() else self.folder / labelled),
        }
        rows = [
            (_present(self.folder / part) / str(row["fname"]), int(row["class"]), part == "cars_test")
            for part, table in tables.items()
            for row in _matlab(table)["annotations"]
        ]
        return rows, [str(name) for name in _matlab(_present(devkit / "cars_meta.mat"))["class_names"]]


def _present(path: Path) -> Path:
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing; the data set comes from {PAGE}")
    return path


def _matlab(path: Path) -> dict[str, Any]:
    loadmat = require("scipy.io", extra="plots").loadmat
    try:
        return dict(loadmat(path, squeeze_me=True))
    except (ValueError, OSError, TypeError, NotImplementedError) as error:
        raise ValueError(f"{path} cannot be read as a MATLAB file ({error}): get it again") from error
