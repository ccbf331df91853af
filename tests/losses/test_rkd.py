import pytest
import torch
from torch import Tensor

from lightning_rkd.losses import RKD, RelationalLoss, RKDAngle, RKDDistance
from lightning_rkd.losses.rkd import rkd_angle, rkd_distance
from lightning_rkd.utils.distributed import Shard, gather_rows
from tests.harness.forks import measure_growth, needs_proc
from tests.harness.ranks import Ranks
from tests.oracles import rkd as oracle
from tests.oracles.differences import det


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
@pytest.mark.parametrize("closeness", [1e-2, 1e-3, 1e-4, 1e-5])
def test_near_duplicates_keep_the_gradient_within_a_thousandth_of_float64(loss, loops, formula, closeness):
    student, teacher = torch.randn(24, 128) + 3, torch.randn(24, 64)
    student[1] = student[0] + closeness * torch.randn(128)
    grad, expected = gradient(loss, student, teacher), gradient(formula, student.double(), teacher.double())
    for rows in (slice(None), slice(0, 2)):
        assert (grad[rows] - expected[rows]).norm() < 1e-3 * expected[rows].norm()


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
