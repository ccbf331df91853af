"""Metrics of one evaluation: a set per loader, samples counted once, values named by stage and loader."""

from collections.abc import Mapping
from typing import Any

import torch
from torchmetrics import Metric

from lightning_rkd.data.loaders import list_loaders
from lightning_rkd.data.row_numbers import RowNumbers
from lightning_rkd.metrics.inputs import compute_metrics, update_metric, update_parameters
from lightning_rkd.utils.types import Batch, Outputs


class Evaluation:
    """Updates metrics with the outputs of networks for the batches of one or several loaders.

    Args:
        metrics: Metrics by name. The first loader uses them, and every other one uses copies.
        loaders: Loaders of this rank: one, a mapping, a sequence, or Lightning's ``CombinedLoader``.
        ranks: Number of ranks that evaluate.
        device: Device of the metrics.
    """

    def __init__(self, metrics: Mapping[str, Metric], loaders: Any, ranks: int, device: torch.device | str) -> None:
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

    def update(self, loader: int, student: Outputs, batch: Batch, teacher: Outputs | None = None) -> None:
        """Update the metrics with a batch.

        Raises:
            ValueError: A metric takes something that is missing, such as the indices of the batch on several ranks.
        """
        rows = student.tensors()[0]
        self._numbers[loader].number(batch, len(rows), rows.device, needed=self.uses("indices", loader))
        for metric in self.metrics[loader].values():
            update_metric(metric, student, batch, teacher)

    def values(self, stage: str) -> list[dict[str, Any]]:
        """Values of each loader, named ``<stage>/<key>``, or ``<stage>/<loader>/<key>`` for several loaders."""
        several = len(self.metrics) > 1
        return [compute_metrics(own, f"{stage}/{n}" if several else stage) for n, own in enumerate(self.metrics)]

    def reset(self) -> None:
        """Empty the metrics."""
        for metric in (m for own in self.metrics for m in own.values()):
            metric.reset()
