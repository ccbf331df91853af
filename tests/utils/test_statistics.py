"""Student's interval against a paired t-test."""

import math

import numpy as np
import pytest
from scipy import stats

from lightning_rkd.utils.statistics import confidence_half_width, paired_difference


@pytest.mark.parametrize("number", [2, 3, 10, 100])
@pytest.mark.parametrize("confidence", [0.5, 0.95, 0.999])
def test_the_interval_is_that_of_a_paired_t_test(number: int, confidence: float) -> None:
    a, b = np.random.default_rng(0).normal(size=(2, number))
    found = paired_difference(dict(enumerate(a)), dict(enumerate(b)), confidence)
    expected = stats.ttest_rel(a, b).confidence_interval(confidence)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), rel=1e-9)
    assert found.high - found.mean == pytest.approx(confidence_half_width((a - b).tolist(), confidence))


def test_only_seeds_of_both_networks_count() -> None:
    found = paired_difference({0: 1.0, 1: 2.0}, {1: 0.5, 2: 9.0})
    assert found.mean == 1.5
    assert math.isnan(found.low)
    assert paired_difference({0: 1.0}, {1: 2.0}) is None
