"""Atomic writing of files, and verification of files before they are read."""

import hashlib
import os
import zipfile
from contextlib import suppress
from pathlib import Path

_LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # torch's magic number, pickled


def write_whole(path: str | os.PathLike[str], content: bytes | memoryview) -> None:
    """Write a file atomically: after a crash the file holds either the old or the new content.

    The bytes are written to ``.<name>.part`` in the same folder, flushed to the disk, and renamed.
    """
    path = Path(path)
    part = path.with_name(f".{path.name}.part")
    try:
        with part.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except BaseException as error:
        part.unlink(missing_ok=True)
        if isinstance(error, OSError):
            reason = error.strerror or error
            raise OSError(f"{str(path)!r} could not be written, and is what it was before: {reason}") from error
        raise
    _flush_folder(path.parent)


def _flush_folder(folder: Path) -> None:
    """Flush the new name to the disk, except on Windows and some network file systems, which cannot flush folders."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def check_file(path: str | os.PathLike[str]) -> None:
    """Verify the checksums inside a file written by ``torch.save``, which ``torch.load`` ignores.

    The format before torch 1.6, which has no checksums, is refused; other formats pass, since ``torch.load`` refuses
    them itself.
    """
    with Path(path).open("rb") as file:
        start = file.read(len(_LEGACY))
    if start == _LEGACY:
        raise ValueError(
            f"{str(path)!r} is of the format before torch 1.6, in which damage cannot be detected: save it again, "
            f"torch.save(torch.load({str(path)!r}, weights_only=True), {str(path)!r})"
        )
    if start[:2] != b"PK" and not zipfile.is_zipfile(path):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            # torch.load takes an entry with this attribute for a folder and leaves its tensor uninitialised
            folders = [entry.filename for entry in archive.infolist() if entry.external_attr & 0x10]
            damaged = folders[0] if folders else archive.testzip()
    except Exception as error:  # zipfile raises errors of many types
        raise ValueError(
            f"the checkpoint {str(path)!r} is damaged or cut short ({error}); use an earlier one"
        ) from error
    if damaged is not None:
        raise ValueError(f"the checkpoint {str(path)!r} is damaged in {damaged!r}; use an earlier one")


def check_sum(path: str | os.PathLike[str]) -> bool:
    """Verify a file against the SHA-256 that ``sha256sum`` wrote to ``<name>.sha256``; ``False`` if there is none."""
    path = Path(path)
    beside = path.with_name(f"{path.name}.sha256")
    if not beside.is_file():
        return False
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    given = beside.read_text(encoding="utf-8", errors="replace").split()[:1]
    if given != [found]:
        raise ValueError(
            f"{str(path)!r} does not have the SHA-256 that {str(beside)!r} gives, so it is damaged, or another file: "
            "download it again, or correct the SHA-256 if the file is right"
        )
    return True
