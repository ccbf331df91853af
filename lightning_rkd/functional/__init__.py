"""Relations between the samples of a batch as pure functions on tensors: distances, angles, similarities, graphs.

Importing this package loads neither Lightning nor numba; kernels are compiled on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_rkd.utils.imports import lazy_attributes

if TYPE_CHECKING:
    from lightning_rkd.functional.angles import angle_loss as angle_loss
    from lightning_rkd.functional.channels import flatten_channels as flatten_channels
    from lightning_rkd.functional.channels import flatten_positions as flatten_positions
    from lightning_rkd.functional.channels import unit_channels as unit_channels
    from lightning_rkd.functional.distances import distance_loss as distance_loss
    from lightning_rkd.functional.distances import pairwise_distances as pairwise_distances
    from lightning_rkd.functional.distances import safe_sqrt as safe_sqrt
    from lightning_rkd.functional.distances import squared_distances as squared_distances
    from lightning_rkd.functional.graphs import knn_graph as knn_graph
    from lightning_rkd.functional.graphs import normalised_adjacency as normalised_adjacency
    from lightning_rkd.functional.graphs import same_class as same_class
    from lightning_rkd.functional.orders import order_hinge as order_hinge
    from lightning_rkd.functional.ranks import log_probability_of_order as log_probability_of_order
    from lightning_rkd.functional.ranks import nearest_samples as nearest_samples
    from lightning_rkd.functional.ranks import permutations as permutations
    from lightning_rkd.functional.rkd import rkd_loss as rkd_loss
    from lightning_rkd.functional.scales import centre_columns as centre_columns
    from lightning_rkd.functional.scales import limit_magnitude as limit_magnitude
    from lightning_rkd.functional.scales import power_of_two as power_of_two
    from lightning_rkd.functional.scales import squares_in_range as squares_in_range
    from lightning_rkd.functional.scales import to_float64 as to_float64
    from lightning_rkd.functional.similarities import cosine_similarities as cosine_similarities
    from lightning_rkd.functional.similarities import flatten_layers as flatten_layers
    from lightning_rkd.functional.similarities import row_norms as row_norms
    from lightning_rkd.functional.similarities import tanimoto_coefficients as tanimoto_coefficients
    from lightning_rkd.functional.similarities import tanimoto_of_pairs as tanimoto_of_pairs
    from lightning_rkd.functional.similarities import unit_rows as unit_rows
    from lightning_rkd.functional.singular import align_vectors as align_vectors
    from lightning_rkd.functional.singular import right_singular_vectors as right_singular_vectors
    from lightning_rkd.functional.standardisation import hadamard_matrix as hadamard_matrix
    from lightning_rkd.functional.standardisation import phi_standardisation as phi_standardisation

__getattr__, __dir__, __all__ = lazy_attributes(__name__)
