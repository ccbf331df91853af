import inspect
from typing import Any
from urllib.error import URLError

import pytest
import torch
from torch import nn
from torchvision import models

from lightning_rkd.distillation.features import read
from lightning_rkd.models import backbones, torchvision_embedder


@pytest.mark.parametrize(
    ("name", "features"), [("resnet18", 512), ("mobilenet_v3_small", 1024), ("convnext_tiny", 768)]
)
def test_the_classifier_gives_way_to_an_embedding(name: str, features: int) -> None:
    net = torchvision_embedder(name, embedding_dim=16).eval()
    images = torch.randn(2, 3, 32, 32)
    assert net(images).shape == (2, 16)
    assert net.backbone(images).shape == (2, features)  # type: ignore[operator]
    assert net.head.linear.in_features == features  # type: ignore[union-attr]


def test_without_a_width_the_features_are_the_embedding() -> None:
    net = torchvision_embedder("resnet18", normalize=True).eval()
    out = net(torch.randn(2, 3, 32, 32))
    assert out.shape == (2, 512)
    assert torch.allclose(out.norm(dim=1), torch.ones(2))


def test_a_resnet_for_small_images_sees_all_pixels_in_its_first_stage() -> None:
    net = torchvision_embedder("resnet50", embedding_dim=None, small_images=True, in_channels=1).eval()
    images = torch.randn(1, 1, 32, 32)
    maps = read(net, ["backbone.layer1", "backbone.layer4"], images).feature_maps
    assert [tuple(m.shape[1:]) for m in maps] == [(256, 32, 32), (2048, 4, 4)]
    assert net(images).shape == (1, 2048)


def test_a_pretrained_first_convolution_sees_grey_as_it_saw_grey_in_colour() -> None:
    net = models.resnet18(weights=None)
    grey = torch.randn(2, 1, 32, 32)
    before = net.conv1(grey.expand(-1, 3, -1, -1))
    backbones._change_channels("resnet18", net, 1, pretrained=True)
    assert torch.allclose(net.conv1(grey), before, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("resnet19", {}, r"no classification model 'resnet19'; near ones: .*resnet18"),
        ("resnet18", {"weights": "BEST"}, "resnet18 has no weights 'BEST'; there are IMAGENET1K_V1"),
        ("resnet18", {"in_channels": 0}, "in_channels must be at least 1"),
        ("mobilenet_v3_small", {"small_images": True}, "small_images is for ResNets, and mobilenet_v3_small is none"),
        ("squeezenet1_1", {}, "does not end in a linear classifier"),
    ],
)
def test_impossible_requests_are_refused_with_what_is_there(name: str, arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        torchvision_embedder(name, **arguments)


def test_a_failed_download_names_weights_address_and_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: object, **__: object) -> None:
        raise URLError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", offline)
    with pytest.raises(
        RuntimeError, match=r"ResNet18_Weights\.IMAGENET1K_V1 .* https://download.*no network.*TORCH_HOME"
    ):
        torchvision_embedder("resnet18", weights="IMAGENET1K_V1")


def test_no_weights_means_no_download(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", lambda *_, **__: pytest.fail("downloads"))
    torchvision_embedder("mobilenet_v3_small")


def test_it_is_annotated_so_that_yaml_may_name_it_as_a_class_path() -> None:
    assert inspect.signature(torchvision_embedder, eval_str=True).return_annotation is nn.Module


@pytest.mark.parametrize("name", ["vit_b_16", "densenet121", "efficientnet_b0", "vgg11", "swin_t", "inception_v3"])
def test_other_families_embed_too(name: str) -> None:
    with torch.device("meta"):  # shapes without the work
        net = torchvision_embedder(name, embedding_dim=8, in_channels=4)
        assert net.train()(torch.empty(2, 4, 224, 224)).shape == (2, 8)


def test_auxiliary_classifiers_are_left_out() -> None:
    net = torchvision_embedder("googlenet", embedding_dim=8).train()
    assert net(torch.randn(2, 3, 64, 64)).shape == (2, 8)
    assert not any(name.startswith("backbone.aux") for name, _ in net.named_parameters())
