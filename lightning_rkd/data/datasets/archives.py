"""Official archives: found, fetched where the publisher offers it, checked, and unpacked whole or not at all."""

from __future__ import annotations

import hashlib
import os
import shutil
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Archive:
    """What a publisher offers.

    Attributes:
        file: Name of the archive, a .zip, .tgz or .tar.gz.
        folder: The folder that it holds.
        page: Where people get it.
        md5: Its checksum, where one is known.
        url: Its direct address, where there is one.
    """

    file: str
    folder: str
    page: str
    md5: str | None = None
    url: str | None = None


def unpacked(archive: Archive, root: Path, needs: Sequence[str], download: bool = False, check: bool = True) -> Path:
    """The folder with an archive's content.

    It may be ``root`` itself or be in ``root``; otherwise the archive is looked for in ``root``, or downloaded into it,
    and unpacked there.

    Args:
        archive: What is wanted.
        root: The folder that the user named.
        needs: Files and folders in it without which the content is not whole.
        download: Whether to fetch an archive that is not there.
        check: Whether to compare the checksum.

    Raises:
        FileNotFoundError: No archive, or one that was unpacked in part; it names what is missing and where to get it.
        ValueError: A wrong checksum, or a damaged archive.
        OSError: The archive cannot be downloaded.
    """
    for folder in (root / archive.folder, root):
        missing = [name for name in needs if not (folder / name).exists()]
        if folder.is_dir() and not missing and (needs or folder != root):
            return folder
        if 0 < len(missing) < len(needs) or (missing and folder != root and folder.is_dir()):
            raise FileNotFoundError(
                f"{folder / missing[0]} is missing: {archive.file} seems to be half extracted. Delete {folder} and "
                f"extract it again; it comes from {archive.page}"
            )
    path = root / archive.file
    if not path.is_file():
        if not download:
            raise FileNotFoundError(
                f"there is neither {root / archive.folder} nor {path}: get {archive.file} from "
                f"{archive.page} and put it, or what it holds, into {root}"
                + (", or pass download=True" if archive.url else "")
            )
        _fetch(archive, root)
    if check:
        check_md5(path, archive.md5)
    _unpack(path, root)
    if missing := [name for name in (".", *needs) if not (root / archive.folder / name).exists()]:
        raise FileNotFoundError(
            f"{path} does not hold {archive.folder}/{missing[0]}, so it is not the official archive, which comes from "
            f"{archive.page}"
        )
    return root / archive.folder


def check_md5(path: Path, md5: str | None) -> None:
    """Compare a file with its published checksum, if there is one.

    Raises:
        ValueError: They differ.
    """
    if md5 is None:
        return
    with path.open("rb") as file:
        found = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
    if found != md5:
        raise ValueError(
            f"{path} has the MD5 checksum {found} instead of {md5}: it is damaged or another version. Delete it and "
            "get it again, or pass check=False if you know better"
        )


def check_counts(name: str, folder: Path, found: Mapping[str, int], expected: Mapping[str, int]) -> None:
    """Compare numbers of images and classes with the published ones.

    Raises:
        ValueError: They differ.
    """
    if wrong := [f"{found[key]:,} {key} instead of {n:,}" for key, n in expected.items() if found[key] != n]:
        raise ValueError(
            f"{folder} holds {' and '.join(wrong)}, so it is not the whole of {name}: extract the archive again, or "
            "pass check=False to use what is there"
        )


def _fetch(archive: Archive, root: Path) -> None:
    from torchvision.datasets.utils import download_url

    if archive.url is None:
        raise OSError(f"{archive.file} has no direct address: get it from {archive.page} and put it into {root}")
    part = f"{archive.file}.part"
    try:
        download_url(archive.url, root, part, archive.md5)
    except (OSError, RuntimeError) as error:
        raise OSError(
            f"{archive.url} cannot be downloaded ({error}): get {archive.file} from {archive.page} and put it into "
            f"{root}"
        ) from error
    os.replace(root / part, root / archive.file)


def _unpack(path: Path, root: Path) -> None:
    """Unpack beside, then move into place: half an archive never looks like a whole one."""
    beside = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=root))
    try:
        if path.suffix == ".zip":
            with zipfile.ZipFile(path) as content:
                content.extractall(beside)  # leaves no path outside
        else:
            with tarfile.open(path) as content:
                content.extractall(beside, filter="data")
        for entry in sorted(beside.iterdir()):
            if not (root / entry.name).exists():
                os.replace(entry, root / entry.name)
    except (tarfile.TarError, zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise ValueError(f"{path} cannot be unpacked ({error}): delete it and get it again") from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)
