"""A classifier on an embedding network, read everywhere by one tap."""

import pytest
import torch
from torch import nn

from lightning_rkd.distillation.features import read
from lightning_rkd.models import Classified, ConvNet


def test_a_tap_at_its_classifier_shows_embedding_logits_and_classifier() -> None:
    net = Classified(ConvNet(widths=(4, 6), embedding_dim=5), num_classes=7)
    outputs = read(net, "classifier", torch.zeros(3, 1, 8, 8))
    assert outputs.embedding is not None
    assert outputs.logits is not None
    assert outputs.classifier is not None
    assert (outputs.embedding.shape, outputs.logits.shape, outputs.classifier[0].shape) == ((3, 5), (3, 7), (7, 5))


def test_a_backbone_of_unknown_width_must_be_told() -> None:
    with pytest.raises(ValueError, match="Linear has no embedding_dim, the width of its embedding: pass embedding_dim"):
        Classified(nn.Linear(3, 4), 2)
    assert Classified(nn.Linear(3, 4), 2, embedding_dim=4)(torch.zeros(1, 3)).shape == (1, 2)
    with pytest.raises(ValueError, match="num_classes must be at least 2"):
        Classified(nn.Linear(3, 4), 1, embedding_dim=4)
