"""Initialisation of the networks for small images."""

from __future__ import annotations

from torch import nn


def initialise_convolutions(network: nn.Module) -> None:
    """Initialise the convolutions of a ReLU network so that gradients keep their size (Kaiming normal, fan-out).

    Reference:
        He, Zhang, Ren, Sun: Delving Deep into Rectifiers, 2015, arXiv:1502.01852.

    Example:
        >>> conv = nn.Conv2d(64, 64, 3)
        >>> initialise_convolutions(conv)
        >>> abs(conv.weight.std().item() - (2 / (9 * 64)) ** 0.5) < 0.002
        True
    """
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
