"""The metrics of one evaluation: a set for each loader, samples counted once, values named by stage and loader."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torchmetrics import Metric

from lightning_rkd.data.loaders import list_loaders
from lightning_rkd.data.row_numbers import RowNumbers
from lightning_rkd.metrics.inputs import compute_metrics, update_metric, update_parameters
from lightning_rkd.utils.types import Batch, Outputs


class Evaluation:
    """Feeds metrics with what is shown for the batches of some loaders, and empties them before and after.

    Args:
        metrics: By name; the first loader has these, every other has copies.
        loaders: This rank's loaders: one, a mapping, a sequence, or Lightning's ``CombinedLoader``.
        ranks: How many ranks evaluate.
        device: Where the metrics are to be.

    Example:
        >>> from torchmetrics import MeanSquaredError
        >>> evaluation = Evaluation({"error": MeanSquaredError()}, [range(3), range(2)], 1, "cpu")
        >>> evaluation.update(1, Outputs(logits=torch.tensor([1.0, 3.0])), Batch(None, labels=torch.tensor([1, 1])))
        >>> evaluation.metrics[1]["error"].compute()
        tensor(2.)
    """

    def __init__(self, metrics: Mapping[str, Metric], loaders: Any, ranks: int, device: torch.device | str) -> None:
        each = list_loaders(loaders)
        self.metrics = [dict(metrics), *({name: m.clone() for name, m in metrics.items()} for _ in each[1:])]
        self._numbers = [RowNumbers(loader, ranks) for loader in each]
        for metric in (m for own in self.metrics for m in own.values()):
            metric.to(device)
            metric.reset()

    def wants(self, name: str, loader: int = 0) -> bool:
        """Whether a metric asks for that, for example for the teacher."""
        return any(name in update_parameters(metric) for metric in self.metrics[loader].values())

    def update(self, loader: int, student: Outputs, batch: Batch, teacher: Outputs | None = None) -> None:
        """Count a batch.

        Raises:
            ValueError: On several ranks nobody knows which rows the batch holds, and a metric asks; or a metric needs
                something that is not there.
        """
        rows = student.tensors()[0]
        self._numbers[loader].number(batch, len(rows), rows.device, needed=self.wants("indices", loader))
        for metric in self.metrics[loader].values():
            update_metric(metric, student, batch, teacher)

    def values(self, stage: str) -> list[dict[str, Any]]:
        """For each loader the values, as ``<stage>/<key>``, or ``<stage>/<loader>/<key>`` where there are several."""
        several = len(self.metrics) > 1
        return [compute_metrics(own, f"{stage}/{n}" if several else stage) for n, own in enumerate(self.metrics)]

    def reset(self) -> None:
        """Empty the metrics."""
        for metric in (m for own in self.metrics for m in own.values()):
            metric.reset()
