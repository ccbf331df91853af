"""Student's interval, against SciPy and by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from lightning_rkd.utils.statistics import paired_difference, t_quantile


@pytest.mark.parametrize("degrees", [1, 2, 3, 4, 5, 9, 30, 101, 1000])
@pytest.mark.parametrize("p", [0.001, 0.3, 0.5, 0.9, 0.975, 0.9999])
def test_quantiles_are_those_of_scipy(p: float, degrees: int) -> None:
    assert t_quantile(p, degrees) == pytest.approx(float(stats.t.ppf(p, degrees)), rel=1e-9, abs=1e-9)


def test_the_interval_is_that_of_a_paired_t_test() -> None:
    a, b = np.random.default_rng(0).normal(size=(2, 7))
    found = paired_difference(dict(enumerate(a)), dict(enumerate(b)))
    assert found is not None
    expected = stats.ttest_rel(a, b).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), rel=1e-9)
    assert found.pairs == 7


def test_only_seeds_that_both_have_count() -> None:
    found = paired_difference({0: 1.0, 1: 2.0}, {1: 0.5, 2: 9.0})
    assert found is not None
    assert (found.mean, found.pairs) == (1.5, 1)
    assert math.isnan(found.half_width)
    assert paired_difference({0: 1.0}, {1: 2.0}) is None
