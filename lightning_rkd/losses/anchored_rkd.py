"""RKD between two networks: distances and angles from the student's rows to the teacher's rows."""

from typing import Any

import torch
from torch import Tensor

from lightning_rkd.functional.distances import second_derivative_error, squared_distances
from lightning_rkd.losses.base import Reference
from lightning_rkd.losses.parts.anchored import AnchoredLoss

_CPU_BLOCK, _BLOCK = 2**16, 2**22  # triplets at a time: on a CPU their buffers stay in cache


class AnchoredRKD(AnchoredLoss):
    r"""RKD's distances and angles between the student's rows and the teacher's, in the teacher's space.

    .. math::
        L = \frac{\lambda_D}{N^2} \sum_{i,j} h\Big(\frac{\lVert \hat s_i - \hat t_j \rVert
        - \lVert \hat t_i - \hat t_j \rVert}{\mu}\Big)
        + \frac{\lambda_A}{N (N - 1) (N - 2)} \sum_{i \ne j \ne k \ne i} h\big(\cos \angle \hat t_j \hat s_i \hat t_k
        - \cos \angle \hat t_j \hat t_i \hat t_k\big)

    with the Huber function :math:`h(e) = e^2 / 2` for :math:`|e| \le 1`, else :math:`|e| - 1/2`, and :math:`\mu` the
    mean of the positive distances :math:`\lVert \hat t_i - \hat t_j \rVert`. Every row of the student is compared with
    the teacher's rows as fixed points, so that, unlike :class:`~lightning_rkd.losses.rkd.RKD`, the loss is 0 only where
    the rows of both are equal, and a student can query a gallery that the teacher has embedded.

    The method is of this library; only distances, angles and the Huber function are those of RKD. The angles come
    from distances by the law of cosines, in O(N^3) time and O(N^2) memory. An angle at a vertex that coincides with
    a corner in either network has cosine 0 in both.

    Rows are normalised first. Where D_s and D_t differ, a trained linear layer without bias maps the student's rows.

    Shapes: (N, D_s), (N, D_t) -> scalar. Batches of one or two rows have no angles.

    Args:
        distance_weight: :math:`\lambda_D`.
        angle_weight: :math:`\lambda_A`. With 0, the default, no angle is computed and time grows with N^2 only: in a
            first trial on text embeddings angles took time and lowered the recall in the teacher's gallery.
        student_dim: D_s; inferred if left out.
        teacher_dim: D_t; inferred if left out.

    Raises:
        RuntimeError: The backward pass runs with ``create_graph=True``.

    Reference:
        Park, Kim, Lu and Cho 2019, Relational Knowledge Distillation, arXiv:1904.05068, for the relations.

    Example:
        >>> student, teacher = torch.tensor([[1.0, 1.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]), torch.eye(3)
        >>> AnchoredRKD()(student, teacher), AnchoredRKD(angle_weight=2.0)(student, teacher)
        (tensor(0.0280), tensor(0.0455))
        >>> AnchoredRKD()(teacher, teacher)
        tensor(0.)
    """

    reference = Reference(
        "park2019relational",
        "ours",
        source="RKD's relations, with the teacher's rows as the other points of pairs and triplets",
    )

    def __init__(self, distance_weight: float = 1.0, angle_weight: float = 0.0, **sizes: int | None) -> None:
        super().__init__(**sizes)
        self.distance_weight, self.angle_weight = distance_weight, angle_weight

    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        own = squared_distances(teacher).sqrt()
        # the other form of cdist holds N x N x D
        across = torch.cdist(student, teacher, compute_mode="use_mm_for_euclid_dist")
        unit = own.sum() / (own > 0).sum()
        unit = torch.where(unit > 0, unit, 1)  # NaN where all rows of the teacher are equal
        value = self.distance_weight * _huber((across - own) / unit).mean()
        if self.angle_weight:
            value = value + self.angle_weight * _AnchoredAngles.apply(across, own)
        return value


def _huber(e: Tensor) -> Tensor:
    g = e.clamp(-1, 1)
    return g * (e - g / 2)


class _AnchoredAngles(torch.autograd.Function):
    """Mean Huber term of the angles at the student's rows between the teacher's, and its gradient in one pass."""

    @staticmethod
    def forward(ctx: Any, across: Tensor, own: Tensor) -> Tensor:
        n = len(own)
        corners, valid = own.square(), (own > 0) & (across > 0)
        inverse, inverse_own = (torch.where(valid, x, 1).reciprocal() * valid for x in (across, own))
        total, pull = across.new_zeros(()), torch.zeros_like(across)
        step = max(1, (_CPU_BLOCK if own.device.type == "cpu" else _BLOCK) // n**2)
        for rows in (slice(start, start + step) for start in range(0, n, step)):
            x, y = inverse[rows], inverse_own[rows]
            cosines = _cosines(across[rows], x, corners)
            e = cosines - _cosines(own[rows], y, corners)
            g = e.clamp(-1, 1)
            total += e.sub_(g, alpha=0.5).mul_(g).sum()
            # of the cosine by the distance to one corner: one over that to the other, minus the cosine over its own
            pull[rows] = torch.bmm(g, x[:, :, None])[:, :, 0] - cosines.mul_(g).sum(2) * x
        count = max(1, n * (n - 1) * (n - 2))
        ctx.save_for_backward(pull * valid * (2 / count))
        return total / count

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        if torch.is_grad_enabled():
            raise second_derivative_error("AnchoredRKD")
        (pull,) = ctx.saved_tensors
        return pull * grads[0], None


def _cosines(distances: Tensor, inverse: Tensor, corners: Tensor) -> Tensor:
    """Cosines at vertices with the given distances to all corners, (B, N) -> (B, N, N)."""
    squared = distances.square()
    cosines = squared[:, :, None] + squared[:, None] - corners
    return cosines.mul_(inverse[:, :, None] / 2).mul_(inverse[:, None])
