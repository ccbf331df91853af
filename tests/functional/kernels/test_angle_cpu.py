"""The angle kernel for the CPU: the same as the tiles and as the formula, at every size."""

import multiprocessing

import pytest
import torch
from torch import Tensor

from lightning_rkd.functional import angle_tiles
from lightning_rkd.functional._kernels import native, threads
from lightning_rkd.functional.distances import squared_distances
from tests.harness.platforms import linux_only
from tests.oracles import rkd as oracle

kernel = native("angle_cpu")
assert kernel is not None

SIZES = [1, 2, 3, 5, 31, 64, 100, 257, pytest.param(1000, marks=pytest.mark.slow)]
WAYS = {"kernel": kernel.loss_and_gradient, "tiles": angle_tiles.loss_and_gradient}


def embeddings(n: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n)
    return (torch.randn(n, d, generator=generator, dtype=torch.float64) for d in (16, 32))  # type: ignore[return-value]


def by(way: str, student: Tensor, teacher: Tensor, dtype: torch.dtype, reduction: str = "official", **settings: bool):
    """The loss, and its gradient to the student's rows."""
    n, official = len(student), reduction == "official"
    factor = 1 / (n**3 if official else max(1, n * (n - 1) * (n - 2)))
    s, t = squared_distances(student), squared_distances(teacher)
    settings = {"with_gradient": True} | settings
    total, pull = WAYS[way](s, t, (0, n), dtype, official=official, factor=factor, **settings)
    if pull is None:
        return total, None
    pull = pull + pull.T
    return total, 2 * (pull.sum(1, keepdim=True) * student - pull @ student)


@pytest.mark.parametrize("reduction", ["official", "distinct"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 3e-6), (torch.float64, 1e-11)])
@pytest.mark.parametrize("n", SIZES)
def test_kernel_tiles_and_formula_agree(n, dtype, tolerance, reduction):
    student, teacher = embeddings(n)
    value, grad = by("kernel", student, teacher, dtype, reduction)
    tiled, tiled_grad = by("tiles", student, teacher, dtype, reduction)
    assert abs(value - tiled) <= tolerance * tiled
    assert (grad - tiled_grad).norm() <= tolerance * tiled_grad.norm()
    if 3 <= n < 1000:
        x = student.clone().requires_grad_()
        expected = oracle.formula_angle(x, teacher)
        if reduction == "distinct":
            expected = expected * n**2 / ((n - 1) * (n - 2))
        (expected_grad,) = torch.autograd.grad(expected, x)
        assert abs(value - expected) <= tolerance * expected
        assert (grad - expected_grad).norm() <= tolerance * expected_grad.norm()


@pytest.mark.parametrize("n", [5, 40, 230])  # half the triplets, all of them, half again
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_duplicates_and_near_rows_are_worked_on_in_full_precision(n, dtype):
    student, teacher = embeddings(n)
    student[1] = student[0]  # in one network only
    teacher[2] = teacher[3] + 1e-4 * teacher[2]
    student[4] = student[3] + 1e-5 * student[4]
    value, grad = by("kernel", student, teacher, dtype)
    expected, expected_grad = by("tiles", student, teacher, torch.float64)
    assert abs(value - expected) < 1e-6 * expected
    for rows in (slice(0, 2), slice(2, 5), slice(5, None)):
        assert (grad[rows] - expected_grad[rows]).norm() <= 1e-6 * expected_grad[rows].norm()
    assert abs(by("kernel", student, teacher, dtype, with_gradient=False)[0] - expected) < 1e-6 * expected


@pytest.mark.parametrize("n", [5, 40, 230])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_number_of_threads_does_not_matter(monkeypatch, n, count):
    student, teacher = embeddings(n)
    monkeypatch.setattr(kernel, "_TRIPLETS", 1)
    values = []
    for parts in (1, count):
        monkeypatch.setattr(threads.torch, "get_num_threads", lambda parts=parts: parts)
        values.append(by("kernel", student, teacher, torch.float64))
    assert abs(values[0][0] - values[1][0]) <= 1e-14 * values[0][0]
    assert (values[0][1] - values[1][1]).norm() <= 1e-13 * values[0][1].norm()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("n", [5, 40, 230])
def test_what_is_not_finite_does_not_pass_for_a_value(n, which, bad):
    squared = [squared_distances(x) for x in embeddings(n)]
    squared[which][1, 3] = squared[which][3, 1] = bad
    settings = {"official": True, "factor": 1.0}
    for with_gradient in (True, False):
        total, _ = kernel.loss_and_gradient(*squared, (0, n), torch.float32, with_gradient=with_gradient, **settings)
        assert not torch.isfinite(total)


def _in_a_child(queue) -> None:  # type: ignore[no-untyped-def]
    torch.set_num_threads(1)  # as in a data loader's worker: PyTorch's own threads do not survive the fork
    value, grad = by("kernel", *embeddings(150), torch.float32)
    queue.put((float(value), float(grad.norm())))


@linux_only
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_process_gets_the_same(monkeypatch):
    monkeypatch.setattr(kernel, "_TRIPLETS", 1)
    monkeypatch.setattr(threads.torch, "get_num_threads", lambda: 2)
    value, grad = by("kernel", *embeddings(150), torch.float32)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_in_a_child, args=(queue,))
    child.start()
    assert queue.get(timeout=60) == (float(value), float(grad.norm()))
    child.join(30)
    assert child.exitcode == 0
