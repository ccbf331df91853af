"""Batches and network outputs, the two types that all parts of the library exchange."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor


@dataclass(slots=True)
class Mix:
    """Record of a mixed batch (mixup, CutMix): row i became ``ratio[i] * x[i] + (1 - ratio[i]) * x[partners[i]]``.

    Attributes:
        partners: Row that each row was mixed with, shape (N,), int64.
        ratio: Share of each row's own sample, shape (N,), between 0 and 1.
        labels: Classes of the partners, shape (N,); ``None`` for a batch without labels.
        teacher_mixed: Whether the teacher's inputs are mixed too; ``None`` if unknown.
    """

    partners: Tensor
    ratio: Tensor
    labels: Tensor | None = None
    teacher_mixed: bool | None = None


@dataclass(slots=True)
class Batch:
    """One batch, independent of the format in which the loader yields it.

    Attributes:
        inputs: Inputs of the student: a tensor, a sequence, or a mapping (passed as keywords).
        labels: Class of each row, shape (N,), or soft labels (N, K).
        indices: Row of each sample in the root data set, shape (N,), int64.
        is_query: Mask of the queries in a query/gallery evaluation, shape (N,), bool.
        teacher_inputs: Inputs of the teacher; ``None`` uses ``inputs``.
        mix: Record of how the rows were mixed, for losses with a parameter ``mix``.
        view: Number of each row's augmented view of its sample, shape (N,), int64; ``None`` for one view of each.
        task_rows: Rows that the task loss is computed on, as numbers or as a mask; ``None`` uses all.
        epoch: Epoch in which the samples were drawn, as reported by the sampler; it selects a cached view.
        host_indices: Copy of ``indices`` on the CPU, if available without waiting for a device.
    """

    inputs: Any
    labels: Tensor | None = None
    indices: Tensor | None = None
    is_query: Tensor | None = None
    teacher_inputs: Any = None
    mix: Mix | None = None
    view: Tensor | None = None
    task_rows: Tensor | None = None
    epoch: int = 0
    host_indices: Tensor | None = None


@dataclass(slots=True)
class Outputs:
    """Outputs of a network at one tap. A field that the tap does not provide is ``None``.

    Attributes:
        embedding: Embedding, shape (N, D).
        logits: Logits, shape (N, K), or (N, K, H, W) for dense prediction.
        feature_maps: Feature maps in the order of the named layers, each (N, C, H, W) or (N, T, C).
        classifier: Weight (K, D) and bias (K,) or ``None`` of the linear classifier that gives ``logits``.
    """

    embedding: Tensor | None = None
    logits: Tensor | None = None
    feature_maps: list[Tensor] | None = None
    classifier: tuple[Tensor, Tensor | None] | None = None

    def tensors(self, reads: str | tuple[str, ...] = ("embedding", "logits", "feature_maps")) -> list[Tensor]:
        """All tensors of the given fields that have a row per sample, which excludes the classifier."""
        fields = (reads,) if isinstance(reads, str) else reads
        found = []
        if "embedding" in fields and self.embedding is not None:
            found.append(self.embedding)
        if "logits" in fields and self.logits is not None:
            found.append(self.logits)
        if "feature_maps" in fields and self.feature_maps is not None:
            found += self.feature_maps
        return found

    def map(self, function: Callable[[Tensor], Tensor]) -> Outputs:
        """Apply a function to every tensor except those of the classifier."""
        return Outputs(
            embedding=None if self.embedding is None else function(self.embedding),
            logits=None if self.logits is None else function(self.logits),
            feature_maps=None if self.feature_maps is None else [function(x) for x in self.feature_maps],
            classifier=self.classifier,
        )


def first_tensor(outputs: Mapping[str, Outputs]) -> Tensor:
    """First tensor in the outputs of a network; raises ``ValueError`` if there is none."""
    for one in outputs.values():
        for x in one.tensors():
            return x
    raise ValueError("the tapped layers give no tensor")


class QuerySample(NamedTuple):
    """Sample, or batch of samples, of a query/gallery evaluation.

    As a named tuple it also unpacks by position: ``x, y, is_query = batch``.

    Attributes:
        inputs: Inputs of the student.
        labels: Class of the sample, or of each row of a batch.
        is_query: ``True`` for a query, ``False`` for a gallery sample.
    """

    inputs: Any
    labels: Any
    is_query: Any


Key = int | str
"""Position of an entry in a batch that is a sequence, or its key in a mapping."""


def unpack(
    batch: Any, inputs: Key | list[str] | None = None, labels: Key | None = None, indices: Key | None = None
) -> Batch:
    """Build a :class:`Batch` from a batch of any loader.

    A tensor becomes the inputs. The first two entries of a sequence become inputs and labels, and the third of a
    :class:`QuerySample` becomes ``is_query``. A mapping needs ``inputs``.

    Args:
        batch: Batch as the loader yields it.
        inputs: Position or key of the inputs, or a list of keys whose values the network takes as keywords.
        labels: Position or key of the labels.
        indices: Position or key of the sample indices.

    Raises:
        TypeError: A mapping without ``inputs``, or an object that is not a batch.
        KeyError: An entry that the batch does not have; the message lists its entries.

    Example:
        >>> import torch
        >>> unpack({"image": torch.ones(2, 3), "target": torch.arange(2)}, inputs="image", labels="target").labels
        tensor([0, 1])
    """
    if isinstance(batch, Batch):
        return batch
    if isinstance(batch, Tensor):
        return Batch(batch)
    if isinstance(batch, Mapping):
        if inputs is None:
            raise TypeError(f"the batch is a mapping with the keys {list(batch)}: say which is the input, inputs='...'")
    elif isinstance(batch, Sequence) and not isinstance(batch, str):
        inputs = 0 if inputs is None else inputs
        labels = 1 if labels is None and len(batch) > 1 else labels
    else:
        raise TypeError(f"a batch is a tensor, a sequence or a mapping, got {type(batch).__name__}")

    def entry(name: str, key: Any) -> Any:
        try:
            return batch[key]
        except (KeyError, IndexError, TypeError) as error:
            has = list(batch) if isinstance(batch, Mapping) else f"{len(batch)} entries"
            raise KeyError(f"{name}={key!r} is not in the batch, which has {has}") from error

    return Batch(
        inputs={k: entry("inputs", k) for k in inputs} if isinstance(inputs, list) else entry("inputs", inputs),
        labels=None if labels is None else entry("labels", labels),
        indices=None if indices is None else entry("indices", indices),
        is_query=batch.is_query if isinstance(batch, QuerySample) else None,
    )


def call_network(network: Callable[..., Any], inputs: Any) -> Any:
    """Call a network with the inputs of a batch; the entries of a mapping are passed as keywords."""
    return network(**inputs) if isinstance(inputs, Mapping) else network(inputs)
