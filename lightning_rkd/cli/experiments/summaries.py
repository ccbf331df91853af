"""The demo's table: mean and spread of the runs of each network, for people and for programs."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_rkd.cli.experiments.runs import Run
from lightning_rkd.utils.files import write_whole


@dataclass(frozen=True)
class Summary:
    """Mean and spread (standard deviation) of the runs of one network; the spread of a single run is 0."""

    network: str
    parameters: int
    seeds: int
    mean: dict[str, float]
    spread: dict[str, float]


def summarise(runs: Iterable[Run]) -> list[Summary]:
    """Mean and spread over seeds, one summary a network, in the order of their first runs.

    Example:
        >>> runs = [Run("student", seed, 10, 1.0, {"recall_at_1": r}) for seed, r in enumerate((0.3, 0.5))]
        >>> summary = summarise(runs)[0]
        >>> round(summary.mean["recall_at_1"], 3), round(summary.spread["recall_at_1"], 3)
        (0.4, 0.141)
    """
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.network, []).append(run)
    summaries = []
    for network, group in groups.items():
        columns = {name: [run.scores[name] for run in group] for name in group[0].scores}
        columns["seconds"] = [run.seconds for run in group]
        mean = {name: statistics.fmean(values) for name, values in columns.items()}
        spread = {name: statistics.stdev(values) if len(values) > 1 else 0.0 for name, values in columns.items()}
        summaries.append(Summary(network, group[0].parameters, len(group), mean, spread))
    return summaries


def cells(summary: Summary, columns: Sequence[str]) -> list[str]:
    """A row of the table for people: name, parameters, and mean ± spread of every column.

    Example:
        >>> cells(Summary("student", 3880, 3, {"recall_at_1": 0.34567}, {"recall_at_1": 0.01234}), ["recall_at_1"])
        ['student', '3,880', '0.346 ± 0.012']
    """
    row = [summary.network, f"{summary.parameters:,}"]
    for name in columns:
        digits = 0 if name == "seconds" else 3
        spread = f" ± {summary.spread[name]:.{digits}f}" if summary.seeds > 1 and digits else ""
        row.append(f"{summary.mean[name]:.{digits}f}{spread}")
    return row


def markdown(summaries: Sequence[Summary], columns: Sequence[str]) -> str:
    """The table in Markdown.

    Example:
        >>> print(markdown([Summary("student", 3880, 1, {"recall_at_1": 0.3}, {"recall_at_1": 0.0})], ["recall_at_1"]))
        | network | parameters | recall_at_1 |
        |---|---:|---:|
        | student | 3,880 | 0.300 |
        <BLANKLINE>
    """
    titles = ["network", "parameters", *columns]
    lines = [titles, *(cells(summary, columns) for summary in summaries)]
    table = [f"| {' | '.join(line)} |" for line in lines]
    return "\n".join([table[0], "|---|" + "---:|" * (len(titles) - 1), *table[1:], ""])


def write_csv(summaries: Sequence[Summary], path: Path) -> None:
    """The table for programs: for every score its mean and, as ``<score>_spread``, its spread, unrounded."""
    scores = list(summaries[0].mean)
    rows: list[Sequence[Any]] = [["network", "parameters", "seeds", *(n for s in scores for n in (s, f"{s}_spread"))]]
    for summary in summaries:
        values = (v for s in scores for v in (summary.mean[s], summary.spread[s]))
        rows.append([summary.network, summary.parameters, summary.seeds, *values])
    _write_rows(rows, path)


def write_runs_csv(runs: Sequence[Run], path: Path) -> None:
    """Every single run, unrounded."""
    scores = list(runs[0].scores)
    rows: list[Sequence[Any]] = [["network", "seed", "parameters", *scores, "seconds"]]
    rows += [[run.network, run.seed, run.parameters, *(run.scores[s] for s in scores), run.seconds] for run in runs]
    _write_rows(rows, path)


def _write_rows(rows: Iterable[Sequence[Any]], path: Path) -> None:
    text = io.StringIO()
    csv.writer(text).writerows(rows)
    write_whole(path, text.getvalue().encode())
