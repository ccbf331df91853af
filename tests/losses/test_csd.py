"""The bank of CSD."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_rkd.losses import CSD
from lightning_rkd.utils.distributed import gather_rows
from tests.harness.ranks import Ranks
from tests.oracles.csd import csd
from tests.oracles.differences import check_gradients


def batch(n: int, width: int = 3) -> tuple[Tensor, Tensor]:
    return torch.randn(n, width, dtype=torch.float64), torch.randn(n, 3, dtype=torch.float64)


def banked(**settings: float) -> CSD:
    return CSD(student_temperature=0.3, teacher_temperature=0.2, student_dim=3, teacher_dim=3, **settings).double()


@pytest.mark.parametrize("top_k", [None, 2])
def test_over_several_steps_the_gallery_is_the_teachers_last_rows(top_k):
    torch.manual_seed(0)
    loss, seen = banked(top_k=top_k, bank_size=5), []
    for n in (2, 1, 4, 5, 1):
        student, teacher = batch(n)
        seen += teacher.tolist()
        settings = {"top_k": top_k, "student_temperature": 0.3, "teacher_temperature": 0.2}
        expected = csd(student.numpy(), teacher.numpy(), **settings, gallery=seen[-5:])
        assert loss(student, teacher).item() == pytest.approx(expected, rel=1e-9)


def test_gradients_with_a_bank_are_those_of_the_loops():
    torch.manual_seed(0)
    loss = banked(bank_size=6)
    before, (student, teacher) = batch(4)[1], batch(3)
    loss(before, before)
    gallery = [*before[1:].tolist(), *teacher.tolist()]

    def loops(given):
        return csd(given["student"], teacher.numpy(), None, 0.3, 0.2, gallery)

    check_gradients(loss(student.requires_grad_(), teacher), {"student": student}, loops)


def test_a_bank_of_the_batch_alone_is_the_loss_without_a_bank():
    student, teacher = batch(4)
    torch.testing.assert_close(banked(bank_size=4)(student, teacher), banked()(student, teacher))
    torch.testing.assert_close(banked(bank_size=9)(student, teacher), banked()(student, teacher))  # not yet full


def in_three_steps(rank: int, counts: list[int], rows: Tensor) -> dict[str, Tensor]:
    mine, loss = slice(sum(counts[:rank]), sum(counts[: rank + 1])), banked(bank_size=8)
    for student, teacher in rows:
        value = loss(gather_rows(student[mine]), gather_rows(teacher[mine]))
    return {**loss.state_dict(), "value": value}


@pytest.mark.parametrize("counts", [[3, 3], [5, 1]], ids=str)
def test_two_ranks_hold_the_bank_of_one_process(ranks: Ranks, counts: list[int]):
    rows = torch.randn(3, 2, 6, 3, dtype=torch.float64)
    alone = in_three_steps(0, [6], rows)
    for states in ranks.run(in_three_steps, counts, rows):
        assert all(torch.equal(states[name], alone[name]) for name in alone)


def test_with_equal_temperatures_it_is_the_queue_of_lightly_train():
    loss = CSD(bank_size=8, student_temperature=0.07, teacher_temperature=0.07).double()
    queue = F.normalize(torch.zeros(0, 3, dtype=torch.float64))
    for n in (4, 4, 4):  # by the formula of the published code once its queue is full
        student, teacher = (F.normalize(x) for x in batch(n))
        queue = torch.cat([teacher, queue])[:8]
        target = (teacher @ queue.T / 0.07).softmax(1)
        expected = F.kl_div((student @ queue.T / 0.07).log_softmax(1), target, reduction="batchmean")
        torch.testing.assert_close(loss(student, teacher), expected)


def test_a_batch_larger_than_the_bank_and_an_empty_bank_are_refused():
    with pytest.raises(ValueError, match=r"CSD: a batch of 6 rows does not fit .* of 5; pass a larger bank_size"):
        banked(bank_size=5)(*batch(6))
    with pytest.raises(ValueError, match="CSD: bank_size must be at least 1, got 0"):
        CSD(bank_size=0)
