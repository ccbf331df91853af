"""Tables and figures of a study of embeddings: means, and gains paired by seed."""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from matplotlib.figure import Figure
from scipy.stats import ttest_1samp

from lightning_rkd.plots.style import get_theme, new_figure, style_axes
from lightning_rkd.utils.statistics import Difference, paired_difference

from .methods import SCORES
from .runner import Row

NAMES = {"RKD": "RKD-DA", "RKDDistance": "RKD-D", "RKDAngle": "RKD-A", "none": "student alone"}
HEADS = {
    "recall_at_1": "recall@1",
    "map_at_r": "MAP@R",
    "asymmetric_recall_at_1": "recall@1, teacher's gallery",
    "neighbour_overlap_at_10": "common neighbours",
    "distance_correlation": "rank correlation",
}
GAINS = ("recall_at_1", "map_at_r")
Values = Mapping[str, Mapping[int, float]]
"""Scores by name and seed."""


class Line(NamedTuple):
    """A row of a table: scores, and for some the gain over the baseline with its p-value after Holm's correction."""

    name: str
    weight: str
    values: Values
    gains: Mapping[str, tuple[Difference, float]]


def correct(p_values: Sequence[float]) -> list[float]:
    """Holm's correction: p-values that keep the probability of a single false finding among all below the level."""
    order, worst, corrected = sorted(range(len(p_values)), key=p_values.__getitem__), 0.0, [0.0] * len(p_values)
    for rank, i in enumerate(order):
        worst = max(worst, min(1.0, (len(p_values) - rank) * p_values[i]))
        corrected[i] = worst
    return corrected


def collect(rows: Iterable[Row]) -> dict[tuple[str, str], tuple[str, dict[str, dict[int, float]]]]:
    """Weight and scores of the final runs, by loss and the loss beside it."""
    found: dict[tuple[str, str], tuple[str, dict[str, dict[int, float]]]] = {}
    for row in rows:
        _, values = found.setdefault((row["loss"], row["beside"]), (row["weight"], {}))
        for score in SCORES:
            if row[score]:
                values.setdefault(score, {})[int(row["seed"])] = float(row[score])
    return found


def compare(lines: Sequence[tuple[str, str, Values]], baseline: Values) -> list[Line]:
    """Lines with gains over a baseline, best first, corrected for the number of lines that have one."""
    gains: list[dict[str, tuple[Difference, float]]] = [{} for _ in lines]
    for score in GAINS:
        own = baseline.get(score, {})
        pairs = [[x - own[seed] for seed, x in v.get(score, {}).items() if seed in own] for _, _, v in lines]
        tested = [i for i, pair in enumerate(pairs) if len(pair) > 1 and lines[i][2] is not baseline]
        corrected = correct([float(ttest_1samp(pairs[i], 0).pvalue) for i in tested])
        for i, p in zip(tested, corrected, strict=True):
            difference = paired_difference(lines[i][2][score], own)
            assert difference is not None
            gains[i][score] = difference, p
    made = [Line(*line, own) for line, own in zip(lines, gains, strict=True)]
    return sorted(made, key=lambda line: -statistics.fmean(line.values["recall_at_1"].values()))


def name_loss(loss: str) -> str:
    """Name in tables."""
    short = re.sub(r"student_temperature=([\d.]+), teacher_temperature=\1", r"\1", loss)
    return NAMES.get(loss, re.sub(r"\bRKD (\+|of)", r"RKD-DA \1", short))


def tabulate(rows: Sequence[Row], together: bool = False) -> dict[str, list[Line]]:
    """Lines of a setting, by caption; tables whose baseline is missing are left out.

    Args:
        rows: Runs of the setting.
        together: Compare all with the student alone, in one table.
    """
    found = collect(row for row in rows if row["stage"] == "final")
    tables: dict[str, list[Line]] = {}
    if together:
        lines = [
            (name_loss(loss) + (f" + {other}" if loss != "none" != other else ""), weight, values)
            for (loss, other), (weight, values) in found.items()
        ]
        alone = found.get(("none", "triplet"))
        return {"Gain over the student alone, with the triplet loss": compare(lines, alone[1])} if alone else {}
    if ("none", "triplet") in found:
        beside = [
            (name_loss(loss) + ("" if other == "triplet" else f" ({other})"), weight, values)
            for (loss, other), (weight, values) in found.items()
            if other == "triplet" or loss == "none"
        ]
        tables["Beside the triplet loss: gain over the student alone"] = compare(beside, found["none", "triplet"][1])
    if ("RKD", "none") in found:
        alone = [
            (name_loss(loss) if other == "none" else f"{name_loss(loss)} beside {name_loss(other)}", weight, values)
            for (loss, other), (weight, values) in found.items()
            if other != "triplet" and loss != "none"
        ]
        tables["Without the triplet loss: gain over RKD-DA"] = compare(alone, found["RKD", "none"][1])
    return tables


def to_cells(lines: Sequence[Line], seeds: int) -> tuple[list[str], list[list[str]]]:
    """Head and rows of a table."""
    head = ["loss", "weight", "seeds", *(x for s in SCORES for x in (HEADS[s], *(["gain"] if s in GAINS else [])))]
    table = []
    for line in lines:
        count = len(line.values["recall_at_1"])
        weight = f"{float(line.weight):g}" if float(line.weight) else ""
        cells = [line.name, weight, str(count) if count == seeds else f"{count} of {seeds}"]
        for score in SCORES:
            values = list(line.values.get(score, {}).values())
            spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 and score in GAINS else ""
            cells.append(f"{statistics.fmean(values):.3f}{spread}" if values else "")
            if score in GAINS:
                cells.append(format_gain(*line.gains[score]) if score in line.gains else "")
        table.append(cells)
    return head, table


def format_gain(gain: Difference, p: float) -> str:
    """Mean and interval, bold if it stands after the correction."""
    text = f"{gain.mean:+.3f} [{gain.low:+.3f}, {gain.high:+.3f}]"
    return f"**{text}**" if p < 0.05 else text


def draw(tables: Mapping[str, Sequence[Line]], score: str = "recall_at_1") -> Figure:
    """Gains with their intervals, sorted; filled dots stand after the correction."""
    look = get_theme(dark=False)
    panels = {caption: [line for line in lines if score in line.gains] for caption, lines in tables.items()}
    longest = max(1, *(len(lines) for lines in panels.values()))
    figure = new_figure(6.2 * len(panels), 1.2 + 0.24 * longest, look)
    for ax, (caption, lines) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        lines = sorted(lines, key=lambda line: line.gains[score][0].mean)
        ax.axvline(0, color=look.ink, linewidth=0.8)
        for place, line in enumerate(lines):
            gain, p = line.gains[score]
            ax.plot([gain.low, gain.high], [place, place], color=look.ink, linewidth=1.2)
            fill = look.ink if p < 0.05 else look.paper
            ax.plot(gain.mean, place, "o", color=look.ink, markersize=5, markerfacecolor=fill)
        ax.set_yticks(range(len(lines)), [line.name for line in lines])
        ax.set_ylim(-0.7, longest - 0.3)
        ax.set_title(caption, fontsize=11)
        ax.set_xlabel(f"{HEADS[score]}: mean gain and 95 % interval", fontsize=10)
        ax.locator_params(axis="x", nbins=6)
        style_axes(ax, look, "x")
    figure.tight_layout()
    return figure


def describe(rows: Sequence[Row], command: str) -> str:
    """Command, dates, hours, hardware, versions and commits of the runs."""
    hours = sum(float(row["seconds"]) for row in rows) / 3600
    dates, tuning = sorted(row["date"][:10] for row in rows), sum(row["stage"] == "tune" for row in rows)
    facts = {
        "command": f"`{command}`",
        "runs": f"{len(rows):,}, of which {tuning:,} for tuning; {hours:.1f} hours of one thread, beside other work",
        "trained": dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}",
        **{name: "; ".join(dict.fromkeys(row[name] for row in rows)) for name in ("hardware", "versions", "commit")},
    }
    return "\n".join(f"- {name}: {text}" for name, text in facts.items())
