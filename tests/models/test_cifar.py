"""Networks for small images: as large as published, with stages that can be named."""

import pytest
import torch
from torch import nn

from lightning_rkd.distillation.features import read
from lightning_rkd.distillation.layers import Tap
from lightning_rkd.models import CIFARVGG, CIFARResNet, CIFARWideResNet, Classified, Conv4, Embedded, count_parameters

X4 = (32, 64, 128, 256)


PUBLISHED = {  # millions of parameters, with a classifier of 100 classes
    (CIFARResNet, 8): 0.08, (CIFARResNet, 14): 0.18, (CIFARResNet, 20): 0.28, (CIFARResNet, 32): 0.47,
    (CIFARResNet, 44): 0.67, (CIFARResNet, 56): 0.86, (CIFARResNet, 110): 1.74,
    (CIFARResNet, 8, X4): 1.23, (CIFARResNet, 32, X4): 7.43,
    (CIFARWideResNet, 16, 1): 0.18, (CIFARWideResNet, 16, 2): 0.70, (CIFARWideResNet, 40, 1): 0.57,
    (CIFARWideResNet, 40, 2): 2.26,
    (CIFARVGG, 8): 3.97, (CIFARVGG, 11): 9.28, (CIFARVGG, 13): 9.46, (CIFARVGG, 16): 14.77, (CIFARVGG, 19): 20.09,
}  # fmt: skip


@pytest.mark.parametrize("network", PUBLISHED, ids=str)
def test_classifiers_of_100_classes_are_as_large_as_published(network):
    make, *arguments = network
    with torch.device("meta"):
        assert count_parameters(Classified(make(*arguments), 100)) / 1e6 == pytest.approx(PUBLISHED[network], abs=0.005)


NETWORKS = {
    "resnet": (lambda c: CIFARResNet(8, in_channels=c), [(16, 32), (32, 16), (64, 8)]),
    "resnet x4": (lambda c: CIFARResNet(8, X4, in_channels=c), [(64, 32), (128, 16), (256, 8)]),
    "wide resnet": (lambda c: CIFARWideResNet(10, 1, in_channels=c), [(16, 32), (32, 16), (64, 8)]),
    "vgg": (lambda c: CIFARVGG(8, in_channels=c), [(64, 32), (128, 16), (256, 8), (512, 4), (512, 4)]),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_stages_can_be_read_and_the_pooled_last_is_the_embedding(name):
    make, stages = NETWORKS[name]
    net = Classified(make(3), 7)
    names = [f"backbone.stage{n}" for n in range(1, len(stages) + 1)]
    images = torch.randn(2, 3, 32, 32)
    net.eval()
    maps = read(net, names, images).feature_maps
    outputs = read(net, Tap("classifier", at="classifier"), images)
    assert [(m.shape[1], m.shape[2]) for m in maps] == stages
    assert outputs.embedding.shape == (2, net.backbone.embedding_dim)
    assert outputs.classifier[0].shape == (7, net.backbone.embedding_dim)
    assert torch.equal(outputs.embedding, read(net, "backbone.pool", images).embedding)
    assert torch.equal(outputs.logits, net(images))
    last = maps[-1]
    pooled = net.backbone.norm(last) if name == "wide resnet" else last
    assert torch.allclose(pooled.mean((2, 3)), outputs.embedding, atol=1e-6)


@pytest.mark.parametrize("name", NETWORKS)
def test_every_parameter_learns_on_any_image_size_and_number_of_channels(name):
    net = NETWORKS[name][0](1)
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
        (lambda: Classified(nn.Linear(3, 4), 2), "Linear has no embedding_dim, .* features: pass embedding_dim"),
        (lambda: Classified(nn.Linear(3, 4), 1, embedding_dim=4), "num_classes must be at least 2"),
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
