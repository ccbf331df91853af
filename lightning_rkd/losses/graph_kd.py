"""Graph knowledge distillation (Lassance et al. 2020): the normalised similarity graph of the batch."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from lightning_rkd.functional.graphs import knn_graph, normalised_adjacency, same_class
from lightning_rkd.functional.scales import to_float64
from lightning_rkd.functional.similarities import cosine_similarities, flatten_layers
from lightning_rkd.losses.base import Reference, RelationalLoss
from lightning_rkd.losses.parts.checks import Reads, check_at_least, check_choice, check_maps_are_read

Edges = Literal["all", "within", "between"]
Layers = Tensor | Sequence[Tensor]


def graph_kd(
    student: Tensor, teacher: Tensor, *, mask: Tensor | None = None, neighbours: int | None = None, power: int = 1
) -> Tensor:
    """The loss of one pair of layers as a function; see :class:`GraphKD`."""
    s, t = _adjacency(student), _adjacency(teacher.detach())
    if mask is not None:
        s, t = s * mask, t * mask
    if neighbours is not None:
        ranked = _adjacency(to_float64(teacher.detach()))  # or rounding in float32 decides between equal edges
        ranked = ranked if mask is None else ranked * mask
        near = knn_graph(-ranked, neighbours, include_self=False, who="GraphKD", argument="neighbours")
        either = near | near.T
        s, t = s * either, t * either
    gap: Tensor = torch.linalg.matrix_power(s, power) - torch.linalg.matrix_power(t, power)
    return gap.square().sum()


def _adjacency(x: Tensor) -> Tensor:
    return normalised_adjacency(cosine_similarities(x).fill_diagonal_(0).relu())


class GraphKD(RelationalLoss):
    r"""Matches the graphs of similarities that a layer of each network spans over the batch.

    .. math::
        L = \frac{1}{|\text{layers}|} \sum_l \big\lVert \tilde A_t^p - \tilde A_s^p \big\rVert_F^2, \qquad
        \tilde A = D^{-1/2} A D^{-1/2}, \quad A_{ij} = [i \ne j] \, \max(0, \cos(x_i, x_j)), \quad
        D = \mathrm{diag}(A \mathbf 1)

    with the flattened activations x of a layer. Both graphs may then be thinned out: to edges within or between
    classes, and to the edges that join a sample to one of its k strongest neighbours in the teacher's graph, in either
    direction. The loss is a sum over edges, so it grows with the batch, slowly: rows of :math:`\tilde A` shrink as they
    get longer. It does not change when either embedding is rotated, or any row scaled.

    Departures from the authors' code: it reads maps behind a ReLU, whose cosines are never negative; here negative
    cosines count as 0, where a negative degree would make theirs NaN. A sample that is similar to no other is
    isolated, with edges of 0. Reading embeddings is ours.

    Shapes: embeddings (N, D_s), (N, D_t), or lists of as many maps (N, C, H, W), of any sizes -> scalar. A batch of
    one row gives 0.

    Args:
        neighbours: k, not counting the sample itself (:class:`~lightning_rkd.losses.HolisticKD` counts it). ``None``
            keeps all edges, as in the authors' main setting.
        power: p, at least 1; 1 in the authors' main setting.
        edges: ``"all"``, or those ``"within"`` or ``"between"`` classes, for which the loss needs ``labels``, (N,) or
            soft (N, K).
        reads: ``"embedding"``, or ``"feature_maps"`` as in the paper.
        feature_maps: Positions of the compared maps among those tapped, ``[-1]`` the last; ``None`` compares all.
            Needs ``reads="feature_maps"``.

    Reference:
        Lassance et al. 2020, Deep Geometric Knowledge Distillation with Graphs, arXiv:1911.03080.

    Example:
        >>> student, teacher = torch.ones(3, 2), torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 1.0]])
        >>> GraphKD()(student, teacher)
        tensor(0.0228)
        >>> GraphKD(edges="within")(student, teacher, labels=torch.tensor([0, 0, 1]))
        tensor(0.0147)
    """

    reference = Reference(
        "lassance2020deep",
        "read in code",
        source="cadurosar/graph_kd, utils.py",
        weight=25.0,
        weight_note="CIFAR-10, three maps (reads='feature_maps'), batches of 128",
    )
    invariances = frozenset({"rotation", "row scale", "scale"})

    def __init__(
        self,
        neighbours: int | None = None,
        power: int = 1,
        edges: Edges = "all",
        reads: Reads = "embedding",
        *,
        feature_maps: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        check_at_least("GraphKD", 1, power=power, **({} if neighbours is None else {"neighbours": neighbours}))
        check_choice("GraphKD", Edges, edges=edges)
        check_choice("GraphKD", Reads, reads=reads)
        check_maps_are_read("GraphKD", reads, feature_maps)
        self.neighbours, self.power, self.edges = neighbours, power, edges
        self.reads, self.feature_maps = reads, feature_maps

    def forward(self, student: Layers, teacher: Layers, *, labels: Tensor | None = None) -> Tensor:
        """The loss as a scalar; ``labels`` are needed where edges depend on classes."""
        layers = list(zip(flatten_layers(student), flatten_layers(teacher), strict=True))
        mask = self._mask(labels, layers[0][0].dtype)
        each = [graph_kd(s, t, mask=mask, neighbours=self.neighbours, power=self.power) for s, t in layers]
        return torch.stack(each).mean()

    def _mask(self, labels: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        if self.edges == "all":
            return None
        if labels is None:
            raise ValueError(
                f"GraphKD: edges={self.edges!r} needs labels: pass labels=..., let the batch carry them, or edges='all'"
            )
        same = same_class(labels).to(dtype)
        return same if self.edges == "within" else 1 - same
