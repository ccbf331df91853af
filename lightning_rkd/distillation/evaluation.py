"""Metrics of one evaluation: a set per loader, samples counted once, values named by stage and loader."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_rkd.data.loaders import list_loaders
from lightning_rkd.data.row_numbers import RowNumbers
from lightning_rkd.losses.base import RelationalLoss
from lightning_rkd.metrics.asymmetric import AsymmetricRetrieval
from lightning_rkd.metrics.inputs import compute_metrics, update_metric, update_parameters, uses_teacher
from lightning_rkd.utils.types import Batch, Outputs


class Evaluation:
    """Updates metrics with the outputs of networks for the batches of one or several loaders, each with its own set.

    The first of the losses of the training that aligns the student's space with the teacher's maps the student's rows
    to queries.
    """

    def __init__(
        self,
        metrics: Mapping[str, Metric],
        loaders: Any,
        ranks: int,
        device: torch.device | str,
        losses: Sequence[RelationalLoss] = (),
    ) -> None:
        self._losses = losses
        self.loaders = loaders
        each = list_loaders(loaders)
        self.metrics = [dict(metrics), *({name: m.clone() for name, m in metrics.items()} for _ in each[1:])]
        self._numbers = [RowNumbers(loader, ranks) for loader in each]
        for metric in (m for own in self.metrics for m in own.values()):
            metric.to(device)
            metric.reset()

    def uses(self, name: str, loader: int = 0) -> bool:
        """True if a metric of a loader takes an argument of that name, for example ``teacher``."""
        return any(name in update_parameters(metric) for metric in self.metrics[loader].values())

    def uses_teacher(self, loader: int = 0) -> bool:
        """True if a metric of a loader takes the embedding of the teacher."""
        return any(uses_teacher(metric) for metric in self.metrics[loader].values())

    def update(self, loader: int, student: Outputs, batch: Batch, teacher: Outputs | None = None) -> None:
        """Update the metrics with a batch."""
        rows = student.tensors()[0]
        self._numbers[loader].number(batch, len(rows), rows.device, needed=self.uses("indices", loader))
        queries = None
        if student.embedding is not None and self.uses("queries", loader):
            queries = map_to_teacher(student.embedding, self._losses)
        for metric in self.metrics[loader].values():
            update_metric(metric, student, batch, teacher, queries)

    def values(self, stage: str) -> list[dict[str, Any]]:
        """Values of each loader, named ``<stage>/<key>``, or ``<stage>/<loader>/<key>`` for several loaders."""
        several = len(self.metrics) > 1
        return [compute_metrics(own, f"{stage}/{n}" if several else stage) for n, own in enumerate(self.metrics)]

    def reset(self) -> None:
        """Empty the metrics."""
        for metric in (m for own in self.metrics for m in own.values()):
            metric.reset()


def find_aligning_loss(losses: Sequence[RelationalLoss]) -> RelationalLoss | None:
    """The first loss that aligns the student's space with the teacher's, one with a projection before one without."""
    aligning = [loss for loss in losses if loss.aligns and not loss.missing_sizes]
    return next((loss for loss in aligning if hasattr(loss, "project")), aligning[0] if aligning else None)


def map_to_teacher(rows: Tensor, losses: Sequence[RelationalLoss]) -> Tensor:
    """Map rows of the student to the teacher's space, by the first loss that aligns the two and has a projection."""
    loss = find_aligning_loss(losses)
    project: Callable[[Tensor], Tensor] | None = getattr(loss, "project", None)
    if loss is None or project is None:
        return rows
    if (width := loss._sizes.get("student_dim", rows.shape[-1])) != rows.shape[-1]:
        raise ValueError(
            f"{type(loss).__name__} projects rows of width {width}, but the evaluated layer gives width "
            f"{rows.shape[-1]}: evaluate the layer that the loss reads"
        )
    dtype = next((p.dtype for p in loss.to(rows.device).parameters()), rows.dtype)
    with torch.no_grad(), torch.autocast(rows.device.type, enabled=False):
        return project(rows.to(dtype))


def warn_if_not_aligned(metrics: Mapping[str, Metric], losses: Sequence[RelationalLoss]) -> None:
    """Warn where queries search a teacher's gallery in a space that no loss of the training has aligned with it."""
    asymmetric = {name: metric for name, metric in metrics.items() if isinstance(metric, AsymmetricRetrieval)}
    aligning = [loss for loss in losses if loss.aligns]
    if not asymmetric or not losses:
        return
    if not aligning:
        warnings.warn(
            f"the metrics {list(asymmetric)} search the teacher's gallery, but no loss aligns the student's space with "
            f"the teacher's (they are {[type(loss).__name__ for loss in losses]}), so that recall is near chance: add "
            "one that does, such as CSD() or Regression()",
            stacklevel=2,
        )
    elif all("row scale" in loss.invariances for loss in aligning):
        lengths = [name for name, metric in asymmetric.items() if metric.distance == "euclidean"]
        if lengths:
            warnings.warn(
                f"the metrics {lengths} depend on the lengths of rows, but {type(aligning[0]).__name__} aligns their "
                "directions only: pass distance='cosine', which is the same for unit rows",
                stacklevel=2,
            )
