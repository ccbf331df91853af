"""Scores of several networks: runs, means and confidence intervals."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from lightning_rkd.plots.style import RIGHT, WRONG, add_title, get_theme, new_figure, style_axes
from lightning_rkd.utils.statistics import confidence_half_width


def comparison(
    values: Mapping[str, Mapping[str, Sequence[float]]],
    baseline: str | None = None,
    title: str = "",
    dark: bool = False,
) -> Figure:
    """Plot the scores of networks, one row each: a dot per run, a bar at the mean, a line for its 95 % interval.

    Args:
        values: Finite scores of the runs, by network and score; one panel per score. Other values are left out.
        baseline: Network whose mean is drawn through all rows.
        title: Title of the figure.
        dark: Use a dark background.

    Example:
        >>> figure = comparison({"alone": {"recall": [0.3, 0.4]}, "RKD": {"recall": [0.5, 0.6]}}, baseline="alone")
        >>> len(figure.axes)
        1
    """
    look = get_theme(dark)
    values = {
        name: {score: [x for x in runs if np.isfinite(x)] for score, runs in own.items()}
        for name, own in values.items()
    }
    scores = list(dict.fromkeys(score for own in values.values() for score, runs in own.items() if runs))
    if not scores:
        raise ValueError("nothing to show: no scores")
    names, height = list(values), 1.1 + 0.34 * len(values)
    figure = new_figure(3.2 + 3.6 * len(scores), height, look)
    panels = figure.subplots(1, len(scores), sharey=True, squeeze=False)[0]
    for ax, score in zip(panels, scores, strict=True):
        for row, name in enumerate(names):
            if not (own := values[name].get(score, ())):
                continue
            colour = WRONG if name == baseline else RIGHT
            mean = float(np.mean(own))
            if len(own) > 1:
                half = confidence_half_width(own)
                ax.plot([mean - half, mean + half], [row, row], color=colour, linewidth=1.5, alpha=0.55, zorder=2)
            ax.scatter(own, [row] * len(own), s=22, facecolor=look.paper, edgecolor=colour, linewidth=1.2, zorder=3)
            ax.plot([mean, mean], [row - 0.3, row + 0.3], color=colour, linewidth=2.5, zorder=4)
            if name == baseline:
                ax.axvline(mean, color=WRONG, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
        dots = [x for own in values.values() for x in own.get(score, ())]
        margin = 0.08 * (max(dots) - min(dots)) or 0.05
        ax.set_xlim(min(dots) - margin, max(dots) + margin)  # wide intervals of few runs are cut
        ax.set_xlabel(score, fontsize=11, color=look.ink)
        ax.set_ylim(len(names) - 0.4, -0.6)
        ax.set_yticks(range(len(names)), names)
        style_axes(ax, look, "x")
    add_title(figure, title, look)
    figure.tight_layout()
    return figure
