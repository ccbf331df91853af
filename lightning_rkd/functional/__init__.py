"""Relations between the samples of a batch as pure functions on tensors: distances, angles, similarities, graphs.

Importing this package loads neither Lightning nor numba; compiled kernels are looked for on first use.
"""

from __future__ import annotations

from lightning_rkd.functional.angles import angle_loss
from lightning_rkd.functional.channels import flatten_channels, flatten_positions, unit_channels
from lightning_rkd.functional.columns import centre_columns
from lightning_rkd.functional.distances import distance_loss, pairwise_distances, safe_sqrt, squared_distances
from lightning_rkd.functional.graphs import knn_graph, normalised_adjacency, same_class
from lightning_rkd.functional.ranks import log_probability_of_order, nearest_samples, permutations
from lightning_rkd.functional.scales import limit_magnitude, power_of_two, squares_in_range, to_float64
from lightning_rkd.functional.similarities import (
    cosine_similarities,
    flatten_layers,
    row_norms,
    tanimoto_coefficients,
    tanimoto_of_pairs,
    unit_rows,
)
from lightning_rkd.functional.singular import align_vectors, right_singular_vectors

__all__ = [
    "align_vectors",
    "angle_loss",
    "centre_columns",
    "cosine_similarities",
    "distance_loss",
    "flatten_channels",
    "flatten_layers",
    "flatten_positions",
    "knn_graph",
    "limit_magnitude",
    "log_probability_of_order",
    "nearest_samples",
    "normalised_adjacency",
    "pairwise_distances",
    "permutations",
    "power_of_two",
    "right_singular_vectors",
    "row_norms",
    "safe_sqrt",
    "same_class",
    "squared_distances",
    "squares_in_range",
    "tanimoto_coefficients",
    "tanimoto_of_pairs",
    "to_float64",
    "unit_channels",
    "unit_rows",
]
