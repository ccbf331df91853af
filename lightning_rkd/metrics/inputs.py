"""Updates of metrics by the names of their parameters, for our metrics and any of torchmetrics."""

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torchmetrics import Metric

from lightning_rkd.utils.types import Batch, Outputs


def update_parameters(metric: Metric) -> dict[str, bool]:
    """Names of the parameters of ``metric.update``, except those it does not use; true where they are required."""
    parameters = inspect.signature(metric.update).parameters.values()
    named = {p.name: p.default is p.empty for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
    return {name: required for name, required in named.items() if name not in getattr(metric, "unused", ())}


def uses_teacher(metric: Metric) -> bool:
    """True if a metric takes the embedding of the teacher."""
    return not {"teacher", "gallery"}.isdisjoint(update_parameters(metric))


def update_metric(
    metric: Metric, student: Outputs, batch: Batch, teacher: Outputs | None = None, queries: Tensor | None = None
) -> None:
    """Update a metric by the names of its parameters.

    ``embeddings`` and ``student`` receive the student's embedding, ``queries`` the same in the teacher's space,
    ``teacher`` and ``gallery`` the teacher's, ``preds`` the student's logits, ``labels`` and ``target`` the labels,
    ``indices`` and ``is_query`` those of the batch.
    """
    values = {
        "embeddings": student.embedding,
        "student": student.embedding,
        "queries": student.embedding if queries is None else queries,
        "teacher": None if teacher is None else teacher.embedding,
        "gallery": None if teacher is None else teacher.embedding,
        "preds": student.logits,
        "labels": batch.labels,
        "target": batch.labels,
        "indices": batch.indices,
        "is_query": batch.is_query,
    }
    given = {name: value for name, value in values.items() if value is not None}
    parameters = update_parameters(metric)
    absent = [name for name, required in parameters.items() if required and name not in given]
    if absent:
        raise ValueError(
            f"{type(metric).__name__}.update needs {absent}, which this evaluation does not have; "
            f"it has {sorted(given)}"
        )
    metric.update(**{name: given[name] for name in parameters if name in given})


def compute_metrics(metrics: Mapping[str, Metric], prefix: str) -> dict[str, Any]:
    """Compute all metrics under ``<prefix>/<key>``: the keys of a dict result, else the name of the metric."""
    values: dict[str, Any] = {}
    for name, metric in metrics.items():
        result = metric.compute()
        for key, value in (result if isinstance(result, Mapping) else {name: result}).items():
            if f"{prefix}/{key}" in values:
                raise ValueError(f"two metrics log {prefix}/{key}; give only one of them")
            values[f"{prefix}/{key}"] = value
    return values
