"""Matryoshka representations (Kusupati et al. 2022): a loss on the first columns of the student, several times."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from lightning_rkd.losses.base import Reference, RelationalLoss
from lightning_rkd.losses.parts.checks import check_at_least, check_positive


class Matryoshka(RelationalLoss):
    r"""A loss of the first d columns of the student's embedding, averaged over several d.

    .. math::
        L = \sum_k w_k\, \ell(s_{:, 1..d_k},\, t)

    so that embeddings can be cut to :math:`d_k` columns when they are used. The teacher keeps all its columns. Each d
    has its own copy of the loss, with its own tensors (projections, memories), for a ``student_dim`` of d.

    Shapes: (N, D_s), (N, D_t) -> scalar, with D_s of at least the largest d.

    Args:
        loss: A loss that reads embeddings, with everything that it needs. For a weighted sum of losses, wrap each.
        dims: All d.
        weights: All w; by default each is one over their number.

    Reference:
        Kusupati, Bhatt, Rege et al. 2022, Matryoshka Representation Learning, arXiv:2205.13147.

    Example:
        >>> from lightning_rkd.losses import RKD
        >>> student, teacher = torch.randn(6, 32), torch.randn(6, 64)
        >>> loss = Matryoshka(RKD(), dims=[8, 32])
        >>> torch.allclose(2 * loss(student, teacher), RKD()(student[:, :8], teacher) + RKD()(student, teacher))
        True
    """

    reference = Reference(
        "kusupati2022matryoshka",
        "read in code",
        source="NLPJCL/RAG-Retrieval, rag_retrieval/train/embedding/model_distill.py, by other authors",
        weight_note="that of the wrapped loss",
    )

    def __init__(self, loss: RelationalLoss, dims: Sequence[int], weights: Sequence[float] | None = None) -> None:
        super().__init__()
        if not isinstance(loss, RelationalLoss):
            raise TypeError(
                f"Matryoshka: loss must be one RelationalLoss, such as RKD(), got {type(loss).__name__}; of a sum, "
                "wrap each: 25 * Matryoshka(RKDDistance(), dims) + 50 * Matryoshka(RKDAngle(), dims)"
            )
        if loss.reads != "embedding":
            raise ValueError(
                f"Matryoshka: loss must read the embedding, but {type(loss).__name__} reads {loss.reads!r}"
            )
        if not isinstance(dims, Sequence) or not dims or len(set(dims)) < len(dims):
            raise ValueError(f"Matryoshka: dims must be a list of different numbers of columns, got {dims!r}")
        for number in dims:
            check_at_least("Matryoshka", 1, dims=number)
        if weights is not None and len(weights) != len(dims):
            raise ValueError(f"Matryoshka: weights must be one for each of {len(dims)} dims, got {len(weights)}")
        for weight in weights or ():
            check_positive("Matryoshka", weights=weight)
        self.dims, self.weights = tuple(dims), None if weights is None else tuple(weights)
        self.losses = cast("Sequence[RelationalLoss]", nn.ModuleList(copy.deepcopy(loss) for _ in dims))
        for columns, one in zip(dims, self.losses, strict=True):
            if "student_dim" in one.needed_sizes:
                one.set_sizes(**{**one._sizes, "student_dim": columns})
        self.gather, self.aligns = loss.gather, loss.aligns
        self.needs, self.required = loss.needs, loss.required
        self.invariances, self.needed_sizes = loss.invariances - {"rotation"}, loss.needed_sizes

    @property
    def missing_sizes(self) -> tuple[str, ...]:
        return tuple(sorted({size for loss in self.losses for size in loss.missing_sizes}))

    def materialize(
        self, student: Any = None, teacher: Any = None, *, num_samples: int | None = None, like: Tensor | None = None
    ) -> None:
        """Make the tensors of all copies, once, each for its own number of columns."""
        whole = None if student is None else self._select(student, "student")
        for columns, loss in zip(self.dims, self.losses, strict=True):
            part = None if whole is None else whole[:, :columns]
            loss.materialize(part, teacher, num_samples=num_samples, like=like)
        self.ready = True

    def suggest_call(self, sizes: Mapping[str, Any]) -> str:
        arguments = ", ".join(f"{name}={sizes.get(name, '...')}" for name in self.missing_sizes)
        return f"Matryoshka({type(self.losses[0]).__name__}({arguments}), dims={[*self.dims]})"

    def forward(self, student: Tensor, teacher: Tensor, **context: Any) -> Tensor:
        if student.shape[1] < max(self.dims):
            raise ValueError(
                f"Matryoshka: dims go up to {max(self.dims)}, but the student's embedding has {student.shape[1]} "
                "columns: name smaller dims, or a wider layer"
            )
        weights = self.weights or [1 / len(self.dims)] * len(self.dims)
        copies = zip(self.dims, weights, self.losses, strict=True)
        return torch.stack([w * loss(student[:, :d], teacher, **context) for d, w, loss in copies]).sum()
