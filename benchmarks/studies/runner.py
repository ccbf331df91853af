"""Runs of a study in worker processes; each finished run is one line of a CSV file, and is not run again."""

from __future__ import annotations

import csv
import datetime
import fcntl
import io
import os
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass, fields
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from lightning_rkd.utils.files import write_whole
from lightning_rkd.utils.provenance import commit, hardware


@dataclass(frozen=True)
class Run:
    """One training.

    Attributes:
        study: Name of the study.
        data: Name of the data set, with the setting where there are several.
        student: Name of the student.
        stage: ``"tune"``, scored on validation classes, or ``"final"``, scored on unseen classes.
        loss: The loss as an expression, or ``"none"``.
        beside: The loss beside which it is used, or ``"none"``.
        weight: Norm of its gradient at the embeddings in units of the other loss's; 0 where there is no other.
        seed: Of initial weights and batches.
    """

    study: str
    data: str
    student: str
    stage: str
    loss: str
    beside: str
    weight: float
    seed: int


ABOUT = ("seconds", "date", "hardware", "versions", "commit")
KEY = tuple(field.name for field in fields(Run))
Row = dict[str, str]


class Study(Protocol):
    """A list of runs, which may depend on the rows of earlier ones."""

    name: str
    scores: Sequence[str]

    def plan(self, rows: Sequence[Row]) -> Iterable[Run]:
        """Runs in the order of the queue, those left out that depend on rows that are missing."""

    def train(self, run: Run) -> Mapping[str, float]:
        """Scores of a run."""


def identify(row: Mapping[str, Any]) -> tuple[str, ...]:
    """Key of a run or of its row."""
    return tuple(str(row[name]) for name in KEY)


def read_rows(path: Path) -> list[Row]:
    """Rows of a file; the last line is left out if a kill has cut it."""
    if not path.exists():
        return []
    text = path.read_bytes().decode()
    return list(csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1], newline="")))


def to_line(cells: Iterable[Any]) -> bytes:
    """A line of a CSV file."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(cells)
    return text.getvalue().encode()


def repair(path: Path, head: Sequence[str]) -> None:
    """Make the file with its head, or remove a last line that a kill has cut."""
    content = path.read_bytes() if path.exists() else b""
    whole = content[: content.rfind(b"\n") + 1] or to_line(head)
    if not whole.startswith(to_line(head)):
        raise ValueError(f"{path} has other columns than {', '.join(head)}: move it away")
    if whole != content:
        write_whole(path, whole)


def run_study(study: Study, folder: Path, jobs: int = 1, start_method: str = "spawn") -> None:
    """Run what is missing; a run that fails is reported, left out, and tried again by the next call.

    Raises:
        BlockingIOError: Another process runs the study in this folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path, head = folder / "runs.csv", (*KEY, *study.scores, *ABOUT)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        repair(path, head)
        rows = read_rows(path)
        seen = {identify(row) for row in rows}
        running: dict[Future[Row], Run] = {}
        with ProcessPoolExecutor(jobs, get_context(start_method), _start_worker) as pool, path.open("ab", 0) as file:
            while True:
                queue = (run for run in study.plan(rows) if identify(asdict(run)) not in seen)
                while len(running) < jobs and (run := next(queue, None)) is not None:
                    seen.add(identify(asdict(run)))
                    running[pool.submit(_train, study, run)] = run
                if not running:
                    break
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    run = running.pop(future)
                    name = " ".join(identify(asdict(run)))
                    if error := future.exception():
                        print(f"FAILED {name}\n{''.join(traceback.format_exception(error))}", flush=True)
                        continue
                    row = future.result()
                    file.write(to_line(row.get(column, "") for column in head))
                    os.fsync(file.fileno())
                    rows.append(row)
                    left = len({identify(asdict(run)) for run in study.plan(rows)} - seen)
                    print(
                        f"{row['date']} {name}: {row[study.scores[0]]} in {row['seconds']} s, {left} left", flush=True
                    )


def _start_worker() -> None:
    os.nice(19)
    torch.set_num_threads(1)


def _train(study: Study, run: Run) -> Row:
    begun = time.perf_counter()
    scores = {name: f"{value:.6g}" for name, value in study.train(run).items()}
    row = {name: str(value) for name, value in asdict(run).items()} | scores
    row |= {"seconds": f"{time.perf_counter() - begun:.1f}", "date": f"{datetime.datetime.now():%Y-%m-%dT%H:%M:%S}"}
    return row | _provenance()


@cache
def _provenance() -> Row:
    from lightning_rkd import __version__

    versions = f"lightning-rkd {__version__}, PyTorch {torch.__version__}"
    return {"hardware": hardware("cpu"), "versions": versions, "commit": commit(Path(__file__).parent)}


def cached(path: Path, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """Tensors of a file, computed and written the first time."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, save(compute()))
    return load_file(path)
