r"""RKD's distance loss from squared distances: loss and gradient in a few operations, whatever the device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_rkd.functional.derivatives import refuse_second_derivative


def distance_loss(squared_student: Tensor, squared_teacher: Tensor, *, count: int) -> Tensor:
    r"""Huber loss between the distances of a batch in student and teacher, each in units of its mean.

    .. math::
        L = \frac{1}{n} \sum_{i,j} h\!\left(\frac{d_{ij}}{\mu} - \frac{d'_{ij}}{\mu'}\right), \qquad
        h(e) = \begin{cases} e^2 / 2 & |e| \le 1 \\ |e| - 1/2 & \text{else} \end{cases}

    :math:`\mu` is the mean of strictly positive distances, and the student's is part of the gradient. Duplicates pass
    none. The gradient flows to the student alone; it is computed with the loss.

    Shapes: (N, N), (N, N) -> scalar, of the type that comes in.

    Args:
        squared_student: As :func:`~lightning_rkd.functional.distances.squared_distances` gives them.
        squared_teacher: The same for the teacher; a constant.
        count: n, what the sum is divided by.

    Raises:
        RuntimeError: A second derivative is asked for.

    Reference:
        Park, Kim, Lu and Cho 2019, Relational Knowledge Distillation, arXiv:1904.05068.

    Example:
        >>> student = torch.tensor([[0.0, 1.0, 4.0], [1.0, 0.0, 1.0], [4.0, 1.0, 0.0]])
        >>> teacher = torch.tensor([[0.0, 1.0, 9.0], [1.0, 0.0, 4.0], [9.0, 4.0, 0.0]])
        >>> distance_loss(student, teacher, count=9)
        tensor(0.0139)
    """
    return _DistanceLoss.apply(squared_student, squared_teacher.detach(), count)  # type: ignore[no-any-return]


class _DistanceLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, squared_student: Tensor, squared_teacher: Tensor, count: int) -> Tensor:
        ctx.count = count
        own, given = squared_student.sqrt(), squared_teacher.sqrt()
        (positive, total, per_mean), (_, _, others) = _unit(own), _unit(given)
        e = own * per_mean - given * others
        g = e.clamp(-1, 1)
        loss = (e.sub_(g, alpha=0.5).mul_(g)).sum() / count
        if ctx.needs_input_grad[0]:
            by_mean = (g * own).sum() * per_mean / total
            pull = g.mul_(per_mean).sub_(by_mean).div_(own)  # 0 / 0 at duplicates
            ctx.save_for_backward(torch.where(positive, pull, 0))
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("distance_loss")
        (pull,) = ctx.saved_tensors
        return pull * (grads[0] * (0.5 / ctx.count)), None, None


def _unit(d: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Where distances are positive, their sum (not 0), and one over their mean; 0 where there is none."""
    positive = d > 0
    total = d.sum().clamp_min(torch.finfo(d.dtype).tiny)
    return positive, total, positive.sum() / total
