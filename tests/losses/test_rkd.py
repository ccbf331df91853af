import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_rkd.losses import RKD, RelationalLoss, RKDAngle, RKDDistance
from lightning_rkd.losses.rkd import rkd_angle, rkd_distance
from lightning_rkd.utils.distributed import Shard, gather_rows
from tests.harness.forks import measure_growth, needs_proc
from tests.harness.ranks import Ranks
from tests.oracles import rkd as oracle


def det(n: int, d: int, a: float, b: float) -> Tensor:
    i, j = torch.arange(n, dtype=torch.float64)[:, None], torch.arange(d, dtype=torch.float64)
    return torch.sin(a * i + b * j + 0.3 * i * j)


def gradient(loss: object, student: Tensor, teacher: Tensor) -> Tensor:
    x = student.clone().requires_grad_()
    (grad,) = torch.autograd.grad(loss(x, teacher), x)  # type: ignore[operator]
    return grad


BOTH = pytest.mark.parametrize(
    ("loss", "loops", "formula"),
    [
        (rkd_distance, oracle.rkd_distance, oracle.formula_distance),
        (rkd_angle, oracle.rkd_angle, oracle.formula_angle),
    ],
    ids=["distance", "angle"],
)


@pytest.mark.parametrize(
    ("loss", "value"),
    [
        (RKDDistance(), 0.041395796960532416),
        (RKDDistance("distinct"), 0.0496749563526389),
        (RKDAngle(), 0.05693017011440054),
        (RKDAngle("distinct"), 0.102474306205921),
        (RKD(), 0.041395796960532416 + 2 * 0.05693017011440054),
        (RKD(25, 50, "distinct"), 25 * 0.0496749563526389 + 50 * 0.102474306205921),
    ],
    ids=str,
)
def test_the_values_are_those_of_the_authors_code(loss, value):
    assert float(loss(det(6, 4, 0.7, 1.1), det(6, 8, 1.3, 0.5))) == pytest.approx(value, rel=1e-12)


@BOTH
@pytest.mark.parametrize("reduction", ["official", "distinct"])
@given(n=st.integers(1, 6), d=st.integers(1, 4), seed=st.integers(0, 10_000), duplicates=st.booleans())
@settings(deadline=None, max_examples=25)
def test_the_loss_is_that_of_the_loops(loss, loops, formula, reduction, n, d, seed, duplicates):
    rng = np.random.default_rng(seed)
    student, teacher = rng.normal(size=(n, d)), rng.normal(size=(n, 3))
    if duplicates:
        student[-1], teacher[-1] = student[0], teacher[n // 2]
    ours = loss(torch.from_numpy(student), torch.from_numpy(teacher), reduction=reduction)
    apart = [abs(x[:, None] - x).sum(2) for x in (student, teacher)]
    closest = min((float(a[a > 0].min()) for a in apart if (a > 0).any()), default=1.0)
    rounding = 1e-10 + 2.2e-16 / closest**2  # inner products of float64 leave this much of a short distance
    assert float(ours) == pytest.approx(loops(student, teacher, reduction), rel=rounding, abs=1e-13)


@BOTH
@pytest.mark.parametrize("n", [2, 3, 12])
@pytest.mark.parametrize("offset", [0.0, 1000.0])
@pytest.mark.parametrize(
    ("dtype", "scale"),
    [(torch.float16, 1.0), (torch.float16, 1e3), (torch.bfloat16, 1e3), (torch.float32, 1.0), (torch.float64, 1.0)],
    ids=str,
)
def test_every_dtype_scale_and_offset_gives_the_float64_loss(loss, loops, formula, dtype, scale, offset, n):
    student, teacher = (torch.randn(n, 24) * scale + offset for _ in range(2))
    student, teacher = student.to(dtype), teacher.to(dtype)
    value = loss(student, teacher)
    assert value.dtype == torch.promote_types(dtype, torch.float32)
    assert float(value) == pytest.approx(loops(student.double().numpy(), teacher.double().numpy()), rel=1e-4, abs=1e-12)
    grad = gradient(loss, student, teacher)
    expected = gradient(formula, student.double(), teacher.double())
    assert grad.dtype == dtype  # which limits it: at magnitude 1e3 float16 has few steps left below 1e-6
    precision, step = max(1e-4, 4 * torch.finfo(dtype).eps), torch.finfo(dtype).eps * torch.finfo(dtype).tiny
    assert (grad.double() - expected).norm() <= precision * expected.norm() + step * grad.numel() ** 0.5 + 1e-12


@BOTH
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_duplicate_rows_give_finite_gradients_of_ordinary_size(loss, loops, formula, dtype):
    student, teacher = torch.randn(8, 16).to(dtype), torch.randn(8, 16).to(dtype)
    ordinary = gradient(loss, student, teacher)
    student[5] = student[2]
    grad = gradient(loss, student, teacher)
    assert torch.isfinite(grad).all()
    assert grad.abs().max() < 10 * ordinary.abs().max()
    value = float(loss(student, teacher))
    assert value == pytest.approx(loops(student.double().numpy(), teacher.double().numpy()), rel=1e-4)


@BOTH
@pytest.mark.parametrize("reduction", ["official", "distinct"])
def test_a_collapsed_student_has_a_finite_loss_and_a_gradient_of_zero(loss, loops, formula, reduction):
    student, teacher = torch.ones(6, 4, requires_grad=True), torch.randn(6, 4)
    value = loss(student, teacher, reduction=reduction)
    value.backward()
    expected = loops(np.ones((6, 4)), teacher.double().numpy(), reduction)
    assert float(value.detach()) == pytest.approx(expected, rel=1e-5)
    assert torch.equal(student.grad, torch.zeros(6, 4))


@pytest.mark.parametrize(("loss", "n"), [(RKDDistance(), 1), (RKDAngle(), 1), (RKDAngle(), 2), (RKD(), 1)], ids=str)
@pytest.mark.parametrize("reduction", ["official", "distinct"])
def test_a_batch_without_a_pair_or_triplet_is_an_exact_zero_with_a_graph(loss, n, reduction):
    loss.reduction = reduction
    student = torch.randn(n, 3, requires_grad=True)
    value = loss(student, torch.randn(n, 5))
    value.backward()
    assert value == 0
    assert torch.equal(student.grad, torch.zeros(n, 3))


@BOTH
@given(scale=st.floats(1e-2, 1e2), shift=st.floats(-1e3, 1e3), seed=st.integers(0, 10_000))
@settings(deadline=None, max_examples=25)
def test_moving_scaling_turning_and_reordering_change_nothing(loss, loops, formula, scale, shift, seed):
    g = torch.Generator().manual_seed(seed)
    student, teacher = (torch.randn(7, 5, dtype=torch.float64, generator=g) for _ in range(2))
    turn, _ = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64, generator=g))
    order = torch.randperm(7, generator=g)
    moved = scale * student @ turn + shift
    expected = loss(student, teacher)
    torch.testing.assert_close(loss(moved, teacher), expected, rtol=1e-8, atol=0)
    torch.testing.assert_close(loss(teacher, moved), loss(teacher, student), rtol=1e-8, atol=0)
    torch.testing.assert_close(loss(student[order], teacher[order]), expected, rtol=1e-10, atol=0)
    grad = gradient(loss, student, teacher)
    torch.testing.assert_close(gradient(loss, student[order], teacher[order]), grad[order])
    torch.testing.assert_close(gradient(loss, moved, teacher), grad @ turn / scale, rtol=1e-6, atol=1e-9 / scale)


@BOTH
def test_a_student_that_copies_the_teacher_has_no_loss_and_no_gradient(loss, loops, formula):
    teacher = torch.randn(9, 4)
    assert float(loss(3 * teacher + 1, teacher)) < 1e-12
    assert gradient(loss, 3 * teacher + 1, teacher).abs().max() < 1e-6


@BOTH
@pytest.mark.parametrize("closeness", [1e-2, 1e-3, 1e-4, 1e-5])
def test_near_duplicates_keep_the_gradient_within_a_thousandth_of_float64(loss, loops, formula, closeness):
    student, teacher = torch.randn(24, 128) + 3, torch.randn(24, 64)
    student[1] = student[0] + closeness * torch.randn(128)
    grad, expected = gradient(loss, student, teacher), gradient(formula, student.double(), teacher.double())
    for rows in (slice(None), slice(0, 2)):
        assert (grad[rows] - expected[rows]).norm() < 1e-3 * expected[rows].norm()


def test_rkd_is_the_weighted_sum_of_its_parts_in_value_and_gradient():
    student, teacher = torch.randn(10, 4, dtype=torch.float64), torch.randn(10, 6, dtype=torch.float64)
    together, parts = RKD(25, 50), 25 * RKDDistance() + 50 * RKDAngle()
    torch.testing.assert_close(together(student, teacher), parts(student, teacher))
    torch.testing.assert_close(gradient(together, student, teacher), gradient(parts, student, teacher))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch.compile looks at it
def test_a_compiled_step_has_the_same_gradient():
    layer, x, teacher = torch.nn.Linear(5, 4), torch.randn(8, 5), torch.randn(8, 6)
    loss = RKD()

    def step(x: Tensor, teacher: Tensor) -> Tensor:
        return loss(layer(x), teacher)

    (expected,) = torch.autograd.grad(step(x, teacher), layer.weight)
    (grad,) = torch.autograd.grad(torch.compile(step, backend="eager")(x, teacher), layer.weight)
    torch.testing.assert_close(grad, expected, rtol=0, atol=2.4e-7)


def _train(rank: int, loss: RelationalLoss, rows: Tensor, teacher: Tensor, counts: list[int], split: bool) -> Tensor:
    """Gradient of a shared layer on one rank, with the rows of all ranks gathered for the loss."""
    mine = slice(sum(counts[:rank]), sum(counts[: rank + 1]))
    weight = torch.eye(rows.shape[1], requires_grad=True)
    shard = {"shard": Shard()} if split and "shard" in loss.needs else {}
    loss(gather_rows(rows[mine] @ weight), gather_rows(teacher[mine]), **shard).backward()
    assert weight.grad is not None
    return weight.grad


@pytest.mark.parametrize("split", [False, True], ids=["whole", "shard split"])
@pytest.mark.parametrize("counts", [[8, 8], [11, 5], [15, 1]], ids=str)
@pytest.mark.parametrize("loss", [RKDDistance(), RKDAngle(), RKD()], ids=str)
def test_two_ranks_average_to_the_gradient_of_one_batch_of_sixteen(ranks: Ranks, loss, counts, split):
    rows, teacher = torch.randn(16, 8), torch.randn(16, 12)
    expected = gradient(lambda w, t: loss(rows @ w, t), torch.eye(8), teacher)
    averaged = torch.stack(list(ranks.run(_train, loss, rows, teacher, counts, split))).mean(0)
    assert (averaged - expected).abs().max() <= 1e-6 * expected.abs().max()


_STEP = """
from lightning_rkd.utils.distributed import Shard
from lightning_rkd.losses import RKDAngle

class First(Shard):  # every matrix and buffer of the whole, a sixteenth of its time
    def range(self, n):
        return 0, -(-n // 16)

def step(n):
    student = torch.randn(n, 128, requires_grad=True)
    RKDAngle()(student, torch.randn(n, 512), shard=First()).backward()
"""


@pytest.mark.slow
@needs_proc
def test_two_thousand_rows_add_less_than_a_gibibyte():
    # some for the N x N matrices, where one N x N x N would take 32 GiB
    assert 100 < measure_growth(_STEP, 64, 2048) < 1024


def test_an_unknown_reduction_of_a_function_is_refused():
    with pytest.raises(ValueError, match="'official' or 'distinct', got 'sum'"):
        rkd_distance(torch.ones(2, 2), torch.ones(2, 2), reduction="sum")  # type: ignore[arg-type]


def test_the_citation_is_that_of_the_paper() -> None:
    paper = "Park, Kim, Lu and Cho 2019, Relational Knowledge Distillation, arXiv:1904.05068"
    assert RKD.reference.citation == paper
