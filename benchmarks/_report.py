"""Report of a benchmark: command, machine, date and tables, printed and written to a Markdown file."""

from __future__ import annotations

import datetime
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from lightning_rkd.utils.provenance import commit, hardware


class Report:
    """Markdown that is printed as it comes, and written at the end."""

    def __init__(self, title: str, about: str | None, device: str = "cpu", **settings: Any) -> None:
        self.lines: list[str] = []
        self.say(f"# {title}")
        if about:
            self.say(about.strip())
        given = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in settings.items())
        self.say(
            f"Made by `python {' '.join(['benchmarks/' + Path(sys.argv[0]).name, *sys.argv[1:]])}` on "
            f"{datetime.date.today()}: {hardware(device)}, {torch.get_num_threads()} threads, torch "
            f"{torch.__version__}{', ' + given if given else ''}, commit {commit(Path(__file__).parent) or 'unknown'}."
        )

    def say(self, text: str) -> None:
        """A paragraph."""
        self.lines += [text, ""]
        print(text + "\n", flush=True)

    def table(self, head: Sequence[Any], rows: Sequence[Sequence[Any]]) -> None:
        """A table."""
        self.say("\n".join("| " + " | ".join(map(str, row)) + " |" for row in (head, ["---"] * len(head), *rows)))

    def write(self, out: Path | None) -> None:
        """The whole, into a file where one was named."""
        if out is not None:
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text("\n".join(self.lines).rstrip() + "\n")


def spread(values: Sequence[float], digits: int = 2, unit: str = "") -> str:
    """Median, least and most of a ratio's values in several turns."""
    middle, least, most = (f"{x:.{digits}f}" for x in (statistics.median(values), min(values), max(values)))
    return f"{middle}{unit} ({least} to {most})"


def resident_peak() -> float:
    """Peak resident size of this process in MiB. Linux only: ``getrusage`` would report a higher one of the parent."""
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024
