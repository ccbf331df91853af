from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_rkd.metrics import RelationalAgreement
from lightning_rkd.metrics.agreement import angles, draw_triplets
from tests.oracles.agreement import angle, angle_gap, distance_correlation, neighbour_overlap


def pair(n: int) -> tuple[Tensor, Tensor]:
    teacher = torch.randn(n, 7)
    return teacher[:, :3] + 0.5 * torch.randn(n, 3), teacher


def evaluate(*columns: Any, **options: Any) -> dict[str, float]:
    metric = RelationalAgreement(**options)
    metric.update(*columns)
    return {name: float(value) for name, value in metric.compute().items()}


# against others


@pytest.mark.parametrize("cosine", [False, True])
def test_equals_plain_loops_and_scipy(cosine: bool) -> None:
    student, teacher = pair(40)
    result = evaluate(student, teacher, k=5, triplets=300, distance="cosine" if cosine else "euclidean")
    s, t = (torch.nn.functional.normalize(x.double()) if cosine else x for x in (student, teacher))
    s, t = s.tolist(), t.tolist()
    triplets = draw_triplets(40, 300, torch.Generator().manual_seed(0)).T.tolist()
    assert result["neighbour_overlap_at_5"] == pytest.approx(neighbour_overlap(s, t, 5), abs=1e-6)
    assert result["distance_correlation"] == pytest.approx(distance_correlation(s, t), abs=1e-6)
    assert result["angle_gap"] == pytest.approx(angle_gap(s, t, triplets), rel=1e-5)


@settings(max_examples=30, deadline=None)
@given(rows=st.lists(st.tuples(*[st.integers(-1, 1)] * 4), min_size=4, max_size=12))
def test_equals_plain_loops_where_distances_tie_and_rows_repeat(rows: list[tuple[int, ...]]) -> None:
    s, t = [list(map(float, r[:1])) for r in rows], [list(map(float, r[1:])) for r in rows]
    result = evaluate(torch.tensor(s), torch.tensor(t), k=2, triplets=20)
    triplets = draw_triplets(len(rows), 20, torch.Generator().manual_seed(0)).T.tolist()
    assert result["neighbour_overlap_at_2"] == pytest.approx(neighbour_overlap(s, t, 2), abs=1e-6)
    assert result["distance_correlation"] == pytest.approx(distance_correlation(s, t), abs=1e-6)
    assert result["angle_gap"] == pytest.approx(angle_gap(s, t, triplets), abs=1e-5)


def test_angles_are_accurate_near_0_and_180_degrees() -> None:
    i, j, k = torch.tensor([[1.0, 0.0]]).double(), torch.zeros(1, 2).double(), torch.tensor([[1.0, 1e-9]]).double()
    assert float(angles(i, j, k)) == pytest.approx(torch.rad2deg(torch.tensor(1e-9, dtype=torch.float64)))
    assert float(angles(i, j, -i)) == pytest.approx(180.0)
    assert float(angles(i, i, i)) == float(angles(i, i, k)) == 90.0 == angle(i.tolist() * 2, 0, 1, 0)


def test_triplets_are_distinct_and_cover_all_orders_evenly() -> None:
    drawn = draw_triplets(4, 24_000, torch.Generator().manual_seed(3))
    _, counts = torch.unique(drawn, dim=1, return_counts=True)
    assert len(counts) == 24
    assert int(counts.min()) > 850


# properties


def test_a_moved_turned_and_scaled_teacher_agrees_fully() -> None:
    teacher = torch.randn(60, 6, dtype=torch.float64)
    turn = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64)).Q
    result = evaluate(3 * teacher @ turn + 5, teacher)
    assert result == pytest.approx(
        {"neighbour_overlap_at_10": 1.0, "distance_correlation": 1.0, "angle_gap": 0.0}, abs=1e-6
    )


def test_a_collapsed_student_correlates_by_zero_and_nothing_is_nan() -> None:
    result = evaluate(torch.ones(50, 3), torch.randn(50, 4))
    assert result["distance_correlation"] == 0.0
    assert all(value == value for value in result.values())


def test_a_subset_of_anchors_comes_close_to_all() -> None:
    columns = pair(600)
    some, every = evaluate(*columns, max_anchors=200), evaluate(*columns, max_anchors=None)
    assert some["distance_correlation"] == pytest.approx(every["distance_correlation"], abs=0.03)
    assert some["angle_gap"] == every["angle_gap"]
    assert every == evaluate(*columns, max_anchors=600)


def test_order_grouping_and_repetition_of_samples_do_not_matter() -> None:
    student, teacher = pair(50)
    expected = evaluate(student, teacher, torch.arange(50), max_anchors=20, triplets=100)
    order = torch.cat([torch.randperm(50), torch.tensor([3, 3, 49])])
    metric = RelationalAgreement(max_anchors=20, triplets=100)
    for part in order.split(17):
        metric.update(student[part], teacher[part], part)
    assert {name: float(value) for name, value in metric.compute().items()} == expected


def test_small_working_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    columns = pair(80)
    expected = evaluate(*columns)
    monkeypatch.setattr("lightning_rkd.metrics.agreement._ENTRIES", 200)
    assert evaluate(*columns) == expected


# as a torchmetrics.Metric, and mistakes


def test_mistakes_are_named() -> None:
    metric = RelationalAgreement()
    with pytest.raises(ValueError, match="student has 4 rows, but teacher has 5"):
        metric.update(torch.zeros(4, 2), torch.zeros(5, 2))
    with pytest.raises(ValueError, match="teacher embeddings: row 1 of this update holds NaN"):
        metric.update(torch.zeros(2, 1), torch.tensor([[0.0], [torch.nan]]))
    metric.update(torch.zeros(4, 2), torch.zeros(4, 3))
    with pytest.raises(ValueError, match="4 different samples are too few: k = 10 needs at least 11"):
        metric.compute()
    with pytest.raises(ValueError, match="indices must come with every update or with none"):
        metric.update(torch.zeros(4, 2), torch.zeros(4, 3), torch.arange(4))
    with pytest.warns(UserWarning, match="before the ``update`` method"), pytest.raises(ValueError, match="no rows"):
        RelationalAgreement().compute()


@pytest.mark.parametrize("options", [{"k": 0}, {"triplets": 0}, {"max_anchors": 0}, {"distance": "manhattan"}])
def test_a_bad_option_is_named(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        RelationalAgreement(**options)
