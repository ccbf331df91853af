r"""RKD's angle loss from distances alone: exact, loss and gradient in one pass.

By the law of cosines :math:`\cos(j; i, k) = (S_{ji} + S_{jk} - S_{ik}) / (2 \sqrt{S_{ji} S_{jk}})` with squared
distances :math:`S`: a network enters through its N x N distances only, the work on the N^3 triplets does not depend on
the width of the embedding and is symmetric in (i, k), and the gradient is an N x N matrix that can be summed while the
loss is. Nothing of size N x N x N or N x N x D is ever held.

The triplets are computed by a native kernel for the CPU (``_kernels.angle_cpu``) or for GPUs
(``_kernels.angle_cuda``); elsewhere, and without numba or Triton, by tiles of PyTorch operations
(:mod:`lightning_rkd.functional.angle_tiles`).
"""

from typing import Any, Literal

import torch
from torch import Tensor

from lightning_rkd.functional import angle_tiles
from lightning_rkd.functional._kernels import give_up, native
from lightning_rkd.functional.distances import second_derivative_error
from lightning_rkd.utils.private import disable_compilation

Reduction = Literal["official", "distinct"]
"""``"official"``: mean over all N^2 or N^3 entries, as in the authors' code; ``"distinct"``: over distinct tuples."""

_KERNELS = {"cpu": "angle_cpu", "cuda": "angle_cuda"}


@disable_compilation
def angle_loss(
    squared_student: Tensor,
    squared_teacher: Tensor,
    *,
    reduction: Reduction = "official",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    r"""Huber loss between the angles that the triplets of a batch span in student and teacher.

    .. math::
        L = \frac{1}{N^3} \sum_{j,i,k} h\big(\cos_s(j; i, k) - \cos_t(j; i, k)\big), \qquad
        h(e) = \begin{cases} e^2 / 2 & |e| \le 1 \\ |e| - 1/2 & \text{else} \end{cases}

    Angles at a vertex that coincides with another corner have cosine 0, as in the authors' code; with
    ``reduction="official"`` this includes :math:`i = k` where j and i are duplicates in one network only.
    The gradient flows to the student alone. Memory is O(N^2).

    Cosines are computed in ``dtype``. In float32 the cosines at two rows at 1e-5 of the spread would be wrong in the
    second digit, so triplets with a pair closer than 0.3 % of the largest distance are computed in float64.

    Shapes: (N, N), (N, N) -> scalar.

    Args:
        squared_student: Squared distances as :func:`~lightning_rkd.functional.distances.squared_distances` gives them:
            symmetric, zero diagonal.
        squared_teacher: The same for the teacher; receives no gradient.
        reduction: ``"official"`` divides by N^3; ``"distinct"`` takes the mean over triplets of three different rows,
            as the paper writes it. Without any triplet the loss is 0.
        dtype: Precision of the cosines and of the result.

    Raises:
        ValueError: Unknown reduction, or matrices that are not both (N, N).
        RuntimeError: The backward pass runs with ``create_graph=True``.

    Reference:
        Park, Kim, Lu and Cho 2019, Relational Knowledge Distillation, arXiv:1904.05068 (with embeddings in place of
        distances).

    Example:
        A right angle against the three angles of an equilateral triangle.

        >>> right = torch.tensor([[0.0, 1.0, 1.0], [1.0, 0.0, 2.0], [1.0, 2.0, 0.0]])
        >>> equilateral = 1 - torch.eye(3)
        >>> angle_loss(right, equilateral, reduction="distinct")
        tensor(0.0560)
    """
    n = len(squared_student)
    if not squared_student.shape == squared_teacher.shape == (n, n):
        raise ValueError(
            "angle_loss takes two (N, N) matrices of squared distances, "
            f"got {tuple(squared_student.shape)} and {tuple(squared_teacher.shape)}"
        )
    check_reduction(reduction)
    return _AngleLoss.apply(  # type: ignore[no-any-return]
        squared_student, squared_teacher.detach(), reduction == "official", count_triplets(n, reduction), dtype
    )


def count_triplets(n: int, reduction: Reduction) -> int:
    """Number of triplets over which a reduction takes the mean, at least 1."""
    return max(1, n**3 if reduction == "official" else n * (n - 1) * (n - 2))


def check_reduction(reduction: str) -> None:
    """Raise ``ValueError`` for an unknown reduction."""
    if reduction not in ("official", "distinct"):
        raise ValueError(f"reduction must be 'official' or 'distinct', got {reduction!r}")


def sum_triplets(student: Tensor, teacher: Tensor, *args: Any, **settings: Any) -> tuple[Tensor, Tensor | None]:
    """Sum of the Huber terms of triplets and its gradient, from :mod:`angle_tiles` or a kernel that gives the same."""
    device = student.device.type
    name = _KERNELS.get(device, "")
    kernel = native(name)
    if kernel is not None:
        try:
            total, grad = kernel.loss_and_gradient(student, teacher, *args, **settings)
            return total, None if grad is None else grad.to(student.dtype)
        except Exception as error:
            if name == "angle_cpu":
                raise
            give_up(name, error)
    with torch.autocast(device, enabled=False):
        return angle_tiles.loss_and_gradient(student, teacher, *args, **settings)


class _AngleLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, official: bool, count: int, dtype: torch.dtype) -> Tensor:
        settings = {"official": official, "factor": 1 / count, "with_gradient": ctx.needs_input_grad[0]}
        loss, grad = sum_triplets(student, teacher, (0, len(student)), dtype, **settings)
        ctx.save_for_backward(grad)
        return loss.to(dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise second_derivative_error("angle_loss")
        (grad,) = ctx.saved_tensors
        return scale_gradient(grad, grads[0]), None, None, None, None


def scale_gradient(grad: Tensor, factor: Tensor) -> Tensor:
    """Product with a scalar; on a CPU on one thread, as PyTorch's threads would hold the cores afterwards."""
    if grad.device.type == "cpu" and not torch.compiler.is_compiling():
        return torch.from_numpy(grad.numpy() * factor.numpy())
    return grad * factor
