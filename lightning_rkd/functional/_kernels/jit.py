"""Compilation of numba kernels: ahead of the first call, without the interpreter's lock, cached on disk."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba

Function = TypeVar("Function", bound=Callable[..., Any])

# Flags that let vector units sum in any order; NaN and infinity keep their meaning.
FAST = {"nsz", "arcp", "contract", "afn", "reassoc"}


def compiled(*signatures: Any) -> Callable[[Function], Function]:
    """Compile a function for these argument types at once, or read it from the cache of an earlier process.

    The function runs without the interpreter's lock on one thread, see ``threads``: numba's parallel loops would end
    a forked process, such as a data loader's worker.

    Args:
        signatures: numba types of the arguments, one tuple per signature.

    Example:
        >>> @compiled((numba.float64[::1],))
        ... def mean(x):
        ...     total = 0.0
        ...     for value in x:
        ...         total += value
        ...     return total / len(x)
        >>> import numpy as np
        >>> mean(np.arange(4.0))
        1.5
    """

    def compile_(function: Function) -> Function:
        settings: dict[str, Any] = {"nogil": True, "fastmath": FAST, "error_model": "numpy"}
        try:
            made = numba.njit(list(signatures), cache=True, **settings)(function)
        except RuntimeError:  # neither the package's folder nor the user's can be written
            made = numba.njit(list(signatures), **settings)(function)
        return cast(Function, made)

    return compile_
