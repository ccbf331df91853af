"""Gathering, sums and travelling blocks over two real processes, and the engine on top of them."""

import socket
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_rkd.distillation.distiller import Distiller
from lightning_rkd.distillation.teachers import Teacher
from lightning_rkd.losses.base import RelationalLoss
from lightning_rkd.losses.rkd import RKD
from lightning_rkd.utils.distributed import (
    Shard,
    broadcast_blocks,
    data_parallel_group,
    fetch_rows,
    gather_row_counts,
    gather_rows,
    rank_and_size,
    sum_over_ranks,
)
from lightning_rkd.utils.types import Batch, Mix
from tests.harness import nets
from tests.harness.ranks import Ranks

ROWS = nets.Rows(16)
SPLITS = {"even": (8, 8), "uneven": (11, 5), "one alone": (15, 1)}


def part(x: Tensor, rank: int, counts: tuple[int, ...]) -> Tensor:
    return x.split(list(counts))[rank]


# The primitives


def gathered(rank: int, counts: tuple[int, ...]) -> tuple[list[int], Tensor, Tensor, list[str]]:
    """A loss of all rows, computed on every rank, plus one of the own rows against all; gradient of the own rows."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        x = part(ROWS.x.double(), rank, counts).clone().requires_grad_()
        every = gather_rows(x)
        own = torch.cdist(x, every.cos()).sum()
        (torch.cdist(every.sin(), every.cos()).square().mean() + own).backward()
    return gather_row_counts(len(x)), every.detach(), x.grad, [str(w.message) for w in caught]


@pytest.mark.parametrize("counts", [*SPLITS.values(), (16, 0)])
def test_a_gather_sums_gradients_over_ranks(ranks: Ranks, counts: tuple[int, ...]) -> None:
    results = ranks.run(gathered, counts)
    x = ROWS.x.double().requires_grad_()
    # every rank adds the loss of all rows once, and that of its own rows once
    (2 * torch.cdist(x.sin(), x.cos()).square().mean() + torch.cdist(x, x.cos()).sum()).backward()
    for sizes, every, _, caught in results:
        assert sizes == list(counts)
        assert torch.equal(every, ROWS.x.double())
        assert caught == []
    torch.testing.assert_close(torch.cat([grad for _, _, grad, _ in results]), x.grad)


def others(rank: int) -> Any:
    labels = gather_rows(torch.tensor([rank, 7 * rank])[: rank + 1])
    share = Shard().range(5)
    total = Shard().sum(torch.tensor([1.0 + rank]))
    blocks = [
        (start, a.tolist(), b.shape)
        for start, (a, b) in broadcast_blocks((torch.arange(3 * rank) + 10, torch.zeros(3 * rank, 2)), 2)
    ]
    return labels.tolist(), share, float(total), blocks, rank_and_size(), float(sum_over_ranks(torch.tensor(2.0)))


def test_whole_numbers_sums_shares_and_blocks(ranks: Ranks) -> None:
    blocks = [(0, [10, 11], (2, 2)), (2, [12], (1, 2))]
    assert list(ranks.run(others)) == [
        ([0, 1, 7], (0, 2), 3.0, blocks, (0, 2), 4.0),
        ([0, 1, 7], (2, 5), 3.0, blocks, (1, 2), 4.0),
    ]


def wanted(rank: int, counts: tuple[int, ...], numbers: list[int]) -> Any:
    mine = part(torch.arange(16), rank, counts)
    found, double = fetch_rows((mine, 2.0 * mine[:, None]), torch.tensor(numbers[rank:], dtype=torch.int64), block=3)
    return found.tolist(), double.flatten().tolist()


@pytest.mark.parametrize("counts", [*SPLITS.values(), (0, 16)])
def test_rows_of_any_rank_are_found_by_number(ranks: Ranks, counts: tuple[int, ...]) -> None:
    numbers = [15, 0, 7, 7, 12]
    for rank, (found, double) in enumerate(ranks.run(wanted, counts, numbers)):
        assert found == numbers[rank:]
        assert double == [2.0 * number for number in numbers[rank:]]
    assert all(found == [] for found, _ in ranks.run(wanted, counts, []))


def teaching(rank: int, weights: tuple[str, str]) -> None:
    Teacher(nets.teacher(seed=rank), weights=weights[rank]).attach(None)


def test_a_weights_file_that_one_machine_lacks_is_an_error_on_all(ranks: Ranks, tmp_path: Path) -> None:
    path = str(tmp_path / "teacher.pt")
    torch.save(nets.teacher().state_dict(), path)
    ranks.run(teaching, (path, path))
    with pytest.raises(RuntimeError) as failed:
        ranks.run(teaching, (path, "nowhere.pt"))
    lacking = "the weights file 'nowhere.pt' does not exist"
    here, there = str(failed.value).split("rank 1:\n")
    assert f"RuntimeError: rank 1 (on {socket.gethostname()}): {lacking}" in here
    assert f"FileNotFoundError: {lacking}" in there


def grouped(rank: int) -> Any:
    group = dist.new_group([1])
    alone = rank == 1
    return [int(n) for n in gather_rows(torch.tensor([rank]), group=group)] if alone else None


def test_a_group_gathers_among_itself(ranks: Ranks) -> None:
    assert list(ranks.run(grouped)) == [None, [1]]


def test_only_a_data_parallel_mesh_narrows_the_group() -> None:
    class Mesh:
        mesh_dim_names = ("data_parallel", "tensor_parallel")

        def __getitem__(self, name: str) -> Any:
            assert name == "data_parallel"
            return self

        def get_group(self) -> str:
            return "the group"

    class Strategy:
        device_mesh: Any = Mesh()

    assert data_parallel_group(Strategy()) == "the group"
    Strategy.device_mesh = (2, 2)
    assert data_parallel_group(Strategy()) is None


# The engine


class PerSample(nets.Hint):
    """Of one network's labels, so that a wrong alignment would be seen."""

    def forward(self, student: Tensor, teacher: Tensor, *, labels: Tensor) -> Tensor:
        return (student.sum(1) - teacher.sum(1) * labels).square().mean()


class Pairs(RelationalLoss):
    """Relates samples by label, index and view."""

    def forward(self, student: Tensor, teacher: Tensor, *, labels: Tensor, indices: Tensor, view: Tensor) -> Tensor:
        key = (labels + 0.1 * indices + 0.01 * view).float()
        return ((student @ student.T - teacher @ teacher.T).square() * (key[:, None] - key).abs()).mean()


AT = {"low": "first", "high": "last"}


def engine(**kwargs: Any) -> Distiller:
    losses: dict[str, RelationalLoss] = {
        "rkd": RKD().at("high"),
        "rkd_low": 0.5 * RKD().at("low"),
        "gram": nets.Gram().at("high"),
        "hint": PerSample().at("high"),
        "pairs": Pairs().at("high"),
    }
    return Distiller(nets.teacher(), losses, student_layer=AT, teacher_layer=AT, input_layer="", **kwargs)


def gradients(rank: int, counts: tuple[int, ...], two_views: bool, gather: bool = True) -> Any:
    torch.manual_seed(0)
    student, distiller = nets.Backbone(), engine(gather=gather)
    student.act.inplace = False
    batch = Batch(*(part(rows, rank, counts) for rows in (ROWS.x, ROWS.y, torch.arange(16))))
    distiller.attach(student)
    distiller.prepare("cpu")
    distiller.start()
    student(batch.inputs)
    if two_views:
        student(-batch.inputs)
    terms = distiller.compute_terms(distiller.collect(batch))
    distiller.detach()
    torch.stack(list(terms.values())).sum().backward()
    return {k: v.detach() for k, v in terms.items()}, [p.grad for p in student.parameters()]


@pytest.mark.parametrize("two_views", [False, True])
@pytest.mark.parametrize("split", SPLITS)
def test_two_ranks_equal_one_with_the_whole_batch(ranks: Ranks, split: str, two_views: bool) -> None:
    results = ranks.run(gradients, SPLITS[split], two_views)
    whole, expected = gradients(0, (16,), two_views)
    for name, value in whole.items():
        values = [terms[name] for terms, _ in results]
        torch.testing.assert_close(torch.stack(values).mean(), value, atol=1e-6, rtol=1e-6)
        if name != "hint":
            assert values[0] == values[1], "relations are those of the global batch on every rank"
    for one, *several in zip(expected, *(grads for _, grads in results), strict=True):
        torch.testing.assert_close(torch.stack(several).mean(0), one, atol=1e-6, rtol=1e-5)


def test_without_gathering_every_rank_relates_its_own_rows(ranks: Ranks) -> None:
    results = ranks.run(gradients, (11, 5), False, False)
    for rank, (terms, _) in enumerate(results):
        alone, _ = gradients(rank, (11, 5), False)
        torch.testing.assert_close(terms, alone)


class Mixed(RelationalLoss):
    """Relates samples, and every one to the partner that it was mixed with."""

    def forward(self, student: Tensor, teacher: Tensor, *, mix: Mix) -> Tensor:
        target = mix.ratio[:, None] * teacher + mix.labels[:, None] * teacher[mix.partners]
        return (student @ student.T - target @ target.T).square().mean()


def mixture(counts: tuple[int, ...]) -> Mix:
    """Of all rows, each mixed with one of its own rank."""
    firsts = [sum(counts[:rank]) for rank in range(len(counts))]
    partners = torch.cat([torch.arange(n).flip(0) + first for n, first in zip(counts, firsts, strict=True)])
    return Mix(partners, torch.linspace(0.1, 0.9, 16), ROWS.y[partners], teacher_mixed=False)


def mixed(rank: int, counts: tuple[int, ...], whole: Mix) -> Tensor:
    place = slice(sum(counts[:rank]), sum(counts[: rank + 1]))
    local = Mix(whole.partners[place] - place.start, whole.ratio[place], whole.labels[place])
    torch.manual_seed(0)
    distiller, student = Distiller(nets.teacher(), Mixed()), nets.Backbone()
    distiller.attach(student)
    distiller.start()
    student(ROWS.x[place])
    return distiller.compute_terms(distiller.collect(Batch(ROWS.x[place], mix=local)))["mixed"].detach()


@pytest.mark.parametrize("counts", [(8, 8), (11, 5)])
def test_mixtures_are_gathered_with_the_rows(ranks: Ranks, counts: tuple[int, int]) -> None:
    whole = mixture(counts)
    first, second = ranks.run(mixed, counts, whole)
    assert first == second
    torch.testing.assert_close(first, mixed(0, (16,), whole))


def compared(rank: int, kind: str) -> str:
    network: Any = nets.teacher(norm=True, seed=rank if "weights" in kind else 7)
    with torch.no_grad():
        if kind == "one bit":
            network.first.bias[0] += 1e-7 * rank * network.first.bias[0].abs()
        if kind == "a buffer":
            network.norm.num_batches_tracked += rank
        if kind == "nan":
            network.first.bias[0] = torch.nan
    if "quantised" in kind:
        network = nets.quantised(network)
    teacher = Teacher(nn.Sequential(network, nn.Identity()), move="quantised" not in kind)
    teacher.attach(None)
    teacher.to("cpu", lambda n: n.to(torch.bfloat16) if kind == "half" else n)
    try:
        teacher.check_same_on_ranks()
    except RuntimeError as error:
        return str(error)
    return "same"


KINDS = ["same", "half", "nan", "quantised", "weights", "quantised, other weights", "one bit", "a buffer"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_teacher_that_differs_between_ranks_is_refused(ranks: Ranks, kind: str) -> None:
    results = ranks.run(compared, kind)
    if kind in KINDS[:4]:
        assert list(results) == ["same", "same"]
    else:
        assert all("the teacher's weights differ between ranks" in result for result in results)
