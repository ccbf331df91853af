"""RKD's distance and angle loss with the gradient of the student's rows on the CPU, from compiled parts.

They pass NumPy's arrays on: at usual batch sizes an operation of PyTorch costs as much as the work on all pairs.
"""

import numpy as np
import torch
from torch import Tensor

from lightning_rkd.functional._kernels.angle_cpu import angle_terms
from lightning_rkd.functional._kernels.distance_cpu import SMALL, as_array, distance_terms, measure, pull_rows, relate
from lightning_rkd.functional.distances import DUPLICATE


def loss_and_gradient(
    student: Tensor,
    teacher: Tensor,
    vertices: tuple[int, int],
    dtype: torch.dtype,
    *,
    distances: float,
    angles: float,
    official: bool,
    with_gradient: bool,
) -> tuple[Tensor, Tensor]:
    """Same arguments and results as ``rkd_cuda.loss_and_gradient``."""
    x, y = as_array(student), as_array(teacher)
    n, loss = len(x), 0.0
    pull = np.zeros((n, n) if with_gradient else (0, 0))
    if n * n * max(x.shape[1], y.shape[1]) <= SMALL and x.dtype == y.dtype:
        own, given, rows = np.empty((n, n)), np.empty((n, n)), np.empty(x.shape)
        loss = relate(x, y, DUPLICATE, distances, own, given, rows, pull)
    else:
        (own, rows), (given, _) = measure(x, DUPLICATE), measure(y, DUPLICATE)
        if distances:
            loss = distance_terms(own, given, distances, pull)
    if angles:
        loss += angle_terms(own, given, vertices, dtype, official, angles, pull)
    gradient = pull_rows(pull, rows) if with_gradient else np.empty(0)
    kind = np.float64 if dtype == torch.float64 else np.float32
    return torch.scalar_tensor(loss, dtype=dtype), torch.from_numpy(gradient.astype(kind, copy=False))
