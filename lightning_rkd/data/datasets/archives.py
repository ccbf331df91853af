"""Official archives: found or downloaded, verified, unpacked whole or not at all, and their lists read."""

import os
import shutil
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torchvision.datasets.utils import calculate_md5, download_url


@dataclass(frozen=True)
class Archive:
    """An archive (.zip, .tgz or .tar.gz) as its publisher offers it: its name, the folder inside, and the web page."""

    file: str
    folder: str
    page: str
    md5: str | None = None
    url: str | None = None

    def unpack(self, root: Path, needs: Sequence[str] = (), download: bool = False, check: bool = True) -> Path:
        """Find the content in ``root``, or unpack the archive there, downloading it first if asked to.

        ``root`` holds the archive, its folder, or the content itself, which is incomplete without the files and folders
        in ``needs``. Returns the folder with the content.
        """
        for folder in (root / self.folder, root):
            missing = [name for name in needs if not (folder / name).exists()]
            if folder.is_dir() and not missing and (needs or folder != root):
                return folder
            if 0 < len(missing) < len(needs) or (missing and folder != root and folder.is_dir()):
                raise FileNotFoundError(
                    f"{folder / missing[0]} is missing: {self.file} seems to be half extracted. Delete {folder} and "
                    f"extract it again; it comes from {self.page}"
                )
        path = root / self.file
        if download and not path.is_file():
            self._download(root)
        if not path.is_file():
            raise FileNotFoundError(
                f"there is neither {root / self.folder} nor {path}: get {self.file} from {self.page} and put it, or "
                f"its content, into {root}{', or pass download=True' if self.url else ''}"
            )
        if check:
            check_md5(path, self.md5)
        _unpack(path, root)
        if missing := [name for name in (".", *needs) if not (root / self.folder / name).exists()]:
            raise FileNotFoundError(
                f"{path} does not hold {self.folder}/{missing[0]}, so it is not the official archive, which comes from "
                f"{self.page}"
            )
        return root / self.folder

    def _download(self, root: Path) -> None:
        if self.url is None:
            raise OSError(f"{self.file} has no direct address: get it from {self.page} and put it into {root}")
        part = f"{self.file}.part"
        try:
            download_url(self.url, root, part, self.md5)
        except (OSError, RuntimeError) as error:
            raise OSError(
                f"{self.url} cannot be downloaded ({error}): get {self.file} from {self.page} and put it into {root}"
            ) from error
        os.replace(root / part, root / self.file)


def _unpack(path: Path, root: Path) -> None:
    """Unpack into a temporary folder, then move: half an archive never looks like a whole one, no path leaves it."""
    beside = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=root))
    try:
        if path.suffix == ".zip":
            with zipfile.ZipFile(path) as content:
                content.extractall(beside)
        else:
            with tarfile.open(path) as content:
                content.extractall(beside, filter="data")  # torchvision's extract_archive does not filter paths
        for entry in sorted(beside.iterdir()):
            if not (root / entry.name).exists():
                os.replace(entry, root / entry.name)
    except (tarfile.TarError, zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise ValueError(f"{path} cannot be unpacked ({error}): delete it and get it again") from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def check_md5(path: Path, md5: str | None) -> None:
    """Compare a file with its published checksum, if there is one."""
    if md5 is not None and (found := calculate_md5(path)) != md5:
        raise ValueError(
            f"{path} has the MD5 checksum {found} instead of {md5}: it is damaged or another version. Delete it and "
            "get it again, or pass check=False to use it all the same"
        )


def check_counts(name: str, folder: Path, found: Mapping[str, int], expected: Mapping[str, int]) -> None:
    """Compare numbers of images and classes with the published ones."""
    if wrong := [f"{found[key]:,} {key} instead of {n:,}" for key, n in expected.items() if found[key] != n]:
        raise ValueError(
            f"{folder} holds {' and '.join(wrong)}, so it is not the whole of {name}: extract the archive again, or "
            "pass check=False to use what is there"
        )


def read_table(path: Path, columns: int, skip: int = 0, separator: str | None = None) -> list[list[str]]:
    """Read the fields of every line that is not empty, after a heading; the last field takes the rest of the line."""
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if number <= skip or not line.strip():
            continue
        fields = line.strip().split(separator, columns - 1)
        if len(fields) < columns:
            raise ValueError(
                f"line {number} of {path} has {len(fields)} fields instead of {columns} ({line!r}), so the file is "
                "damaged: extract the archive again"
            )
        rows.append(fields)
    return rows
