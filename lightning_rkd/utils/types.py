"""Batches and network outputs, the two types that all parts of the library exchange."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor


@dataclass(slots=True)
class Mix:
    """How the rows of a batch were mixed: row i is ``ratio[i]`` of itself and the rest of row ``partners[i]``.

    Attributes:
        partners: (N,), int64.
        ratio: (N,), between 0 and 1.
        labels: Classes of the partners, shape (N,); ``None`` where the batch has none.
        teacher_mixed: Whether the teacher sees mixed rows too; ``None`` where that is not known.
    """

    partners: Tensor
    ratio: Tensor
    labels: Tensor | None = None
    teacher_mixed: bool | None = None


@dataclass(slots=True)
class Batch:
    """One batch, whatever the loader yielded.

    Attributes:
        inputs: What the student is called with: a tensor, a sequence, or a mapping (passed as keywords).
        labels: Class of each row, shape (N,), or soft labels (N, K).
        indices: Row of each sample in the root data set, shape (N,), int64.
        is_query: Marks the rows that ask in a query/gallery evaluation, shape (N,), bool.
        teacher_inputs: What the teacher is called with; ``None`` means ``inputs``.
        mix: With whom the rows were mixed, for losses that ask for ``mix``.
        view: Which augmented view of its sample a row is, shape (N,), int64; ``None`` where there is one of each.
        task_rows: The rows that the task loss sees, as numbers or as a mask; ``None`` for all.
        epoch: The epoch in which the samples were drawn, where the sampler says; it chooses a cached view.
        host_indices: The indices on the CPU, where they are known without waiting for a device.
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
    """Outputs of a network at one tap. A field is ``None`` where the tap cannot give it.

    Attributes:
        embedding: (N, D).
        logits: (N, K), or (N, K, H, W) for dense prediction.
        feature_maps: Feature maps in the order the layers were named, each (N, C, H, W) or (N, T, C).
        classifier: Weight (K, D) and bias (K,) or ``None`` of the linear classifier behind ``logits``.
    """

    embedding: Tensor | None = None
    logits: Tensor | None = None
    feature_maps: list[Tensor] | None = None
    classifier: tuple[Tensor, Tensor | None] | None = None

    def tensors(self, reads: str | tuple[str, ...] = ("embedding", "logits", "feature_maps")) -> list[Tensor]:
        """The tensors with a row for each sample among these fields; the classifier has none.

        Example:
            >>> import torch
            >>> len(Outputs(embedding=torch.ones(2, 3), feature_maps=[torch.ones(2, 3, 4, 4)]).tensors())
            2
        """
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
        """The same outputs with a function applied to every tensor but those of the classifier.

        Example:
            >>> import torch
            >>> Outputs(embedding=torch.ones(2, 3)).map(torch.neg).embedding[0]
            tensor([-1., -1., -1.])
        """
        return Outputs(
            embedding=None if self.embedding is None else function(self.embedding),
            logits=None if self.logits is None else function(self.logits),
            feature_maps=None if self.feature_maps is None else [function(x) for x in self.feature_maps],
            classifier=self.classifier,
        )


def first_tensor(outputs: Mapping[str, Outputs]) -> Tensor:
    """The first tensor among the outputs of a network.

    Raises:
        ValueError: There is none.

    Example:
        >>> import torch
        >>> first_tensor({"": Outputs(embedding=torch.zeros(2, 3))}).shape
        torch.Size([2, 3])
    """
    for one in outputs.values():
        for x in one.tensors():
            return x
    raise ValueError("the tapped layers give no tensor")


def count_rows(outputs: Mapping[str, Outputs]) -> int:
    """The number of rows among the outputs of a network.

    Example:
        >>> import torch
        >>> count_rows({"": Outputs(embedding=torch.zeros(2, 3))})
        2
    """
    return len(first_tensor(outputs))


class QuerySample(NamedTuple):
    """A sample, or a batch of them, that says whether it asks in a query/gallery evaluation.

    It is a tuple of three, so that ``x, y, is_query = batch`` works in a step of your own; :func:`unpack` knows it.

    Attributes:
        inputs: What the student is called with.
        labels: The class, or one of each row.
        is_query: Whether it asks; it is in the gallery otherwise.
    """

    inputs: Any
    labels: Any
    is_query: Any


Key = int | str
"""Where in a batch something lies: a position in a sequence, or a key of a mapping."""


def unpack(
    batch: Any, inputs: Key | list[str] | None = None, labels: Key | None = None, indices: Key | None = None
) -> Batch:
    """Build a :class:`Batch` from what a loader yields.

    A tensor is the inputs; of a sequence the first entry is the inputs and the second the labels, and a
    :class:`QuerySample` says by its third which rows ask; a mapping needs ``inputs``, as a key or as a list of keys
    whose values the network takes as keywords.

    Raises:
        TypeError: A mapping without ``inputs``, or something that is no batch.
        KeyError, IndexError: An entry that the batch lacks, with what it has.

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
