"""Colours that suit colour-blind readers, on light and dark backgrounds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

RIGHT, WRONG = "#0072b2", "#d55e00"
"""Blue and vermilion of Okabe and Ito's palette."""

COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#b8a800", "#888888")
"""Okabe and Ito's palette with a darker yellow, and grey for black, so that all show on white and on black."""

DASHES = ((0, ()), (0, (6, 2)), (0, (2, 1.5)), (0, (6, 2, 1.5, 2)))
"""Dash patterns of lines, which differ by colour and pattern."""


@dataclass(frozen=True)
class Theme:
    """Colours of text, grid lines and background."""

    ink: str
    grid: str
    paper: str


_LIGHT, _DARK = Theme("#222222", "#dddddd", "#ffffff"), Theme("#e8e8e8", "#3d3d3d", "#16181d")


def get_theme(dark: bool) -> Theme:
    """Colours for a light or a dark background.

    Example:
        >>> get_theme(dark=True).paper, get_theme(dark=False).paper
        ('#16181d', '#ffffff')
    """
    return _DARK if dark else _LIGHT


def new_figure(width: float, height: float, look: Theme) -> Figure:
    """A figure of a size in inches, outside pyplot."""
    figure = Figure(figsize=(width, height), dpi=100, facecolor=look.paper)
    FigureCanvasAgg(figure)
    return figure


def style_axes(ax: Axes, look: Theme, grid: str | None = "both") -> None:
    """Remove the frame, and add a grid behind the data along ``"x"``, ``"y"`` or ``"both"``."""
    ax.set_facecolor(look.paper)
    if grid is not None:
        ax.grid(axis=grid, color=look.grid, linewidth=0.8)  # type: ignore[arg-type]
    ax.set_axisbelow(True)
    ax.tick_params(which="both", labelsize=10, labelcolor=look.ink, length=0)
    for label in (ax.xaxis.label, ax.yaxis.label, ax.title):
        label.set_color(look.ink)
    for spine in ax.spines.values():
        spine.set_visible(False)


def add_title(figure: Figure, title: str, look: Theme) -> None:
    """Add a title at the top left."""
    if title:
        height = figure.get_figheight()
        figure.suptitle(title, x=0.01, y=1 - 0.1 / height, ha="left", va="top", fontsize=14, color=look.ink)


def finish_lines(figure: Figure, axes: Sequence[Axes], title: str, look: Theme) -> Figure:
    """Style the panels of lines, with a legend in the first one and a title."""
    for ax in axes:
        style_axes(ax, look)
    axes[0].legend(frameon=False, fontsize=10, labelcolor=look.ink)
    add_title(figure, title, look)
    figure.tight_layout()
    return figure
