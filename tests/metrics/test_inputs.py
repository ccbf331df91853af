"""Metrics are updated by the names of their parameters, and missing ones are named."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torchmetrics import MeanMetric, Metric
from torchmetrics.classification import MulticlassAccuracy

from lightning_rkd.metrics.inputs import compute_metrics, update_metric
from lightning_rkd.metrics.retrieval import EmbeddingRetrieval
from lightning_rkd.utils.types import Batch, Outputs

STUDENT = Outputs(embedding=torch.randn(4, 2), logits=torch.randn(4, 3))
TEACHER = Outputs(embedding=torch.randn(4, 5))
BATCH = Batch(None, labels=torch.tensor([0, 1, 0, 1]), indices=torch.arange(4), is_query=torch.tensor([True] * 4))


class Keeps(Metric):
    def update(self, student: Any, teacher: Any, preds: Any, indices: Any = None, *, is_query: Any = 7) -> None:
        self.seen = (student, teacher, preds, indices, is_query)

    def compute(self) -> Tensor:
        return torch.zeros(())


def test_every_parameter_gets_what_it_is_named_after() -> None:
    metric = Keeps()
    update_metric(metric, STUDENT, BATCH, TEACHER)
    expected = (STUDENT.embedding, TEACHER.embedding, STUDENT.logits, BATCH.indices, BATCH.is_query)
    assert all(a is b for a, b in zip(metric.seen, expected, strict=True))
    update_metric(metric, STUDENT, Batch(None), TEACHER)
    assert metric.seen[3:] == (None, 7), "what is absent keeps its default"


def test_ours_and_those_of_torchmetrics_are_fed_alike() -> None:
    metrics = {"retrieval": EmbeddingRetrieval(), "accuracy": MulticlassAccuracy(3)}
    for metric in metrics.values():
        update_metric(metric, STUDENT, Batch(None, labels=BATCH.labels))
    assert sorted(compute_metrics(metrics, "val")) == [
        "val/accuracy",
        "val/map_at_r",
        "val/r_precision",
        "val/recall_at_1",
    ]


@pytest.mark.parametrize(
    ("metric", "batch", "missing"),
    [(Keeps(), BATCH, "teacher"), (EmbeddingRetrieval(), Batch(None), "labels"), (MeanMetric(), BATCH, "value")],
)
def test_what_is_missing_is_named_with_what_there_is(metric: Metric, batch: Batch, missing: str) -> None:
    message = rf"{type(metric).__name__}\.update needs \['{missing}'\].*it has \['embeddings'"
    with pytest.raises(ValueError, match=message):
        update_metric(metric, STUDENT, batch)


def test_two_metrics_may_not_share_a_key() -> None:
    metrics = {name: EmbeddingRetrieval() for name in "ab"}
    for metric in metrics.values():
        update_metric(metric, STUDENT, Batch(None, labels=BATCH.labels))
    with pytest.raises(ValueError, match="two metrics log val/recall_at_1; give only one of them"):
        compute_metrics(metrics, "val")
