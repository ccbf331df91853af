import inspect
from urllib.error import URLError

import pytest
import torch
from torch import nn
from torchvision import models

from lightning_rkd.models import backbones, torchvision_embedder


@pytest.mark.parametrize(
    ("name", "features"),
    [("resnet18", 512), ("mobilenet_v3_small", 1024), ("convnext_tiny", 768), ("squeezenet1_1", 0)],
)
def test_the_classifier_gives_way_to_an_embedding(name: str, features: int) -> None:
    if not features:
        with pytest.raises(ValueError, match="does not end in a linear classifier"):
            torchvision_embedder(name)
        return
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
    maps = {}
    for stage in ("layer1", "layer4"):
        net.get_submodule(f"backbone.{stage}").register_forward_hook(
            lambda module, args, out, stage=stage: maps.update({stage: tuple(out.shape[1:])})
        )
    assert net(torch.randn(1, 1, 32, 32)).shape == (1, 2048)
    assert maps == {"layer1": (256, 32, 32), "layer4": (2048, 4, 4)}
    with pytest.raises(ValueError, match="small_images is for ResNets, and mobilenet_v3_small is none"):
        torchvision_embedder("mobilenet_v3_small", small_images=True)


@pytest.mark.parametrize("channels", [1, 4])
def test_other_channels_replace_the_first_convolution(channels: int) -> None:
    net = torchvision_embedder("resnet18", embedding_dim=8, in_channels=channels).eval()
    assert net(torch.randn(2, channels, 32, 32)).shape == (2, 8)
    assert net.backbone.conv1.weight.shape[1] == channels  # type: ignore[union-attr]


def test_a_pretrained_first_convolution_sees_grey_as_it_saw_grey_in_colour() -> None:
    net = models.resnet18(weights=None)
    grey = torch.randn(2, 1, 32, 32)
    before = net.conv1(grey.expand(-1, 3, -1, -1))
    backbones._change_channels("resnet18", net, 1, pretrained=True)
    assert torch.allclose(net.conv1(grey), before, atol=1e-5)


def test_unknown_names_list_near_ones() -> None:
    with pytest.raises(ValueError, match=r"no classification model 'resnet19'; near ones: .*resnet18"):
        torchvision_embedder("resnet19")
    with pytest.raises(ValueError, match="resnet18 has no weights 'BEST'; there are IMAGENET1K_V1"):
        torchvision_embedder("resnet18", weights="BEST")
    with pytest.raises(ValueError, match="in_channels must be at least 1"):
        torchvision_embedder("resnet18", in_channels=0)


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
        net = torchvision_embedder(name, embedding_dim=8, in_channels=1)
        assert net.train()(torch.empty(2, 1, 224, 224)).shape == (2, 8)


def test_auxiliary_classifiers_are_left_out() -> None:
    net = torchvision_embedder("googlenet", embedding_dim=8).train()
    assert net(torch.randn(2, 3, 64, 64)).shape == (2, 8)
    assert not any(name.startswith("backbone.aux") for name, _ in net.named_parameters())
