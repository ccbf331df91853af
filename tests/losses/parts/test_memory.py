from collections import Counter, deque

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_rkd.losses.parts import memory
from lightning_rkd.losses.parts.memory import MemoryBank, Queue
from lightning_rkd.losses.parts.nce import nce
from lightning_rkd.utils.distributed import gather_rows
from tests.harness.ranks import Ranks
from tests.oracles import memory as oracle


def unit(n: int, d: int) -> Tensor:
    return F.normalize(torch.randn(n, d, dtype=torch.float64), dim=1)


def test_the_bank_starts_with_unit_rows_that_depend_on_the_seed_alone():
    torch.manual_seed(1)
    first = MemoryBank(20, 6, seed=3).rows
    torch.manual_seed(2)
    assert torch.equal(MemoryBank(20, 6, seed=3).rows, first)
    assert not torch.equal(MemoryBank(20, 6, seed=4).rows, first)
    torch.testing.assert_close(first.norm(dim=1), torch.ones(20))


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("indices", [[3, 0, 7], [5, 5, 2], [1, 1, 1]], ids=str)
def test_an_update_is_that_of_the_loops(momentum, indices):
    bank, rows = MemoryBank(8, 4).double(), unit(3, 4)
    expected = oracle.renewed(bank.rows.tolist(), indices, rows.tolist(), momentum)
    bank.update(torch.tensor(indices), rows, momentum)
    torch.testing.assert_close(bank.rows, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-14)
    assert int(bank.updates) == 1


def test_a_row_of_zeros_leaves_a_finite_bank():
    bank = MemoryBank(4, 3)
    bank.update(torch.tensor([1]), torch.zeros(1, 3), momentum=0.0)
    assert torch.equal(bank.rows[1], torch.zeros(3))


def test_negatives_are_all_other_samples_equally_often():
    bank = MemoryBank(10, 3)
    drawn = bank.draw(torch.tensor([4, 0, 9]), 9000)
    for own, row in zip([4, 0, 9], drawn.tolist(), strict=True):
        counts = Counter(row)
        assert set(counts) == set(range(10)) - {own}
        assert all(850 < n < 1150 for n in counts.values())


def test_negatives_are_of_other_classes_or_of_classes_not_known_yet():
    bank = MemoryBank(10, 3)
    bank.update(torch.tensor([0, 1, 2, 3]), unit(4, 3), 0.5, labels=torch.tensor([7, 8, 7, -1]))
    drawn = bank.draw(torch.tensor([5, 1, 3]), 5000, labels=torch.tensor([7, 8, -1]))
    assert set(drawn[0].tolist()) == {1, 3, 4, 6, 7, 8, 9}
    assert set(drawn[1].tolist()) == {0, 2, 3, 4, 5, 6, 7, 8, 9}
    assert set(drawn[2].tolist()) == {0, 1, 2, 4, 5, 6, 7, 8, 9}
    assert all(550 < n < 900 for n in Counter(drawn[0].tolist()).values())


def test_soft_labels_count_as_their_largest_class():
    bank, indices = MemoryBank(10, 3), torch.tensor([0, 1, 2])
    soft = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4]])
    assert torch.equal(bank.draw(indices, 50, soft), bank.draw(indices, 50, torch.tensor([0, 1, 0])))
    bank.update(indices, unit(3, 3), 0.5, soft)
    assert bank.labels[:3].tolist() == [0, 1, 0]


def test_negatives_follow_the_sample_and_not_its_row():
    bank, indices, labels = MemoryBank(30, 3), torch.tensor([11, 4, 29, 4]), torch.tensor([0, 1, 1, 1])
    order = torch.tensor([2, 0, 3, 1])
    for classes in (None, labels):
        drawn = bank.draw(indices, 40, classes)
        assert torch.equal(drawn[1], drawn[3])
        assert torch.equal(bank.draw(indices[order], 40, None if classes is None else classes[order]), drawn[order])


def test_negatives_depend_on_the_number_of_updates_and_the_seed_alone():
    bank, indices = MemoryBank(1000, 3), torch.tensor([1, 2])
    first = bank.draw(indices, 20)
    torch.manual_seed(5)
    assert torch.equal(bank.draw(indices, 20), first)
    assert not torch.equal(MemoryBank(1000, 3, seed=1).draw(indices, 20), first)
    bank.update(indices, unit(2, 3), 0.5)
    assert not torch.equal(bank.draw(indices, 20), first)


def test_more_negatives_than_samples_can_be_drawn():
    assert MemoryBank(2, 3).draw(torch.tensor([0, 1]), 5).tolist() == [[1] * 5, [0] * 5]


def test_a_memory_of_one_class_has_no_negatives_and_says_so():
    with pytest.raises(ValueError, match="CRD: all 3 samples in memory are of one class"):
        MemoryBank(3, 2, name="CRD").draw(torch.arange(3), 4, labels=torch.zeros(3, dtype=torch.int64))


@pytest.mark.parametrize("indices", [[3, 70, 2], [50]], ids=str)
def test_an_index_beyond_the_memory_is_refused_with_the_cure(indices):
    with pytest.raises(ValueError, match=rf"CRD: index {max(indices)} is outside its memory of 50 samples; pass num_s"):
        MemoryBank(50, 2, name="CRD").locate(torch.tensor(indices))


def test_a_negative_index_is_refused():
    with pytest.raises(ValueError, match="index -1 is outside"):
        MemoryBank(50, 2).locate(torch.tensor([3, -1]))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_a_wrong_index_is_refused_later_and_the_host_never_waits():
    bank = MemoryBank(50, 2).cuda()
    good, bad = torch.tensor([3], device="cuda"), torch.tensor([70], device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        bank.draw(bank.locate(good), 4)
        assert bank.locate(bad).is_cuda
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    with pytest.raises(ValueError, match="index 70 is outside"):
        bank.locate(good)


@pytest.mark.parametrize("indices", [torch.zeros(2), torch.zeros(2, 1, dtype=torch.int64), torch.tensor([True])])
def test_indices_that_are_no_vector_of_integers_are_refused(indices):
    with pytest.raises(TypeError, match=r"indices must be integers of shape \(N,\)"):
        MemoryBank(50, 2).locate(indices)


@pytest.mark.parametrize(("num_samples", "dim"), [(1, 4), (0, 4), (4, 0)])
def test_a_bank_without_rows_is_refused(num_samples, dim):
    with pytest.raises(ValueError, match="at least 2 samples"):
        MemoryBank(num_samples, dim)


@pytest.mark.parametrize("block", [1, 25, 2**25])
def test_similarities_are_those_of_the_rows_chosen_by_each_sample(block, monkeypatch):
    monkeypatch.setattr(memory, "_BLOCK", block)
    bank, features, which = MemoryBank(8, 4).double(), unit(5, 4), torch.randint(8, (5, 11))
    expected = (features[:, None] * bank.rows[which]).sum(2)
    torch.testing.assert_close(bank.similarities(features, which), expected, rtol=1e-12, atol=1e-14)


def test_an_update_between_forward_and_backward_leaves_the_gradient_alone():
    bank, features, which = MemoryBank(8, 4), unit(5, 4).float().requires_grad_(), torch.randint(8, (5, 11))
    expected = bank.rows[which].sum(1)
    value = bank.similarities(features, which).sum()
    bank.update(torch.arange(5), features.detach(), 0.0)
    value.backward()
    torch.testing.assert_close(features.grad, expected)


def _three_steps(rank: int, counts: list[int], indices: Tensor, rows: Tensor, labels: Tensor) -> dict[str, Tensor]:
    mine, bank = slice(sum(counts[:rank]), sum(counts[: rank + 1])), MemoryBank(9, 4)
    for i, x, y in zip(indices, rows, labels, strict=True):
        bank.update(gather_rows(i[mine]), gather_rows(x[mine]), 0.5, gather_rows(y[mine]))
    return bank.state_dict() | {"drawn": bank.draw(gather_rows(indices[0][mine]), 8)}


@pytest.mark.parametrize("counts", [[3, 3], [5, 1]], ids=str)
def test_two_ranks_hold_the_bank_of_one_process_after_three_steps(ranks: Ranks, counts):
    indices, rows, labels = torch.randint(9, (3, 6)), torch.randn(3, 6, 4), torch.randint(3, (3, 6))
    alone = _three_steps(0, [6], indices, rows, labels)
    for states in zip(
        *(state.items() for state in ranks.run(_three_steps, counts, indices, rows, labels)), strict=True
    ):
        for name, value in states:
            assert torch.equal(value, alone[name]), name


def test_counters_stay_on_the_host_and_rows_move():
    bank, queue = MemoryBank(4, 2).to("meta"), Queue(4, 2).to("meta")
    assert (bank.rows.device.type, bank.updates.device.type) == ("meta", "cpu")
    assert (queue.rows.device.type, queue.pushed.device.type) == ("meta", "cpu")


@pytest.mark.parametrize("sizes", [[2, 2, 2, 2], [5], [1, 4, 3], [12], [5, 12, 1]], ids=str)
def test_a_queue_holds_the_last_rows_that_were_pushed(sizes):
    queue, last = Queue(5, 2, seed=1), deque(maxlen=5)
    for rows in (torch.randn(n, 2) for n in sizes):
        before = queue.contents()
        kept = before.clone()
        queue.push(rows)
        last.extend(map(tuple, rows.tolist()))
        assert torch.equal(before, kept)
    assert set(last) <= set(map(tuple, queue.contents().tolist()))
    assert queue.filled == len(last) == min(sum(sizes), 5)


def test_a_queue_without_rows_is_refused():
    with pytest.raises(ValueError, match="at least one row"):
        Queue(0, 2)


@pytest.mark.parametrize(("rows", "negatives"), [(1, 1), (3, 4), (2, 50)])
def test_noise_contrastive_estimation_is_that_of_the_loops(rows, negatives):
    scores = 3 * torch.randn(rows, 1 + negatives, dtype=torch.float64)
    expected = oracle.nce(scores.exp().tolist(), z=70.0, num_samples=20)
    assert float(nce(scores, torch.tensor(70.0, dtype=torch.float64).log().item(), 20)) == pytest.approx(
        expected, rel=1e-11
    )


def test_noise_contrastive_estimation_is_finite_where_exponentials_are_not():
    scores = torch.tensor([[1e4, -1e4], [-1e4, 1e4]], requires_grad=True)
    value = nce(scores, 3.0, 20)
    value.backward()
    assert torch.isfinite(value)
    assert torch.isfinite(scores.grad).all()
