"""Errors for missing second derivatives."""

from __future__ import annotations


def second_derivative_error(name: str) -> RuntimeError:
    """Error for a backward pass that runs with ``create_graph=True`` where no second derivative exists.

    A backward pass raises it ``if torch.is_grad_enabled()``.

    Args:
        name: Function named in the message.

    Example:
        >>> str(second_derivative_error("angle_loss"))[:42]
        'angle_loss has a first derivative only: it'
    """
    return RuntimeError(
        f"{name} has a first derivative only: its backward pass ran with create_graph=True, and the second "
        "derivative would be left out silently"
    )
