"""Files that are whole or not there: written under another name and renamed, and verified before they are read."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path


def write_whole(path: str | os.PathLike[str], content: bytes | memoryview) -> None:
    """Write a file so that, whenever the process or the machine stops, the old content or the new one is there.

    The bytes go to ``.<name>.part`` in the same folder, reach the disk, and take the name at once.

    Raises:
        OSError: The disk is full, or something else kept it from being written; what was there before still is.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder, "notes.txt")
        ...     write_whole(path, b"old")
        ...     write_whole(path, b"new")
        ...     path.read_bytes(), [p.name for p in Path(folder).iterdir()]
        (b'new', ['notes.txt'])
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
    """Let the new name reach the disk, too; where folders cannot be opened (Windows) the system sees to it."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    except OSError:  # some network file systems know no fsync of folders
        pass
    finally:
        os.close(handle)


def check_file(path: str | os.PathLike[str]) -> None:
    """Verify the checksums inside a file written by ``torch.save``; a flipped bit would otherwise load in silence.

    Raises:
        ValueError: The file is cut short or damaged; the message names it.
    """
    with Path(path).open("rb") as file:
        if file.read(2) != b"PK" and not zipfile.is_zipfile(path):
            return  # the format before torch 1.6 carries no checksums
    try:
        with zipfile.ZipFile(path) as archive:
            # torch.load takes an entry with this attribute for a folder and leaves its tensor uninitialised
            folders = [entry.filename for entry in archive.infolist() if entry.external_attr & 0x10]
            damaged = folders[0] if folders else archive.testzip()
    except Exception as error:  # zipfile has many ways to say that it understands nothing
        raise ValueError(
            f"the checkpoint {str(path)!r} is damaged or cut short ({error}); use an earlier one"
        ) from error
    if damaged is not None:
        raise ValueError(f"the checkpoint {str(path)!r} is damaged in {damaged!r}; use an earlier one")
