"""Loss weights from the gradient norms of each term and the task loss at the features that the term reads."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from lightning_rkd.distillation.distiller import BoundLoss
from lightning_rkd.utils.distributed import Group, sum_over_ranks
from lightning_rkd.utils.types import Outputs


def balance_weights(
    terms: Mapping[str, Tensor],
    task: Tensor,
    student: Mapping[str, Outputs],
    losses: Mapping[str, BoundLoss],
    group: Group = None,
    scale: Callable[[Tensor], Tensor] | None = None,
) -> dict[str, Tensor]:
    r"""Compute factors that match the gradient norms of loss terms to that of the task loss.

    .. math:: b_k = \left\lVert \frac{\partial L_{task}}{\partial s_k} \right\rVert \Big/
        \left\lVert \frac{\partial L_k}{\partial s_k} \right\rVert

    with :math:`s_k` the student features that term k reads, on all ranks. The graphs are retained, and the factors have
    no gradient. The factor of a term without a gradient is 0.

    Args:
        terms: Values of the terms by name.
        task: Task loss from the same forward pass.
        student: Outputs of the student by tap.
        losses: Losses of the terms.
        group: Process group whose rows the norms include.
        scale: Function of a gradient scaler that scales a loss before its backward pass, without which half-precision
            gradients of feature maps may underflow.

    Returns:
        A factor per term, a scalar of the term's dtype; NaN if the gradient of the term overflows, after which a
        gradient scaler lowers its scale.

    Raises:
        ValueError: The task loss or a term does not depend on the features that the term reads.

    Example:
        >>> from lightning_rkd.losses.rkd import RKDDistance
        >>> x = torch.tensor([[0.0], [1.0], [3.0]], requires_grad=True)
        >>> from lightning_rkd.losses.weighting import Term
        >>> loss = RKDDistance()
        >>> value = loss(x, torch.tensor([[0.0], [1.0], [1.0]]))
        >>> losses = {"rkd_distance": BoundLoss.bind("rkd_distance", Term(loss), [""], [""])}
        >>> both = {"rkd_distance": 10 * value}, 2 * value
        >>> balance_weights(*both, {"": Outputs(embedding=x)}, losses)["rkd_distance"]
        tensor(0.2000)
    """
    factors = {}
    for name, value in terms.items():
        at = [x for x in losses[name].student_tensors(student) if x.requires_grad]
        of_task, of_term = (_gradient_norm(loss if scale is None else scale(loss), at, group) for loss in (task, value))
        if of_task is None or of_term is None:
            raise ValueError(
                f"balance: the {'task loss' if of_task is None else 'term'} does not depend on what {name} reads, so "
                "gradients cannot be compared there; tap a layer that both pass through, or set weights by hand"
            )
        ratio = torch.where(of_term > 0, of_task / torch.where(of_term > 0, of_term, 1), 0)
        factors[name] = torch.where(of_term.isfinite(), ratio, torch.nan).to(value.dtype)
    return factors


def _gradient_norm(loss: Tensor, at: list[Tensor], group: Group) -> Tensor | None:
    found = torch.autograd.grad(loss, at, retain_graph=True, allow_unused=True) if at and loss.requires_grad else ()
    squares = [g.to(torch.promote_types(g.dtype, torch.float32)).square().sum() for g in found if g is not None]
    return sum_over_ranks(torch.stack(squares).sum(), group).sqrt() if squares else None
