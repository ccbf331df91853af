"""Arguments of a layer's call by the names that its ``forward`` gives them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn

_VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def find_signature(module: nn.Module) -> inspect.Signature | None:
    """Signature of a module's ``forward``, or, for a wrapper that only passes arguments on, of the wrapped module's."""
    try:
        signature = inspect.signature(module.forward)
    except (TypeError, ValueError):  # a forward in C++
        return None
    children = list(module.children())
    if len(children) == 1 and all(p.kind in _VARIADIC for p in signature.parameters.values()):
        return find_signature(children[0])
    return signature


def bind_arguments(
    signature: inspect.Signature | None, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[Any, Any]:
    """Arguments of a call by name, with defaults; those without a name have their position, an integer, as the key."""
    by_position: dict[Any, Any] = {**dict(enumerate(args)), **kwargs}
    if signature is None:
        return by_position
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError:  # the layer itself refuses the call
        return by_position
    bound.apply_defaults()
    arguments: dict[Any, Any] = {}
    for name, value in bound.arguments.items():
        kind = signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_POSITIONAL:
            arguments |= dict(enumerate(value, start=len(arguments)))
        elif kind is inspect.Parameter.VAR_KEYWORD:
            arguments |= value
        else:
            arguments[name] = value
    return arguments
