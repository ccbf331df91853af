"""RKD's distance and angle loss with the gradient of the student's rows on a GPU, in a few launches of Triton.

Column means; distances within both networks; the distance loss and what the angles need; the angles, twice two kernels;
the gradient of the rows and the sum of the losses. Without angles the four of them are left out, without gradient two.
Everything has a size that the host knows, and the host does not wait for the device: CUDA graphs can capture it.
"""

from typing import Any

import torch
from torch import Tensor

from lightning_rkd.functional._kernels.angle_cuda import PADDED, Relations
from lightning_rkd.functional._kernels.distance_cuda import PULL, grid_of, measure, pull_rows
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
    """Loss and gradient of the student's rows in ``dtype``; the latter is empty without ``with_gradient``.

    Args:
        student: Rows, (N, D_s).
        teacher: Rows, (N, D_t).
        vertices: First vertex of the angles, and the one behind the last.
        dtype: Precision of the cosines and of the results.
        distances: What multiplies the sum of the distances' Huber terms.
        angles: What multiplies that of the angles'.
        official: Include i = k, as :func:`lightning_rkd.functional.angle_tiles.loss_and_gradient` does.
        with_gradient: Compute the gradient.
    """
    kind = torch.promote_types(student.dtype, teacher.dtype)
    x, y = (rows.detach().to(kind).contiguous() for rows in (student, teacher))
    n, width = x.shape
    squared, mean, sums = measure([x, y], n + -n % PADDED, DUPLICATE)
    settings: dict[str, Any] = {
        "distances": distances,
        "angles": angles,
        "official": official,
        "with_gradient": with_gradient,
    }
    relations = Relations(squared, sums, vertices, dtype, **settings)
    loss = torch.empty((), dtype=dtype, device=x.device)
    gradient = torch.empty((n, width) if with_gradient else (0,), dtype=dtype, device=x.device)
    products, losses = relations.products, relations.losses
    pull_rows[grid_of(x) if with_gradient else (1, 1)](
        x, mean, relations.pull, gradient, squared, relations.units, losses, products, loss,
        n, squared.shape[1], width, losses.numel(), products.numel(),
        GRADIENT=with_gradient, DISTANCES=bool(distances), LOSS=True, **PULL,
    )  # fmt: skip
    return loss, gradient
