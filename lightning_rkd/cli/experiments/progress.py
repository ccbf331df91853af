"""How far runs have come: bars where there is a terminal, a line every quarter of a run where there is none."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn


def display(console: Console) -> Progress:
    """The display that :class:`Line` adds to; a context manager."""
    columns = (
        TextColumn("{task.description:<24}"),
        BarColumn(30),
        TimeElapsedColumn(),
        TextColumn("{task.fields[news]}"),
    )
    return Progress(*columns, console=console, disable=not console.is_terminal)


class Line:
    """One run of the display, whose length is counted in steps or another unit."""

    def __init__(self, progress: Progress, name: str, steps: int, unit: str = "steps") -> None:
        self.progress, self.name, self.steps, self.unit = progress, name, max(1, steps), unit
        self.task = progress.add_task(name, total=self.steps, news="")
        self.first, self.quarter, self.start = 0, 0, time.perf_counter()
        self.say(f"{steps} {unit}")

    def say(self, news: str) -> None:
        """Show what there is to know."""
        self.progress.update(self.task, news=news)
        if self.progress.disable:
            self.progress.console.print(f"  {self.name}: {news}", markup=False)

    def begin(self, first: int) -> None:
        """Training begins, or goes on after ``first`` steps."""
        self.first, self.start, self.quarter = first, time.perf_counter(), 4 * first // self.steps
        if first:
            self.say(f"goes on after {first} {self.unit}")

    def advance(self, done: int) -> None:
        """So many steps are done."""
        self.progress.update(self.task, completed=done)
        quarter = 4 * done // self.steps
        wanted = quarter > self.quarter if self.progress.disable else done % 10 == 0
        if wanted and self.first < done < self.steps:
            left = (time.perf_counter() - self.start) / (done - self.first) * (self.steps - done)
            self.say(f"{done} of {self.steps} {self.unit}, about {clock(left)} left")
        self.quarter = quarter

    def end(self, news: str) -> None:
        """It is done, and stays to be seen."""
        self.progress.update(self.task, completed=self.steps)
        self.say(news)


def clock(seconds: float) -> str:
    """Seconds for people.

    Example:
        >>> clock(5.4), clock(125)
        ('5 s', '2 min 5 s')
    """
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
