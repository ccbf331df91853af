"""Distance matrices of several networks for the same samples."""

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch
from matplotlib.figure import Figure
from torch import Tensor

from lightning_rkd.plots.style import add_title, check_embeddings, get_theme, hide_ticks, new_figure


def relations(
    embeddings: Mapping[str, Tensor],
    labels: Tensor,
    class_names: Sequence[str] | None = None,
    max_classes: int = 12,
    samples_per_class: int = 8,
    title: str = "",
    dark: bool = False,
) -> Figure:
    """Plot the distance matrices of networks for the same samples, one panel per network.

    Rows and columns are samples, class by class. Classes are drawn with a fixed seed, and neighbouring classes of the
    first network are next to each other. Distances are divided by the mean distance of the network.

    Args:
        embeddings: (N, D) by name of the network, in the order of the panels; the first orders the classes.
        labels: (N,) classes.
        class_names: Names of the classes, written next to the matrix where they are short.
        max_classes: Number of classes.
        samples_per_class: Number of samples per class.
        title: Title of the figure.
        dark: Use a dark background.

    Example:
        >>> y = torch.arange(12) // 4
        >>> figure = relations({"teacher": torch.rand(12, 3), "student": torch.rand(12, 2)}, y)
        >>> len(figure.axes)  # two matrices and the colour bar
        3
    """
    look = get_theme(dark)
    plain, labels = check_embeddings(embeddings, labels=labels), labels.cpu()
    rows = _ordered_rows(next(iter(plain.values())), labels, max_classes, samples_per_class)
    matrices = {name: _relative_distances(x[rows]) for name, x in plain.items()}
    top = float(np.quantile(np.stack(list(matrices.values())), 0.995))
    starts = np.flatnonzero(np.diff(labels[rows].numpy(), prepend=np.nan))
    names = [str(class_names[int(labels[rows[s]])]) for s in starts] if class_names is not None else []
    names = names if max(map(len, names), default=99) <= 14 else []
    long = max(map(len, names), default=0) > 2

    left, bar, panels = (1.1 if long else 0.35), 0.95, len(matrices)
    size = (12.0 - left - bar - 0.18 * (panels - 1)) / panels
    top_margin = 1.0 if title else 0.75
    height = size + top_margin + 0.25
    figure = new_figure(12.0, height, look)
    centres = np.diff(np.append(starts, len(rows))) / 2 + starts - 0.5
    for i, (name, matrix) in enumerate(matrices.items()):
        box = ((left + i * (size + 0.18)) / 12, 0.25 / height, size / 12, size / height)
        ax = figure.add_axes(box)
        image = ax.imshow(matrix, cmap="viridis", vmin=0, vmax=top, interpolation="nearest")
        for start in starts[1:]:
            ax.axhline(start - 0.5, color="white", linewidth=0.5, alpha=0.6)
            ax.axvline(start - 0.5, color="white", linewidth=0.5, alpha=0.6)
        ax.set_title(name, fontsize=12, color=look.ink, loc="left", pad=6, linespacing=1.3)
        hide_ticks(ax)
        if names and i == 0:
            ax.set_yticks(centres, names, fontsize=9)
            ax.tick_params(length=0, labelcolor=look.ink)
    scale = figure.add_axes(((12 - bar + 0.14) / 12, 0.25 / height, 0.14 / 12, size / height))
    colours = figure.colorbar(image, cax=scale)
    colours.set_label("distance / mean distance", fontsize=10, color=look.ink)
    colours.outline.set_visible(False)
    scale.tick_params(labelsize=9, labelcolor=look.ink, length=0)
    add_title(figure, title, look)
    return figure


def _ordered_rows(x: Tensor, labels: Tensor, max_classes: int, samples_per_class: int) -> Tensor:
    """Rows of some samples of some classes, along a chain of nearest class means."""
    classes = np.unique(labels.numpy())
    chosen = np.random.default_rng(0).permutation(len(classes))[:max_classes]
    members = [torch.nonzero(labels == int(classes[c])).flatten() for c in sorted(chosen)]
    means = torch.stack([x[m].mean(0) for m in members])
    distances = torch.cdist(means, means)
    chain = [int(distances.sum(1).argmax())]
    while len(chain) < len(members):
        to_last = distances[chain[-1]].clone()
        to_last[chain] = torch.inf
        chain.append(int(to_last.argmin()))
    return torch.cat([members[c][:samples_per_class] for c in chain])


def _relative_distances(x: Tensor) -> npt.NDArray[np.float64]:
    distances = torch.cdist(x, x)
    mean = distances.sum() / max(1, len(x) * (len(x) - 1))
    relative: npt.NDArray[np.float64] = (distances / mean.clamp_min(1e-12)).numpy()
    return relative
