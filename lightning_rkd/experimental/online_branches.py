"""Online distillation among branches, after Li, Huang, Chen, Luo, Cai and Pan 2020: their ensemble is the teacher."""

from collections.abc import Sequence
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_rkd.distillation.layers import find_layer
from lightning_rkd.distillation.step import StepFeatures
from lightning_rkd.losses.parts.checks import check_at_least, check_positive
from lightning_rkd.losses.references import BibTeX, Reference
from lightning_rkd.losses.soft_target import soft_target
from lightning_rkd.modules.distillation import DistillationModule


class Branches(nn.Module):
    """Classifiers behind a common trunk; the output is the mean of their logits."""

    def __init__(self, branches: Sequence[nn.Module], trunk: nn.Module | None = None) -> None:
        super().__init__()
        self.trunk = nn.Identity() if trunk is None else trunk
        self.branches = nn.ModuleList(branches)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The mean of the branches' logits, (N, K)."""
        shared = self.trunk(*args, **kwargs)
        logits = [branch(shared) for branch in self.branches]
        shapes = [tuple(z.shape) for z in logits]
        if len(set(shapes)) > 1 or logits[0].ndim != 2:
            raise ValueError(f"OnlineBranches: every branch must give logits (N, K) of the same classes, got {shapes}")
        return torch.stack(logits).mean(0)

    def single(self, number: int) -> nn.Sequential:
        """The trunk and one branch, sharing their weights: the small network to deploy."""
        return nn.Sequential(self.trunk, self.branches[number])


class BranchLosses(nn.Module):
    """Cross-entropies of all branches, and soft targets of all branches: logits (N, K, B) -> (2,)."""

    def __init__(self, temperature: float = 3.0) -> None:
        super().__init__()
        self.temperature = temperature

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        branches, ensemble = logits.unbind(2), logits.mean(2)
        hard = torch.stack([F.cross_entropy(z, labels) for z in branches]).sum()
        soft = torch.stack([soft_target(z, ensemble, temperature=self.temperature) for z in branches]).sum()
        return torch.stack([hard, soft])


def classifier_overlap(weights: Sequence[Tensor]) -> Tensor:
    r"""Overlap of the directions of classifiers (K, D_i), :math:`\sum_{i<j} \lVert W_i^\top W_j \rVert_F`."""
    pairs = [torch.linalg.vector_norm(a.T @ b) for a, b in combinations(weights, 2)]
    return torch.stack(pairs).sum()


class OnlineBranches(DistillationModule):
    r"""Trains several classifiers together without a teacher: each learns from the labels and from the ensemble.

    .. math::
        L = \sum_b \mathrm{CE}(z_b, y) + \frac{T^2}{N} \sum_b \sum_n
        \mathrm{KL}\big(\sigma(\bar{z}_n / T) \,\Vert\, \sigma(z_{bn} / T)\big) +
        \delta \sum_{i<j} \lVert W_i^\top W_j \rVert_F, \qquad \bar{z} = \frac{1}{B} \sum_b z_b

    z are the logits of the B branches, :math:`\bar{z}`, a constant here, those of their ensemble, and :math:`W_b` (K,
    D_b) the weights of a branch's classifier, which the last term keeps diverse. ``forward`` is the ensemble;
    ``module.student.single(0)`` is one small network.

    This is not the whole method of the paper. Its Feature Fusion Module, which weighs the branches by attention over
    their last maps, could not be recovered: neither the paper's text nor its authors' code were available. The ensemble
    is the plain mean of logits instead, and no parity with the paper is claimed.

    Provenance: cross-entropies, soft targets, T and :math:`\delta` are from third-party code that compares methods.
    Departures from it: there the last term has no gradient and so no effect, the ensemble learns from the branches, and
    the divergence is divided by K as well.

    Logged: ``train/cross_entropy``, ``distill/ensemble`` and ``distill/diversity``, the three terms; ``train/task`` is
    their sum.

    Args:
        branches: At least two classifiers, each (N, K), with different random weights.
        trunk: Shared layers before them; ``None`` for none.
        classifier: Dotted path, inside a branch, of its Linear classifier; ``None`` takes a branch's last Linear.
        temperature: T.
        diversity: :math:`\delta`.
        kwargs: Arguments of :class:`~lightning_rkd.DistillationModule` for metrics (of the mean of the logits),
            optimization and batches.

    Reference:
        Li, Huang, Chen, Luo, Cai and Pan 2020, Online Knowledge Distillation via Multi-branch Diversity Enhancement,
        arXiv:2010.00795.

    Example:
        >>> module = OnlineBranches([nn.Linear(8, 3), nn.Linear(8, 3)], trunk=nn.Linear(4, 8))
        >>> module(torch.ones(2, 4)).shape
        torch.Size([2, 3])
    """

    bibtex = BibTeX()
    reference = Reference(
        "li2020online",
        "reconstruction",
        source="third-party code for all but the ensemble; the paper's Feature Fusion Module is missing, and the mean "
        "of logits stands in for it",
        weight=5e-8,
        weight_note="of the diversity term, with T = 3",
    )

    student: Branches

    def __init__(
        self,
        branches: list[nn.Module],
        trunk: nn.Module | None = None,
        *,
        classifier: str | None = None,
        temperature: float = 3.0,
        diversity: float = 5e-8,
        **kwargs: Any,
    ) -> None:
        if len(branches) < 2:
            raise ValueError(f"OnlineBranches needs at least two branches that teach one another, got {len(branches)}")
        if len({id(p) for b in branches for p in b.parameters()}) < sum(len(list(b.parameters())) for b in branches):
            raise ValueError("OnlineBranches: branches share parameters; build each of its own, share by trunk=...")
        check_positive("OnlineBranches", temperature=temperature)
        check_at_least("OnlineBranches", 0, diversity=diversity)
        layers: dict[str, Any] = {
            "embedding": "",
            "branches": [f"branches.{number}" for number in range(len(branches))],
        }
        super().__init__(
            student=Branches(branches, trunk), teacher=None, loss=None, student_layer=layers, teacher_layer=None,
            input_layer=None, task_loss=BranchLosses(temperature), task_reads="logits", miner=None, weight=1.0,
            task_weight=1.0, gather=True, balance=None, compare_gradients=None, **kwargs,
        )  # fmt: skip
        self.diversity = diversity
        self._classifiers = [classifier or _last_linear(branch) for branch in branches]
        self._find_weights()  # to refuse layers of other types

    def task(self, features: StepFeatures, output: Any) -> Tensor:
        """Compute all three terms of the equation."""
        logits = features.student["branches"].feature_maps
        assert logits is not None
        hard, soft = super().task(features, torch.stack(logits, dim=2))
        with torch.autocast(output.device.type, enabled=False):
            diverse = self.diversity * classifier_overlap([w.to(hard.dtype) for w in self._find_weights()])
        parts = {"train/cross_entropy": hard, "distill/ensemble": soft, "distill/diversity": diverse}
        self.log_dict({name: value.detach() for name, value in parts.items()})
        return torch.stack([*parts.values()]).sum()

    def _find_weights(self) -> list[Tensor]:
        weights = []
        for number, (branch, path) in enumerate(zip(self.student.branches, self._classifiers, strict=True)):
            layer = find_layer(branch, path)
            if not isinstance(layer, nn.Linear):
                raise ValueError(
                    f"OnlineBranches: {path!r} in branch {number} is a {type(layer).__name__}, but the diversity of "
                    "the branches is that of their Linear classifiers: classifier='<dotted path of a Linear>'"
                )
            weights.append(layer.weight)
        return weights


def _last_linear(branch: nn.Module) -> str:
    """Dotted path of a branch's last Linear; empty if there is none."""
    return next((name for name, m in reversed([*branch.named_modules()]) if isinstance(m, nn.Linear)), "")
