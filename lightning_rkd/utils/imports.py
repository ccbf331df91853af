"""Lazy imports: public names that are loaded when they are first used, and optional dependencies."""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable
from importlib import import_module
from types import ModuleType
from typing import Any


def lazy_attributes(package: str) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """``__getattr__``, ``__dir__`` and ``__all__`` of a package whose public names are loaded on first use (PEP 562).

    The names are those that its ``__init__.py`` imports under ``if TYPE_CHECKING:``, where type checkers and editors
    read them, so each is written once.

    Args:
        package: The package's ``__name__``.

    Example:
        >>> import lightning_rkd
        >>> get, _, names = lazy_attributes("lightning_rkd")
        >>> get("RKD").__module__, "RKD" in names
        ('lightning_rkd.losses.rkd', True)
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


def require(module: str, extra: str) -> ModuleType:
    """Import an optional dependency.

    Args:
        module: Dotted name of the module.
        extra: The extra of this package that installs it.

    Raises:
        ImportError: It is not installed; the message names the extra.

    Example:
        >>> require("json", extra="cli").__name__
        'json'
        >>> require("no_such_module", extra="cli")
        Traceback (most recent call last):
            ...
        ImportError: no_such_module is not installed: pip install 'lightning-rkd[cli]'
    """
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != module.partition(".")[0]:
            raise
        raise ImportError(
            f"{module.partition('.')[0]} is not installed: pip install 'lightning-rkd[{extra}]'"
        ) from error
