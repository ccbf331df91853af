"""The student alone, for production: files that need neither teacher nor Lightning, and their reader."""

from lightning_rkd.export.read import load
from lightning_rkd.export.write import Exported, ExportError, export

__all__ = ["ExportError", "Exported", "export", "load"]
