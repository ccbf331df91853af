"""Bad input at volume: both metrics give what exact arithmetic gives at any magnitude, or say what is wrong."""

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_rkd.metrics import EmbeddingRetrieval, RelationalAgreement
from tests.harness.real_networks import DTYPES, MISFITS, Wild, wild
from tests.oracles.retrieval import retrieval

volume = settings(max_examples=100, deadline=None, derandomize=True, database=None)


def evaluated(metric: Any, *columns: Any) -> dict[str, float]:
    metric.update(*columns)
    return {name: float(value) for name, value in metric.compute().items()}


sizes = st.sampled_from((3, 4, 6, 12))


@volume
@given(how=wild(), n=sizes, width=st.integers(1, 4), memory=st.sampled_from((1, 2_000, 2**19)))
def test_retrieval_of_any_numbers_is_that_of_exact_arithmetic(how, n, width, memory):
    x, labels = how.of(n, width), torch.arange(n) % 2
    rows = [[Fraction(v) for v in row] for row in x.double().tolist()]
    expected = retrieval(rows, labels.tolist(), k=(1, 2))
    metric = EmbeddingRetrieval(k=(1, 2), working_memory=memory)
    assert evaluated(metric, x, labels) == pytest.approx(expected, abs=1e-6)


@volume
@given(how=wild(), n=sizes, width=st.integers(1, 4))
def test_retrieval_by_directions_knows_no_lengths_at_any_magnitude(how, n, width):
    x, labels = how.of(n, width), torch.arange(n) % 2
    x = torch.where(x.double().abs() < 1e-30, 0, x.double())  # no power of two below pushes anything out of range
    powers = 2.0 ** torch.linspace(-60, 60, n).round()[:, None]
    values = [evaluated(EmbeddingRetrieval(distance="cosine"), rows, labels) for rows in (x, x * powers)]
    assert values[0] == values[1]
    assert all(0 <= value <= 1 for value in values[0].values())


@volume
@given(student=wild(), teacher=wild(), n=sizes, widths=st.tuples(st.integers(1, 3), st.integers(1, 3)))
def test_agreement_of_any_numbers_is_in_bounds_and_knows_no_scale(student, teacher, n, widths):
    both = [how.of(n, width) for how, width in zip((student, teacher), widths, strict=True)]
    values = evaluated(RelationalAgreement(k=1, triplets=20), *both)
    assert 0 <= values["neighbour_overlap_at_1"] <= 1
    assert -1.001 <= values["distance_correlation"] <= 1.001
    assert 0 <= values["angle_gap"] <= 180
    ordinary = [x.double() / 2.0 ** math.frexp(float(x.double().abs().max()))[1] for x in both]
    assert evaluated(RelationalAgreement(k=1, triplets=20), *ordinary) == pytest.approx(values, abs=1e-6)


@pytest.mark.parametrize("metric", [EmbeddingRetrieval, RelationalAgreement])
@pytest.mark.parametrize("scale", [1e-200, 1e200])
def test_float64_numbers_without_a_square_are_refused_with_their_magnitude(metric, scale):
    x, metric = torch.randn(6, 3, dtype=torch.float64).clamp(-0.9, 0.9) * scale, metric()
    second = torch.arange(6) if isinstance(metric, EmbeddingRetrieval) else x
    with pytest.raises(
        ValueError, match=r"embeddings: the largest magnitude of this update is .*e[+-]\d+.* multiply all"
    ):
        metric.update(x, second)
    metric.update(torch.zeros_like(x), second if second is not x else torch.ones_like(x))


WRONG: dict[str, Callable[[Tensor], Any]] = {
    **MISFITS,
    "three dimensions": lambda x: x[..., None],
    "NaN": lambda x: x.where(x < x.max(), torch.nan),
    "infinity": lambda x: x.where(x < x.max(), -torch.inf),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_rows_that_cannot_be_are_refused_by_name_and_leave_nothing_behind(wrong):
    x = torch.randn(6, 3)
    retrieval, agreement = EmbeddingRetrieval(), RelationalAgreement(k=1)
    with pytest.raises(ValueError, match=r"^embeddings"):
        retrieval.update(WRONG[wrong](x), torch.arange(6))
    for which, name in enumerate(("student", "teacher")):
        with pytest.raises(ValueError, match=rf"^{name} embeddings"):
            agreement.update(*(WRONG[wrong](x) if which == i else x for i in (0, 1)))
    assert not retrieval.embeddings
    assert not retrieval.labels
    assert not agreement.student
    assert not agreement.teacher


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32])
@pytest.mark.parametrize("shift", [0, -100])
def test_labels_of_any_integer_type_and_sign_are_only_names(dtype, shift):
    x, labels = torch.randn(8, 3), torch.arange(8) % 3
    named = (labels + shift).to(dtype) if shift >= 0 or dtype.is_signed else labels.to(dtype)
    assert evaluated(EmbeddingRetrieval(), x, named) == evaluated(EmbeddingRetrieval(), x, labels)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["strided", "transposed", "reversed strides"])
def test_views_are_scored_like_copies(dtype, layout):
    view, copy = (Wild(dtype=dtype, layout=how).of(8, 3) for how in (layout, "contiguous"))
    labels = torch.arange(8) % 3
    assert evaluated(EmbeddingRetrieval(), view, labels) == evaluated(EmbeddingRetrieval(), copy, labels)
    assert evaluated(RelationalAgreement(k=1), view, copy)["angle_gap"] == 0
