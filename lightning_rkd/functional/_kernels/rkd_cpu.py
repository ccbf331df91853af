"""RKD's distance and angle loss with the gradient of the student's rows on the CPU, from compiled parts.

They pass NumPy's arrays on: at usual batch sizes an operation of PyTorch costs as much as the work on all pairs.
"""

import numpy as np
import torch
from torch import Tensor

from lightning_rkd.functional._kernels import angle_cpu, distance_cpu
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
    own, rows = distance_cpu.measure(student, DUPLICATE)
    given, _ = distance_cpu.measure(teacher, DUPLICATE)
    loss, pull = 0.0, None
    if distances:
        loss, pull = distance_cpu.distance_terms(own, given, distances, with_gradient)
    if angles:
        total, more = angle_cpu.angle_terms(own, given, vertices, dtype, official, angles, with_gradient)
        loss, pull = loss + total, more if pull is None or more is None else np.add(pull, more, out=pull)
    gradient = np.zeros(rows.shape if with_gradient else 0)
    if pull is not None:
        gradient = distance_cpu.pull_rows(pull, rows)
    return torch.scalar_tensor(loss, dtype=dtype), torch.from_numpy(gradient).to(dtype)
