"""Instance relationship graphs (Liu, Cao, Li, Yuan, Hu, Li and Duan 2019): vertices, edges and transformations."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_rkd.functional.channels import flatten_channels
from lightning_rkd.functional.distances import squared_distances
from lightning_rkd.functional.scales import power_of_two
from lightning_rkd.losses.base import Reference, RelationalLoss
from lightning_rkd.utils.types import Outputs


def edges(x: Tensor) -> Tensor:
    r"""Squared distances between a batch's rows, in units of the largest, a constant; zeros where all are equal."""
    return _over_largest(squared_distances(x)).to(x.dtype)


def transformation(before: Tensor, after: Tensor) -> Tensor:
    r"""Squared distances (N,) by which a stage moves each sample, in units of the largest, a constant."""
    move = after - before
    return _over_largest((move / power_of_two(move, (0, 1))).square().sum(1))


def _over_largest(x: Tensor) -> Tensor:
    largest = x.detach().amax()
    return x / torch.where(largest > 0, largest, 1)


class IRG(RelationalLoss):
    r"""Compares the graphs that a batch's samples form in the two networks, and how each stage moves the samples.

    .. math::
        L = \lambda_1 \frac{1}{2N} \sum_i \lVert z^s_i - z^t_i \rVert^2
        + \lambda_2 \sum_{l \in E} \frac{1}{2N} \sum_{i,j} \big(A^s_{l,ij} - A^t_{L,ij}\big)^2
        + \lambda_3 \sum_{(k,l)} \frac{1}{2} \sum_i \big(\Lambda^s_{kl,i} - \Lambda^t_{kl,i}\big)^2

    - Vertices: logits z, the only layer where the paper compares features themselves.
    - Edges A: squared distances between samples in one layer, in units of the largest. The layers E of the student are
      all compared with the teacher's last one, L.
    - Transformations :math:`\Lambda`: squared distances by which each sample moves between a layer k and a later one
      l, in units of the largest. The paper also defines a transformation of edges, and leaves it out as redundant.

    Maps are averaged over their positions first, as in the authors' network files, so heights, widths and channels of
    student and teacher may differ. But both ends of a transformation must have the same channels: the
    authors take the first and the last block of every stage.

    The factors 1/2N and 1/2 and the units of the largest are those of the authors' Caffe layers; the paper writes
    plain sums of plain squared distances. As in their backward pass, the largest distance is a constant: through it,
    nearly all of the gradient would fall on the two samples that are farthest apart. Departure: theirs lets an edge
    pull only the first of its two samples, which halves the gradient of the edges. Duplicates have distance 0 and pass
    no gradient.

    Shapes: ``Outputs`` with logits (N, K) and lists of maps (N, C, H, W) or tokens (N, T, C) -> scalar.

    Args:
        vertex_weight: :math:`\lambda_1`. With 0 no logits are read. Its size is ours: the authors' files have no term
            for vertices.
        edge_weight: :math:`\lambda_2`, as in the authors' files.
        transform_weight: :math:`\lambda_3`, as in the authors' files.
        edge_layers: E, positions of the student's maps whose edges are compared; negative ones count from the end.
        transform_layers: Pairs of positions, for both networks. ``None`` takes every map and the next one.

    Reference:
        Liu, Cao, Li, Yuan, Hu, Li and Duan 2019, Knowledge Distillation via Instance Relationship Graph, CVPR.

    Example:
        >>> loss = IRG(vertex_weight=0, edge_weight=1, transform_weight=1)
        >>> student = [torch.zeros(3, 1), torch.tensor([[0.0], [1.0], [2.0]])]
        >>> teacher = [torch.zeros(3, 1), torch.tensor([[0.0], [2.0], [2.0]])]
        >>> loss(Outputs(feature_maps=student), Outputs(feature_maps=teacher))
        tensor(0.4896)
    """

    reads: str | tuple[str, ...] = ("logits", "feature_maps")
    reference = Reference(
        "liu2019knowledge",
        "read in code",
        source="yufanLIU/IRG, batch_euclidean_map_layer.cpp, batch_euclidean_vector_layer.cpp and the prototxt files",
        weight=1.0,
        weight_note="with 0.005 inside for edges and for each transformation, CIFAR-10, the authors' files",
        result="CIFAR-10 ResNet20 to ResNet20-x0.5: 90.69 (student alone 88.36), the authors' README",
    )

    def __init__(
        self,
        vertex_weight: float = 0.005,
        edge_weight: float = 0.005,
        transform_weight: float = 0.005,
        *,
        edge_layers: Sequence[int] = (-1,),
        transform_layers: Sequence[tuple[int, int]] | None = None,
    ) -> None:
        super().__init__()
        self.vertex_weight, self.edge_weight, self.transform_weight = vertex_weight, edge_weight, transform_weight
        self.edge_layers = tuple(edge_layers)
        self.transform_layers = None if transform_layers is None else tuple((k, m) for k, m in transform_layers)
        if not vertex_weight:
            self.reads = ("feature_maps",)

    def forward(self, student: Outputs, teacher: Outputs) -> Tensor:
        assert student.feature_maps is not None
        assert teacher.feature_maps is not None
        s, t = (
            [flatten_channels(x, who="IRG").mean(2) for x in maps]
            for maps in (student.feature_maps, teacher.feature_maps)
        )
        total = s[0].new_zeros(())
        if student.logits is not None and teacher.logits is not None and self.vertex_weight:
            total = total + self.vertex_weight * _vertices(student.logits, teacher.logits)
        last = edges(t[-1])
        for layer in self.edge_layers:
            gap = edges(_select_map(s, layer)) - last
            total = total + self.edge_weight * gap.square().sum() / (2 * len(last))
        consecutive = tuple((k, k + 1) for k in range(len(s) - 1))
        for pair in consecutive if self.transform_layers is None else self.transform_layers:
            gap = _moved(s, *pair, who="student") - _moved(t, *pair, who="teacher")
            total = total + self.transform_weight * gap.square().sum() / 2
        return total


def _vertices(s: Tensor, t: Tensor) -> Tensor:
    if s.shape != t.shape:
        raise ValueError(
            f"IRG: the vertices are logits over the same classes, got {tuple(s.shape)} and {tuple(t.shape)}; "
            "pass vertex_weight=0 to leave them out"
        )
    return (s - t).square().sum() / (2 * len(s))


def _select_map(maps: list[Tensor], position: int) -> Tensor:
    if not -len(maps) <= position < len(maps):
        raise ValueError(f"IRG: there is no map {position} among the {len(maps)} that are read")
    return maps[position]


def _moved(maps: list[Tensor], k: int, m: int, *, who: str) -> Tensor:
    before, after = _select_map(maps, k), _select_map(maps, m)
    if before.shape != after.shape:
        raise ValueError(
            f"IRG: a transformation runs between maps with the same channels, but the {who}'s maps {k} and {m} have "
            f"{before.shape[1]} and {after.shape[1]}; tap the first and the last block of each stage and pass "
            "transform_layers=[(0, 1), (2, 3), ...]"
        )
    return transformation(before, after)
