"""Errors for missing second derivatives."""

from __future__ import annotations


def second_derivative_error(name: str) -> RuntimeError:
    """Error for a backward pass that runs with ``create_graph=True`` where no second derivative exists.

    The backward pass of the function ``name`` raises it ``if torch.is_grad_enabled()``.
    """
    return RuntimeError(
        f"{name} has a first derivative only: its backward pass ran with create_graph=True, and the second "
        "derivative would be left out silently"
    )
