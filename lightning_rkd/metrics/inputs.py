"""Hands a metric what its ``update`` asks for, so that ours and any other torchmetrics metric fit one evaluation."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torchmetrics import Metric

from lightning_rkd.utils.types import Batch, Outputs


def wants(metric: Metric) -> dict[str, bool]:
    """Parameter names of ``metric.update``, and whether each must be given.

    Example:
        >>> from torchmetrics.classification import BinaryAccuracy
        >>> wants(BinaryAccuracy())
        {'preds': True, 'target': True}
    """
    parameters = inspect.signature(metric.update).parameters.values()
    return {
        p.name: p.default is inspect.Parameter.empty
        for p in parameters
        if p.kind not in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    }


def feed(metric: Metric, student: Outputs, batch: Batch, teacher: Outputs | None = None) -> None:
    """Update a metric by the names of its parameters.

    ``embeddings`` and ``student`` receive the student's embedding, ``teacher`` the teacher's, ``preds`` the student's
    logits, ``labels`` and ``target`` the labels, ``indices`` and ``is_query`` those of the batch.

    Raises:
        ValueError: The metric needs something that is not there, or has a parameter of another name.

    Example:
        >>> import torch
        >>> from torchmetrics.classification import MulticlassAccuracy
        >>> metric = MulticlassAccuracy(num_classes=2)
        >>> feed(metric, Outputs(logits=torch.tensor([[2.0, 1.0]])), Batch(None, labels=torch.tensor([0])))
        >>> metric.compute()
        tensor(1.)
    """
    given = {
        "embeddings": student.embedding,
        "student": student.embedding,
        "teacher": None if teacher is None else teacher.embedding,
        "preds": student.logits,
        "labels": batch.labels,
        "target": batch.labels,
        "indices": batch.indices,
        "is_query": batch.is_query,
    }
    asked = wants(metric)
    absent = [name for name, required in asked.items() if required and given.get(name) is None]
    if absent:
        raise ValueError(
            f"{type(metric).__name__}.update needs {absent}, which this evaluation does not have; "
            f"it has {sorted(k for k, v in given.items() if v is not None)}"
        )
    metric.update(**{name: given[name] for name in asked if given.get(name) is not None})


def computed(metrics: Mapping[str, Metric], prefix: str) -> dict[str, Any]:
    """Compute all metrics under ``<prefix>/<key>``: the keys of a dict result, else the metric's own name.

    Raises:
        ValueError: Two metrics give the same key.

    Example:
        >>> import torch
        >>> from torchmetrics import MeanMetric
        >>> mean = MeanMetric(); mean.update(torch.tensor(2.0))
        >>> computed({"loss": mean}, "val")
        {'val/loss': tensor(2.)}
    """
    values: dict[str, Any] = {}
    for name, metric in metrics.items():
        result: Tensor | Mapping[str, Tensor] = metric.compute()
        for key, value in (result if isinstance(result, Mapping) else {name: result}).items():
            if f"{prefix}/{key}" in values:
                raise ValueError(f"two metrics log {prefix}/{key}; give only one of them")
            values[f"{prefix}/{key}"] = value
    return values
