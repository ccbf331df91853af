"""Colours that colour-blind readers tell apart, on light and on dark paper."""

from __future__ import annotations

from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

RIGHT, WRONG = "#0072b2", "#d55e00"
"""Blue and vermilion of Okabe and Ito."""

COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#b8a800", "#888888")
"""Okabe and Ito's, the yellow darkened and the black made grey, so that all are seen on white and on black."""

DASHES = ((0, ()), (0, (6, 2)), (0, (2, 1.5)), (0, (6, 2, 1.5, 2)))
"""Lines differ by these too."""


@dataclass(frozen=True)
class Theme:
    """What is not data.

    Attributes:
        ink: Of text.
        faint: Of marks that stay behind.
        grid: Of grid lines.
        paper: Behind everything.
    """

    ink: str
    faint: str
    grid: str
    paper: str


_LIGHT, _DARK = Theme("#222222", "#777777", "#dddddd", "#ffffff"), Theme("#e8e8e8", "#9a9a9a", "#3d3d3d", "#16181d")


def theme(dark: bool) -> Theme:
    """Of one of the two kinds of paper.

    Example:
        >>> theme(dark=True).paper, theme(dark=False).paper
        ('#16181d', '#ffffff')
    """
    return _DARK if dark else _LIGHT


def new_figure(width: float, height: float, look: Theme) -> Figure:
    """A figure of so many inches, which no window or global state knows of."""
    figure = Figure(figsize=(width, height), dpi=100, facecolor=look.paper)
    FigureCanvasAgg(figure)
    return figure


def plain_axes(ax: Axes, look: Theme, grid: str | None = "both") -> None:
    """Axes without a frame, with labels in ink and, along ``"x"``, ``"y"`` or ``"both"``, a grid behind the data."""
    ax.set_facecolor(look.paper)
    if grid is not None:
        ax.grid(axis=grid, color=look.grid, linewidth=0.8)  # type: ignore[arg-type]
    ax.set_axisbelow(True)
    ax.tick_params(which="both", labelsize=10, labelcolor=look.ink, length=0)
    for label in (ax.xaxis.label, ax.yaxis.label, ax.title):
        label.set_color(look.ink)
    for spine in ax.spines.values():
        spine.set_visible(False)


def head(figure: Figure, title: str, look: Theme) -> None:
    """A title above everything, at the left."""
    if title:
        height = figure.get_figheight()
        figure.suptitle(title, x=0.01, y=1 - 0.1 / height, ha="left", va="top", fontsize=14, color=look.ink)
