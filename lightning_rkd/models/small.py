"""Small convolutional networks: one that trains in a minute on a CPU, and the standard one of few-shot learning."""

from collections import OrderedDict
from collections.abc import Sequence

from torch import Tensor, nn

from lightning_rkd.models.heads import EmbeddingHead


class ConvNet(nn.Module):
    """Stages of 3 x 3 convolutions with max pooling between them, then average pooling and an embedding head.

    The named layers are ``backbone`` (pooled features, (N, widths[-1] * pool ** 2)), ``backbone.stage1`` and so on
    (feature maps), and ``head`` (the embedding). Images need at least ``2 ** (len(widths) - 1)`` pixels in each
    direction.

    Args:
        widths: Channels of each stage.
        embedding_dim: Width of the embedding.
        in_channels: Channels of the images.
        depth: Convolutions in each stage.
        pool: Size to which the last maps are averaged; 1 is global average pooling.
        normalize: Scale embeddings to unit norm. Do not normalise the student of a relational loss.

    Example:
        >>> import torch
        >>> net = ConvNet(widths=(8, 16), embedding_dim=32)
        >>> net(torch.zeros(4, 1, 28, 28)).shape
        torch.Size([4, 32])
    """

    def __init__(
        self,
        widths: Sequence[int] = (24, 48, 96),
        embedding_dim: int = 128,
        in_channels: int = 1,
        depth: int = 2,
        pool: int = 1,
        normalize: bool = False,
    ) -> None:
        super().__init__()
        if not widths or min(widths) < 1:
            raise ValueError(f"widths must name at least one stage of at least one channel, got {tuple(widths)}")
        for name, number in {"depth": depth, "pool": pool, "embedding_dim": embedding_dim}.items():
            if number < 1:
                raise ValueError(f"{name} must be at least 1, got {number}")
        parts: OrderedDict[str, nn.Module] = OrderedDict()
        channels = in_channels
        for i, width in enumerate(widths, start=1):
            # the norm has a shift, so the convolutions need no bias
            layers = convolutions(channels, width, depth, bias=False)
            parts[f"stage{i}"] = nn.Sequential(*[nn.MaxPool2d(2)] * (i > 1), *layers)
            channels = width
        parts["pool"] = nn.AdaptiveAvgPool2d(pool)
        parts["flatten"] = nn.Flatten()
        self.backbone = nn.Sequential(parts)
        self.head = EmbeddingHead(channels * pool**2, embedding_dim, normalize)
        self.embedding_dim = embedding_dim

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, C, H, W) -> embeddings (N, D)."""
        return self.head(self.backbone(images))  # type: ignore[no-any-return]


class Conv4(nn.Module):
    """Four blocks of a 3 x 3 convolution, batch norm, ReLU and max pooling; the flattened last maps are the embedding.

    The named layers are ``block1`` to ``block4`` (feature maps).

    Shapes: images (N, in_channels, H, W), H and W at least 16 -> (N, width (H // 16) (W // 16)): width 64 for
    characters of 28 x 28 pixels, 1600 for images of 84 x 84.

    Args:
        in_channels: Channels of the images.
        width: Channels of each block.

    Reference:
        Vinyals, Blundell, Lillicrap, Kavukcuoglu, Wierstra: Matching Networks for One Shot Learning, 2016,
        arXiv:1606.04080; with 64 channels as in Snell, Swersky, Zemel 2017, arXiv:1703.05175.

    Example:
        >>> import torch
        >>> from lightning_rkd.models import count_parameters
        >>> net = Conv4(in_channels=1)
        >>> net(torch.zeros(2, 1, 28, 28)).shape, count_parameters(net)
        (torch.Size([2, 64]), 111936)
    """

    def __init__(self, in_channels: int = 1, width: int = 64) -> None:
        super().__init__()
        if min(in_channels, width) < 1:
            raise ValueError(f"in_channels and width must be at least 1, got {in_channels} and {width}")
        blocks = [convolutions(channels, width) for channels in (in_channels, width, width, width)]
        self.block1, self.block2, self.block3, self.block4 = (nn.Sequential(*b, nn.MaxPool2d(2)) for b in blocks)

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, C, H, W) -> embeddings (N, D)."""
        if min(images.shape[-2:]) < 16:
            raise ValueError(
                f"Conv4 halves images four times, so they must be 16 x 16 pixels at least, got {tuple(images.shape)}"
            )
        return self.block4(self.block3(self.block2(self.block1(images)))).flatten(1)  # type: ignore[no-any-return]


def convolutions(channels: int, width: int, count: int = 1, bias: bool = True) -> list[nn.Module]:
    """Layers of 3 x 3 convolutions, each with batch norm and ReLU."""
    layers: list[nn.Module] = []
    for before in (channels, *[width] * (count - 1)):
        layers += [nn.Conv2d(before, width, 3, padding=1, bias=bias), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
    return layers
