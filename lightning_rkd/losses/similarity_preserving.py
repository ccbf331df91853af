"""Similarity-preserving distillation (Tung and Mori 2019): similarities of the activations within a batch."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_rkd.functional.similarities import flatten_layers, unit_rows
from lightning_rkd.losses.base import Reference, RelationalLoss
from lightning_rkd.losses.parts.checks import Reads, check_choice, check_maps_are_read
from lightning_rkd.losses.parts.maps import gram_matrices


class SimilarityPreserving(RelationalLoss):
    r"""Compares the similarities between the activations of the samples in a batch.

    .. math::
        L = \frac{1}{N^2} \sum_l \big\lVert \tilde G_t^{(l)} - \tilde G_s^{(l)} \big\rVert_F^2, \qquad
        \tilde G_{i:} = G_{i:} / \lVert G_{i:} \rVert_2, \quad G = Q Q^\top

    with the flattened activations :math:`Q` of layer l. Several layers add up, as in the paper; the usual setting is
    one, the last map before pooling. The loss does not change when either network's are rotated or scaled.

    Departures: a sample without any activation has a row of zeros, as in the published code, but passes no gradient,
    where that passes one 1e12 times too large. Reading embeddings instead of maps is ours.

    Shapes: embeddings (N, D_s), (N, D_t), or lists of as many maps (N, C, H, W), of any sizes -> scalar. A batch of
    one row gives 0.

    Args:
        reads: ``"embedding"``, or ``"feature_maps"`` as in the paper.
        feature_maps: Positions of the compared maps among those tapped, ``[-1]`` the last; ``None`` compares all.
            Needs ``reads="feature_maps"``.

    Reference:
        Tung and Mori 2019, Similarity-Preserving Knowledge Distillation, arXiv:1907.09682.

    Example:
        >>> student, teacher = torch.eye(2), torch.ones(2, 1)
        >>> SimilarityPreserving()(student, teacher)
        tensor(0.2929)
        >>> maps = [torch.eye(2).view(2, 2, 1, 1)], [torch.ones(2, 1, 4, 4)]
        >>> SimilarityPreserving(reads="feature_maps")(*maps)
        tensor(0.2929)
    """

    reference = Reference(
        "tung2019similarity",
        "read in code",
        source="HobbitLong/RepDistiller, distiller_zoo/SP.py",
        weight=3000.0,
        weight_note="CIFAR-100, the last map before pooling (reads='feature_maps', feature_maps=[-1]), RepDistiller",
        result="CIFAR-100 resnet32x4 to resnet8x4: 72.94 (student alone 72.50), RepDistiller",
    )
    invariances = frozenset({"rotation", "scale"})

    def __init__(self, reads: Reads = "embedding", *, feature_maps: Sequence[int] | None = None) -> None:
        super().__init__()
        check_choice("SimilarityPreserving", Reads, reads=reads)
        check_maps_are_read("SimilarityPreserving", reads, feature_maps)
        self.reads, self.feature_maps = reads, feature_maps

    def forward(self, student: Tensor | Sequence[Tensor], teacher: Tensor | Sequence[Tensor]) -> Tensor:
        pairs = zip(flatten_layers(student), flatten_layers(teacher), strict=True)
        grams = ([unit_rows(gram_matrices(x.flatten(1))) for x in pair] for pair in pairs)
        return torch.stack([(s - t).square().mean() for s, t in grams]).sum()
