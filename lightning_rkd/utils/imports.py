"""Lazy imports: public names that are loaded when they are first used, and optional dependencies."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from types import ModuleType
from typing import Any


def lazy_attributes(package: str, homes: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """``__getattr__`` and ``__dir__`` of a package whose public names are loaded on first use (PEP 562).

    Args:
        package: The package's ``__name__``.
        homes: The submodule that defines each public name, relative to the package.

    Example:
        >>> get, names = lazy_attributes("lightning_rkd", {"RKD": "losses.rkd"})
        >>> get("RKD").__name__, names()
        ('RKD', ['RKD'])
    """

    def __getattr__(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(f"{package}.{homes[name]}"), name)

    def __dir__() -> list[str]:
        return sorted(homes)

    return __getattr__, __dir__


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
