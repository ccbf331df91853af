"""Curves over training steps: scores, loss terms, and their shares of the gradient."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lightning_rkd.plots.style import COLOURS, DASHES, finish_lines, get_theme, new_figure

Curve = Mapping[int, float]
"""Values by step."""


def read_metrics(path: str | Path) -> dict[str, dict[int, float]]:
    """Read ``metrics.csv`` of Lightning's ``CSVLogger``: values by name and ascending step.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder, "metrics.csv")
        ...     _ = path.write_text("epoch,step,train/loss,val/recall_at_1\\n0,9,0.5,\\n0,9,,0.25\\n")
        ...     read_metrics(path)
        {'train/loss': {9: 0.5}, 'val/recall_at_1': {9: 0.25}}
    """
    with Path(path).open(newline="", encoding="utf-8") as file:
        lines = csv.DictReader(file)
        if "step" not in (lines.fieldnames or ()):
            raise ValueError(f"{str(path)!r} has no column 'step': it is no metrics.csv of a CSVLogger")
        found: dict[str, dict[int, float]] = {}
        for line in lines:
            for name, text in line.items():
                if text and name not in ("epoch", "step", None):
                    found.setdefault(name, {})[int(float(line["step"]))] = float(text)
    return {name: dict(sorted(curve.items())) for name, curve in found.items()}


def curves(values: Mapping[str, Curve], label: str, title: str = "", log: bool = False, dark: bool = False) -> Figure:
    """Plot a score over training, one line per network.

    Args:
        values: Values by step, by name of the network.
        label: Label of the vertical axis, with its unit.
        title: Title of the figure.
        log: Use a logarithmic vertical axis, without values that are not positive.
        dark: Use a dark background.

    Example:
        >>> figure = curves({"alone": {10: 0.2, 20: 0.3}, "RKD": {10: 0.3, 20: 0.4}}, "recall@1")
        >>> figure.axes[0].get_xlabel(), figure.axes[0].get_ylabel()
        ('step', 'recall@1')
    """
    if not any(values.values()):
        raise ValueError("nothing to show: no values")
    look = get_theme(dark)
    figure = new_figure(9.0, 4.6, look)
    ax = figure.subplots()
    _lines(ax, values, list(values))
    if log:
        ax.set_yscale("log")
    ax.set_xlabel("step", fontsize=11)
    ax.set_ylabel(label, fontsize=11)
    return finish_lines(figure, [ax], title, look)


def loss_terms(history: Mapping[str, Curve], title: str = "", dark: bool = False) -> Figure:
    """Plot the logged loss terms of a run and, below, the share of each in the gradient.

    Shares come from ``gradient/<term>``: the norm of the weighted term's gradient at the features it reads, in units of
    the task's. ``compare_gradients`` of module and callback logs them, in every logged step if it is ``"step"``.

    Args:
        history: ``train/task``, ``distill/<term>`` and ``gradient/<term>``, see :func:`read_metrics`.
        title: Title of the figure.
        dark: Use a dark background.

    Example:
        >>> steps = {0: 2.0, 10: 1.0}
        >>> figure = loss_terms({"train/task": steps, "distill/RKD": steps, "gradient/RKD": {0: 1.0, 10: 3.0}})
        >>> [round(float(y), 2) for y in figure.axes[1].lines[0].get_ydata()]  # of the task
        [0.5, 0.25]
    """
    terms = {"task": history.get("train/task", {})}
    terms |= {n.removeprefix("distill/"): c for n, c in history.items() if n.startswith("distill/")}
    terms = {name: curve for name, curve in terms.items() if curve}
    if not terms:
        raise ValueError("nothing to show: the history holds neither train/task nor distill/<term>")
    shares = _shares(history, list(terms))
    look = get_theme(dark)
    figure = new_figure(9.0, 7.2 if shares else 4.6, look)
    panels = figure.subplots(2 if shares else 1, 1, sharex=True, squeeze=False)[:, 0]
    _lines(panels[0], terms, list(terms))
    panels[0].set_yscale("log")
    panels[0].set_ylabel("loss term (logarithmic)", fontsize=11)
    if shares:
        _lines(panels[1], shares, list(terms))
        panels[1].set_ylim(0, 1)
        panels[1].set_ylabel("share of the gradient", fontsize=11)
    panels[-1].set_xlabel("step", fontsize=11)
    return finish_lines(figure, list(panels), title, look)


def _shares(history: Mapping[str, Curve], names: Sequence[str]) -> dict[str, dict[int, float]]:
    """Share of each term in the sum of all gradient norms, of which the task's is 1."""
    lengths = {name: history[f"gradient/{name}"] for name in names if f"gradient/{name}" in history}
    steps = sorted(set.intersection(*(set(curve) for curve in lengths.values()))) if lengths else []
    if not steps or "task" not in names:
        return {}
    total = {step: 1 + sum(curve[step] for curve in lengths.values()) for step in steps}
    found = {"task": {step: 1 / total[step] for step in steps}}
    return found | {name: {step: curve[step] / total[step] for step in steps} for name, curve in lengths.items()}


def _lines(ax: Axes, values: Mapping[str, Curve], names: Sequence[str]) -> None:
    """Plot curves in the colour and dashes of the place of their name among all names."""
    for name, curve in values.items():
        n = names.index(name)
        (line,) = ax.plot(list(curve), np.array(list(curve.values())), label=name, linewidth=2)
        line.set(color=COLOURS[n % len(COLOURS)], linestyle=DASHES[n % len(DASHES)])
