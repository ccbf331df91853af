"""Batches and network outputs, the two types that all parts of the library exchange."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, fields, is_dataclass
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
        inputs: Inputs of the student: one object, or a mapping, whose entries are passed as keywords, and those with
            the keys 0, 1, ... positionally.
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
"""Entry of a batch: a position in a sequence, a key of a mapping, a field of a named tuple or a dataclass, or a dotted
path through nested ones, such as ``"views.global"`` or ``"0.image"``."""

Keys = Key | list[Key] | dict[str, Key]
"""Inputs of a network in a batch: one entry; a list, whose positions are passed positionally and whose names as
keywords; or a dict from keywords of the network to entries."""


def select(batch: Any, key: Key) -> Any:
    """Entry of a batch: a sequence, a mapping (also a ``TensorDict``), a named tuple or a dataclass, nested or not."""
    names = _list_names(batch)
    if key in names:
        return batch[key] if isinstance(batch, Mapping) else getattr(batch, str(key))
    if isinstance(batch, Sequence) and _is_position(key) and -len(batch) <= int(key) < len(batch):
        return batch[int(key)]
    first, dot, rest = str(key).partition(".")
    if dot:
        return select(select(batch, first), rest)
    has = f"the entries {names}" if names else f"{len(batch)} entries" if isinstance(batch, Sequence) else "no entries"
    raise KeyError(f"there is no {key!r} in the {type(batch).__name__} with {has}")


def unpack(
    batch: Any,
    inputs: Keys | None = None,
    labels: Key | None = None,
    indices: Key | None = None,
    teacher_inputs: Keys | None = None,
) -> Batch:
    """Build a :class:`Batch` from a batch of any loader.

    A tensor becomes the inputs. The first two entries of a sequence become inputs and labels, unless they are named
    otherwise, and the third of a :class:`QuerySample` becomes ``is_query``. A mapping or a dataclass needs ``inputs``.

    Args:
        batch: Batch as the loader yields it.
        inputs: Entries with the inputs of the student.
        labels: Entry with the labels.
        indices: Entry with the sample indices.
        teacher_inputs: Entries with the inputs of the teacher; ``None`` passes those of the student.

    Raises:
        TypeError: A mapping or a dataclass without ``inputs``, or an object that is not a batch.
        ValueError: Two entries would be passed as the same keyword.
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
    if inputs is labels is indices is teacher_inputs is None and type(batch) in (list, tuple) and batch:
        return Batch(batch[0], batch[1] if len(batch) > 1 else None)  # as below, in a few microseconds
    names = _list_names(batch)
    if isinstance(batch, Sequence) and not isinstance(batch, str):
        inputs = 0 if inputs is None else inputs
        second = {"1", *names[1:2]}  # the labels, unless another argument names it
        if labels is None and len(batch) > 1 and second.isdisjoint(_list_first_parts(inputs, indices, teacher_inputs)):
            labels = 1
    elif not names:
        raise TypeError(
            f"a batch is a tensor, a sequence, a mapping or a dataclass, got {type(batch).__name__}: override "
            "unpack(batch) to return Batch(inputs, labels=...)"
        )
    elif inputs is None:
        raise TypeError(
            f"the batch, a {type(batch).__name__}, has the entries {names}: say which are the inputs, inputs='...'"
        )

    def entry(name: str, key: Any) -> Any:
        if key is None:
            return None
        several = name_arguments(name, key) if isinstance(key, list) else key
        try:
            if isinstance(several, Mapping):
                return {argument: select(batch, one) for argument, one in several.items()}
            return select(batch, key)
        except KeyError as error:
            raise KeyError(f"{name}={key!r} is not in the batch: {error.args[0]}") from error

    return Batch(
        inputs=entry("inputs", inputs),
        labels=entry("labels", labels),
        indices=entry("indices", indices),
        is_query=batch.is_query if isinstance(batch, QuerySample) else None,
        teacher_inputs=entry("teacher_inputs", teacher_inputs),
    )


def _list_names(batch: Any) -> list[Any]:
    """Keys of a mapping, or fields of a dataclass or named tuple."""
    if isinstance(batch, Mapping):
        return list(batch.keys())  # a TensorDict iterates over its rows
    return [f.name for f in fields(batch)] if is_dataclass(batch) else list(getattr(batch, "_fields", ()))


def _list_first_parts(*keys: Keys | None) -> set[str]:
    """First parts of the paths of all entries."""
    lists = [list(k.values()) if isinstance(k, dict) else k if isinstance(k, list) else [k] for k in keys]
    return {str(key).partition(".")[0] for each in lists for key in each}


def name_arguments(name: str, keys: list[Key]) -> dict[Any, Key]:
    """Arguments that take the listed entries: the number of a positional one, or the last part of a path."""
    last = {key: str(key).rpartition(".")[2] for key in keys}
    positions = [key for key in keys if _is_position(last[key])]
    words = {last[key]: key for key in keys if not _is_position(last[key])}
    if len(positions) + len(words) < len(keys):
        raise ValueError(
            f"{name}={keys!r} passes two entries as the same keyword: name the keywords of the network, "
            f"{name}={{'keyword': 'entry', ...}}"
        )
    return {**dict(enumerate(positions)), **words}


def _is_position(part: Key) -> bool:
    return re.fullmatch(r"-?\d+", str(part)) is not None


def call_network(network: Callable[..., Any], inputs: Any) -> Any:
    """Call a network with the inputs of a batch; entries of a mapping are passed as keywords, or by position 0, 1, ...

    A mapping among them is copied, since a network may add its results to it.
    """
    if not isinstance(inputs, Mapping):
        return network(inputs)
    given = {key: copy(value) if isinstance(value, Mapping) else value for key, value in inputs.items()}
    words = {key: value for key, value in given.items() if isinstance(key, str)}
    positions = range(len(given) - len(words))
    return network(*(given[number] for number in positions), **words)
