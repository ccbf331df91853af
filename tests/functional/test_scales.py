import torch
from hypothesis import given, settings

from lightning_rkd.functional.scales import (
    centre_columns,
    power_of_two,
)
from tests.harness.real_networks import Wild, wild


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(how=wild(dtypes=(torch.float32, torch.float64)))
def test_a_power_of_two_scales_to_between_1_and_2_without_rounding(how: Wild):
    x = how.of(4, 3)
    scale = power_of_two(x, 1)
    assert torch.equal(torch.frexp(scale).mantissa, torch.full_like(scale, 0.5))
    largest = (x / scale).abs().amax(1)
    assert ((largest == 0) | ((largest >= 1) & (largest < 2))).all()
    kept = (x / scale).abs() > 1e-30  # the rest may have fallen out of the range of float32
    assert torch.equal((x / scale * scale)[kept], x[kept])


def test_the_largest_number_and_the_smallest_have_a_power_of_two():
    x = torch.tensor([[torch.finfo(torch.float32).max], [1e-45], [0.0]])
    assert power_of_two(x, 1).flatten().tolist() == [2.0**127, 2.0**-116, 2.0**-116]


def test_constant_columns_are_exact_zeros_once_centred():
    x = torch.randn(7, 3)
    x[:, 1] = 0.1
    eighths = (x * 8).round() / 8
    far = eighths + 2.0**20
    far[:, 1] = 1e30
    assert (centre_columns(x)[:, 1] == 0).all()
    assert (centre_columns(far)[:, 1] == 0).all()
    torch.testing.assert_close(centre_columns(far)[:, 0], centre_columns(eighths)[:, 0], rtol=1e-9, atol=1e-9)
    assert centre_columns(x).mean(0).abs().max() < 1e-15
