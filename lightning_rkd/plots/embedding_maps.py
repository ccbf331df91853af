"""Maps of images in the plane by their embeddings."""

from collections.abc import Mapping

import numpy as np
import torch
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.offsetbox import AnnotationBbox, OffsetImage
from scipy.linalg import orthogonal_procrustes
from torch import Tensor

from lightning_rkd.plots.style import COLOURS, add_title, check_embeddings, get_theme, hide_ticks, new_figure, to_pixels


def embedding_map(
    images: Tensor,
    labels: Tensor,
    embeddings: Mapping[str, Tensor],
    max_classes: int = 8,
    samples_per_class: int = 12,
    title: str = "",
    dark: bool = False,
) -> Figure:
    """Plot images at their places on the two principal axes of the embedding, one panel per network.

    The maps of the other networks are rotated, mirrored and scaled onto the first map, so that an image has about the
    same place where networks agree. The outermost 2 % are moved to the border. The colour of a frame is the class.

    Args:
        images: (N, C, H, W), uint8 or in 0 to 1, C 1 or 3.
        labels: (N,) classes.
        embeddings: (N, D) by name of the network, in the order of the panels.
        max_classes: Number of classes, at most 8; drawn with a fixed seed.
        samples_per_class: Number of images per class.
        title: Title of the figure.
        dark: Use a dark background.

    Example:
        >>> x, y = torch.rand(8, 1, 6, 6), torch.arange(8) // 4
        >>> figure = embedding_map(x, y, {"teacher": torch.rand(8, 3), "student": torch.rand(8, 2)})
        >>> [len(ax.artists) for ax in figure.axes]
        [8, 8]
    """
    plain, labels = check_embeddings(embeddings, labels=labels, images=images), labels.cpu()
    if not 1 <= max_classes <= len(COLOURS):
        raise ValueError(f"max_classes must be between 1 and {len(COLOURS)}, got {max_classes}: colours are few")
    look = get_theme(dark)
    rows, numbers = _chosen(labels, max_classes, samples_per_class)
    thumbnails = to_pixels(images[rows])
    maps = [_plane(x[rows]) for x in plain.values()]
    maps = [maps[0], *(own @ orthogonal_procrustes(own, maps[0])[0] for own in maps[1:])]
    reach = float(np.quantile(np.abs(np.stack(maps)), 0.98)) or 1.0
    maps = [own.clip(-reach, reach) for own in maps]
    size = 12.0 / max(2, len(maps))
    top = 0.85 if title else 0.4
    figure = new_figure(size * len(maps), size + top, look)
    panels = figure.subplots(1, len(maps), squeeze=False)[0]
    zoom = 22 / max(thumbnails.shape[1:3])
    interpolation = "nearest" if zoom >= 1 else "antialiased"  # sharp pixels where images grow
    for ax, name, places in zip(panels, embeddings, maps, strict=True):
        for picture, place, number in zip(thumbnails, places, numbers, strict=True):
            box = AnnotationBbox(
                OffsetImage(picture, zoom=zoom, cmap="gray", norm=Normalize(0, 1), interpolation=interpolation),
                (float(place[0]), float(place[1])),
                pad=0.12,
                bboxprops={"edgecolor": COLOURS[number], "linewidth": 2, "facecolor": COLOURS[number]},
            )
            ax.add_artist(box)
        ax.set_xlim(-1.12 * reach, 1.12 * reach)
        ax.set_ylim(-1.12 * reach, 1.12 * reach)
        ax.set_aspect("equal")
        ax.set_facecolor(look.paper)
        hide_ticks(ax, look.grid)
        ax.set_title(name, fontsize=12, color=look.ink, loc="left", linespacing=1.3)
    height = figure.get_figheight()
    figure.subplots_adjust(left=0.01, right=0.99, bottom=0.01, top=1 - top / height, wspace=0.03)
    add_title(figure, title, look)
    return figure


def _chosen(labels: Tensor, max_classes: int, samples_per_class: int) -> tuple[Tensor, list[int]]:
    """Rows to draw, and the number of the class of each."""
    rng = np.random.default_rng(0)
    classes = rng.permutation(np.unique(labels.numpy()))[:max_classes]
    rows: list[int] = []
    numbers: list[int] = []
    for number, label in enumerate(sorted(classes.tolist())):
        members = np.flatnonzero(labels.numpy() == label)
        members = np.sort(rng.permutation(members)[:samples_per_class])
        rows += members.tolist()
        numbers += [number] * len(members)
    return torch.tensor(rows), numbers


def _plane(x: Tensor) -> np.ndarray:
    """Coordinates (N, 2) on the principal axes, with mean 0 and mean square 1."""
    centred = x - x.mean(0)
    _, _, axes = torch.linalg.svd(centred, full_matrices=False)
    flat = torch.zeros(len(x), 2, dtype=torch.float64)
    flat[:, : min(2, len(axes))] = centred @ axes[:2].T
    flat /= flat.square().mean().sqrt().clamp_min(1e-12)
    found: np.ndarray = flat.numpy()
    return found
