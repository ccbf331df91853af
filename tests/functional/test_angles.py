import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_rkd.functional import angle_tiles, angles, distances
from lightning_rkd.functional._kernels import native
from lightning_rkd.functional.angles import angle_loss
from lightning_rkd.functional.distances import squared_distances
from lightning_rkd.losses.rkd import rkd_angle as ours
from lightning_rkd.utils.distributed import Shard
from tests.harness.ranks import Ranks
from tests.oracles import rkd as oracle


def use(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (angles, distances):
        monkeypatch.setattr(module, "native", native if way == "kernel" else lambda name: None)


@pytest.fixture(params=["kernel", "tiles"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways on the CPU, in turn."""
    if request.param == "kernel":
        pytest.importorskip("numba")
        assert native("angle_cpu")
        assert native("distance_cpu")
    use(request.param, monkeypatch)
    return request.param


both_ways = pytest.mark.usefixtures("way")


def loss_and_gradient(loss: object, student: Tensor, teacher: Tensor, **settings: object) -> tuple[Tensor, Tensor]:
    x = student.clone().requires_grad_()
    value = loss(x, teacher, **settings)  # type: ignore[operator]
    (grad,) = torch.autograd.grad(value, x)
    return value.detach(), grad


@pytest.mark.parametrize("edge", [2, 3, 5, 128])
@pytest.mark.parametrize("tile", [1, 60, 2**19])
@pytest.mark.parametrize("n", [3, 4, 7, 10])
def test_every_tiling_gives_the_loss_and_the_gradient_of_the_formula(monkeypatch, n, tile, edge):
    use("tiles", monkeypatch)
    monkeypatch.setattr(angle_tiles, "_EDGE", edge)
    monkeypatch.setattr(angle_tiles, "_TILE", tile)
    student, teacher = torch.randn(n, 4, dtype=torch.float64), torch.randn(n, 9, dtype=torch.float64)
    value, grad = loss_and_gradient(ours, student, teacher)
    expected, expected_grad = loss_and_gradient(oracle.formula_angle, student, teacher)
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-9, atol=1e-13)


@both_ways
@pytest.mark.parametrize("reduction", ["official", "distinct"])
def test_the_gradient_passes_gradcheck(reduction):
    student, teacher = torch.randn(5, 3, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)
    student[4] = -3 * student[3]  # differences beyond 1 too, where the loss is linear
    assert torch.autograd.gradcheck(lambda x: ours(x, teacher, reduction=reduction), student.requires_grad_())


@both_ways
@pytest.mark.parametrize("reduction", ["official", "distinct"])
def test_duplicates_in_one_network_or_both_count_as_in_the_loops(reduction):
    student, teacher = np.random.default_rng(0).normal(size=(2, 6, 4))
    student[1] = student[0]
    teacher[1] = teacher[0]
    student[2] = student[3]
    teacher[4] = teacher[5]
    value = ours(torch.from_numpy(student), torch.from_numpy(teacher), reduction=reduction)
    assert float(value) == pytest.approx(oracle.rkd_angle(student, teacher, reduction), rel=1e-12)


@both_ways
@pytest.mark.parametrize("reduction", ["official", "distinct"])
@pytest.mark.parametrize("n", [1, 2])
def test_a_batch_without_a_triplet_is_an_exact_zero_with_a_graph(n, reduction):
    x = torch.randn(n, 3, requires_grad=True)
    value = ours(x, torch.randn(n, 5), reduction=reduction)
    value.backward()
    assert value == 0
    assert torch.equal(x.grad, torch.zeros(n, 3))


@both_ways
@pytest.mark.parametrize("both", [False, True], ids=["student", "student and teacher"])
@pytest.mark.parametrize("closeness", [1e-2, 1e-3, 1e-4, 1e-5])
@pytest.mark.parametrize("n", [8, 64, 130])
def test_near_duplicates_keep_the_gradient_within_a_thousandth(n, closeness, both):
    student, teacher = torch.randn(n, 32), torch.randn(n, 64)
    near, others = [0, 1, n - 2, n - 1], slice(2, n - 2)  # in the first tile and in the last
    for x in (student, teacher) if both else (student,):
        x[[1, n - 1]] = x[[0, n - 2]] + closeness * torch.randn(2, x.shape[1])
    _, grad = loss_and_gradient(ours, student, teacher)
    _, expected = loss_and_gradient(oracle.formula_angle, student.double(), teacher.double())
    for rows in (slice(None), near[:2], near[2:], others):
        assert (grad[rows] - expected[rows]).norm() < 1e-3 * expected[rows].norm()


@both_ways
def test_an_outlier_does_not_spoil_the_gradient_of_the_others():
    student, teacher = torch.randn(20, 8), torch.randn(20, 8)
    student[7] *= 1e4
    _, grad = loss_and_gradient(ours, student, teacher)
    _, expected = loss_and_gradient(oracle.formula_angle, student.double(), teacher.double())
    others = torch.arange(20) != 7
    assert (grad[others] - expected[others]).norm() < 1e-4 * expected[others].norm()


@both_ways
def test_the_teacher_gets_no_gradient_and_without_need_none_is_computed():
    teacher = torch.randn(6, 4, requires_grad=True)
    student = torch.randn(6, 4)
    assert not ours(student, teacher.detach()).requires_grad
    ours(student.requires_grad_(), teacher).backward()
    assert teacher.grad is None
    with torch.inference_mode():
        assert torch.isfinite(ours(student, teacher))


def test_matrices_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match=r"\(N, N\) .*\(3, 3\) and \(4, 4\)"):
        angle_loss(torch.zeros(3, 3), torch.zeros(4, 4))
    with pytest.raises(ValueError, match="'official' or 'distinct', got 'mean'"):
        angle_loss(torch.zeros(3, 3), torch.zeros(3, 3), reduction="mean")  # type: ignore[arg-type]


def _split(rank: int, student: Tensor, teacher: Tensor, reduction: str) -> tuple[Tensor, Tensor]:
    return loss_and_gradient(ours, student, teacher, shard=Shard(), reduction=reduction)


@both_ways
@pytest.mark.parametrize("reduction", ["official", "distinct"])
@pytest.mark.parametrize("n", [1, 2, 3, 11])
def test_anchors_split_over_two_ranks_give_the_whole(ranks: Ranks, n: int, reduction: str):
    student, teacher = torch.randn(n, 4, dtype=torch.float64), torch.randn(n, 5, dtype=torch.float64)
    if n > 3:
        student[2] = student[3]
    expected, expected_grad = loss_and_gradient(ours, student, teacher, reduction=reduction)
    for value, grad in ranks.run(_split, student, teacher, reduction):
        torch.testing.assert_close(value, expected, rtol=1e-13, atol=0)
        torch.testing.assert_close(grad, expected_grad, rtol=1e-12, atol=1e-15)


@both_ways
def test_a_second_derivative_is_refused():
    squared = squared_distances(torch.randn(4, 3)).requires_grad_()
    loss = angle_loss(squared, 1 - torch.eye(4))
    with pytest.raises(RuntimeError, match="angle_loss has a first derivative only"):
        torch.autograd.grad(loss, squared, create_graph=True)


# Samples of vertices


@both_ways
@pytest.mark.parametrize("reduction", ["official", "distinct"])
def test_a_sample_of_vertices_estimates_loss_and_gradient_without_bias(reduction):
    n, m, draws = 9, 4, 1500
    student, teacher = torch.randn(n, 4, dtype=torch.float64), torch.randn(n, 5, dtype=torch.float64)
    exact, exact_grad = loss_and_gradient(ours, student, teacher, reduction=reduction)
    estimates = [
        loss_and_gradient(ours, student, teacher, reduction=reduction, sampled_anchors=m) for _ in range(draws)
    ]
    values = torch.stack([value for value, _ in estimates])
    grads = torch.stack([grad for _, grad in estimates])
    parts = torch.stack([at_vertex(student, teacher, j, reduction) for j in range(n)])
    torch.testing.assert_close(parts.mean(), exact, rtol=1e-12, atol=0)
    variance = parts.var() / m * (1 - m / n)
    assert abs(values.mean() - exact) < 4 * (variance / draws).sqrt()
    assert values.var() == pytest.approx(float(variance), rel=0.2)
    assert ((grads.mean(0) - exact_grad).abs() < 5 * grads.std(0) / draws**0.5).all()


def at_vertex(student: Tensor, teacher: Tensor, j: int, reduction: str) -> Tensor:
    """Mean Huber term of the triplets at a vertex."""

    def cosines(x: Tensor) -> Tensor:
        unit = torch.nn.functional.normalize(x - x[j], dim=1)
        return unit @ unit.T

    terms = torch.nn.functional.huber_loss(cosines(student), cosines(teacher), reduction="none")
    n = len(student)
    return terms.sum() / (n**2 if reduction == "official" else (n - 1) * (n - 2))


@both_ways
def test_a_sample_of_all_or_more_vertices_is_exact_and_one_of_none_refused():
    student, teacher = torch.randn(6, 4), torch.randn(6, 4)
    assert torch.equal(ours(student, teacher, sampled_anchors=6), ours(student, teacher))
    assert torch.equal(ours(student, teacher, sampled_anchors=99), ours(student, teacher))
    with pytest.raises(ValueError, match="a sample has at least one vertex, got 0"):
        ours(student, teacher, sampled_anchors=0)


def _mean_of_samples(rank: int, student: Tensor, teacher: Tensor) -> Tensor:
    torch.manual_seed(rank)
    return torch.stack([ours(student, teacher, shard=Shard(), sampled_anchors=4) for _ in range(300)])


def test_ranks_that_draw_from_their_own_shards_agree_without_bias(ranks: Ranks):
    student, teacher = torch.randn(9, 4, dtype=torch.float64), torch.randn(9, 5, dtype=torch.float64)
    first, second = ranks.run(_mean_of_samples, student, teacher)
    assert torch.equal(first, second)
    assert abs(first.mean() - ours(student, teacher)) < 4 * first.std() / 300**0.5


@both_ways
@pytest.mark.parametrize("reduction", ["official", "distinct"])
def test_squared_distances_alone_give_the_loss_and_the_gradient(reduction):
    student, teacher = torch.randn(9, 4), torch.randn(9, 5)

    def apart(student: Tensor, teacher: Tensor) -> Tensor:
        return angle_loss(squared_distances(student), squared_distances(teacher), reduction=reduction)

    value, grad = loss_and_gradient(apart, student, teacher)
    expected, expected_grad = loss_and_gradient(ours, student, teacher, reduction=reduction)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(grad, expected_grad)
