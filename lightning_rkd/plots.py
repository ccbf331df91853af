"""Pictures of what a student has learned: functions that return matplotlib figures, and touch no global state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from lightning_rkd.paired import t_quantile

RIGHT, WRONG = "#0072b2", "#d55e00"
"""Blue and vermilion of Okabe and Ito, which colour-blind readers tell apart."""

_SIGNS = {True: ("\N{CHECK MARK}", RIGHT), False: ("\N{MULTIPLICATION SIGN}", WRONG)}
_INK, _FAINT = "#222222", "#777777"


def neighbours(
    images: Tensor,
    labels: Tensor,
    embeddings: Mapping[str, Tensor],
    queries: Sequence[int] | None = None,
    k: int = 5,
    title: str = "",
) -> Figure:
    """Rows of queries, each with the nearest images that every network finds, right and wrong marked.

    Right neighbours (of the query's class) carry a blue frame and a check mark, wrong ones a vermilion frame and a
    cross.

    Args:
        images: (N, C, H, W), uint8 or floating point in 0 to 1, C 1 or 3.
        labels: (N,).
        embeddings: (N, D) by name of the network, in the order of the columns.
        queries: Rows to ask with; ``None`` draws six of different classes, at random but always the same.
        k: Neighbours shown.
        title: Above everything.

    Raises:
        ValueError: Nothing to show, or images, labels and embeddings of different lengths.

    Example:
        >>> x, y = torch.rand(8, 1, 6, 6), torch.arange(8) // 4
        >>> figure = neighbours(x, y, {"teacher": torch.rand(8, 3), "student": torch.rand(8, 2)}, queries=[0, 5], k=2)
        >>> len(figure.axes)
        10
    """
    _check(labels, embeddings, images=images)
    k = min(k, len(labels) - 1)
    queries = _some_queries(labels, 6) if queries is None else queries
    if k < 1 or not queries:
        raise ValueError(f"nothing to show: {len(queries)} queries, {k} neighbours")
    rows = torch.as_tensor(queries)
    found = {name: _nearest(x, rows, k) for name, x in embeddings.items()}
    pictures = _pictures(images)

    gap = 0.45
    widths = [1.0] + [width for _ in found for width in (gap, *[1.0] * k)]
    cell = 12.0 / sum(widths)
    figure = _figure(12.0, cell * len(queries) * 1.06 + (0.95 if title else 0.65))
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
        _show(ax, pictures[query], _INK, "")
        if i == 0:
            ax.set_title("query", fontsize=12, color=_INK, pad=9)
        for j, (name, nearest) in enumerate(found.items()):
            for n in range(k):
                ax = figure.add_subplot(grid[i, 2 + j * (k + 1) + n])
                row = int(nearest[i, n])
                sign, colour = _SIGNS[bool(labels[row] == labels[query])]
                _show(ax, pictures[row], colour, sign)
                if i == 0 and n == 0:
                    ax.set_title(name, fontsize=12, color=_INK, loc="left", pad=9, linespacing=1.3)
    if title:
        figure.suptitle(title, x=0.005, y=1 - 0.1 / figure.get_figheight(), ha="left", va="top", fontsize=14)
    return figure


def relations(
    embeddings: Mapping[str, Tensor],
    labels: Tensor,
    class_names: Sequence[str] | None = None,
    max_classes: int = 12,
    samples_per_class: int = 8,
    title: str = "",
) -> Figure:
    """Distance matrices side by side: how every network relates the same samples.

    Rows and columns are samples, class by class; the classes are drawn at random but always the same, and neighbouring
    classes of the first network stand next to each other. Distances are divided by the network's mean distance, so
    that one scale fits all.

    Args:
        embeddings: (N, D) by name of the network, in the order of the panels; the first orders the classes.
        labels: (N,).
        class_names: Name of every class, written beside the matrix where names are short.
        max_classes: Classes shown.
        samples_per_class: Samples shown of each.
        title: Above everything.

    Raises:
        ValueError: Nothing to show, or labels and embeddings of different lengths.

    Example:
        >>> y = torch.arange(12) // 4
        >>> figure = relations({"teacher": torch.rand(12, 3), "student": torch.rand(12, 2)}, y)
        >>> len(figure.axes)  # two matrices and the colour bar
        3
    """
    _check(labels, embeddings)
    first = next(iter(embeddings.values()))
    rows = _ordered_rows(first, labels, max_classes, samples_per_class)
    matrices = {name: _relative_distances(x[rows]) for name, x in embeddings.items()}
    top = float(np.quantile(np.stack(list(matrices.values())), 0.995))
    starts = np.flatnonzero(np.diff(labels[rows].numpy(), prepend=-1))
    names = [str(class_names[int(labels[rows[s]])]) for s in starts] if class_names is not None else []
    names = names if max(map(len, names), default=99) <= 14 else []
    long = max(map(len, names), default=0) > 2

    left, bar, panels = (1.1 if long else 0.35), 0.95, len(matrices)
    side = (12.0 - left - bar - 0.18 * (panels - 1)) / panels
    top_margin = 1.0 if title else 0.75
    height = side + top_margin + 0.25
    figure = _figure(12.0, height)
    centres = np.diff(np.append(starts, len(rows))) / 2 + starts - 0.5
    for i, (name, matrix) in enumerate(matrices.items()):
        box = ((left + i * (side + 0.18)) / 12, 0.25 / height, side / 12, side / height)
        ax = figure.add_axes(box)
        shown = ax.imshow(matrix, cmap="viridis", vmin=0, vmax=top, interpolation="nearest")
        for start in starts[1:]:
            ax.axhline(start - 0.5, color="white", linewidth=0.5, alpha=0.6)
            ax.axvline(start - 0.5, color="white", linewidth=0.5, alpha=0.6)
        ax.set_title(name, fontsize=12, color=_INK, loc="left", pad=6, linespacing=1.3)
        ax.set_xticks([])
        ax.set_yticks(centres if names and i == 0 else [], names if names and i == 0 else [], fontsize=9)
        ax.tick_params(length=0, labelcolor=_INK)
        for spine in ax.spines.values():
            spine.set_visible(False)
    scale = figure.add_axes(((12 - bar + 0.14) / 12, 0.25 / height, 0.14 / 12, side / height))
    colours = figure.colorbar(shown, cax=scale)
    colours.set_label("distance / mean distance", fontsize=10, color=_INK)
    colours.outline.set_visible(False)
    scale.tick_params(labelsize=9, labelcolor=_INK, length=0)
    if title:
        figure.suptitle(title, x=left / 12, y=1 - 0.1 / height, ha="left", va="top", fontsize=14, color=_INK)
    return figure


def comparison(
    values: Mapping[str, Mapping[str, Sequence[float]]], baseline: str | None = None, title: str = ""
) -> Figure:
    """Networks from top to bottom: every run a dot, the mean a bar across, its 95 % interval a line.

    Args:
        values: By network and score, one of each run; a panel a score.
        baseline: Network whose mean is drawn through all rows.
        title: Above everything.

    Raises:
        ValueError: Nothing to show.

    Example:
        >>> figure = comparison({"alone": {"recall": [0.3, 0.4]}, "RKD": {"recall": [0.5, 0.6]}}, baseline="alone")
        >>> len(figure.axes)
        1
    """
    scores = list(dict.fromkeys(score for own in values.values() for score in own))
    if not scores:
        raise ValueError("nothing to show: no scores")
    names, height = list(values), 1.1 + 0.34 * len(values)
    figure = _figure(3.2 + 3.6 * len(scores), height)
    panels = figure.subplots(1, len(scores), sharey=True, squeeze=False)[0]
    for ax, score in zip(panels, scores, strict=True):
        for row, name in enumerate(names):
            own = [x for x in values[name].get(score, ()) if np.isfinite(x)]
            if not own:
                continue
            colour = WRONG if name == baseline else RIGHT
            mean = float(np.mean(own))
            if len(own) > 1:
                half = t_quantile(0.975, len(own) - 1) * float(np.std(own, ddof=1)) / len(own) ** 0.5
                ax.plot([mean - half, mean + half], [row, row], color=colour, linewidth=1.5, alpha=0.55, zorder=2)
            ax.scatter(own, [row] * len(own), s=22, facecolor="white", edgecolor=colour, linewidth=1.2, zorder=3)
            ax.plot([mean, mean], [row - 0.3, row + 0.3], color=colour, linewidth=2.5, zorder=4)
            if name == baseline:
                ax.axvline(mean, color=WRONG, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
        dots = [x for own in values.values() for x in own.get(score, ()) if np.isfinite(x)]
        margin = 0.08 * (max(dots) - min(dots)) or 0.05
        ax.set_xlim(min(dots) - margin, max(dots) + margin)  # wide intervals of few runs are cut
        ax.set_xlabel(score, fontsize=11, color=_INK)
        ax.set_ylim(len(names) - 0.4, -0.6)
        ax.set_yticks(range(len(names)), names)
        ax.grid(axis="x", color="#dddddd", linewidth=0.8)
        ax.set_axisbelow(True)
        ax.tick_params(labelsize=10, labelcolor=_INK, length=0)
        for spine in ax.spines.values():
            spine.set_visible(False)
    if title:
        figure.suptitle(title, fontsize=13, color=_INK)
    figure.tight_layout()
    return figure


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), dpi=100, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def _show(ax: Axes, picture: npt.NDArray[np.float32], colour: str, sign: str) -> None:
    ax.imshow(picture, cmap="gray", vmin=0, vmax=1, interpolation="nearest" if picture.shape[0] < 64 else "antialiased")
    ax.set_xticks([])
    ax.set_yticks([])
    for spine in ax.spines.values():
        spine.set_color(colour)
        spine.set_linewidth(2.5 if sign else 1)
    if sign:
        ax.add_patch(Rectangle((0.7, 0), 0.3, 0.3, transform=ax.transAxes, facecolor=colour, linewidth=0))
        ax.text(0.85, 0.14, sign, transform=ax.transAxes, color="white", ha="center", va="center", fontsize=9,
                fontweight="bold")  # fmt: skip


def _check(labels: Tensor, embeddings: Mapping[str, Tensor], **others: Tensor) -> None:
    if not embeddings:
        raise ValueError("nothing to show: no embeddings")
    lengths = {name: len(x) for name, x in {"labels": labels, **others, **embeddings}.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"labels and embeddings are of different lengths: {lengths}")
    if len(labels) < 2:
        raise ValueError(f"nothing to show: {len(labels)} samples")


def _pictures(images: Tensor) -> npt.NDArray[np.float32]:
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise ValueError(f"images must be (N, 1, H, W) or (N, 3, H, W), got {tuple(images.shape)}")
    pixels = images.float() if images.is_floating_point() else images.float() / 255
    pictures: npt.NDArray[np.float32] = pixels.clamp(0, 1).movedim(1, 3).squeeze(3).cpu().numpy()
    return pictures


def _nearest(x: Tensor, queries: Tensor, k: int) -> Tensor:
    distances = torch.cdist(x[queries].double(), x.double())
    distances[torch.arange(len(queries)), queries] = torch.inf
    return distances.topk(k, largest=False).indices


def _some_queries(labels: Tensor, count: int) -> list[int]:
    """Rows of different classes that have a second sample to find."""
    order = np.random.default_rng(0).permutation(len(labels))
    classes, sizes = np.unique(labels.numpy(), return_counts=True)
    askable = set(classes[sizes > 1].tolist())
    queries: dict[int, int] = {}
    for row in order:
        label = int(labels[row])
        if label in askable and label not in queries:
            queries[label] = int(row)
    return list(queries.values())[:count]


def _ordered_rows(x: Tensor, labels: Tensor, max_classes: int, samples_per_class: int) -> Tensor:
    """Some samples of some classes, along a chain of nearest class means."""
    classes = np.unique(labels.numpy())
    chosen = np.random.default_rng(0).permutation(len(classes))[:max_classes]
    members = [torch.nonzero(labels == int(classes[c])).flatten() for c in sorted(chosen)]
    means = torch.stack([x[m].double().mean(0) for m in members])
    distances = torch.cdist(means, means)
    chain = [int(distances.sum(1).argmax())]
    while len(chain) < len(members):
        to_last = distances[chain[-1]].clone()
        to_last[chain] = torch.inf
        chain.append(int(to_last.argmin()))
    return torch.cat([members[c][:samples_per_class] for c in chain])


def _relative_distances(x: Tensor) -> npt.NDArray[np.float64]:
    distances = torch.cdist(x.double(), x.double())
    mean = distances.sum() / max(1, len(x) * (len(x) - 1))
    relative: npt.NDArray[np.float64] = (distances / mean.clamp_min(1e-12)).numpy()
    return relative
