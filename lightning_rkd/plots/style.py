"""Shared by the figures: colours that suit colour-blind readers, axes, titles, and checks before drawing."""

import io
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

RIGHT, WRONG = "#0072b2", "#d55e00"
"""Blue and vermilion of Okabe and Ito's palette."""

MARKS = {True: ("\N{CHECK MARK}", RIGHT), False: ("\N{MULTIPLICATION SIGN}", WRONG)}
"""Sign and colour of right and wrong."""

COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#b8a800", "#888888")
"""Okabe and Ito's palette with a darker yellow, and grey for black, so that all show on white and on black."""

DASHES = ((0, ()), (0, (6, 2)), (0, (2, 1.5)), (0, (6, 2, 1.5, 2)))
"""Dash patterns of lines, which differ by colour and pattern."""


class Theme(NamedTuple):
    """Colours of text, grid lines and background."""

    ink: str
    grid: str
    paper: str


_LIGHT, _DARK = Theme("#222222", "#dddddd", "#ffffff"), Theme("#e8e8e8", "#3d3d3d", "#16181d")


def get_theme(dark: bool) -> Theme:
    """Colours for a light or a dark background."""
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


def hide_ticks(ax: Axes, colour: str = "none", width: float = 1) -> None:
    """Remove the ticks, and give the frame a colour and a width."""
    ax.set_xticks([])
    ax.set_yticks([])
    for spine in ax.spines.values():
        spine.set(color=colour, linewidth=width)


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


def to_png(figure: Figure) -> bytes:
    """The figure as a PNG file."""
    content = io.BytesIO()
    figure.savefig(content, format="png")
    return content.getvalue()


def check_embeddings(embeddings: Mapping[str, Tensor], **others: Tensor) -> dict[str, Tensor]:
    """Embeddings without gradients, in float64, on the CPU; refuses what cannot be drawn."""
    if not embeddings:
        raise ValueError("nothing to show: no embeddings")
    lengths = {name: len(x) for name, x in {**others, **embeddings}.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"{', '.join([*others, 'embeddings'])} are of different lengths: {lengths}")
    plain = {name: x.detach().double().cpu() for name, x in embeddings.items()}
    for name, x in plain.items():
        if x.ndim != 2:
            raise ValueError(f"embeddings must be (N, D), got {tuple(x.shape)} of {name!r}")
        if len(x) < 2:
            raise ValueError(f"nothing to show: {len(x)} samples")
        if not (finite := x.isfinite().all(1)).all():
            raise ValueError(
                f"the embeddings of {name!r} hold NaN or infinity, first in row {int(finite.int().argmin())}, and "
                "cannot be drawn"
            )
    return plain


def to_pixels(images: Tensor) -> npt.NDArray[np.float32]:
    """Images (N, C, H, W), uint8 or in 0 to 1 -> (N, H, W) or (N, H, W, 3) in 0 to 1."""
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise ValueError(f"images must be (N, 1, H, W) or (N, 3, H, W), got {tuple(images.shape)}")
    pixels = images.float() if images.is_floating_point() else images.float() / 255
    array: npt.NDArray[np.float32] = pixels.clamp(0, 1).movedim(1, 3).squeeze(3).cpu().numpy()
    return array
