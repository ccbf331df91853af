"""A network with a linear classifier on top."""

from __future__ import annotations

from torch import Tensor, nn


class Classified(nn.Module):
    """An embedding network with a linear classifier, read at its layer ``classifier``.

    A tap at ``"classifier"`` shows the embedding (its input), the logits (its output) and the classifier itself, so
    that losses on any of them can be compared on one network.

    Shapes: inputs of the backbone -> logits (N, K).

    Args:
        backbone: From inputs to embeddings (N, D), with D as its attribute ``embedding_dim`` unless it is given.
        num_classes: K.
        embedding_dim: D.

    Raises:
        ValueError: D is not known.

    Example:
        >>> import torch
        >>> from lightning_rkd.models import ConvNet
        >>> net = Classified(ConvNet(widths=(8, 16), embedding_dim=32), num_classes=10)
        >>> net(torch.zeros(4, 1, 28, 28)).shape
        torch.Size([4, 10])
    """

    def __init__(self, backbone: nn.Module, num_classes: int, embedding_dim: int | None = None) -> None:
        super().__init__()
        width = embedding_dim if embedding_dim is not None else getattr(backbone, "embedding_dim", None)
        if not isinstance(width, int):
            raise ValueError(f"{type(backbone).__name__} does not tell how wide it embeds: pass embedding_dim=...")
        if num_classes < 2:
            raise ValueError(f"num_classes must be at least 2, got {num_classes}")
        self.backbone = backbone
        self.classifier = nn.Linear(width, num_classes)

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits (N, K)."""
        logits: Tensor = self.classifier(self.backbone(inputs))
        return logits
