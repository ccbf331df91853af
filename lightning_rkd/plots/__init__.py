"""Figures of embeddings and training runs: functions that return matplotlib figures and change no global state.

Figures have a light background, or a dark one with ``dark=True``, in colours that suit colour-blind readers.
"""

from lightning_rkd.utils.imports import check_installed

check_installed("matplotlib", "scipy", extra="plots")

from lightning_rkd.plots.angles import angles
from lightning_rkd.plots.comparisons import comparison
from lightning_rkd.plots.curves import curves, loss_terms, read_metrics
from lightning_rkd.plots.distances import relations
from lightning_rkd.plots.embedding_maps import embedding_map
from lightning_rkd.plots.gallery import neighbours
from lightning_rkd.plots.style import RIGHT, WRONG

__all__ = [
    "RIGHT",
    "WRONG",
    "angles",
    "comparison",
    "curves",
    "embedding_map",
    "loss_terms",
    "neighbours",
    "read_metrics",
    "relations",
]
