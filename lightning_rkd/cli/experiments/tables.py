"""Tables of several networks over seeds: mean, spread, and the paired difference to a baseline."""

import csv
import io
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lightning_rkd.cli.experiments.plan import TEACHER
from lightning_rkd.cli.experiments.runs import Run
from lightning_rkd.cli.experiments.schedule import Failure
from lightning_rkd.cli.experiments.tasks import Task
from lightning_rkd.utils.files import write_whole
from lightning_rkd.utils.statistics import Difference, paired_difference

SECONDS = "seconds"


@dataclass
class Row:
    """The runs of one network: values by score and seed, and by score the paired difference to the baseline."""

    network: str
    parameters: int = 0
    values: dict[str, dict[int, float]] = field(default_factory=dict)
    failed: int = 0
    differences: dict[str, Difference] = field(default_factory=dict)

    @property
    def seeds(self) -> int:
        """Number of finished runs."""
        return len(self.values.get(SECONDS, {}))

    def summarize(self, score: str) -> tuple[float, float]:
        """Mean and standard deviation over seeds, ``nan`` where there are too few."""
        values = list(self.values.get(score, {}).values())
        spread = statistics.stdev(values) if len(values) > 1 else math.nan
        return statistics.fmean(values) if values else math.nan, spread


@dataclass
class Table:
    """Rows of networks in the order of their tasks, and columns of scores, by default all of the students'."""

    tasks: Sequence[Task]
    results: Mapping[str, Run | Failure]
    scores: Sequence[str] | None = None
    baseline: str | None = None

    def __post_init__(self) -> None:
        rows: dict[str, Row] = {}
        for task in self.tasks:
            row, run = rows.setdefault(task.network, Row(task.network)), self.results[task.folder]
            if isinstance(run, Failure):
                row.failed += 1
                continue
            row.parameters = run.parameters
            for name, value in {**run.scores, SECONDS: run.seconds}.items():
                row.values.setdefault(name, {})[task.seed] = value
        self.rows = list(rows.values())
        self.failures = [result for result in self.results.values() if isinstance(result, Failure)]
        self.known = list(dict.fromkeys(name for row in self.rows for name in row.values if name != SECONDS))
        students = [name for row in self.rows if row.network != TEACHER for name in row.values if name != SECONDS]
        self.columns = list(dict.fromkeys(students) if self.scores is None else self.scores)
        if self.known and (unknown := [name for name in self.columns if name not in self.known]):
            raise ValueError(f"scores: no network has {unknown[0]!r}; the scores are {', '.join(self.known)}")
        for row in self.rows if self.baseline is not None else ():
            for name, values in row.values.items() if row.network not in (TEACHER, self.baseline) else ():
                if difference := paired_difference(values, rows[self.baseline or ""].values.get(name, {})):
                    row.differences[name] = difference

    @property
    def headings(self) -> list[str]:
        """Headings of the columns."""
        several = ("", ": difference") if self.baseline is not None else ("",)
        return ["network", "parameters", "seeds", *(score + end for score in self.columns for end in several), SECONDS]

    def cells(self, row: Row) -> list[str]:
        """Cells of a row, rounded."""
        if not row.seeds:
            return [row.network, "", "failed" if row.failed else "", *[""] * (len(self.headings) - 3)]
        found = [row.network, f"{row.parameters:,}", f"{row.seeds}" + (f" ({row.failed} failed)" if row.failed else "")]
        for score in self.columns:
            mean, spread = row.summarize(score)
            found.append("" if math.isnan(mean) else f"{mean:.3f}" + ("" if math.isnan(spread) else f" ± {spread:.3f}"))
            if self.baseline is not None:
                d = row.differences.get(score)
                interval = "" if d is None or math.isnan(d.low) else f" [{d.low:+.3f}, {d.high:+.3f}]"
                found.append("" if d is None else f"{d.mean:+.3f}{interval}")
        return [*found, f"{row.summarize(SECONDS)[0]:.0f}"]

    def to_markdown(self) -> str:
        """The table in Markdown."""
        lines = [self.headings, *map(self.cells, self.rows)]
        table = [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines]
        return "\n".join([table[0], "|---|" + "---:|" * (len(lines[0]) - 1), *table[1:]])

    @property
    def caption(self) -> str:
        """Meaning of the columns."""
        text = "Mean ± standard deviation over seeds, on the test data, after the last step."
        if self.baseline is not None:
            text += (
                f" Difference: to {self.baseline}, seed by seed, with the 95 % interval of Student's t over the seeds "
                "that both have (none for a single seed)."
            )
        return text

    def write_csv(self, out: Path) -> None:
        """Write ``table.csv``, and ``runs.csv`` with every single run, both with all scores and unrounded."""
        parts = ("", "_spread", "_difference", "_low", "_high")
        columns = [f"{score}{part}" for score in self.known for part in parts]
        table: list[list[object]] = [["network", "parameters", "seeds", "failed", *columns, SECONDS]]
        for row in self.rows:
            line: list[object] = [row.network, row.parameters, row.seeds, row.failed]
            for score in self.known:
                line += [*row.summarize(score), *row.differences.get(score, [math.nan] * 3)]
            table.append([*line, row.summarize(SECONDS)[0]])
        write_csv(table, out / "table.csv")
        table = [["network", "seed", "folder", "parameters", *self.known, SECONDS, "error"]]
        for task in self.tasks:
            run, start = self.results[task.folder], [task.network, task.seed, task.folder]
            if isinstance(run, Failure):
                table.append([*start, *[""] * (len(self.known) + 2), run.error])
            else:
                scores = (run.scores.get(score, math.nan) for score in self.known)
                table.append([*start, run.parameters, *scores, run.seconds, ""])
        write_csv(table, out / "runs.csv")


def write_csv(lines: Iterable[Sequence[object]], path: Path) -> None:
    """Write a CSV file, with empty cells for ``nan``."""
    text = io.StringIO()
    csv.writer(text).writerows(["" if cell != cell else cell for cell in line] for line in lines)
    write_whole(path, text.getvalue().encode())
