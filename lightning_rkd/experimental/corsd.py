"""Class-Oriented Relational Self Distillation (Yu et al. 2023): shallow stages learn the deepest one's relations."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_rkd.distillation.layers import Tap
from lightning_rkd.distillation.lightning import refuse_lbfgs
from lightning_rkd.distillation.step import StepFeatures
from lightning_rkd.losses.base import RelationalLoss
from lightning_rkd.losses.parts.checks import check_at_least, check_positive
from lightning_rkd.losses.parts.memory import generator
from lightning_rkd.losses.parts.state import StepState
from lightning_rkd.losses.references import BibTeX, Reference
from lightning_rkd.losses.soft_target import soft_target
from lightning_rkd.modules.distillation import DistillationModule
from lightning_rkd.utils.distributed import gather_row_counts, gather_rows, rank_and_size
from lightning_rkd.utils.types import Outputs

PARTS = ("classes", "triplet", "scores", "memory")
"""Terms of the loss besides the cross-entropy, in the order of :meth:`RelationNets.forward`."""


def _separable(channels: int, out: int) -> nn.Sequential:
    def step(width: int, stride: int) -> list[nn.Module]:
        depthwise = nn.Conv2d(channels, channels, 3, stride, padding=1, groups=channels, bias=False)
        return [depthwise, nn.Conv2d(channels, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]

    return nn.Sequential(*step(channels, 2), *step(out, 1))


class RelationNet(nn.Module):
    """Distance of two samples at one stage, between 0 and 1, and their classes.

    Shapes: maps (N, 2C, H, W), the concatenated maps of two samples -> score (N,), logits (N, K). ``widths`` are 2C of
    this stage and of every deeper one; separable blocks of stride 2 connect them.
    """

    def __init__(self, widths: Sequence[int], hidden: int, num_classes: int) -> None:
        super().__init__()
        blocks = [_separable(a, b) for a, b in pairwise(widths)]
        self.features = nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.score = nn.Sequential(
            nn.Linear(widths[-1], hidden), nn.BatchNorm1d(hidden), nn.ReLU(inplace=True), nn.Linear(hidden, 1)
        )
        self.auxiliary = nn.Linear(widths[-1], num_classes)

    def forward(self, maps: Tensor) -> tuple[Tensor, Tensor]:
        features = self.features(maps)
        return torch.sigmoid(self.score(features)).squeeze(1), self.auxiliary(features)


class ClassMemory(StepState):
    """Running mean of the predictions for every class, initially one-hot; ``sums`` is the identity plus their sums."""

    on_host: ClassVar[frozenset[str]] = frozenset({"steps"})
    sums: Tensor
    steps: Tensor

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.register_buffer("sums", torch.eye(num_classes, dtype=torch.float32))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def means(self) -> Tensor:
        """(K, K), one distribution per class."""
        return self.sums / self.sums.sum(1, keepdim=True)

    @torch.no_grad()
    def update(self, predictions: Tensor, labels: Tensor) -> None:
        """Add the predictions (N, K) of samples of the classes (N,)."""
        self.sums.index_add_(0, labels, predictions.to(self.sums.dtype))
        self.steps += 1


def triplets(labels: Tensor, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw for every row another one of its class (or itself if there is none), and one of another class."""
    same = labels[:, None] == labels
    if labels.device.type == "cpu" and bool(same.all()):
        raise ValueError(
            f"CORSD compares classes, but all {len(labels)} rows of the batch are of one: shuffle, or sample P classes "
            "with K rows each (PKBatchSampler)"
        )
    keys = torch.rand(same.shape, generator=random, device=labels.device)
    alone = torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    positive = keys.masked_fill(alone, -1).masked_fill(~same, -2).argmax(1)
    return positive, keys.masked_fill(same, -1).argmax(1)


class RelationNets(RelationalLoss):
    """All terms of :class:`CORSD` besides the cross-entropy: the four :data:`PARTS`, weighted means over samples.

    Student and teacher are the same network.
    """

    reads = ("feature_maps", "logits")
    gather = False
    display_name = "CORSD"
    nets: nn.ModuleList
    judge: nn.Sequential
    memory: ClassMemory

    def __init__(self, channels: tuple[int, ...], num_classes: int, weights: dict[str, float], seed: int) -> None:
        super().__init__()
        self.weights, self.seed = weights, seed
        self.set_sizes(student_dim=channels, num_classes=num_classes)

    def build(self, student_dim: tuple[int, ...], num_classes: int) -> None:
        widths, first = [2 * c for c in student_dim], 2 * student_dim[0]
        hidden = [first] * (len(widths) - 1) + [2 * first]
        self.nets = nn.ModuleList(RelationNet(widths[k:], hidden[k], num_classes) for k in range(len(widths)))
        self.judge = nn.Sequential(
            nn.Linear(2 * num_classes, 1), nn.BatchNorm1d(1), nn.ReLU(inplace=True), nn.Linear(1, 1), nn.Sigmoid()
        )
        self.memory = ClassMemory(num_classes)

    def forward(self, student: Outputs, teacher: Outputs, *, labels: Tensor) -> Tensor:
        """The four parts, (4,)."""
        assert student.feature_maps is not None
        assert student.logits is not None
        w = self.weights
        random = generator(self.seed, int(self.memory.steps), labels.device)
        positive, negative = triplets(labels, random)
        halves = F.one_hot(torch.stack([labels, labels[negative]]), student.logits.shape[1]).to(student.logits).mean(0)
        near, far = (
            [net(torch.cat([x, x[row]], dim=1)) for net, x in zip(self.nets, student.feature_maps, strict=True)]
            for row in (positive, negative)
        )
        (p0, p_logits0), (n0, n_logits0) = near[-1], far[-1]
        classes, triplet, scores = [], [], []
        for (p, p_logits), (n, n_logits) in zip(near, far, strict=True):
            classes += [
                w["positive_ce"] * F.cross_entropy(p_logits, labels),
                w["negative_ce"] * F.cross_entropy(n_logits / w["temperature"], halves),
            ]
            triplet.append(F.relu(p - n + w["margin"]).mean())
        for (p, p_logits), (n, n_logits) in zip(near[:-1], far[:-1], strict=True):
            classes += [
                w["positive_kd"] * soft_target(p_logits, p_logits0, temperature=1),
                w["negative_kd"] * soft_target(n_logits, n_logits0, temperature=1),
            ]
            scores += [F.mse_loss(p, p0.detach()), F.mse_loss(n, n0.detach())]
        parts = [
            torch.stack(classes).sum(),
            w["triplet"] * torch.stack(triplet).sum(),
            w["scores"] * torch.stack(scores).sum(),
            w["memory"] * self._compare_with_memory(student.logits, labels, random),
        ]
        return torch.stack(parts)

    def _compare_with_memory(self, logits: Tensor, labels: Tensor, random: torch.Generator) -> Tensor:
        """Distance to the memory of the own class minus that of another class."""
        probabilities, means = logits.softmax(1), self.memory.means()
        count = logits.shape[1]
        other = torch.randint(1, count, labels.shape, generator=random, device=labels.device)
        pairs = [torch.cat([probabilities, means[c]], dim=1) for c in (labels, (labels + other) % count)]
        own, wrong = self.judge(torch.cat(pairs)).chunk(2)  # in one pass: batch norm would remove the difference
        gap: Tensor = (own - wrong).mean()
        return gap


class CORSD(DistillationModule):
    r"""Self-distillation without a teacher: relation nets on every stage, the deepest of which teaches the others.

    .. math::
        L = \mathrm{CE}(z, y) + \sum_k \big[&.16\, \mathrm{KL}(\bar{a}^p_0 \Vert a^p_k) + .04\, \mathrm{CE}(a^p_k, y) +
        .04\, \mathrm{KL}(\bar{a}^n_0 \Vert a^n_k) + .01\, \mathrm{CE}_{T=3}(a^n_k, \tfrac{1}{2}(y + y^n)) \\
        & + .01 \max(p_k - n_k + 1, 0) + .01\, (p_k - \bar{p}_0)^2 + .01\, (n_k - \bar{n}_0)^2 \big] \\
        & + 1.29\, \big[R(\sigma(z), m_y) - R(\sigma(z), m_{y'})\big]

    averaged over the samples of the batch. For each sample, p and n are the distances in (0, 1) that relation net k
    assigns to its maps and those of a row of its class, or of another class; a are the logits of an auxiliary
    classifier. Stage 0 is the deepest; a bar marks a constant. R is a small net on a prediction and the mean prediction
    :math:`m` for a class; :math:`y'` is some other class.

    Provenance: a reconstruction. The authors' code fixes nets, terms and weights, but does not run; the paper was not
    available. Corrected here: the divergences are of probabilities (there, ``kl_div`` of raw logits); the deepest stage
    is constant where it teaches; the halved labels pass no second softmax; R gets the whole batch, since its batch norm
    cannot work on single rows; the memory, there a sum that grows without bound though its name says moving average, is
    divided by its count; the last term is a mean, whose weight is the authors' 0.01 times the 129 rows of their batch.
    Departures: triplets are formed inside the batch, with every row as an anchor once, where the authors load each
    triplet's images; the memory is updated after the step's loss; weights have PyTorch's initialization.

    Logged: ``train/cross_entropy``, ``distill/classes`` (the auxiliary classifiers), ``distill/triplet``,
    ``distill/scores`` and ``distill/memory``; ``train/task`` is their sum.

    Args:
        student: A classifier, whose output is the logits.
        stages: Dotted paths of at least two stages, shallow to deep, which output maps.
        channels: Channels of those maps.
        num_classes: K.
        student_logits: Dotted path of the layer that makes the logits, whose input is the embedding for metrics; with
            ``None`` the network's output is both.
        positive_kd: The .16 of the equation.
        positive_ce: The first .04.
        negative_kd: The second .04.
        negative_ce: The .01 before the cross-entropy.
        triplet: The .01 before the maximum.
        scores: The .01 before the squares.
        memory: The 1.29.
        margin: The 1 inside the maximum.
        temperature: T.
        seed: Seed of triplets and other classes.
        kwargs: Arguments of :class:`~lightning_rkd.DistillationModule` for metrics, optimization and batches; labels
            must stay classes.

    Reference:
        Yu, Tan, Wu, Dong, Zhang and Ma 2023, CORSD: Class-Oriented Relational Self Distillation, arXiv:2305.00918.

    Example:
        >>> from lightning_rkd.models.small import ConvNet
        >>> net = ConvNet(widths=(4, 6), embedding_dim=5)
        >>> module = CORSD(net, ["backbone.stage1", "backbone.stage2"], [4, 6], num_classes=5)
        >>> module(torch.zeros(2, 1, 12, 12)).shape
        torch.Size([2, 5])
    """

    bibtex = BibTeX()
    reference = Reference(
        "yu2023corsd",
        "reconstruction",
        source="muzhou-yu/CORSD, distillation.py and model.py, which do not run as published",
        weight_note="seven weights, the authors'",
        result="abstract: 3.8 points over the baseline on CIFAR-100, 1.5 on ImageNet, 4.5 on CUB-200-2011, averages",
    )

    def __init__(
        self,
        student: nn.Module,
        stages: list[str],
        channels: list[int],
        num_classes: int,
        *,
        student_logits: str | None = None,
        positive_kd: float = 0.16,
        positive_ce: float = 0.04,
        negative_kd: float = 0.04,
        negative_ce: float = 0.01,
        triplet: float = 0.01,
        scores: float = 0.01,
        memory: float = 1.29,
        margin: float = 1.0,
        temperature: float = 3.0,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        if len(stages) < 2 or len(stages) != len(channels):
            raise ValueError(
                f"CORSD needs two stages at least, and the channels of each: got {stages} and {list(channels)}"
            )
        check_at_least("CORSD", 2, num_classes=num_classes)
        check_positive("CORSD", temperature=temperature)
        final = Tap() if student_logits is None else Tap(student_logits, at="classifier")
        layers: dict[str, Any] = {"embedding": final, "feature_maps": stages}
        super().__init__(
            student=student, teacher=None, loss=None, student_layer=layers, teacher_layer=None, input_layer=None,
            task_loss=nn.CrossEntropyLoss(), task_reads="logits", miner=None, weight=1.0, task_weight=1.0,
            gather=True, balance=None, compare_gradients=None, **kwargs,
        )  # fmt: skip
        weights = {
            "positive_kd": positive_kd, "positive_ce": positive_ce, "negative_kd": negative_kd,
            "negative_ce": negative_ce, "triplet": triplet, "scores": scores, "memory": memory,
            "margin": margin, "temperature": temperature,
        }  # fmt: skip
        self.relations = RelationNets(tuple(channels), num_classes, weights, seed)

    def on_fit_start(self) -> None:
        """Refuse optimizers that evaluate a step several times."""
        super().on_fit_start()
        refuse_lbfgs(self.trainer.optimizers, ["CORSD"])

    def task(self, features: StepFeatures, output: Any) -> Tensor:
        """Compute all terms of the equation."""
        logits = features.student["embedding"].logits
        assert logits is not None
        hard, labels = super().task(features, logits), features.batch.labels
        assert labels is not None
        if labels.ndim != 1:
            raise ValueError(f"CORSD needs one class per sample, (N,), got labels {tuple(labels.shape)}")
        here = Outputs(feature_maps=features.student["feature_maps"].feature_maps, logits=logits)
        group, ranks = self.distiller.group, rank_and_size(self.distiller.group)[1]
        counts = gather_row_counts(len(labels), logits.device, group)
        parts = ranks * len(labels) / sum(counts) * self.relations(here, here, labels=labels)
        predictions = logits.detach().float().softmax(1)
        self.relations.memory.update(gather_rows(predictions, counts, group), gather_rows(labels, counts, group))
        self.log("train/cross_entropy", hard.detach())
        self.log_dict({f"distill/{name}": part.detach() for name, part in zip(PARTS, parts.unbind(), strict=True)})
        return hard + parts.sum()
