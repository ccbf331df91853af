r"""RKD's distance and angle loss as one operator: one autograd node, which computes the gradient with the loss.

At usual batch sizes launches and operations dominate. So on a GPU it is a handful of Triton kernels
(``_kernels.rkd_cuda``) and on a CPU functions compiled by numba (``_kernels.rkd_cpu``); elsewhere, and without these
packages, the parts of :mod:`~lightning_rkd.functional.distances` and :mod:`~lightning_rkd.functional.angles` run one
after the other.
"""

from typing import Any

import torch
from torch import Tensor

from lightning_rkd.functional._kernels import give_up, native
from lightning_rkd.functional.angles import (
    Reduction,
    check_reduction,
    scale_gradient,
    sum_triplets,
)
from lightning_rkd.functional.distances import distance_terms, measure, pull_rows, second_derivative_error
from lightning_rkd.utils.distributed import Shard, rank_and_size
from lightning_rkd.utils.private import disable_compilation

_KERNELS = {"cpu": "rkd_cpu", "cuda": "rkd_cuda"}
_SMALL = 2**15  # elements up to which PyTorch works on one thread of the CPU


def rkd_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    distance_weight: float = 1.0,
    angle_weight: float = 2.0,
    reduction: Reduction = "official",
    sampled_anchors: int | None = None,
    shard: Shard | None = None,
) -> Tensor:
    r"""Weighted sum of RKD's distance loss and angle loss of two embeddings.

    .. math:: L = \lambda_D L_D + \lambda_A L_A

    with :math:`L_D` of :func:`~lightning_rkd.functional.distances.distance_loss` and :math:`L_A` of
    :func:`~lightning_rkd.functional.angles.angle_loss`. A part of weight 0 is not computed. The gradient flows to the
    student alone; it is computed with the loss, in the precision of the result. Memory is O(N^2). With
    ``torch.compile`` this is one node of the graph, except with ``shard``, where ranks communicate.

    Shapes: (N, D_s), (N, D_t) -> scalar, of the higher of both precisions, at least float32.

    Args:
        student: Embeddings, any floating dtype.
        teacher: Embeddings of the same samples; a constant.
        distance_weight: :math:`\lambda_D`.
        angle_weight: :math:`\lambda_A`.
        reduction: ``"official"`` takes means over N^2 and N^3 entries, degenerate ones included; ``"distinct"`` over
            pairs and triplets of different rows.
        sampled_anchors: Number m of vertices at which angles are computed, drawn at each call from PyTorch's random
            number generator, like the mask of dropout (with ``shard``, each rank draws its share of its own vertices).
            Value and gradient are unbiased estimates; with :math:`\ell_j` the mean over the triplets at vertex j, the
            variance of the angle loss is
            :math:`\frac{1}{m} \left(1 - \frac{m}{N}\right) \frac{1}{N - 1} \sum_j (\ell_j - L_A)^2`. ``None`` computes
            all vertices.
        shard: Split of the vertices over ranks that all hold the same batch; value and gradient are summed over ranks.

    Raises:
        ValueError: Unknown reduction, a sample of no vertices, or a different number of rows.
        RuntimeError: The backward pass runs with ``create_graph=True``.

    Reference:
        Park, Kim, Lu and Cho 2019, Relational Knowledge Distillation, arXiv:1904.05068.

    Example:
        >>> student, teacher = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]]), torch.eye(3)
        >>> rkd_loss(student, teacher)
        tensor(0.0347)
    """
    if reduction != "official" or sampled_anchors is not None:  # the usual case without calls
        check_reduction(reduction)
        check_sample(sampled_anchors)
    if len(student) != len(teacher):
        raise ValueError(f"student and teacher must hold the same samples, got {len(student)} and {len(teacher)} rows")
    settings = (float(distance_weight), float(angle_weight), reduction, sampled_anchors or 0)
    if torch.compiler.is_compiling() and shard is None:
        with_gradient = torch.is_grad_enabled() and student.requires_grad
        loss: Tensor = _operator(student, teacher.detach(), *settings, with_gradient)[0]
        return loss
    call = _call_uncompiled if torch.compiler.is_compiling() else _call
    return call(student, teacher.detach(), *settings, shard)


def check_sample(sample: int | None) -> None:
    """Raise ``ValueError`` for a sample without vertices."""
    if sample is not None and sample < 1:
        raise ValueError(f"a sample has at least one vertex, got {sample}")


def _loss_and_gradient(
    student: Tensor,
    teacher: Tensor,
    distance_weight: float,
    angle_weight: float,
    reduction: Reduction,
    sample: int,
    shard: Shard | None,
    with_gradient: bool,
) -> tuple[Tensor, Tensor]:
    """Loss, and its gradient to the student's rows in the precision of the loss, empty without ``with_gradient``."""
    n = len(student)
    start, stop = (0, n) if shard is None else shard.range(n)
    order, share = None, 1.0
    if 0 < sample < n and start < stop:
        own = sample * (stop - start) // n or 1
        order, share = torch.arange(n, device=student.device), (stop - start) / own
        order[start:stop] = start + torch.randperm(stop - start, device=student.device)
        stop = start + own
        student, teacher = student[order], teacher[order]
    if shard is not None and rank_and_size(shard.group)[0] > 0:
        distance_weight = 0.0  # a single rank computes the distances' part
    official = reduction == "official"
    pairs, triplets = (n * n, n**3) if official else (n * (n - 1), n * (n - 1) * (n - 2))
    loss, grad = _compute(
        student,
        teacher,
        (start, stop),
        _precision(student, teacher),
        distances=distance_weight / max(1, pairs),
        angles=angle_weight * share / max(1, triplets),
        official=official,
        with_gradient=with_gradient,
    )
    if order is not None and with_gradient:
        grad = torch.empty_like(grad).index_copy_(0, order, grad)
    if shard is not None:
        loss, grad = shard.sum(loss), shard.sum(grad) if with_gradient else grad
    return loss, grad


def _compute(student: Tensor, teacher: Tensor, *args: Any, **settings: Any) -> tuple[Tensor, Tensor]:
    name = _KERNELS.get(student.device.type, "")
    kernel = native(name)
    if kernel is not None:
        try:
            return kernel.loss_and_gradient(student, teacher, *args, **settings)  # type: ignore[no-any-return]
        except Exception as error:
            if name == "rkd_cpu":  # what numba cannot compile fails when it is imported
                raise
            give_up(name, error)
    return _by_parts(student, teacher, *args, **settings)


def _by_parts(
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
    """The same as ``rkd_cuda.loss_and_gradient``, on any device."""
    s, saved, kernel = measure(student)
    t = measure(teacher)[0]
    loss, pull = s.new_zeros(()), None
    if distances:
        loss, pull = distance_terms(s, t, distances, with_gradient)
    if angles:
        total, more = sum_triplets(s, t, vertices, dtype, official=official, factor=angles, with_gradient=with_gradient)
        loss, pull = loss + total, more if pull is None or more is None else pull.add_(more)
    if not with_gradient:
        return loss.to(dtype), loss.new_empty(0, dtype=dtype)
    return loss.to(dtype), (torch.zeros_like(student) if pull is None else pull_rows(pull, saved, kernel)).to(dtype)


def _precision(*embeddings: Tensor) -> torch.dtype:
    dtype = torch.float32
    for x in embeddings:
        dtype = torch.promote_types(dtype, x.dtype)
    return dtype


class _RKD(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, student: Tensor, *arguments: Any) -> Tensor:
        loss, grad = _loss_and_gradient(*(student, *arguments, ctx.needs_input_grad[0]))
        ctx.dtype = student.dtype
        ctx.save_for_backward(grad)
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise second_derivative_error("RKD")
        (grad,) = ctx.saved_tensors
        grad = grad * grads[0] if grad.numel() <= _SMALL else scale_gradient(grad, grads[0])
        return grad.to(ctx.dtype), None, None, None, None, None, None


def _call(*args: Any) -> Tensor:
    return _RKD.apply(*args)  # type: ignore[no-any-return]


# Ranks that share the work communicate, which cannot be part of a compiled graph. torch.compiler.disable would do the
# same, but imports the whole compiler at once.
_call_uncompiled = disable_compilation(_call)


def _operate(
    student: Tensor,
    teacher: Tensor,
    distance_weight: float,
    angle_weight: float,
    reduction: Reduction,
    sample: int,
    with_gradient: bool,
) -> tuple[Tensor, Tensor]:
    return _loss_and_gradient(student, teacher, distance_weight, angle_weight, reduction, sample, None, with_gradient)


# The loss as one node of a compiled graph, so that the compiler does not trace what is inside.
_operator = torch.library.custom_op(
    "lightning_rkd::rkd_loss",
    _operate,
    mutates_args=(),
    schema="(Tensor student, Tensor teacher, float distance_weight, float angle_weight, str reduction, int sample, "
    "bool with_gradient) -> (Tensor, Tensor)",
)


@_operator.register_fake
def _shapes(student: Tensor, teacher: Tensor, *settings: Any) -> tuple[Tensor, Tensor]:
    dtype = _precision(student, teacher)
    shape = student.shape if settings[-1] else (0,)
    return student.new_empty((), dtype=dtype), student.new_empty(shape, dtype=dtype)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.dtype = inputs[0].dtype
    ctx.save_for_backward(output[1])


def _pull(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    (grad,) = ctx.saved_tensors
    return (grad * grads[0]).to(ctx.dtype), None, None, None, None, None, None


_operator.register_autograd(_pull, setup_context=_remember)
