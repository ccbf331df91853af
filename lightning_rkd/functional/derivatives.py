"""Errors for missing second derivatives."""

from __future__ import annotations

import torch


def refuse_second_derivative(name: str) -> None:
    """Raise where the backward pass of a first-order function runs with ``create_graph=True``.

    Args:
        name: Function named in the message.

    Example:
        >>> with torch.no_grad():
        ...     refuse_second_derivative("angle_loss")
    """
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"{name} has a first derivative only: its backward pass ran with create_graph=True, and the second "
            "derivative would be left out silently"
        )
