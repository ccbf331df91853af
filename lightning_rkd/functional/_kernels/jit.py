"""How our kernels are compiled: before the first call, without the interpreter's lock, kept on disk."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba

Function = TypeVar("Function", bound=Callable[..., Any])

# Whatever lets sums be taken in any order, which vector units need; NaN and infinity keep their meaning.
FAST = {"nsz", "arcp", "contract", "afn", "reassoc"}


def compiled(*signatures: Any) -> Callable[[Function], Function]:
    """Compile a function for these argument types at once, or read it from the cache of an earlier process.

    The function runs without the interpreter's lock on one thread, see ``threads``: numba's
    own parallel loops end a forked process, such as a data loader's worker.

    Args:
        signatures: numba's types of the arguments, one tuple for each kind of call.

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
