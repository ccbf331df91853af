"""The table of a comparison: mean, spread, and the paired difference to the baseline, for people and for programs."""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lightning_rkd.cli.experiments.plan import TEACHER, Comparison
from lightning_rkd.cli.experiments.runs import Run
from lightning_rkd.cli.experiments.tasks import Failure, Task
from lightning_rkd.utils.files import write_whole
from lightning_rkd.utils.statistics import Difference, paired_difference

SECONDS = "seconds"


@dataclass(frozen=True)
class Row:
    """What the table says of one network.

    Attributes:
        network: Its name.
        parameters: Of the network; 0 if no run of it has been finished.
        values: By score and seed.
        failed: How many of its runs failed.
        differences: By score, to the baseline.
    """

    network: str
    parameters: int
    values: dict[str, dict[int, float]]
    failed: int
    differences: dict[str, Difference]

    @property
    def seeds(self) -> int:
        """How many of its runs were finished."""
        return len(self.values.get(SECONDS, {}))

    def mean(self, score: str) -> float:
        """Over seeds; ``nan`` where there is none."""
        values = self.values.get(score, {})
        return statistics.fmean(values.values()) if values else math.nan

    def spread(self, score: str) -> float:
        """Standard deviation over seeds; ``nan`` for fewer than two."""
        values = self.values.get(score, {})
        return statistics.stdev(values.values()) if len(values) > 1 else math.nan


def scores_of(comparison: Comparison, results: Mapping[str, Run | Failure]) -> list[str]:
    """The columns: those that were asked for, else all that the networks' runs have.

    Raises:
        ValueError: A score that was asked for and that no run has.
    """
    runs = [run for run in results.values() if isinstance(run, Run) and run.scores]
    known = list(dict.fromkeys(name for run in runs for name in run.scores))
    if comparison.scores is None:
        students = [name for run in runs if run.network != TEACHER for name in run.scores]
        return list(dict.fromkeys(students)) or known
    if known and (unknown := [name for name in comparison.scores if name not in known]):
        raise ValueError(f"scores: no network has {unknown[0]!r}; the scores are {', '.join(known)}")
    return list(comparison.scores)


def rows(
    comparison: Comparison, tasks: Sequence[Task], results: Mapping[str, Run | Failure], scores: Sequence[str]
) -> list[Row]:
    """The teacher, then the networks in the order of the file."""
    values: dict[str, dict[str, dict[int, float]]] = {}
    parameters: dict[str, int] = {}
    failed: dict[str, int] = {}
    for task in tasks:
        if task.fills:
            continue
        own, run = values.setdefault(task.network, {}), results[task.folder]
        if isinstance(run, Failure):
            failed[task.network] = failed.get(task.network, 0) + 1
            continue
        parameters[task.network] = run.parameters
        for name in scores:
            if name in run.scores:
                own.setdefault(name, {})[task.seed] = run.scores[name]
        own.setdefault(SECONDS, {})[task.seed] = run.seconds
    order = ([TEACHER] if comparison.teacher is not None else []) + [n.name for n in comparison.networks]
    baseline = values.get(comparison.baseline or "", {})
    found = []
    for name in order:
        differences = {}
        if comparison.baseline and name not in (TEACHER, comparison.baseline):
            compared = {s: paired_difference(values[name].get(s, {}), baseline.get(s, {})) for s in scores}
            differences = {s: d for s, d in compared.items() if d is not None}
        found.append(Row(name, parameters.get(name, 0), values[name], failed.get(name, 0), differences))
    return found


def headings(comparison: Comparison, scores: Sequence[str]) -> list[str]:
    """Of the columns."""
    several = [f"{score}: difference" for score in scores] if comparison.baseline else ["" for _ in scores]
    pairs = [part for pair in zip(scores, several, strict=True) for part in pair if part]
    return ["network", "parameters", "seeds", *pairs, SECONDS]


def cells(row: Row, comparison: Comparison, scores: Sequence[str]) -> list[str]:
    """A row of the table for people.

    Example:
        >>> values = {"recall": {0: 0.3, 1: 0.5}, "seconds": {0: 9.0, 1: 8.0}}
        >>> row = Row("RKD", 4200, values, 1, {"recall": Difference(0.1, 0.02, 2)})
        >>> cells(row, Comparison("", (), (0, 1, 2), baseline="alone"), ["recall"])
        ['RKD', '4,200', '2 (1 failed)', '0.400 ± 0.141', '+0.100 [+0.080, +0.120]', '8']
    """
    if not row.seeds:
        return [row.network, "", "failed" if row.failed else "", *("" for _ in headings(comparison, scores)[3:])]
    seeds = f"{row.seeds}" + (f" ({row.failed} failed)" if row.failed else "")
    found = [row.network, f"{row.parameters:,}", seeds]
    for score in scores:
        mean, spread = row.mean(score), row.spread(score)
        found.append("" if math.isnan(mean) else f"{mean:.3f}" + ("" if math.isnan(spread) else f" ± {spread:.3f}"))
        if comparison.baseline:
            difference = row.differences.get(score)
            found.append("" if difference is None else _difference(difference))
    return [*found, f"{row.mean(SECONDS):.0f}"]


def _difference(difference: Difference) -> str:
    if math.isnan(difference.half_width):
        return f"{difference.mean:+.3f}"
    return f"{difference.mean:+.3f} [{difference.low:+.3f}, {difference.high:+.3f}]"


def markdown(found: Sequence[Row], comparison: Comparison, scores: Sequence[str]) -> str:
    """The table in Markdown."""
    titles = headings(comparison, scores)
    lines = [titles, *(cells(row, comparison, scores) for row in found)]
    table = [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines]
    return "\n".join([table[0], "|---|" + "---:|" * (len(titles) - 1), *table[1:], ""])


def explanation(comparison: Comparison) -> str:
    """What the columns say, in words."""
    text = "Mean ± standard deviation over seeds, on the test data, after the last step."
    if comparison.baseline:
        text += (
            f" Difference: to {comparison.baseline}, seed by seed, with the 95 % interval of Student's t over the "
            "seeds that both have (none for a single seed)."
        )
    return text


def write_csv(found: Sequence[Row], comparison: Comparison, scores: Sequence[str], path: Path) -> None:
    """The table for programs, unrounded."""
    parts = ("", "_spread", "_difference", "_low", "_high")
    lines: list[list[object]] = [
        ["network", "parameters", "seeds", "failed", *(f"{s}{p}" for s in scores for p in parts)]
    ]
    lines[0].append(SECONDS)
    for row in found:
        line: list[object] = [row.network, row.parameters, row.seeds, row.failed]
        for score in scores:
            d = row.differences.get(score)
            ends = [math.nan] * 3 if d is None else [d.mean, d.low, d.high]
            line += [_number(x) for x in (row.mean(score), row.spread(score), *ends)]
        lines.append([*line, _number(row.mean(SECONDS))])
    _write(lines, path)


def write_runs_csv(
    tasks: Sequence[Task], results: Mapping[str, Run | Failure], scores: Sequence[str], path: Path
) -> None:
    """Every single run, unrounded."""
    lines: list[list[object]] = [["network", "seed", "folder", "parameters", *scores, SECONDS, "error"]]
    for task in tasks:
        if task.fills:
            continue
        run = results[task.folder]
        start: list[object] = [task.network, task.seed, task.folder]
        if isinstance(run, Failure):
            lines.append([*start, *("" for _ in scores), "", "", run.error])
        else:
            values = [_number(run.scores.get(s, math.nan)) for s in scores]
            lines.append([*start, run.parameters, *values, run.seconds, ""])
    _write(lines, path)


def _number(x: float) -> object:
    return "" if math.isnan(x) else x


def _write(lines: Sequence[Sequence[object]], path: Path) -> None:
    text = io.StringIO()
    csv.writer(text).writerows(lines)
    write_whole(path, text.getvalue().encode())
