"""Queries and their nearest images in several networks."""

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from lightning_rkd.plots.style import MARKS, add_title, check_embeddings, get_theme, hide_ticks, new_figure, to_pixels


def neighbours(
    images: Tensor,
    labels: Tensor | None,
    embeddings: Mapping[str, Tensor],
    queries: Sequence[int] | None = None,
    k: int = 5,
    title: str = "",
    dark: bool = False,
) -> Figure:
    """Plot queries, one per row, with their nearest images in each network.

    Neighbours of the query's class have a blue frame and a check mark, others a vermilion frame and a cross.

    Args:
        images: (N, C, H, W), uint8 or in 0 to 1, C 1 or 3.
        labels: (N,) classes; ``None`` leaves out frames and marks.
        embeddings: (N, D) by name of the network, in the order of the columns.
        queries: Row numbers of the queries; ``None`` draws six, of different classes if these are known, with a fixed
            seed.
        k: Number of neighbours.
        title: Title of the figure.
        dark: Use a dark background.

    Example:
        >>> x, y = torch.rand(8, 1, 6, 6), torch.arange(8) // 4
        >>> figure = neighbours(x, y, {"teacher": torch.rand(8, 3), "student": torch.rand(8, 2)}, queries=[0, 5], k=2)
        >>> len(figure.axes)
        10
    """
    look = get_theme(dark)
    labels = None if labels is None else labels.cpu()
    plain = check_embeddings(embeddings, **({} if labels is None else {"labels": labels}), images=images)
    k = min(k, len(images) - 1)
    queries = _draw_queries(labels, len(images), 6) if queries is None else [int(query) for query in queries]
    if k < 1 or not queries:
        raise ValueError(f"nothing to show: {len(queries)} queries, {k} neighbours")
    if unknown := [query for query in queries if not 0 <= query < len(images)]:
        raise ValueError(f"queries must be rows between 0 and {len(images) - 1}, got {unknown}")
    distances = {name: torch.cdist(x[queries], x) for name, x in plain.items()}
    for far in distances.values():
        far[torch.arange(len(queries)), queries] = torch.inf
    found = {name: far.topk(k, largest=False).indices for name, far in distances.items()}
    pixels = to_pixels(images)

    gap = 0.45
    widths = [1.0] + [width for _ in found for width in (gap, *[1.0] * k)]
    cell = 12.0 / sum(widths)
    figure = new_figure(12.0, cell * len(queries) * 1.06 + (0.95 if title else 0.65), look)
    grid = figure.add_gridspec(
        len(queries),
        len(widths),
        width_ratios=widths,
        left=0.005,
        right=0.995,
        bottom=0.12 / figure.get_figheight(),
        top=1 - (0.9 if title else 0.6) / figure.get_figheight(),
        wspace=0.08,
        hspace=0.08,
    )
    for i, query in enumerate(queries):
        ax = figure.add_subplot(grid[i, 0])
        _draw_image(ax, pixels[query], look.ink, "")
        if i == 0:
            ax.set_title("query", fontsize=12, color=look.ink, pad=9)
        for j, (name, nearest) in enumerate(found.items()):
            for n in range(k):
                ax = figure.add_subplot(grid[i, 2 + j * (k + 1) + n])
                row = int(nearest[i, n])
                sign, colour = ("", look.ink) if labels is None else MARKS[bool(labels[row] == labels[query])]
                _draw_image(ax, pixels[row], colour, sign)
                if i == 0 and n == 0:
                    ax.set_title(name, fontsize=12, color=look.ink, loc="left", pad=9, linespacing=1.3)
    add_title(figure, title, look)
    return figure


def _draw_image(ax: Axes, picture: npt.NDArray[np.float32], colour: str, sign: str) -> None:
    ax.imshow(picture, cmap="gray", vmin=0, vmax=1, interpolation="nearest" if picture.shape[0] < 64 else "antialiased")
    hide_ticks(ax, colour, width=2.5 if sign else 1)
    if sign:
        ax.add_patch(Rectangle((0.7, 0), 0.3, 0.3, transform=ax.transAxes, facecolor=colour, linewidth=0))
        text = ax.text(0.85, 0.14, sign, transform=ax.transAxes, ha="center", va="center", fontsize=9)
        text.set(color="white", fontweight="bold")


def _draw_queries(labels: Tensor | None, rows: int, count: int) -> list[int]:
    """Some rows, of different classes with at least two samples if there are labels."""
    order = np.random.default_rng(0).permutation(rows)
    if labels is None:
        return [int(row) for row in order[:count]]
    _, first, sizes = np.unique(labels.numpy()[order], return_index=True, return_counts=True)
    queries: list[int] = order[np.sort(first[sizes > 1])[:count]].tolist()
    return queries
