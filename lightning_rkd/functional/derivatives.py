"""Derivatives that are not there, said so."""

from __future__ import annotations

import torch


def refuse_second_derivative(name: str) -> None:
    """Called in a backward pass that is no function of its own inputs: raise where its graph is asked for.

    Args:
        name: What has no second derivative.

    Raises:
        RuntimeError: The backward pass runs with ``create_graph=True``.

    Example:
        >>> with torch.no_grad():
        ...     refuse_second_derivative("angle_loss")
    """
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"{name} has a first derivative only: its backward pass was asked for a graph of its own "
            "(create_graph=True), which would leave the second derivative out in silence"
        )
