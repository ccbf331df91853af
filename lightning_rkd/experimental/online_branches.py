"""Online distillation among branches, after Li, Huang, Chen, Luo, Cai and Pan 2020: their ensemble is the teacher."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations
from typing import Any, Literal

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import Metric

from lightning_rkd.distillation.features import Tap, find_layer
from lightning_rkd.distillation.step import StepFeatures
from lightning_rkd.losses.parts.checks import check_positive
from lightning_rkd.losses.references import BibTeX, Reference
from lightning_rkd.losses.soft_target import soft_target
from lightning_rkd.modules.distillation import DistillationModule
from lightning_rkd.utils.types import Batch, Key


class Branches(nn.Module):
    """Classifiers behind a common trunk; the output is the mean of their logits.

    Args:
        branches: The classifiers, each (N, K).
        trunk: What they share; ``None`` feeds all of them the input.

    Example:
        >>> net = Branches([nn.Linear(3, 2), nn.Linear(3, 2)], trunk=nn.ReLU())
        >>> net(torch.ones(4, 3)).shape, len(net.single(0))
        (torch.Size([4, 2]), 2)
    """

    def __init__(self, branches: Sequence[nn.Module], trunk: nn.Module | None = None) -> None:
        super().__init__()
        self.trunk = nn.Identity() if trunk is None else trunk
        self.branches = nn.ModuleList(branches)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The mean of the branches' logits, (N, K)."""
        shared = self.trunk(*args, **kwargs)
        logits = [branch(shared) for branch in self.branches]
        if len({tuple(z.shape) for z in logits}) > 1 or logits[0].ndim != 2:
            shapes = [tuple(z.shape) for z in logits]
            raise ValueError(f"OnlineBranches: every branch must give logits (N, K) of the same classes, got {shapes}")
        return torch.stack(logits).mean(0)

    def single(self, number: int) -> nn.Sequential:
        """The trunk and one branch, sharing their weights: the small network to deploy."""
        return nn.Sequential(self.trunk, self.branches[number])


def branch_losses(logits: Tensor, labels: Tensor, *, temperature: float = 3.0) -> Tensor:
    r"""What branches learn from the labels and from their ensemble; :class:`OnlineBranches` has the equation.

    Shapes: logits (N, K, B), labels (N,) or soft labels (N, K) -> (2,): the sum over branches of the cross-entropies,
    and of the soft targets.

    Args:
        logits: Of the B branches.
        labels: Classes.
        temperature: T.

    Example:
        >>> branch_losses(torch.tensor([[[0.0, 2.0], [0.0, 0.0]]]), torch.tensor([0]))
        tensor([0.8201, 0.2422])
    """
    branches = logits.unbind(2)
    ensemble = logits.mean(2)
    hard = torch.stack([F.cross_entropy(z, labels) for z in branches]).sum()
    soft = torch.stack([soft_target(z, ensemble, temperature=temperature) for z in branches]).sum()
    return torch.stack([hard, soft])


def classifier_overlap(weights: Sequence[Tensor]) -> Tensor:
    r"""How much classifiers look at the same directions: :math:`\sum_{i<j} \lVert W_i^\top W_j \rVert_F`.

    Shapes: each (K, D_i) -> scalar.

    Args:
        weights: Of the classifiers, which know the same K classes.

    Example:
        >>> classifier_overlap([torch.eye(2), torch.eye(2), torch.zeros(2, 3)])
        tensor(1.4142)
    """
    pairs = [torch.linalg.vector_norm(a.T @ b) for a, b in combinations(weights, 2)]
    return torch.stack(pairs).sum()


class OnlineBranches(DistillationModule):
    r"""Trains several classifiers together: each learns from the labels and from the ensemble of all; no teacher.

    .. math::
        L = \sum_b \mathrm{CE}(z_b, y) + \frac{T^2}{N} \sum_b \sum_n
        \mathrm{KL}\big(\sigma(\bar{z}_n / T) \,\Vert\, \sigma(z_{bn} / T)\big) +
        \delta \sum_{i<j} \lVert W_i^\top W_j \rVert_F, \qquad \bar{z} = \frac{1}{B} \sum_b z_b

    z are the logits of the B branches, :math:`\bar{z}`, a constant here, those of their ensemble, and :math:`W_b` (K,
    D_b) the weights of a branch's classifier, which the last term keeps diverse.

    This is not the whole method of the paper. Its Feature Fusion Module, which weighs the branches by attention over
    their last maps, could not be recovered: neither the paper's text nor its authors' code were at hand. The ensemble
    is the plain mean of logits instead, and no parity with the paper is claimed.

    Certainty: cross-entropies, soft targets, T and :math:`\delta` were read in third-party code that compares methods.
    That code cuts the gradient of the last term, which then does nothing, lets the ensemble learn from the branches,
    and divides the divergence by K as well; here none of that.

    Logged: ``train/cross_entropy``, ``distill/ensemble`` and ``distill/diversity``, the three parts;
    ``train/task`` is their sum.

    Args:
        branches: Two classifiers or more, each (N, K), of different random weights.
        trunk: What they share; ``None`` feeds all of them the input.
        classifier: Dotted path, inside a branch, of its Linear classifier; ``None`` takes a branch's last Linear.
        temperature: T.
        diversity: :math:`\delta`.
        metrics: As for :class:`~lightning_rkd.DistillationModule`, and so are the following. They see the mean
            of the logits.
        optimizer: From parameters to optimizer.
        lr_scheduler: From optimizer to scheduler.
        lr_interval: ``"epoch"`` or ``"step"``.
        batch_transform: From ``Batch`` to ``Batch``, in training.
        inputs: Key of the inputs in the batch.
        labels: Key of the labels.
        indices: Key of the sample indices.

    ``forward`` is the ensemble; ``module.student.single(0)`` is one small network.

    Raises:
        ValueError: Fewer than two branches, a branch without a Linear, a setting out of range, or logits of different
            classes.

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
        metrics: dict[str, Metric] | None = None,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
        lr_interval: Literal["epoch", "step"] = "epoch",
        batch_transform: Callable[[Batch], Batch] | None = None,
        inputs: Key | list[str] | None = None,
        labels: Key | None = None,
        indices: Key | None = None,
    ) -> None:
        if len(branches) < 2:
            raise ValueError(f"OnlineBranches needs at least two branches that teach one another, got {len(branches)}")
        if len({id(p) for b in branches for p in b.parameters()}) < sum(len(list(b.parameters())) for b in branches):
            raise ValueError("OnlineBranches: branches share parameters; build each of its own, share by trunk=...")
        check_positive("OnlineBranches", temperature=temperature)
        if diversity < 0:
            raise ValueError(f"OnlineBranches: diversity must be >= 0, got {diversity}")
        layers: dict[str, Any] = {
            "embedding": Tap("", at="output"),
            "branches": [Tap(f"branches.{number}", at="output") for number in range(len(branches))],
        }
        super().__init__(
            Branches(branches, trunk),
            task_loss=_BranchLosses(temperature),
            task_reads="logits",
            metrics=metrics,
            optimizer=optimizer,
            lr_scheduler=lr_scheduler,
            lr_interval=lr_interval,
            batch_transform=batch_transform,
            student_layer=layers,
            inputs=inputs,
            labels=labels,
            indices=indices,
        )
        self.diversity = diversity
        self._classifiers = [classifier or _last_linear(branch) for branch in branches]
        for branch in range(len(branches)):
            self._classifier(branch)

    def task(self, features: StepFeatures, output: Any) -> Tensor:
        """All three parts of the equation."""
        logits = features.student["branches"].feature_maps
        assert logits is not None
        hard, soft = super().task(features, torch.stack(logits, dim=2))
        weights = [self._classifier(number).weight for number in range(len(self.student.branches))]
        with torch.autocast(output.device.type, enabled=False):
            diverse = self.diversity * classifier_overlap([w.to(hard.dtype) for w in weights])
        parts = {"train/cross_entropy": hard, "distill/ensemble": soft, "distill/diversity": diverse}
        self.log_dict({name: value.detach() for name, value in parts.items()})
        return torch.stack([*parts.values()]).sum()

    def _classifier(self, branch: int) -> nn.Linear:
        found = find_layer(self.student.branches[branch], self._classifiers[branch])
        if isinstance(found, nn.Linear):
            return found
        raise ValueError(
            f"OnlineBranches: {self._classifiers[branch]!r} in branch {branch} is a {type(found).__name__}, but the "
            "diversity of the branches is that of their Linear classifiers: classifier='<dotted path of a Linear>'"
        )


class _BranchLosses(nn.Module):
    def __init__(self, temperature: float) -> None:
        super().__init__()
        self.temperature = temperature

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        return branch_losses(logits, labels, temperature=self.temperature)


def _last_linear(branch: nn.Module) -> str:
    """The dotted path of a branch's last Linear; of the branch itself where there is none."""
    return next((name for name, m in reversed([*branch.named_modules()]) if isinstance(m, nn.Linear)), "")
