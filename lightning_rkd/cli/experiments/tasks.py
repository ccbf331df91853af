"""The runs of a comparison in their order, and their being done by some workers at once."""

from __future__ import annotations

import hashlib
import json
import queue
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from lightning_rkd.cli.experiments import runs as study
from lightning_rkd.cli.experiments.plan import TAUGHT, TEACHER, Comparison, Network, folder_of
from lightning_rkd.cli.experiments.progress import Line, clock, display
from lightning_rkd.cli.experiments.runs import Run
from lightning_rkd.cli.experiments.settings import Config, with_settings
from lightning_rkd.cli.experiments.workers import Message, Worker, closing, threads_each

LOG = "log.txt"
"""What a run has printed, in its folder."""


@dataclass(frozen=True)
class Task:
    """One training, or the writing of a cache.

    Attributes:
        network: Name of the row.
        seed: Its seed.
        config: What trains it.
        folder: Where, below the output folder.
        teacher: Folder of the run that teaches it.
        cache: Name of the cache that it reads or writes.
        fills: Whether it writes that.
        split: Which data it is measured on.
    """

    network: str
    seed: int
    config: Config = field(repr=False)
    folder: str
    teacher: str | None = None
    cache: str | None = None
    fills: bool = False
    split: Literal["test", "validation"] = "test"

    @property
    def name(self) -> str:
        """For people."""
        return self.network if self.fills or self.network == TEACHER else f"{self.network}, seed {self.seed}"

    @property
    def needs(self) -> list[str]:
        """Folders of the tasks that come first."""
        cache = self.cache if not self.fills else None
        return [need for need in (self.teacher, cache) if need is not None]

    def message(self, out: Path, teacher: Run | None, commit: str) -> Message:
        """What a worker is told."""
        paths: dict[str, str] = {}
        folder = out / self.folder
        if self.cache is not None:
            assert teacher is not None
            cache = out / "cache" / cache_of(self.config["data"], self.cache, teacher)
            if self.fills:
                folder = cache
            else:
                paths[f"{TAUGHT}.init_args.path"] = str(cache)
        if self.teacher is not None and not paths:
            paths[f"{TAUGHT}.init_args.weights"] = str(out / self.teacher / "last.ckpt")
        return {
            "network": self.network,
            "seed": self.seed,
            "config": self.config,
            "folder": str(folder),
            "teacher": None if teacher is None else teacher.weights,
            "paths": paths,
            "fills": self.fills,
            "split": self.split,
            "commit": commit,
        }


@dataclass(frozen=True)
class Failure:
    """A run that failed: which, why, and the end of what it printed."""

    task: Task
    error: str
    log: str = ""


def cache_of(data: Config, name: str, teacher: Run) -> str:
    """Name of a folder that is another one for other data and other teachers."""
    return hashlib.sha256(f"{json.dumps(data, sort_keys=True)} {name} {teacher.weights}".encode()).hexdigest()[:16]


def teacher_task(comparison: Comparison) -> list[Task]:
    """The training of the teacher, if there is one."""
    teacher = comparison.teacher
    return [] if teacher is None else [Task(TEACHER, comparison.teacher_seed, teacher.config, TEACHER)]


def tasks_of(comparison: Comparison, networks: Sequence[Network], seeds: Sequence[int]) -> list[Task]:
    """All runs of some networks, seed by seed, so that early rows are of all networks; caches come first."""
    caches: dict[str, Task] = {}
    tasks: list[Task] = []
    for seed in seeds:
        for network in networks:
            task = Task(network.name, seed, network.config, f"{folder_of(network.name)}-{seed}")
            if network.taught_by is not None:
                teacher = network.taught_by
                folder = TEACHER if teacher == TEACHER else f"{folder_of(teacher)}-{seed}"
                task = replace(task, teacher=folder)
            if network.cached:
                fill = _filling(comparison, network, seed)
                caches.setdefault(fill.folder, fill)
                task = replace(task, cache=fill.cache)
            tasks.append(task)
    return [*caches.values(), *tasks]


def _filling(comparison: Comparison, network: Network, seed: int) -> Task:
    """What writes the cache that a network reads: one for all seeds, unless the seed decides what images look like."""
    assert comparison.teacher is not None
    views = network.config["data"].get("init_args", {}).get("views")
    data = json.dumps(network.config["data"], sort_keys=True)
    name = f"cache {hashlib.sha256(data.encode()).hexdigest()[:8]}" + (f" of seed {seed}" if views else "")
    student = comparison.teacher.config["model"]["init_args"]["student"]
    teacher = {"class_path": "Teacher", "init_args": {"network": student}}
    config = with_settings(network.config, {TAUGHT: teacher})
    return Task("the teacher's cache", seed, config, name, TEACHER, name, fills=True)


def run_all(
    tasks: Sequence[Task],
    out: Path,
    jobs: int,
    console: Console,
    commit: str = "",
) -> dict[str, Run | Failure]:
    """Do all tasks, some at a time, those first that others need. What was done by an earlier call is not repeated.

    Returns:
        By folder, the run or what went wrong.
    """
    with display(console) as progress:
        board = _Board(tasks, out, jobs, progress, commit)
        with closing(board.workers):
            board.go()
    if board.kept:
        console.print(f"{board.kept} of {len([t for t in tasks if not t.fills])} runs were finished before.")
    return board.results


class _Board:
    """Who does what."""

    def __init__(self, tasks: Sequence[Task], out: Path, jobs: int, progress: Any, commit: str) -> None:
        self.waiting, self.out, self.jobs, self.progress, self.commit = list(tasks), out, jobs, progress, commit
        self.ready: list[Task] = []
        self.results: dict[str, Run | Failure] = {}
        self.workers: list[Worker] = []
        self.heard: queue.Queue[tuple[Worker, Message]] = queue.Queue()
        self.doing: dict[Worker, Task] = {}
        self.lines: dict[Worker, Line] = {}
        self.kept = 0

    def go(self) -> None:
        """Until all is done."""
        while True:
            self._sort()
            while self.ready and len(self.doing) < self.jobs:
                self._begin(self.ready.pop(0))
            if not self.doing:
                return
            self._hear(*self.heard.get())

    def _sort(self) -> None:
        """Take what may begin from what waits; what needs something that failed, fails, and what is done, is done."""
        changed = True
        while changed:
            changed = False
            for task in list(self.waiting):
                needed = [self.results.get(need) for need in task.needs]
                if failed := next((n for n in needed if isinstance(n, Failure)), None):
                    self.results[task.folder] = Failure(task, f"{failed.task.name} failed, which it needs")
                elif (kept := self._finished(task)) is not None:
                    self.results[task.folder] = kept
                    self.kept += 1
                elif all(need in self.results for need in task.needs):
                    self.ready.append(task)
                else:
                    continue
                self.waiting.remove(task)
                changed = True
        read = {task.cache for task in self.waiting}
        self.ready = [task for task in self.ready if not task.fills or task.cache in read]

    def _teacher(self, task: Task) -> Run | None:
        found = None if task.teacher is None else self.results.get(task.teacher)
        return found if isinstance(found, Run) else None

    def _finished(self, task: Task) -> Run | None:
        teacher = self._teacher(task)
        if task.fills or (task.teacher is not None and teacher is None):
            return None
        identity = study.identify(task.config, task.seed, teacher)
        return study.finished(task.network, self.out / task.folder, task.seed, identity)

    def _begin(self, task: Task) -> None:
        free = next((worker for worker in self.workers if worker not in self.doing), None)
        if free is None:
            free = Worker("lightning_rkd.cli.experiments.work:work", self.heard, threads_each(self.jobs))
            self.workers.append(free)
        message = task.message(self.out, self._teacher(task), self.commit)
        self.doing[free] = task
        free.give(message, Path(message["folder"], LOG))

    def _hear(self, worker: Worker, message: Message) -> None:
        event = message["event"]
        task = self.doing.get(worker)
        if event == "ended":
            self.workers.remove(worker)
            worker.close()
        if task is None:
            return
        if event == "begin":
            self.lines[worker] = Line(self.progress, task.name, message["steps"], message.get("unit", "steps"))
            self.lines[worker].begin(message["first"])
        elif event == "step":
            self.lines[worker].advance(message["done"])
        else:
            del self.doing[worker]
            self._end(task, self.lines.pop(worker, None), message)

    def _end(self, task: Task, line: Line | None, message: Message) -> None:
        found: Run | Failure | None = None
        if message["event"] == "done":
            found = Run(task.network, task.seed, 0, 0.0) if task.fills else self._finished(task)
        if found is None:
            told = task.message(self.out, self._teacher(task), self.commit)
            log = Path(told["folder"], LOG)
            found = Failure(task, message.get("error", "it left no result"), _tail(log))
            self.progress.console.print(f"  {task.name}: FAILED: {found.error} ({log})", markup=False, soft_wrap=True)
        self.results[task.folder] = found
        if line is not None:
            news = "failed" if isinstance(found, Failure) else _news(found)
            line.end(news)
            if not self.progress.disable and isinstance(found, Run):
                self.progress.console.print(f"  {task.name}: {news}", markup=False)
            self.progress.remove_task(line.task)


def _news(run: Run) -> str:
    if not run.scores:  # a cache
        return "done"
    return next(f"{name} {value:.3f} after {clock(run.seconds)}" for name, value in run.scores.items())


def _tail(log: Path, lines: int = 8) -> str:
    try:
        return "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])
    except OSError:
        return ""
