"""Heads on top of a backbone: embeddings, unit norm, classifiers."""

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F


class L2Normalize(nn.Module):
    r"""Scales rows to unit norm: :math:`x / \max(\lVert x \rVert_2, 10^{-12})`, computed in float32 at least.

    Shapes: (N, D) -> (N, D).

    Example:
        >>> import torch
        >>> L2Normalize()(torch.tensor([[3.0, 4.0]]))
        tensor([[0.6000, 0.8000]])
    """

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the rows."""
        wide = x if x.element_size() >= 4 else x.float()  # squares of half precision overflow
        return F.normalize(wide, dim=-1).to(x.dtype)


class EmbeddingHead(nn.Sequential):
    """A linear layer ``linear``, optionally followed by ``normalize``, which scales rows to unit norm.

    Do not normalise the student of a relational loss: the unit sphere only restricts it.

    Shapes: (N, in_features) -> (N, embedding_dim).

    Args:
        in_features: Width of the features.
        embedding_dim: Width of the embedding.
        normalize: Scale rows to unit norm.

    Example:
        >>> import torch
        >>> rows = EmbeddingHead(8, 4, normalize=True)(torch.randn(2, 8))
        >>> rows.shape, bool(rows.norm(dim=1).allclose(torch.ones(2)))
        (torch.Size([2, 4]), True)
    """

    def __init__(self, in_features: int, embedding_dim: int, normalize: bool = False) -> None:
        super().__init__()
        self.linear = nn.Linear(in_features, embedding_dim)
        if normalize:
            self.normalize = L2Normalize()


class Embedded(nn.Module):
    """A backbone of pooled features with an embedding head, with the layers ``backbone`` and ``head``.

    Shapes: inputs of the backbone -> embeddings (N, D).

    Args:
        backbone: Network from inputs to features (N, F), with F as its attribute ``embedding_dim`` unless given.
        embedding_dim: Width D of the embedding.
        normalize: Scale embeddings to unit norm. Do not normalise the student of a relational loss.
        in_features: Width F of the features.

    Example:
        >>> import torch
        >>> from lightning_rkd.models import CIFARResNet
        >>> Embedded(CIFARResNet(8), embedding_dim=32)(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 32])
    """

    def __init__(
        self, backbone: nn.Module, embedding_dim: int, normalize: bool = False, in_features: int | None = None
    ) -> None:
        super().__init__()
        if embedding_dim < 1:
            raise ValueError(f"embedding_dim must be at least 1, got {embedding_dim}")
        self.backbone = backbone
        self.head = EmbeddingHead(_find_width(backbone, in_features, "in_features"), embedding_dim, normalize)
        self.embedding_dim = embedding_dim

    def forward(self, *inputs: Any, **named: Any) -> Tensor:
        """Embeddings (N, D)."""
        return self.head(self.backbone(*inputs, **named))  # type: ignore[no-any-return]


class Classified(nn.Module):
    """An embedding network with a linear layer ``classifier`` on top.

    Read at ``Tap("classifier", at="classifier")``, it gives a loss the embedding (the input of the layer), the logits
    (its output) and the weights of the classifier, so that all losses can be compared on one network.

    Shapes: inputs of the backbone -> logits (N, K).

    Args:
        backbone: Network from inputs to embeddings (N, D), with D as its attribute ``embedding_dim`` unless given.
        num_classes: Number K of classes.
        embedding_dim: Width D of the embedding.

    Example:
        >>> import torch
        >>> from lightning_rkd.models import ConvNet
        >>> net = Classified(ConvNet(widths=(8, 16), embedding_dim=32), num_classes=10)
        >>> net(torch.zeros(4, 1, 28, 28)).shape
        torch.Size([4, 10])
    """

    def __init__(self, backbone: nn.Module, num_classes: int, embedding_dim: int | None = None) -> None:
        super().__init__()
        if num_classes < 2:
            raise ValueError(f"num_classes must be at least 2, got {num_classes}")
        self.backbone = backbone
        self.classifier = nn.Linear(_find_width(backbone, embedding_dim, "embedding_dim"), num_classes)

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits (N, K)."""
        return self.classifier(self.backbone(inputs))  # type: ignore[no-any-return]


def _find_width(backbone: nn.Module, given: int | None, argument: str) -> int:
    width = given if given is not None else getattr(backbone, "embedding_dim", None)
    if not isinstance(width, int):
        raise ValueError(f"{type(backbone).__name__} has no embedding_dim, the width of its features: pass {argument}")
    return width


def count_parameters(module: nn.Module) -> int:
    """Number of elements of all parameters; shared parameters count once.

    Example:
        >>> count_parameters(nn.Linear(3, 2))
        8
    """
    return sum(p.numel() for p in module.parameters())
