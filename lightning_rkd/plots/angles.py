"""Histograms of the angles between samples, which RKD-A compares."""

from collections.abc import Mapping

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from lightning_rkd.plots.style import COLOURS, DASHES, check_embeddings, finish_lines, get_theme, new_figure

_EDGES = np.linspace(0, 180, 61)


def angles(
    embeddings: Mapping[str, Tensor], triplets: int = 20_000, seed: int = 0, title: str = "", dark: bool = False
) -> Figure:
    """Plot histograms of the angles of random triplets in each network, and their mean gap to the first network.

    The angle of a triplet (i, j, k) is that at j, between 0 and 180 degrees; triplets with two equal rows have none.

    Args:
        embeddings: (N, D) by name of the network, the teacher first; N at least 3.
        triplets: Number of triplets.
        seed: Seed of the triplets.
        title: Title of the figure.
        dark: Use a dark background.

    Example:
        >>> figure = angles({"teacher": torch.randn(20, 8), "student": torch.randn(20, 2)})
        >>> figure.axes[0].get_xlabel()
        'angle in degrees'
    """
    plain = check_embeddings(embeddings)
    count = len(next(iter(plain.values())))
    if count < 3:
        raise ValueError(f"nothing to show: {count} samples, and an angle takes three")
    look = get_theme(dark)
    rows = _draw_triplets(count, triplets, seed)
    degrees = [(name.partition("\n")[0], _degrees(x, rows)) for name, x in plain.items()]
    figure = new_figure(9.0, 4.6, look)
    ax = figure.subplots()
    first, reference = degrees[0]
    for n, (label, found) in enumerate(degrees):
        if n:
            gaps = np.abs(found - reference)
            gap = gaps[np.isfinite(gaps)].mean() if np.isfinite(gaps).any() else np.nan
            label += f", {gap:.1f}\N{DEGREE SIGN} from {first} on average"
        shares = np.histogram(found, bins=_EDGES)[0] / max(1, np.isfinite(found).sum()) / (_EDGES[1] - _EDGES[0])
        ax.stairs(
            shares, _EDGES, linewidth=2, label=label, color=COLOURS[n % len(COLOURS)], linestyle=DASHES[n % len(DASHES)]
        )
    ax.set_xlim(0, 180)
    ax.set_xticks(range(0, 181, 30))
    ax.set_xlabel("angle in degrees", fontsize=11)
    ax.set_ylabel("share of triplets per degree", fontsize=11)
    return finish_lines(figure, [ax], title, look)


def _draw_triplets(n: int, count: int, seed: int) -> Tensor:
    """Up to ``count`` triplets of different rows, (M, 3)."""
    rng = np.random.default_rng(seed)
    j = rng.integers(n, size=count)
    a = (j + rng.integers(1, n, size=count)) % n
    b = (j + rng.integers(1, n, size=count)) % n
    rows = np.stack([a, j, b], 1)
    return torch.from_numpy(rows[a != b])


def _degrees(x: Tensor, rows: Tensor) -> np.ndarray:
    cosines = []
    for some in torch.split(rows, 1000):  # wide embeddings would fill the memory otherwise
        a, b = (x[some[:, end]] - x[some[:, 1]] for end in (0, 2))
        cosines.append((a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1)))
    found: np.ndarray = torch.cat(cosines).clamp(-1, 1).acos().rad2deg().numpy()
    return found
