"""Metrics of embeddings, as ordinary torchmetrics: exact, bounded in memory, the same on one device and on many."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_rkd.metrics._faiss import Faiss as Faiss
    from lightning_rkd.metrics.agreement import RelationalAgreement as RelationalAgreement
    from lightning_rkd.metrics.fewshot import FewShotAccuracy as FewShotAccuracy
    from lightning_rkd.metrics.retrieval import EmbeddingRetrieval as EmbeddingRetrieval

_HOME = {
    "EmbeddingRetrieval": "retrieval",
    "Faiss": "_faiss",
    "FewShotAccuracy": "fewshot",
    "RelationalAgreement": "agreement",
}
__all__ = ["EmbeddingRetrieval", "Faiss", "FewShotAccuracy", "RelationalAgreement"]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
