"""Classification models of torchvision and timm with an embedding head in place of the classifier."""

from collections import OrderedDict
from difflib import get_close_matches
from typing import Any

from torch import nn
from torchvision import models

from lightning_rkd.models.heads import Embedded, EmbeddingHead, L2Normalize
from lightning_rkd.utils.imports import require


def torchvision_embedder(
    name: str,
    embedding_dim: int | None = None,
    weights: str | None = None,
    normalize: bool = False,
    in_channels: int = 3,
    small_images: bool = False,
) -> nn.Module:
    """Build an embedding network from a torchvision classifier, with the layers ``backbone`` and ``head``.

    ``backbone`` is the torchvision model with an identity in place of its last linear layer, whose inputs are the
    features (N, F). Layers between pooling and that layer (a norm, a hidden layer) are kept.

    Shapes: images (N, in_channels, H, W) -> (N, embedding_dim).

    Args:
        name: Name of a model, see :func:`torchvision.models.list_models`, for example ``resnet18``.
        embedding_dim: Width of the embedding; ``None`` returns the features themselves.
        weights: Name of pretrained weights, for example ``DEFAULT`` or ``IMAGENET1K_V1``; ``None`` initialises at
            random and downloads nothing.
        normalize: Scale embeddings to unit norm.
        in_channels: Channels of the images. Other than 3 replaces the first convolution; pretrained weights are summed
            over colours and spread evenly.
        small_images: Start a ResNet with a 3 x 3 convolution of stride 1 and without max pooling, for images of 32 or
            64 pixels.

    Example:
        >>> net = torchvision_embedder("resnet18", embedding_dim=64)
        >>> type(net.backbone).__name__, net.head
        ('ResNet', EmbeddingHead(
          (linear): Linear(in_features=512, out_features=64, bias=True)
        ))
    """
    backbone = build_classifier(name, weights)
    path, classifier = _last_linear(name, backbone)
    backbone.set_submodule(path, nn.Identity())
    for auxiliary in ("aux1", "aux2", "AuxLogits"):  # auxiliary classifiers of training
        if getattr(backbone, auxiliary, None) is not None:
            setattr(backbone, auxiliary, None)
            backbone.aux_logits = False  # type: ignore[assignment]
    if in_channels != 3:
        _change_channels(name, backbone, in_channels, pretrained=weights is not None)
    if small_images:
        _begin_small(name, backbone, in_channels, pretrained=weights is not None)
    parts: OrderedDict[str, nn.Module] = OrderedDict(backbone=backbone)
    if embedding_dim is not None:
        parts["head"] = EmbeddingHead(classifier.in_features, embedding_dim, normalize)
    else:
        parts["head"] = L2Normalize() if normalize else nn.Identity()
    return nn.Sequential(parts)


def timm_embedder(
    name: str,
    embedding_dim: int | None = None,
    pretrained: bool = False,
    normalize: bool = False,
    in_channels: int = 3,
    image_size: int | None = None,
) -> nn.Module:
    """Build an embedding network from a model of timm, with the layers ``backbone`` and ``head``.

    Shapes: images (N, in_channels, H, W) -> (N, embedding_dim).

    Args:
        name: Name of a model, see ``timm.list_models()``.
        embedding_dim: Width of the embedding; ``None`` returns the model, which gives its pooled features.
        pretrained: Fetch the weights that timm names; otherwise they are random.
        normalize: Scale embeddings to unit norm; needs ``embedding_dim``.
        in_channels: Channels of the images.
        image_size: Height and width of the images, for models that fix them, such as vision transformers.
    """
    timm = require("timm", extra="timm")
    fixed: dict[str, Any] = {} if image_size is None else {"img_size": image_size}
    options = {"num_classes": 0, "in_chans": in_channels}
    try:
        backbone: Any = timm.create_model(name, pretrained, **options, **fixed)
    except TypeError as error:
        if "img_size" not in str(error):
            raise
        backbone = timm.create_model(name, pretrained, **options)
    backbone.embedding_dim = getattr(backbone, "head_hidden_size", None) or backbone.num_features
    return backbone if embedding_dim is None else Embedded(backbone, embedding_dim, normalize)


def build_classifier(name: str, weights: str | None) -> nn.Module:
    """Build a classification model of torchvision; the arguments are those of :func:`torchvision_embedder`."""
    known = models.list_models(module=models)
    if name not in known:
        near = get_close_matches(name.lower(), known, n=5, cutoff=0.4) or known[:5]
        raise ValueError(f"torchvision has no classification model {name!r}; near ones: {', '.join(near)}")
    if weights is None:
        # these two warn unless told how to initialise
        extra = {"init_weights": True} if name in ("googlenet", "inception_v3") else {}
        return models.get_model(name, weights=None, **extra)  # type: ignore[no-any-return]
    entries = models.get_model_weights(name)
    if weights not in entries.__members__:
        raise ValueError(f"{name} has no weights {weights!r}; there are {', '.join(entries.__members__)}")
    entry = entries[weights]
    try:
        return models.get_model(name, weights=entry)  # type: ignore[no-any-return]
    except OSError as error:  # URLError among them
        raise RuntimeError(
            f"the weights {entry} of {name} could not be fetched from {entry.url} ({error}): put the file into "
            "$TORCH_HOME/hub/checkpoints, or pass weights=None to start at random"
        ) from error


def _last_linear(name: str, backbone: nn.Module) -> tuple[str, nn.Linear]:
    for path, layer in reversed(list(backbone.named_modules())):
        if isinstance(layer, nn.Linear) and path.split(".")[0] in ("fc", "classifier", "head", "heads"):
            return path, layer
    raise ValueError(f"{name} does not end in a linear classifier, so there is none to replace: choose another model")


def _change_channels(name: str, backbone: nn.Module, in_channels: int, pretrained: bool) -> None:
    if in_channels < 1:
        raise ValueError(f"in_channels must be at least 1, got {in_channels}")
    if getattr(backbone, "transform_input", False):
        raise ValueError(f"{name} with these weights rescales three colours, so in_channels must be 3")
    for layer in backbone.modules():
        if isinstance(layer, nn.Conv2d) and layer.in_channels == 3:
            layer.in_channels = in_channels
            spread = layer.weight.detach().sum(1, keepdim=True) / in_channels
            layer.weight = nn.Parameter(spread.repeat(1, in_channels, 1, 1))
            if not pretrained:
                layer.reset_parameters()
            return
    raise ValueError(f"{name} has no convolution that reads three colours")


def _begin_small(name: str, backbone: nn.Module, in_channels: int, pretrained: bool) -> None:
    if not isinstance(backbone, models.ResNet):
        raise ValueError(f"small_images is for ResNets, and {name} is none: leave it out")
    if pretrained:
        raise ValueError(
            "small_images replaces the first convolution, so weights of large images do not fit: leave them out"
        )
    backbone.conv1 = nn.Conv2d(in_channels, backbone.conv1.out_channels, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(backbone.conv1.weight, mode="fan_out", nonlinearity="relu")  # as torchvision's
    backbone.maxpool = nn.Identity()
