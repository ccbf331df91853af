"""Data to distil on, images, texts or vectors, read from files or objects."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lightning_rkd.cli.distill.tables import TABLES, read_table
from lightning_rkd.data.datamodules.folder import find_images
from lightning_rkd.data.datasets.decoding import open_upright
from lightning_rkd.utils.arrays import load_rows

Kind = Literal["image", "text", "vector"]
ARRAYS = (".npy", ".safetensors")
_FORMS = "a folder of images, a table of texts (.csv, .tsv, .jsonl, .parquet) or an array (.npy, .safetensors)"


@dataclass(frozen=True)
class Samples:
    """Data to distil on.

    Attributes:
        kind: ``"image"``, ``"text"`` or ``"vector"``.
        items: Paths or PIL images, strings, or rows (N, D).
        labels: Class of every sample, (N,) int64; ``None`` without labels.
        class_names: Name of every class.
        root: Folder of the images, from which messages name them.
    """

    kind: Kind
    items: Any
    labels: Tensor | None = None
    class_names: Sequence[str] = ()
    root: Path | None = None

    def __len__(self) -> int:
        return len(self.items)

    def fetch(self, rows: Sequence[int]) -> Any:
        """Samples as teachers and students take them: RGB images, strings, or rows (M, D)."""
        if self.kind == "vector":
            return self.items[torch.tensor([int(i) for i in rows], dtype=torch.int64)]
        found = [self.items[int(i)] for i in rows]
        return found if self.kind == "text" else [_to_image(item) for item in found]

    def name(self, row: int) -> str:
        """Name of a sample for messages."""
        item = self.items[row]
        if isinstance(item, Path):
            return f"row {row}, {item if self.root is None else item.relative_to(self.root)}"
        return f"row {row}, {item[:60]!r}" if isinstance(item, str) else f"row {row}"

    @property
    def fingerprint(self) -> str:
        """Checksum of the samples and their labels; of image files it takes names and sizes."""
        digest = hashlib.sha256(f"{self.kind} {len(self)}".encode())
        if isinstance(self.items, Tensor):
            digest.update(self.items.contiguous().numpy().data)
        for item in () if isinstance(self.items, Tensor) else self.items:
            if isinstance(item, Path):
                name = item if self.root is None else item.relative_to(self.root)
                digest.update(f"{name} {item.stat().st_size}\n".encode())
            else:
                digest.update(item.encode() + b"\n" if isinstance(item, str) else item.tobytes())
        if self.labels is not None:
            digest.update(self.labels.numpy().data)
        return digest.hexdigest()[:32]

    def describe(self) -> str:
        """Number and kind of the samples in words."""
        what = {"image": "images", "text": "texts", "vector": "vectors"}[self.kind]
        return f"{len(self):,} {what}" + ("" if self.labels is None else f" of {len(self.class_names)} classes")


def read_samples(
    data: Any,
    labels: Any = None,
    unlabelled: bool = False,
    text_column: str = "text",
    label_column: str | None = None,
    skip_damaged: bool = False,
) -> Samples:
    """Read the data of ``lightning-rkd distill``.

    Args:
        data: A folder of images, whose folders are their classes; a table with a column of texts; an array (N, D); or
            objects: a list of strings, PIL images or paths, an array, images (N, C, H, W) of bytes, or samples.
        labels: Label of every sample, in their order, or a file with them: one in each line, or ``.npy``.
        unlabelled: Leave labels out.
        text_column: Column of the texts.
        label_column: Column of the labels; ``None`` reads none.
        skip_damaged: Leave out images of a folder that cannot be read.

    Raises:
        FileNotFoundError: There is no such file, or no image in the folder.
        ValueError: Another kind of file, a column that is missing, or labels of another number.
    """
    path = Path(data).expanduser() if isinstance(data, str | Path) else None
    if path is None:
        found = _from_objects(data)
    elif path.is_dir():
        found = _read_folder(path, skip_damaged)
    elif not path.exists():
        raise FileNotFoundError(f"there is no data {str(path)!r} (seen from {Path.cwd()}): expected {_FORMS}")
    elif path.suffix in TABLES:
        texts, topics = read_table(path, text_column, None if unlabelled else label_column)
        found = Samples("text", texts)
        found = found if topics is None else label_samples(found, topics)
    elif path.suffix in ARRAYS:
        found = Samples("vector", read_array(path))
    else:
        raise ValueError(f"the data {str(path)!r} has the suffix {path.suffix!r}: expected {_FORMS}")
    if unlabelled:
        return replace(found, labels=None, class_names=())
    if isinstance(labels, str | Path):
        labels = np.load(labels) if Path(labels).suffix == ".npy" else Path(labels).read_text().splitlines()
    return found if labels is None else label_samples(found, labels)


def _from_objects(data: Any) -> Samples:
    items: Any = torch.from_numpy(data) if isinstance(data, np.ndarray) else data
    if isinstance(items, Samples):
        return items
    if isinstance(items, Tensor) and items.ndim == 4 and items.dtype == torch.uint8:
        pixels = items.permute(0, 2, 3, 1).numpy()
        return Samples("image", [Image.fromarray(x.squeeze(-1) if x.shape[-1] == 1 else x) for x in pixels])
    if isinstance(items, Tensor):
        return Samples("vector", _check_rows(items, "data"))
    items = list(items) if isinstance(items, Iterable) and not isinstance(items, Mapping) else []
    kinds = {"text" if isinstance(x, str) else "image" if isinstance(x, Path | Image.Image) else "" for x in items}
    if kinds not in ({"text"}, {"image"}):
        inside = " and ".join(sorted({type(x).__name__ for x in items}))
        raise TypeError(
            "data: expected a path, an array (N, D), Samples, or a list of strings, paths or PIL images, got "
            + (f"{type(data).__name__} of {inside}" if inside else f"{data!r:.60}")
        )
    return Samples("text" if kinds == {"text"} else "image", items)


def label_samples(samples: Samples, labels: Any) -> Samples:
    """The samples with a label each, of any type, whose classes are sorted."""
    given = labels.tolist() if isinstance(labels, Tensor | np.ndarray) else list(labels)
    if len(given) != len(samples):
        raise ValueError(
            f"labels: {len(given):,} labels for {len(samples):,} samples; give one for each, in their order"
        )
    try:
        classes = sorted(set(given))
    except TypeError as error:
        raise TypeError(
            f"labels: expected texts or numbers, and one kind of them ({error}): rewrite the others"
        ) from None
    numbers = {name: number for number, name in enumerate(classes)}
    return replace(samples, labels=torch.tensor([numbers[x] for x in given]), class_names=[str(x) for x in classes])


def read_array(path: str | Path) -> Tensor:
    """Rows (N, D) of a ``.npy`` file, or of a ``.safetensors`` file with one tensor."""
    rows, beside = load_rows(path, f"{str(path)!r}: distill")
    if "ids" in beside and not torch.equal(beside["ids"].long(), torch.arange(len(rows))):
        raise ValueError(f"{str(path)!r} has ids other than 0 to {len(rows) - 1}: order the rows as the samples are")
    return _check_rows(rows.float(), str(path))


def _check_rows(x: Tensor, name: str) -> Tensor:
    if x.ndim != 2 or not x.is_floating_point():
        raise ValueError(f"{name}: expected floating-point rows (N, D), got {x.dtype} of shape {tuple(x.shape)}")
    if len(bad := (~x.isfinite()).any(1).nonzero()):
        raise ValueError(f"{name}: row {int(bad[0])} holds NaN or infinity, and so do {len(bad) - 1} others; mend them")
    return x.float()


def _read_folder(root: Path, skip_damaged: bool) -> Samples:
    classes = find_images(root, skip_damaged)
    shared = next(iter(classes)) == "." and len(classes) == 1
    paths = [path for group in classes.values() for path in group]
    if shared:  # all in one folder
        return Samples("image", paths, root=root)
    labels = torch.repeat_interleave(torch.arange(len(classes)), torch.tensor([len(g) for g in classes.values()]))
    return Samples("image", paths, labels, list(classes), root)


def _to_image(item: Any) -> Image.Image:
    image: Image.Image = open_upright(item) if isinstance(item, Path) else item
    return image.convert("RGB")
