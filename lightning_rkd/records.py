"""The two nouns that travel through the library: what a step was given, and what a network showed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(slots=True)
class Batch:
    """One batch, whatever the loader yielded.

    Attributes:
        inputs: What the student is called with: a tensor, a sequence, or a mapping (passed as keywords).
        labels: Class of each row, shape (N,), or soft labels (N, K).
        indices: Row of each sample in the root data set, shape (N,), int64.
        is_query: Marks the rows that ask in a query/gallery evaluation, shape (N,), bool.
        teacher_inputs: What the teacher is called with; ``None`` means ``inputs``.
        mix: What a batch transform did to the rows (partners and ratios), for losses that ask for ``mix``.
    """

    inputs: Any
    labels: Tensor | None = None
    indices: Tensor | None = None
    is_query: Tensor | None = None
    teacher_inputs: Any = None
    mix: Any = None


@dataclass(slots=True)
class Outputs:
    """What a network showed at one tap. A field is ``None`` where the tap cannot give it.

    Attributes:
        embedding: (N, D).
        logits: (N, K), or (N, K, H, W) for dense prediction.
        maps: Feature maps in the order the layers were named, each (N, C, H, W) or (N, T, C).
        classifier: Weight (K, D) and bias (K,) or ``None`` of the linear classifier behind ``logits``.
    """

    embedding: Tensor | None = None
    logits: Tensor | None = None
    maps: list[Tensor] | None = None
    classifier: tuple[Tensor, Tensor | None] | None = None
