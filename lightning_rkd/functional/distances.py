r"""Pairwise distances of a batch, exact where the textbook forms are not.

:math:`|a|^2 + |b|^2 - 2ab` in float32 is useless far from the origin and for rows that lie close together: with two
rows at a thousandth of the spread it makes the gradient of RKD's angle loss 50 % wrong. Here the rows are centred and
the Gram matrix is taken in float64, which costs no more than the float32 difference form and is exact in practice.
"""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from lightning_rkd.functional._kernels import give_up, native

DUPLICATE = 1e-13
"""Two rows with squared distance up to this part of the sum of their squared norms (centred) count as duplicates."""

_BLOCK = 2**22  # elements of a block of differences, where there is no float64


def squared_distances(x: Tensor) -> Tensor:
    r"""Squared Euclidean distances between the rows of a batch, with an exact gradient.

    .. math:: S_{ij} = \lVert x_i - x_j \rVert_2^2

    Rows are centred and multiplied in float64, and so is the backward pass: for an incoming gradient :math:`W` it is
    :math:`2\,(\mathrm{diag}(V \mathbf 1) - V)\,x` with :math:`V = W + W^\top`. The diagonal and the entries of
    duplicates are exactly 0. Duplicates are rows whose squared distance is at most
    ``1e-13 * (|x_i|^2 + |x_j|^2)`` after centring: a relative distance of about 3e-7, close to what float32 can tell
    apart at all. Devices without float64 (MPS) take differences in blocks instead, in the dtype of ``x`` but at least
    float32. The host never waits for the device.

    Shapes: (N, D) -> (N, N). The result stays float64 (float32 on MPS), whatever the dtype of ``x``.

    Args:
        x: Embeddings, any floating dtype.

    Example:
        >>> squared_distances(torch.tensor([[0.0, 0.0], [3.0, 4.0], [3.0, 4.0]])).tolist()
        [[0.0, 25.0, 25.0], [25.0, 0.0, 0.0], [25.0, 0.0, 0.0]]
    """
    return _SquaredDistances.apply(x)  # type: ignore[no-any-return]


def safe_sqrt(squared: Tensor) -> Tensor:
    """Square root whose gradient is 0, not infinite, where the argument is 0.

    Example:
        >>> x = torch.tensor([0.0, 4.0], requires_grad=True)
        >>> safe_sqrt(x).sum().backward()
        >>> x.grad
        tensor([0.0000, 0.2500])
    """
    zero = squared <= 0
    return torch.where(zero, 0, torch.where(zero, 1, squared).sqrt())


def pairwise_distances(x: Tensor) -> Tensor:
    r"""Euclidean distances between the rows of a batch; duplicates have distance 0 and pass no gradient.

    .. math:: d_{ij} = \lVert x_i - x_j \rVert_2

    Shapes: (N, D) -> (N, N), float64 as in :func:`squared_distances`.

    Example:
        >>> pairwise_distances(torch.tensor([[0.0, 0.0], [3.0, 4.0]])).tolist()
        [[0.0, 5.0], [5.0, 0.0]]
    """
    return safe_sqrt(squared_distances(x))


def distance_loss(squared_student: Tensor, squared_teacher: Tensor, *, count: int) -> Tensor:
    r"""Huber loss between the distances of a batch in student and teacher, each in units of its mean.

    .. math::
        L = \frac{1}{n} \sum_{i,j} h\!\left(\frac{d_{ij}}{\mu} - \frac{d'_{ij}}{\mu'}\right), \qquad
        h(e) = \begin{cases} e^2 / 2 & |e| \le 1 \\ |e| - 1/2 & \text{else} \end{cases}

    :math:`\mu` is the mean of strictly positive distances, and the student's is part of the gradient. Duplicates pass
    none. The gradient flows to the student alone; it is computed with the loss.

    Shapes: (N, N), (N, N) -> scalar, of the type that comes in.

    Args:
        squared_student: As :func:`squared_distances` gives them.
        squared_teacher: The same for the teacher; a constant.
        count: n, what the sum is divided by.

    Raises:
        RuntimeError: The backward pass runs with ``create_graph=True``.

    Reference:
        Park, Kim, Lu and Cho 2019, Relational Knowledge Distillation, arXiv:1904.05068.

    Example:
        >>> student = torch.tensor([[0.0, 1.0, 4.0], [1.0, 0.0, 1.0], [4.0, 1.0, 0.0]])
        >>> teacher = torch.tensor([[0.0, 1.0, 9.0], [1.0, 0.0, 4.0], [9.0, 4.0, 0.0]])
        >>> distance_loss(student, teacher, count=9)
        tensor(0.0139)
    """
    return _DistanceLoss.apply(squared_student, squared_teacher.detach(), count)  # type: ignore[no-any-return]


def second_derivative_error(name: str) -> RuntimeError:
    """Error for a backward pass of ``name`` with ``create_graph=True``, where no second derivative exists."""
    return RuntimeError(
        f"{name} has a first derivative only: its backward pass ran with create_graph=True, and the second "
        "derivative would be left out silently"
    )


def measure(x: Tensor) -> tuple[Tensor, tuple[Tensor, ...], ModuleType | None]:
    """Squared distances without a graph, and what :func:`pull_rows` takes: some tensors, and the kernel or ``None``."""
    if x.device.type == "mps":
        return _by_differences(x), (x,), None
    name = _KERNELS.get(x.device.type, "")
    kernel = None if torch.compiler.is_compiling() else native(name)
    if kernel:
        try:
            return *kernel.squared(x, DUPLICATE), kernel
        except Exception as error:
            if x.device.type == "cpu":
                raise
            give_up(name, error)
    rows = _centred(x, torch.float64)
    return _from_gram(rows @ rows.T), (rows,), None


def pull_rows(pull: Tensor, saved: tuple[Tensor, ...], kernel: ModuleType | None) -> Tensor:
    """Gradient of rows, from the gradient of their squared distances and from what :func:`measure` gives."""
    if kernel:
        return kernel.pulled(pull, *saved)  # type: ignore[no-any-return]
    with torch.autocast(pull.device.type, enabled=False):
        pull = pull + pull.T
        rows = _centred(saved[0], pull.dtype)
        return (pull.sum(1, keepdim=True) * rows).sub_(pull @ rows).mul_(2)


class _SquaredDistances(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        squared, saved, ctx.kernel = measure(x)
        ctx.dtype = x.dtype
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(*saved)
        return squared

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            raise second_derivative_error("squared_distances")
        return pull_rows(grads[0], ctx.saved_tensors, ctx.kernel).to(ctx.dtype)


_KERNELS = {"cpu": "distance_cpu", "cuda": "distance_cuda"}


def _centred(x: Tensor, dtype: torch.dtype) -> Tensor:
    x = x.to(dtype)
    return x - x.mean(0)


def _from_gram(gram: Tensor) -> Tensor:
    norms = gram.diagonal()
    sums = norms[:, None] + norms
    squared = torch.sub(sums, gram, alpha=2)
    squared.masked_fill_(squared <= sums.mul_(DUPLICATE), 0)
    return squared.fill_diagonal_(0)


def _by_differences(x: Tensor) -> Tensor:
    rows = _centred(x, torch.promote_types(x.dtype, torch.float32))
    step = max(1, _BLOCK // max(1, rows.numel()))
    return torch.cat([(block[:, None] - rows).square_().sum(2) for block in torch.split(rows, step)])


def distance_terms(
    squared_student: Tensor, squared_teacher: Tensor, factor: float, with_gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """Sum of the Huber terms of all pairs times a factor, and its gradient to the student's squared distances."""
    own, given = squared_student.sqrt(), squared_teacher.sqrt()
    positive, tiny = own > 0, torch.finfo(own.dtype).tiny
    total = own.sum().clamp_min(tiny)
    per_mean, others = positive.sum() / total, (given > 0).sum() / given.sum().clamp_min(tiny)
    e = own * per_mean - given * others
    g = e.clamp(-1, 1)
    loss = (e.sub_(g, alpha=0.5).mul_(g)).sum() * factor
    if not with_gradient:
        return loss, None
    per_mean = per_mean * (0.5 * factor)
    by_mean = (g * own).sum() * per_mean / total
    pull = g.mul_(per_mean).sub_(by_mean).div_(own)  # 0 / 0 at duplicates
    return loss, torch.where(positive, pull, 0)


class _DistanceLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, squared_student: Tensor, squared_teacher: Tensor, count: int) -> Tensor:
        loss, pull = distance_terms(squared_student, squared_teacher, 1 / count, ctx.needs_input_grad[0])
        ctx.save_for_backward(pull)
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise second_derivative_error("distance_loss")
        (pull,) = ctx.saved_tensors
        return pull * grads[0], None, None
