"""Execution of tasks in parallel, in their order, with progress bars and a result or a failure for each."""

import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from lightning_rkd.cli.experiments import runs
from lightning_rkd.cli.experiments.runs import Run
from lightning_rkd.cli.experiments.tasks import Task
from lightning_rkd.cli.experiments.workers import Worker, end_all

LOG = "log.txt"
"""Name of the file, in the folder of a task, with everything that the task has printed."""


@dataclass(frozen=True)
class Failure:
    """A task that failed: the error, its log, and the last lines of that."""

    task: Task
    error: str
    log: Path | None = None
    tail: str = ""


def run_all(
    tasks: Sequence[Task], out: Path, jobs: int, console: Console, commit: str = ""
) -> dict[str, Run | Failure]:
    """Perform tasks in parallel, each after those that it needs; return runs and failures by the tasks' folders.

    Finished runs of an earlier call are not repeated; a teacher's task stands before those of its students.
    """
    queue, threads = _Queue(tasks, out), max(1, torch.get_num_threads() // jobs)
    idle: list[Worker] = []
    busy: dict[Future[str], tuple[Worker, Task, _Line]] = {}
    columns = (TextColumn("{task.description:<24}"), BarColumn(30), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        try:
            while True:
                while len(busy) < jobs and (task := queue.take()) is not None:
                    worker = idle.pop() if idle else Worker(threads)
                    teacher = queue.teacher_of(task)
                    future = worker.submit(task.perform, task.path(out, teacher) / LOG, out, teacher, commit)
                    busy[future] = worker, task, _Line(progress, task.name)
                if not busy:
                    break
                done, _ = wait(busy, timeout=0.1, return_when=FIRST_COMPLETED)
                for worker, _, line in busy.values():
                    while worker.connection.poll():
                        line.advance(*worker.connection.recv())
                for future in done:
                    worker, task, line = busy.pop(future)
                    broken = isinstance(future.exception(), BrokenProcessPool)
                    error = "its process was killed, or ran out of memory" if broken else future.result()
                    idle += [] if broken else [worker]
                    line.end(queue.finish(task, error))
        finally:
            end_all([*idle, *(worker for worker, _, _ in busy.values())])
    if queue.kept:
        console.print(f"{queue.kept} of {len(tasks)} runs were finished before.")
    return queue.results


class _Queue:
    """Tasks that wait, and the results of those that are done."""

    def __init__(self, tasks: Sequence[Task], out: Path) -> None:
        self.waiting, self.out, self.kept = list(tasks), out, 0
        self.results: dict[str, Run | Failure] = {}
        self.caches: set[str] = set()  # that have been begun

    def teacher_of(self, task: Task) -> str | None:
        teacher = self.results.get(task.teacher or "")
        return teacher.weights if isinstance(teacher, Run) else None

    def take(self) -> Task | None:
        """The next task that can begin."""
        for task in list(self.waiting):
            needed = [self.results.get(folder) for folder in (task.teacher, task.cache and task.cache.folder) if folder]
            if failed := next((result for result in needed if isinstance(result, Failure)), None):
                self.results[task.folder] = Failure(task, f"{failed.task.name} failed, which it needs")
            elif task.teacher is not None and needed[0] is None:
                continue
            elif (kept := self.read(task)) is not None:
                self.results[task.folder], self.kept = kept, self.kept + 1
            elif None not in needed:
                self.waiting.remove(task)
                return task
            elif task.cache is not None and task.cache.folder not in self.caches:
                self.caches.add(task.cache.folder)
                return task.cache
            else:
                continue
            self.waiting.remove(task)
        return None

    def read(self, task: Task) -> Run | None:
        identity = runs.identify(task.config, task.seed, self.teacher_of(task))
        return runs.read_finished(self.out / task.folder, identity)

    def finish(self, task: Task, error: str) -> Run | Failure:
        found: Run | Failure | None = None
        if not error:
            found = Run() if task.split is None else self.read(task)
        if found is None:
            log = task.path(self.out, self.teacher_of(task)) / LOG
            lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.is_file() else []
            found = Failure(task, error or "it left no result", log, "\n".join(lines[-8:]))
        self.results[task.folder] = found
        return found


class _Line:
    """Progress of a task: a bar in a terminal, elsewhere a printed line for every quarter."""

    def __init__(self, progress: Progress, name: str) -> None:
        self.progress, self.name = progress, name
        self.bar = progress.add_task(name, total=None)
        self.first, self.quarter, self.start = -1, 0, 0.0

    def advance(self, done: int, total: int, unit: str) -> None:
        self.progress.update(self.bar, completed=done, total=total)
        quarter = 4 * done // max(1, total)
        if self.first < 0:
            self.first, self.start = done, time.perf_counter()
            self.say(f"resumes after {done} of {total} {unit}" if done else f"{total} {unit}")
        elif quarter > self.quarter and done < total:
            left = (time.perf_counter() - self.start) / (done - self.first) * (total - done)
            self.say(f"{done} of {total} {unit}, about {clock(left)} left")
        self.quarter = quarter

    def say(self, text: str) -> None:
        if self.progress.disable:
            self.progress.console.print(f"  {self.name}: {text}", markup=False)

    def end(self, result: Run | Failure) -> None:
        text = "done"
        if isinstance(result, Failure):
            text = f"FAILED: {result.error} ({result.log})"
        elif result.scores:
            name, value = next(iter(result.scores.items()))
            text = f"{name} {value:.3f} after {clock(result.seconds)}"
        self.progress.console.print(f"  {self.name}: {text}", markup=False, soft_wrap=True)
        self.progress.remove_task(self.bar)


def clock(seconds: float) -> str:
    """Seconds in minutes and seconds."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
