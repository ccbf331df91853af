"""Parts that ``demo`` and ``compare`` share: option types, the output folder, and messages."""

import argparse
import shlex
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from lightning_rkd.cli.trainer import check_writable
from lightning_rkd.utils.files import write_whole


def new_parser(command: str, description: str, epilog: str) -> argparse.ArgumentParser:
    """Parser of a command, whose help keeps the lines of the epilog."""
    return argparse.ArgumentParser(
        prog=f"lightning-rkd {command}",
        description=textwrap.fill(description, 100),
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def new_console() -> Console:
    """Console that does not wrap tables where the output is no terminal."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else 160)


def seeds(text: str) -> tuple[int, ...]:
    """Seeds as a number, ``"3"`` for 0, 1 and 2, or as a list, ``"0,3"`` or ``"3,"``."""
    parts = [part for part in text.split(",") if part.strip()]
    numbers = tuple(int(part) for part in parts) if all(part.strip().isdecimal() for part in parts) else ()
    found = tuple(range(numbers[0])) if len(numbers) == 1 and "," not in text else numbers
    if not found or len(set(found)) < len(found):
        raise argparse.ArgumentTypeError(f"expected a number of seeds (3) or different seeds (0,1,2), got {text!r}")
    return found


def positive(text: str) -> int:
    """Integer of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a number of at least 1, got {text!r}")
    return int(text)


def check_folder(out: Path, made_by: str, command: str) -> None:
    """Refuse an output folder with content but without ``made_by``, the file that every output of a command has."""
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"the output folder {str(out)!r} is a file; choose another one with --out")
    begun = {made_by, f".{made_by}.part"}  # the latter alone if the first write was killed
    if out.is_dir() and any(out.iterdir()) and not any((out / name).is_file() for name in begun):
        raise FileExistsError(f"{str(out)!r} is not the output of a {command}; choose another folder with --out")


def begin(out: Path, made_by: str, settings: Mapping[str, Any], what: str) -> bool:
    """Write the settings into a new folder; ``True`` if it holds the same ones, an ``OSError`` if it holds others."""
    check_writable(out)
    path = out / made_by
    if not path.exists():
        write_whole(path, yaml.safe_dump(dict(settings), sort_keys=False).encode())
        return False
    theirs = yaml.safe_load(path.read_text(encoding="utf-8"))
    theirs = theirs if isinstance(theirs, dict) else {}
    if other := [f"{k} {theirs.get(k)} there, {v} now" for k, v in settings.items() if theirs.get(k) != v]:
        raise FileExistsError(
            f"{str(out)!r} holds a {what} with other settings ({'; '.join(other)}): choose another folder with --out, "
            "or delete that one"
        )
    return True


@contextmanager
def resumable(name: str, args: Sequence[str]) -> Iterator[str]:
    """The command as typed; when it is interrupted, a message says that it resumes."""
    command = shlex.join(["lightning-rkd", name, *args])
    try:
        yield command
    except (KeyboardInterrupt, SystemExit):
        print(f"Stopped. The same command resumes: {command}")
        raise


def print_files(console: Console, out: Path, files: Mapping[str, str]) -> None:
    """Print the files in the output folder with their content."""
    console.print(f"Files in {out}:", soft_wrap=True)
    for names, content in files.items():
        console.print(f"  {names:<30} {content}", soft_wrap=True)
