"""The student alone, for production: files that need neither teacher nor Lightning, and their reader."""

from lightning_rkd.export.formats import ExportError
from lightning_rkd.export.preprocess import (
    ImagePreprocess,
    PiecesPreprocess,
    Preprocess,
    TokensPreprocess,
    VectorPreprocess,
)
from lightning_rkd.export.read import Embedder, load
from lightning_rkd.export.write import Exported, export

__all__ = [
    "Embedder",
    "ExportError",
    "Exported",
    "ImagePreprocess",
    "PiecesPreprocess",
    "Preprocess",
    "TokensPreprocess",
    "VectorPreprocess",
    "export",
    "load",
]
