"""Losses of the studies of embeddings, the queue of their runs, their gradients, and scores on unseen classes."""

from __future__ import annotations

import inspect
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, partial

import torch
from pytorch_metric_learning.losses import MultiSimilarityLoss, TripletMarginLoss
from pytorch_metric_learning.utils.loss_and_miner_utils import get_all_triplets_indices
from torch import Tensor, nn

import lightning_rkd.experimental
import lightning_rkd.losses
from lightning_rkd.cli.distill.losses import parse_loss
from lightning_rkd.distillation.evaluation import map_to_teacher
from lightning_rkd.losses import LossSum, RelationalLoss
from lightning_rkd.metrics import AsymmetricRetrieval, EmbeddingRetrieval, RelationalAgreement

from .runner import Row, Run

SCORES = ("recall_at_1", "map_at_r", "asymmetric_recall_at_1", "neighbour_overlap_at_10", "distance_correlation")
TASKS: dict[str, Callable[[], nn.Module]] = {
    "triplet": partial(TripletMarginLoss, margin=0.2),
    "multi-similarity": MultiSimilarityLoss,
}
BALANCES = (0.25, 1.0, 4.0, 16.0)
LEFT_OUT = ("CRCD",)
"""A step with the published 500 negatives takes more than a second on a CPU."""


@cache
def list_losses(variants: Sequence[str]) -> tuple[str, ...]:
    """Every loss of the package that reads the embedding alone and needs no argument, and variants, RKD's first."""
    found = []
    for module in (lightning_rkd.losses, lightning_rkd.experimental):
        for name in module.__all__:
            loss = getattr(module, name)
            if isinstance(loss, type) and issubclass(loss, RelationalLoss) and loss is not RelationalLoss:
                parameters = inspect.signature(loss).parameters.values()
                needed = [p for p in parameters if p.default is p.empty and p.kind not in (2, 4)]  # *args, **kwargs
                found += [name] if loss.reads == "embedding" and not needed and name not in LEFT_OUT else []
    return tuple(sorted((*found, *variants), key=lambda name: not name.startswith("RKD")))


@cache
def list_anchored(losses: Sequence[str]) -> tuple[str, ...]:
    """The single losses that align the student's space with the teacher's."""
    sums = {name: LossSum(parse_loss(name)) for name in losses}
    return tuple(name for name, loss in sums.items() if loss.aligns and len(loss.terms) == 1)


Means = Mapping[tuple[str, ...], Mapping[str, float]]
"""Mean scores over the tuning seeds by data, student, loss, beside and weight, of complete groups of runs."""


def average_tuning(rows: Sequence[Row], seeds: int) -> Means:
    """Mean scores of the runs on validation classes."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        if row["stage"] == "tune":
            key = tuple(row[name] for name in ("data", "student", "loss", "beside", "weight"))
            groups.setdefault(key, []).append(row)
    return {
        key: {score: statistics.fmean(float(row[score]) for row in found) for score in SCORES if found[0].get(score)}
        for key, found in groups.items()
        if len(found) == seeds
    }


class EmbeddingStudy:
    """Queue of runs of a study; a subclass trains them.

    For each setting: the task losses alone; every loss alone; every loss beside the triplet loss with the weight that
    has the best MAP@R on validation classes; and RKD-DA, so tuned, beside the anchored loss that alone has the best
    recall among the teacher's rows there. Data named ``"unlabelled"`` have no task loss, ``"labelled"`` ones no run
    without it.
    """

    name: str
    settings: Sequence[tuple[str, str]]
    scores: Sequence[str] = SCORES
    seeds: int
    tuning_seeds: Sequence[int] = (100,)
    together = False

    def parts(self) -> Iterator[tuple[Sequence[str], Sequence[int]]]:
        """Losses and seeds, in the order of the queue."""
        raise NotImplementedError

    def plan(self, rows: Sequence[Row]) -> Iterator[Run]:
        """Runs of the teachers, then of all settings with each part's losses and seeds."""
        means = average_tuning(rows, len(self.tuning_seeds))
        for data in dict.fromkeys(data for data, _ in self.settings):
            yield Run(self.name, data, "teacher", "final", "none", "none", 0.0, 0)
        for losses, seeds in self.parts():
            for data, student in self.settings:
                yield from self.plan_setting(means, data, student, losses, seeds)

    def plan_setting(
        self, means: Means, data: str, student: str, losses: Sequence[str], seeds: Sequence[int]
    ) -> Iterator[Run]:
        """Runs of some losses and seeds."""
        run, labelled = partial(Run, self.name, data, student), data != "unlabelled"
        for seed in seeds:
            yield from (run("final", "none", task, 0.0, seed) for task in TASKS if labelled)
            yield from (run("final", loss, "none", 0.0, seed) for loss in losses if data != "labelled")
        if labelled:
            yield from self.plan_tuned(means, data, student, losses, "triplet", seeds)
        if data == "labelled":
            return
        anchored = list_anchored(tuple(losses))
        yield from (run("tune", loss, "none", 0.0, seed) for loss in anchored for seed in self.tuning_seeds)
        found = {loss: means.get((data, student, loss, "none", "0.0")) for loss in anchored}
        if found and None not in found.values():
            best = max(anchored, key=lambda loss: found[loss]["asymmetric_recall_at_1"])
            yield from self.plan_tuned(means, data, student, ["RKD"], best, seeds)

    def plan_tuned(
        self, means: Means, data: str, student: str, losses: Sequence[str], beside: str, seeds: Sequence[int]
    ) -> Iterator[Run]:
        """Runs that tune the weights of losses beside another, and runs with the best weights."""
        run, best = partial(Run, self.name, data, student), {}
        for loss in losses:
            yield from (run("tune", loss, beside, weight, seed) for weight in BALANCES for seed in self.tuning_seeds)
            found = {weight: means.get((data, student, loss, beside, str(weight))) for weight in BALANCES}
            if None not in found.values():
                best[loss] = max(BALANCES, key=lambda weight: found[weight]["map_at_r"])
        for seed in seeds:
            yield from (run("final", loss, beside, weight, seed) for loss, weight in best.items())


class Objective(nn.Module):
    """Losses of a run, and their gradients at the student's embedding.

    Args:
        run: The run.
        student: Some rows of the student.
        teacher: The same of the teacher.
        num_samples: Size of the training set.
    """

    def __init__(self, run: Run, student: Tensor, teacher: Tensor, num_samples: int) -> None:
        super().__init__()
        self.weight, self.losses = run.weight, nn.ModuleList()
        self._same, self._triplets = torch.zeros(0), None
        for name in (run.beside, run.loss):
            if name in TASKS:
                self.losses.append(TASKS[name]())
            elif name != "none":
                self.losses.append(LossSum(parse_loss(name)))
        for loss in self.distilling:
            loss.materialize(student, teacher, num_samples=num_samples)

    @property
    def distilling(self) -> list[RelationalLoss]:
        """The package's losses."""
        return [term.loss for one in self.losses if isinstance(one, LossSum) for term in one.terms.values()]

    def backward(self, student: Tensor, teacher: Tensor, **context: Tensor) -> None:
        """Gradients of the student's and the losses' parameters; the second loss's are scaled to the weight.

        In every step the norm of the second loss's gradient at the embedding is the weight times the first one's, as
        with ``DistillationModule(balance=weight)``.
        """
        leaf, total = student.detach().requires_grad_(), torch.zeros_like(student)
        for number, loss in enumerate(self.losses):
            leaf.grad = None
            if isinstance(loss, LossSum):
                known = frozenset().union(*(term.loss.needs for term in loss.terms.values()))
                value = loss(leaf, teacher, **{name: x for name, x in context.items() if name in known})
            else:
                labels = context["labels"]
                listed = isinstance(loss, TripletMarginLoss)
                value = loss(leaf, labels, self.list_triplets(labels)) if listed else loss(leaf, labels)
            value.backward()
            if number:
                norm = leaf.grad.norm()
                factor = self.weight * total.norm() / norm if norm > 0 else torch.zeros(())
                for gradient in (p.grad for p in loss.parameters() if p.grad is not None):
                    gradient.mul_(factor)
                leaf.grad.mul_(factor)
            total += leaf.grad
        student.backward(total)

    def list_triplets(self, labels: Tensor) -> tuple[Tensor, ...]:
        """All triplets of a batch, listed once for batches that have their classes in the same places."""
        same = labels[:, None] == labels
        if not torch.equal(same, self._same):
            self._same, self._triplets = same, get_all_triplets_indices(labels)
        return self._triplets

    def project(self, rows: Tensor) -> Tensor:
        """Rows of the student in the teacher's space, if a loss has learned to map them there."""
        return map_to_teacher(rows, self.distilling)


def measure(student: Tensor, teacher: Tensor, labels: Tensor, queries: Tensor) -> dict[str, float]:
    """Scores of a student's rows by cosine; those of queries only if they are as wide as the teacher's rows."""
    retrieval = EmbeddingRetrieval(k=1, distance="cosine")
    retrieval.update(student, labels)
    agreement = RelationalAgreement(k=10, triplets=1, max_anchors=500, distance="cosine")
    agreement.update(student, teacher)
    found = retrieval.compute() | agreement.compute()
    if queries.shape[1] == teacher.shape[1]:
        asymmetric = AsymmetricRetrieval(k=1)
        asymmetric.update(queries, labels, teacher)
        found["asymmetric_recall_at_1"] = asymmetric.compute()["asymmetric/recall_at_1"]
    return {name: float(found[name]) for name in SCORES if name in found}
