"""Scores of the student and its teacher on held-out samples."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from lightning_rkd.cli.distill.samples import Samples
from lightning_rkd.cli.distill.teachers import TeacherSource
from lightning_rkd.export.card import measure_milliseconds
from lightning_rkd.metrics.agreement import RelationalAgreement
from lightning_rkd.metrics.asymmetric import AsymmetricRetrieval
from lightning_rkd.metrics.retrieval import EmbeddingRetrieval
from lightning_rkd.utils.files import write_whole

HELD_OUT = "held_out.safetensors"
"""File with the embeddings of held-out samples by both networks."""

_BATCH = 250


def score_agreement(student: Tensor, teacher: Tensor) -> dict[str, float]:
    """Share of common neighbours and rank correlation of cosine distances."""
    metric = RelationalAgreement(k=min(10, len(student) - 1), distance="cosine")
    metric.update(student, teacher)
    found = {name: float(value) for name, value in metric.compute().items()}
    return {"common neighbours": next(iter(found.values())), "rank correlation": found["distance_correlation"]}


def score_recall(x: Tensor, labels: Tensor) -> float:
    """Recall@1 among the rows, by cosine."""
    metric = EmbeddingRetrieval(k=1, distance="cosine")
    metric.update(x, labels)
    return float(metric.compute()["recall_at_1"])


def score_asymmetric_recall(student: Tensor, teacher: Tensor, labels: Tensor) -> float:
    """Recall@1 of the student's rows as queries among the teacher's rows of the other samples, by cosine."""
    metric = AsymmetricRetrieval(k=1)
    metric.update(student, labels, teacher)
    return float(metric.compute()["asymmetric/recall_at_1"])


def compare_networks(
    source: TeacherSource, student: Callable[[Any], Tensor], align: nn.Module | None,
    parameters: int, samples: Samples, rows: Sequence[int], teacher: Tensor, file: Path,
) -> list[dict[str, Any]]:  # fmt: skip
    """Rows of the table, for teacher and student, on held-out samples, whose embeddings are written into a file.

    Args:
        source: The teacher.
        student: Function from samples to the student's embeddings.
        align: Function from these to the teacher's space; ``None`` if the student has not learned that.
        parameters: Number of the student's.
        samples: The samples.
        rows: The held-out ones.
        teacher: The teacher's embeddings of these, (M, D).
        file: File for the embeddings of both.
    """
    own = torch.cat([student(samples.fetch(rows[i : i + _BATCH])) for i in range(0, len(rows), _BATCH)]).float().cpu()
    tensors = {"student": own, "teacher": teacher, "rows": torch.tensor(rows)}
    few = samples.fetch(rows[:32])
    labels = None if samples.labels is None else samples.labels[torch.tensor(rows)]
    table: list[dict[str, Any]] = [
        {"network": "teacher", "parameters": source.parameters or None, "width": teacher.shape[1]},
        {"network": "student", "parameters": parameters, "width": own.shape[1]},
    ]
    if source.embed is not None:
        table[0]["ms"] = measure_milliseconds(source.embed, few) / len(few)
    table[1]["ms"] = measure_milliseconds(student, few) / len(few)
    if labels is not None and int(torch.bincount(labels).max()) > 1:
        tensors["labels"] = labels
        table[0]["recall@1"], table[1]["recall@1"] = score_recall(teacher, labels), score_recall(own, labels)
        aligned = None if align is None else align(own).detach()
        if aligned is not None and aligned.shape[1] == teacher.shape[1]:  # Matryoshka has a projection for each width
            table[1]["recall@1, teacher's gallery"] = score_asymmetric_recall(aligned, teacher, labels)
    if len(own) > 3:
        table[1] |= score_agreement(own, teacher)
    write_whole(file, save({name: x.contiguous() for name, x in tensors.items()}))
    return table
