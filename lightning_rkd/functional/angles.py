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
from lightning_rkd.utils.distributed import Shard
from lightning_rkd.utils.private import disable_compilation

Reduction = Literal["official", "distinct"]
"""``"official"``: mean over all N^2 or N^3 entries, as in the authors' code; ``"distinct"``: over distinct tuples."""

_KERNELS = {"cpu": "angle_cpu", "cuda": "angle_cuda"}


def angle_loss(
    squared_student: Tensor,
    squared_teacher: Tensor,
    *,
    reduction: Reduction = "official",
    shard: Shard | None = None,
    sample: int | None = None,
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
        shard: Split of the vertices over ranks that all hold the same batch; the result is summed over ranks.
        sample: Number m of vertices to compute, drawn at each call from PyTorch's random number generator, like the
            mask of dropout (with ``shard``, each rank draws its share of its own vertices). Value and gradient are
            unbiased estimates; with :math:`\ell_j` the mean over the triplets at vertex j, the variance is
            :math:`\frac{1}{m} \left(1 - \frac{m}{N}\right) \frac{1}{N - 1} \sum_j (\ell_j - L)^2`. ``None``
            computes all vertices.
        dtype: Precision of the cosines and of the result.

    Raises:
        ValueError: Unknown reduction, a sample of no vertices, or matrices that are not both (N, N).
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
    check_sample(sample)
    teacher = squared_teacher.detach()
    if torch.compiler.is_compiling() and shard is None:
        with_gradient = torch.is_grad_enabled() and squared_student.requires_grad
        loss: Tensor = _operator(squared_student, teacher, reduction, sample or 0, dtype, with_gradient)[0]
        return loss
    call = _call_uncompiled if torch.compiler.is_compiling() else _call
    return call(squared_student, teacher, reduction, shard, sample, dtype)


def check_reduction(reduction: str) -> None:
    """Raise ``ValueError`` for an unknown reduction."""
    if reduction not in ("official", "distinct"):
        raise ValueError(f"reduction must be 'official' or 'distinct', got {reduction!r}")


def check_sample(sample: int | None) -> None:
    """Raise ``ValueError`` for a sample without vertices."""
    if sample is not None and sample < 1:
        raise ValueError(f"a sample has at least one vertex, got {sample}")


def _loss_and_gradient(
    student: Tensor,
    teacher: Tensor,
    reduction: str,
    shard: Shard | None,
    sample: int | None,
    dtype: torch.dtype,
    with_gradient: bool,
) -> tuple[Tensor, Tensor | None]:
    n = len(student)
    start, stop = (0, n) if shard is None else shard.range(n)
    order, share = None, 1.0
    if sample is not None and sample < n and stop > start:
        own = sample * (stop - start) // n or 1
        order, share = torch.arange(n, device=student.device), (stop - start) / own
        order[start:stop] = start + torch.randperm(stop - start, device=student.device)
        stop = start + own
        student, teacher = student[order][:, order], teacher[order][:, order]
    official = reduction == "official"
    count = n**3 if official else max(1, n * (n - 1) * (n - 2))
    settings = {"official": official, "factor": share / count, "with_gradient": with_gradient}
    total, grad = _sum_triplets(student, teacher, (start, stop), dtype, **settings)
    if grad is not None and order is not None:
        grad = torch.empty_like(grad).index_put_((order[:, None], order), grad)
    if shard is not None:
        total = shard.sum(total)
        grad = None if grad is None else shard.sum(grad)
    return total.to(dtype), grad


def _sum_triplets(student: Tensor, teacher: Tensor, *args: Any, **settings: Any) -> tuple[Tensor, Tensor | None]:
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
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        loss, grad = _loss_and_gradient(*(*arguments, ctx.needs_input_grad[0]))
        if grad is not None:
            ctx.save_for_backward(grad)
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise second_derivative_error("angle_loss")
        (grad,) = ctx.saved_tensors
        if grad.device.type == "cpu":  # on one thread: PyTorch's threads would hold the cores afterwards
            return torch.from_numpy(grad.numpy() * grads[0].numpy()), None, None, None, None, None
        return grad * grads[0], None, None, None, None, None


def _call(*args: Any) -> Tensor:
    return _AngleLoss.apply(*args)  # type: ignore[no-any-return]


# Ranks that share the work communicate, which cannot be part of a compiled graph. torch.compiler.disable would do the
# same, but imports the whole compiler at once.
_call_uncompiled = disable_compilation(_call)


# The loss as one node of a compiled graph, so that the compiler does not trace its loops.
def _operate(
    student: Tensor, teacher: Tensor, reduction: str, sample: int, dtype: torch.dtype, with_gradient: bool
) -> tuple[Tensor, Tensor]:
    loss, grad = _loss_and_gradient(student, teacher, reduction, None, sample or None, dtype, with_gradient)
    return loss, student.new_empty(0) if grad is None else grad


_operator = torch.library.custom_op(
    "lightning_rkd::angle_loss",
    _operate,
    mutates_args=(),
    schema="(Tensor student, Tensor teacher, str reduction, int sample, ScalarType dtype, bool with_gradient) "
    "-> (Tensor, Tensor)",
)


@_operator.register_fake
def _shapes(
    student: Tensor, teacher: Tensor, reduction: str, sample: int, dtype: torch.dtype, with_gradient: bool
) -> tuple[Tensor, Tensor]:
    return student.new_empty((), dtype=dtype), torch.empty_like(student) if with_gradient else student.new_empty(0)


def _pull(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    (grad,) = ctx.saved_tensors
    return grad * grads[0], None, None, None, None, None


_operator.register_autograd(_pull, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(output[1]))
