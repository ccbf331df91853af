"""Compilation of numba kernels: ahead of the first call, without the interpreter's lock, cached on disk."""

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba

Function = TypeVar("Function", bound=Callable[..., Any])

# Flags that let vector units sum in any order; NaN and infinity keep their meaning.
FAST = {"nsz", "arcp", "contract", "afn", "reassoc"}


_TYPES = {"i": numba.int64, "b": numba.boolean, "s": numba.float32, "d": numba.float64}


def compiled(codes: str) -> Callable[[Function], Function]:
    """Compile a function at once for types such as ``"f2 d0 i1"``, or read it from the cache of an earlier process.

    A letter is a type (int64, boolean, single, double, and f for single and double in turn), a digit the dimensions.
    The function runs without the interpreter's lock on one thread, see ``threads``: numba's parallel loops would end
    a forked process, such as a data loader's worker.
    """
    signatures = []
    for real in (numba.float32, numba.float64) if "f" in codes else (None,):
        kinds = [((_TYPES | {"f": real})[code[0]], int(code[1])) for code in codes.split()]
        signatures.append(tuple(numba.types.Array(kind, n, "C") if n else kind for kind, n in kinds))

    def compile_(function: Function) -> Function:
        settings: dict[str, Any] = {"nogil": True, "fastmath": FAST, "error_model": "numpy"}
        try:
            made = numba.njit(signatures, cache=True, **settings)(function)
        except RuntimeError:  # neither the package's folder nor the user's can be written
            made = numba.njit(signatures, **settings)(function)
        return cast(Function, made)

    return compile_
