"""In-Shop Clothes Retrieval, a part of DeepFashion."""

from typing import ClassVar

from lightning_rkd.data.datamodules.archived import Listing, OfficialDataModule
from lightning_rkd.data.datasets.archives import read_table

PAGE = "https://mmlab.ie.cuhk.edu.hk/projects/DeepFashion/InShopRetrieval.html"
"""Page of the publisher; there is no direct address."""


class InShopDataModule(OfficialDataModule):
    """In-Shop Clothes Retrieval: 52,712 pictures of 7,982 pieces of clothing.

    3,997 pieces train and validate. Of the other 3,985, the 14,218 pictures marked ``query`` are compared with the
    12,612 marked ``gallery``: test batches are :class:`~lightning_rkd.utils.types.QuerySample`, whose third entry is
    the mark, which :class:`~lightning_rkd.metrics.EmbeddingRetrieval` takes as ``is_query``. Validation has no such
    marks: there every picture is a query among all others.

    ``root`` holds ``list_eval_partition.txt``, directly or in ``Eval``, and the folder ``img``, directly or in
    ``Img``. Images are 256 x 256, cropped to 224 x 224; they stay on disk unless ``in_memory`` (10.4 GB).
    All arguments are those of :class:`~lightning_rkd.data.OfficialDataModule`; ``download`` has no effect, as
    the publisher requires an agreement.

    Reference:
        Liu, Luo, Qiu, Wang and Tang 2016, DeepFashion: Powering Robust Clothes Recognition and Retrieval with Rich
        Annotations, CVPR.
    """

    title: ClassVar[str] = "In-Shop Clothes Retrieval"
    counts: ClassVar[dict[str, int]] = {
        "images": 52_712, "queries": 14_218, "training classes": 3_997, "test classes": 3_985,
    }  # fmt: skip

    def read_lists(self) -> Listing:
        """Read ``list_eval_partition.txt``."""
        places = [self.folder / "Eval" / "list_eval_partition.txt", self.folder / "list_eval_partition.txt"]
        table = next((path for path in places if path.is_file()), None)
        base = next((path for path in (self.folder / "Img", self.folder) if (path / "img").is_dir()), None)
        if table is None or base is None:
            raise FileNotFoundError(
                f"there is no {places[0] if table is None else self.folder / 'Img' / 'img'}: get "
                f"list_eval_partition.txt and img.zip from {PAGE} and put them, extracted, into {self.folder}"
            )
        rows = read_table(table, 3, skip=2)  # a number and a heading
        if unknown := {part for *_, part in rows} - {"train", "query", "gallery"}:
            raise ValueError(f"{table} marks images as {sorted(unknown)}; train, query and gallery are known")
        train, test = ({item for _, item, mark in rows if (mark == "train") == trains} for trains in (True, False))
        files = [(base / path, item) for path, item, _ in rows]
        is_query = [mark == "query" for *_, mark in rows]
        return Listing.from_names(files, is_query=is_query, train=train, test=test)
