"""Networks for small images: as large as published and as a formula says, with stages that can be named."""

import pytest
import torch
from torch import nn

from lightning_rkd.distillation.features import read
from lightning_rkd.models import CIFARVGG, CIFARResNet, CIFARWideResNet, Classified, Conv4, Embedded, count_parameters

X4 = (32, 64, 128, 256)


def resnet(depth: int, channels: tuple[int, ...], classes: int) -> int:
    """Weights of all convolutions, two numbers a channel for every norm, and the classifier."""
    blocks = (depth - 2) // 6
    total, before = 27 * channels[0] + 2 * channels[0], channels[0]
    for stage, width in enumerate(channels[1:]):
        total += 9 * before * width + (2 * blocks - 1) * 9 * width**2 + 2 * blocks * 2 * width
        total += before * width + 2 * width if stage or before != width else 0
        before = width
    return total + before * classes + classes


def wide(depth: int, widen: int, classes: int) -> int:
    blocks = (depth - 4) // 6
    total, before = 27 * 16, 16
    for width in (16 * widen, 32 * widen, 64 * widen):
        total += 9 * before * width + (2 * blocks - 1) * 9 * width**2  # convolutions
        total += 2 * before + (2 * blocks - 1) * 2 * width  # norms
        total += before * width if before != width else 0
        before = width
    return total + 2 * before + before * classes + classes


def vgg(layout: list[int], classes: int) -> int:
    total, before = 0, 3
    for width in layout:
        total += 9 * before * width + width + 2 * width
        before = width
    return total + before * classes + classes


def plain(*numbers: int) -> list[int]:
    return [w for w, n in zip((64, 128, 256, 512, 512), numbers, strict=True) for _ in range(n)]


@pytest.mark.parametrize(
    ("network", "counted", "published"),
    [
        (lambda: CIFARResNet(8), resnet(8, (16, 16, 32, 64), 100), 0.08),
        (lambda: CIFARResNet(14), resnet(14, (16, 16, 32, 64), 100), 0.18),
        (lambda: CIFARResNet(20), resnet(20, (16, 16, 32, 64), 100), 0.28),
        (lambda: CIFARResNet(32), resnet(32, (16, 16, 32, 64), 100), 0.47),
        (lambda: CIFARResNet(44), resnet(44, (16, 16, 32, 64), 100), 0.67),
        (lambda: CIFARResNet(56), resnet(56, (16, 16, 32, 64), 100), 0.86),
        (lambda: CIFARResNet(110), resnet(110, (16, 16, 32, 64), 100), 1.74),
        (lambda: CIFARResNet(8, X4), resnet(8, X4, 100), 1.23),
        (lambda: CIFARResNet(32, X4), resnet(32, X4, 100), 7.43),
        (lambda: CIFARWideResNet(16, 1), wide(16, 1, 100), 0.18),
        (lambda: CIFARWideResNet(16, 2), wide(16, 2, 100), 0.70),
        (lambda: CIFARWideResNet(40, 1), wide(40, 1, 100), 0.57),
        (lambda: CIFARWideResNet(40, 2), wide(40, 2, 100), 2.26),
        (lambda: CIFARVGG(8), vgg(plain(1, 1, 1, 1, 1), 100), 3.97),
        (lambda: CIFARVGG(11), vgg(plain(1, 1, 2, 2, 2), 100), 9.28),
        (lambda: CIFARVGG(13), vgg(plain(2, 2, 2, 2, 2), 100), 9.46),
        (lambda: CIFARVGG(16), vgg(plain(2, 2, 3, 3, 3), 100), 14.77),
        (lambda: CIFARVGG(19), vgg(plain(2, 2, 4, 4, 4), 100), 20.09),
    ],
)
def test_classifiers_of_100_classes_are_as_large_as_published(network, counted, published):
    with torch.device("meta"):
        net = Classified(network(), 100)
    assert count_parameters(net) == counted
    assert counted / 1e6 == pytest.approx(published, abs=0.005)


NETWORKS = {
    "resnet": lambda: CIFARResNet(8),
    "resnet x4": lambda: CIFARResNet(8, X4),
    "wide resnet": lambda: CIFARWideResNet(10, 1),
    "vgg": lambda: CIFARVGG(8),
}
STAGES = {
    "resnet": [(16, 32), (32, 16), (64, 8)],
    "resnet x4": [(64, 32), (128, 16), (256, 8)],
    "wide resnet": [(16, 32), (32, 16), (64, 8)],
    "vgg": [(64, 32), (128, 16), (256, 8), (512, 4), (512, 4)],
}


@pytest.mark.parametrize("name", NETWORKS)
def test_stages_can_be_read_and_the_pooled_last_is_the_embedding(name):
    net = Classified(NETWORKS[name](), 7)
    names = [f"backbone.stage{n}" for n in range(1, len(STAGES[name]) + 1)]
    images = torch.randn(2, 3, 32, 32)
    net.eval()
    maps = read(net, names, images).feature_maps
    outputs = read(net, "classifier", images)
    assert [(m.shape[1], m.shape[2]) for m in maps] == STAGES[name]
    assert outputs.embedding.shape == (2, net.backbone.embedding_dim)
    assert torch.equal(outputs.embedding, read(net, "backbone.pool", images).embedding)
    assert torch.equal(outputs.logits, net(images))
    last = maps[-1]
    pooled = net.backbone.norm(last) if name == "wide resnet" else last
    assert torch.allclose(pooled.mean((2, 3)), outputs.embedding, atol=1e-6)


@pytest.mark.parametrize("name", NETWORKS)
def test_every_parameter_learns_on_any_image_size_and_number_of_channels(name):
    nets = {
        "resnet": CIFARResNet(8, in_channels=1),
        "resnet x4": CIFARResNet(8, X4, in_channels=1),
        "wide resnet": CIFARWideResNet(10, 1, in_channels=1),
        "vgg": CIFARVGG(8, in_channels=1),
    }
    net = nets[name]
    for pixels in (16, 28, 64):
        net(torch.randn(3, 1, pixels, pixels)).square().sum().backward()
        assert all(p.grad is not None for p in net.parameters())
    assert all(p.grad.abs().sum() > 0 for p in net.parameters())


def test_a_residual_block_adds_its_input():
    net = CIFARResNet(8)
    block = net.stage1[0]
    nn.init.zeros_(block.norm2.weight)
    x = torch.rand(2, 16, 8, 8)
    assert torch.equal(block(x), x)
    block = CIFARWideResNet(10, 1).stage1[0]
    nn.init.zeros_(block.conv2.weight)
    assert torch.equal(block(x - 0.5), x - 0.5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CIFARResNet(18), r"depth must be 6 n \+ 2.* got 18"),
        (lambda: CIFARResNet(20, (16, 32, 64)), r"channels must be four.* got \(16, 32, 64\)"),
        (lambda: CIFARWideResNet(18), r"depth must be 6 n \+ 4.* got 18"),
        (lambda: CIFARWideResNet(16, 0), "widen must be at least 1, got 0"),
        (lambda: CIFARVGG(9), "depth must be one of 8, 11, 13, 16, 19, got 9"),
        (lambda: Conv4(0), "in_channels and width must be at least 1, got 0 and 64"),
        (lambda: Conv4()(torch.zeros(1, 1, 12, 12)), "must be 16 x 16 pixels at least"),
        (lambda: Embedded(nn.Flatten(), 8), "Flatten has no embedding_dim, the width of its features"),
        (lambda: Embedded(CIFARResNet(8), 0), "embedding_dim must be at least 1, got 0"),
    ],
)
def test_impossible_networks_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(("pixels", "channels", "width", "size"), [(28, 1, 64, 111_936), (84, 3, 1600, 113_088)])
def test_conv4_has_the_published_size_and_embeds_as_wide_as_in_the_papers(pixels, channels, width, size):
    net = Conv4(channels)
    assert net(torch.randn(2, channels, pixels, pixels)).shape == (2, width)
    assert count_parameters(net) == size == 9 * channels * 64 + 3 * 9 * 64 * 64 + 4 * 64 + 4 * 2 * 64


@pytest.mark.parametrize("normalize", [True, False])
def test_an_embedding_head_of_any_width_goes_on_top(normalize):
    net = Embedded(CIFARResNet(8), 16, normalize)
    rows = net(torch.randn(3, 3, 32, 32))
    assert rows.shape == (3, 16)
    assert torch.allclose(rows.norm(dim=1), torch.ones(3)) == normalize
