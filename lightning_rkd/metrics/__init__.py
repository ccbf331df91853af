"""Metrics of embeddings, as ordinary torchmetrics: exact, bounded in memory, the same on one device and on many."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_rkd.utils.imports import lazy_attributes

if TYPE_CHECKING:
    from lightning_rkd.metrics._faiss import Faiss as Faiss
    from lightning_rkd.metrics._stored import StoredGallery as StoredGallery
    from lightning_rkd.metrics.agreement import RelationalAgreement as RelationalAgreement
    from lightning_rkd.metrics.asymmetric import AsymmetricRetrieval as AsymmetricRetrieval
    from lightning_rkd.metrics.fewshot import FewShotAccuracy as FewShotAccuracy
    from lightning_rkd.metrics.retrieval import EmbeddingRetrieval as EmbeddingRetrieval

__getattr__, __dir__, __all__ = lazy_attributes(__name__)
