"""Lazy imports: public names that are loaded when they are first used, and optional dependencies."""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any


def lazy_attributes(package: str) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """``__getattr__``, ``__dir__`` and ``__all__`` of a package whose public names are loaded on first use (PEP 562).

    The names are those that its ``__init__.py`` imports under ``if TYPE_CHECKING:``, where type checkers and editors
    read them, so each is written once.
    """
    loader: Any = sys.modules[package].__spec__.loader  # type: ignore[union-attr] # set while it is imported
    blocks = [node for node in ast.parse(loader.get_source(package)).body if isinstance(node, ast.If)]
    imports = [node for block in blocks for node in block.body if isinstance(node, ast.ImportFrom)]
    homes = {alias.asname or alias.name: str(node.module) for node in imports for alias in node.names}

    def __getattr__(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(homes[name]), name)

    return __getattr__, lambda: sorted(homes), sorted(homes)


class MissingExtraError(ImportError):
    """A package that an extra of this library installs is missing."""


def check_installed(*packages: str, extra: str) -> None:
    """Raise :class:`MissingExtraError` if a package that the extra installs is missing; none is imported."""
    missing = [package for package in packages if find_spec(package) is None]
    if missing:
        verb = "is" if len(missing) == 1 else "are"
        raise MissingExtraError(f"{', '.join(missing)} {verb} not installed: pip install 'lightning-rkd[{extra}]'")


def require(module: str, extra: str) -> ModuleType:
    """Import a module of an optional dependency, as :func:`check_installed` allows."""
    check_installed(module.partition(".")[0], extra=extra)
    return import_module(module)
