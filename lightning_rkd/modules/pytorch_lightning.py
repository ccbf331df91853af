"""The LightningModules of this package for the Trainer of ``pytorch_lightning``.

``pytorch_lightning`` and ``lightning.pytorch`` hold the same code, but the Trainer of one refuses modules of the other.
Callbacks and data modules of ``lightning_rkd`` work with both. The modules of ``lightning_rkd.modules`` are here for
``pytorch_lightning``: the same files once more, with ``pytorch_lightning`` imported in place of ``lightning.pytorch``.

Example:
    >>> import pytorch_lightning as pl
    >>> from lightning_rkd.modules.pytorch_lightning import DistillationModule
    >>> issubclass(DistillationModule, pl.LightningModule)
    True
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, SourceFileLoader
from importlib.util import find_spec, spec_from_file_location
from types import CodeType, ModuleType
from typing import TYPE_CHECKING, Any

from lightning_rkd.utils.imports import lazy_attributes

if TYPE_CHECKING:
    from lightning_rkd.modules.distillation import DistillationModule as DistillationModule
    from lightning_rkd.modules.mhgd import AttentionGraphEstimator as AttentionGraphEstimator
    from lightning_rkd.modules.mhgd import MHGDModule as MHGDModule
    from lightning_rkd.modules.multihead import MultiHeadDistillation as MultiHeadDistillation

__path__: list[str] = []  # a package: its modules come from the finder
_load, __dir__, __all__ = lazy_attributes(__name__)

_RENAMED = {
    r"lightning\.pytorch": "pytorch_lightning",
    r"lightning\.fabric": "lightning_fabric",
    r"lightning_rkd\.modules": __name__,
}


def __getattr__(name: str) -> Any:
    home = _load(name).__module__.rpartition(".")[2]
    return getattr(import_module(f"{__name__}.{home}"), name)


class _Finder(MetaPathFinder):
    """Finds ``lightning_rkd.modules.pytorch_lightning.<file>`` in the files of ``lightning_rkd.modules``."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        parent, _, file = fullname.rpartition(".")
        if parent != __name__:
            return None
        original = find_spec(f"lightning_rkd.modules.{file}")
        if original is None or original.origin is None:
            return None
        return spec_from_file_location(fullname, original.origin, loader=_Loader(fullname, original.origin))


class _Loader(SourceFileLoader):
    """Compiles a file with its imports renamed, without the bytecode cache, which belongs to the original."""

    def get_code(self, fullname: str) -> CodeType:
        source = self.get_data(self.path).decode()
        for old, new in _RENAMED.items():
            source = re.sub(rf"^(\s*(?:from|import) ){old}\b", rf"\1{new}", source, flags=re.MULTILINE)
        return self.source_to_code(source.encode(), self.path)


sys.meta_path.append(_Finder())
