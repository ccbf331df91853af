import pytest
import torch

from lightning_rkd.distillation.features import read
from lightning_rkd.models import ConvNet, EmbeddingHead, L2Normalize, count_parameters


@pytest.mark.parametrize("pixels", [28, 32, 64, 105])
@pytest.mark.parametrize("channels", [1, 3])
def test_any_image_size_gives_embeddings(pixels: int, channels: int) -> None:
    net = ConvNet(widths=(4, 8, 8), embedding_dim=10, in_channels=channels, pool=2)
    assert net(torch.randn(3, channels, pixels, pixels)).shape == (3, 10)


def test_layers_are_named() -> None:
    net = ConvNet(widths=(4, 6, 8), embedding_dim=10, pool=2)
    images = torch.randn(2, 1, 28, 28)
    maps = read(net, ["backbone.stage1", "backbone.stage2", "backbone.stage3"], images).feature_maps
    assert [tuple(m.shape) for m in maps] == [(2, 4, 28, 28), (2, 6, 14, 14), (2, 8, 7, 7)]
    assert [read(net, name, images).embedding.shape[1] for name in ("backbone", "head")] == [32, 10]


def test_the_default_is_a_teacher_of_174_thousand_parameters() -> None:
    assert count_parameters(ConvNet()) == 174_008


def test_normalised_embeddings_have_unit_norm_and_others_do_not() -> None:
    images = torch.randn(5, 1, 28, 28)
    assert torch.allclose(ConvNet(normalize=True)(images).norm(dim=1), torch.ones(5))
    assert not torch.allclose(ConvNet()(images).norm(dim=1), torch.ones(5))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"widths": ()}, "at least one stage"), ({"widths": (4, 0)}, "at least one channel"), ({"depth": 0}, "depth"),
     ({"pool": 0}, "pool"), ({"embedding_dim": 0}, "embedding_dim")],
)  # fmt: skip
def test_impossible_sizes_are_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ConvNet(**arguments)  # type: ignore[arg-type]


def test_half_precision_rows_of_great_length_are_normalised() -> None:
    x = torch.full((1, 4), 1e4, dtype=torch.float16)
    assert torch.allclose(L2Normalize()(x), torch.full((1, 4), 0.5, dtype=torch.float16))


def test_a_row_of_zeros_stays_finite() -> None:
    x = torch.zeros(1, 4, requires_grad=True)
    L2Normalize()(x).sum().backward()
    assert torch.isfinite(x.grad).all()  # type: ignore[arg-type]


def test_shared_parameters_count_once() -> None:
    head = EmbeddingHead(3, 2)
    assert count_parameters(torch.nn.ModuleList([head, head])) == 8
