import pytest
import torch
from hypothesis import given, settings

from lightning_rkd.functional.scales import (
    centre_columns,
    far_above_rounding,
    limit_magnitude,
    power_of_two,
    squares_in_range,
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


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_nothing_hides_numbers_that_are_none(bad: float):
    x = torch.tensor([[1.0, bad]])
    assert not torch.isfinite(x / power_of_two(x, 1)).all()
    assert not torch.isfinite(limit_magnitude(x, 1)).all()
    assert not squares_in_range(x.norm(dim=1), x)


def test_large_numbers_are_brought_down_and_others_left_alone():
    x = torch.tensor([[3.0, -1.0], [2.0**100, 2.0**90]])
    assert limit_magnitude(x, 1).tolist() == [[3.0, -1.0], [2.0**40, 2.0**30]]
    assert limit_magnitude(x[:1], 1) is not x
    assert torch.equal(limit_magnitude(x[:1], 1), x[:1])


@pytest.mark.parametrize(
    ("numbers", "answer"), [([0.0, 1.0], True), ([1e-20, 1.0], False), ([1e-30, 1.0], False), ([1e20], False)]
)
def test_squares_in_range_are_far_from_overflow_and_underflow(numbers, answer):
    x = torch.tensor(numbers)[:, None]
    assert squares_in_range(x.square().sum(1), x) is answer


def test_far_above_rounding_is_checked_on_the_cpu_only():
    assert far_above_rounding(torch.tensor([0.5, 0.1]))
    assert not far_above_rounding(torch.tensor([0.5, 1e-6]))
    assert not squares_in_range(torch.ones(2, device="meta"), torch.ones(2, 1, device="meta"))
    assert not far_above_rounding(torch.ones(2, device="meta"))


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
