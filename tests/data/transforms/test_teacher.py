"""A teacher's images are those of torchvision's transforms, of any type and inside any inputs."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision.transforms import v2

from lightning_rkd.data import Renormalize, Resize

STATISTICS = ([0.5, 0.4, 0.3], [0.2, 0.3, 0.25]), ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
X = torch.randn(2, 3, 16, 24, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("size", [8, (12, 40), 33])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_images_are_resized_as_torchvision_does(size: Any, interpolation: Any) -> None:
    expected = v2.functional.resize(
        X, [size, size] if isinstance(size, int) else size, v2.InterpolationMode(interpolation), antialias=True
    )
    assert torch.equal(Resize(size, interpolation)(X), expected)


def test_images_of_the_size_pass_unchanged() -> None:
    assert Resize((16, 24))(X) is X


def test_statistics_are_replaced_as_two_normalisations_would() -> None:
    (mean, std), teacher = STATISTICS
    pixels = torch.rand(2, 3, 8, 8, dtype=torch.float64)
    given, expected = v2.functional.normalize(pixels, mean, std), v2.functional.normalize(pixels, *teacher)
    torch.testing.assert_close(Renormalize(*STATISTICS)(given), expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(Renormalize((0.0, 1.0), teacher)(pixels), expected, atol=1e-6, rtol=0)


def test_grey_images_become_those_of_a_colour_teacher() -> None:
    pixels = torch.rand(2, 1, 8, 8)
    expected = v2.functional.normalize(pixels.expand(-1, 3, -1, -1), *STATISTICS[1])
    torch.testing.assert_close(Renormalize((0.5, 0.25), STATISTICS[1])((pixels - 0.5) / 0.25), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("transform", [Resize(8), Renormalize(*STATISTICS)])
def test_half_precision_is_rounded_once(transform: Any, dtype: torch.dtype) -> None:
    x = X.to(dtype)
    wide = x.to(torch.promote_types(dtype, torch.float32))
    assert torch.equal(transform(x), transform(wide).to(dtype))


def test_images_are_found_inside_nested_inputs_and_others_left() -> None:
    tokens = torch.ones(2, 5, dtype=torch.int64)
    given = {"pixel_values": X, "input_ids": tokens, "more": (X, None)}
    out = Resize(8)(given)
    assert out["input_ids"] is tokens
    assert torch.equal(out["pixel_values"], Resize(8)(X))
    assert torch.equal(out["more"][0], Resize(8)(X))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: Resize(8)(X.byte()),
            TypeError,
            r"expected floating-point images .*, got torch\.uint8 of shape \(2, 3",
        ),
        (lambda: Resize(8)({"a": 1}), TypeError, "in the teacher's inputs, got dict"),
        (lambda: Resize(8, "nearest"), ValueError, "must be 'bicubic' or 'bilinear', got 'nearest'"),
        (lambda: Renormalize(*STATISTICS)(X[:, :2]), ValueError, r"1 or 3 channels.* got \(2, 2, 16, 24\); convert"),
        (lambda: Renormalize(([0.5] * 4, 0.5), STATISTICS[1]), ValueError, "of the same channels, got student="),
        (lambda: Renormalize(0.5, STATISTICS[1]), ValueError, r"student must be \(mean, std\), got 0\.5"),
        (lambda: Renormalize((0.5, 0.0), STATISTICS[1]), ValueError, "deviation of student must be positive, got 0"),
    ],
)
def test_what_cannot_be_transformed_is_refused(call: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_casts_of_a_module_around_it_do_not_round_the_statistics() -> None:
    transform = Renormalize(*STATISTICS)
    expected: Tensor = transform(X)
    assert torch.equal(torch.nn.Sequential(transform).bfloat16()(X), expected)
