from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_rkd.losses import CRD
from lightning_rkd.losses.crd import log_mean_exp
from lightning_rkd.losses.parts.memory import MemoryBank
from lightning_rkd.utils.distributed import gather_rows
from tests.harness.ranks import Ranks
from tests.oracles import crd as oracle
from tests.oracles.memory import project, renewed


def small(**settings) -> CRD:
    return CRD(4, 6, 12, **{"dim": 5, "negatives": 7, **settings}).double()


def batches(n: int, steps: int = 1, samples: int = 12) -> list[dict[str, Tensor]]:
    return [
        {
            "student": torch.randn(n, 4, dtype=torch.float64),
            "teacher": torch.randn(n, 6, dtype=torch.float64),
            "indices": torch.randint(samples, (n,)),
            "labels": torch.randint(3, (n,)),
        }
        for _ in range(steps)
    ]


def layer(module: nn.Module) -> tuple[list[list[float]], list[float]]:
    return module.linear.weight.tolist(), module.linear.bias.tolist()


@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize(
    ("n", "settings"), [(1, {}), (3, {"negatives": 1}), (5, {"temperature": 0.5, "momentum": 0.9})]
)
def test_loss_and_memories_over_several_steps_are_those_of_the_loops(n, settings, labelled):
    loss = small(**settings)
    memories = [bank.rows.tolist() for bank in (loss.student_memory, loss.teacher_memory)]
    z = 12 * math.exp(log_mean_exp(5, loss.temperature))
    for batch in batches(n, steps=3):
        indices, labels = batch["indices"], batch["labels"] if labelled else None
        drawn = loss.student_memory.draw(indices, loss.negatives, labels).tolist()
        which = [[i, *others] for i, others in zip(indices.tolist(), drawn, strict=True)]
        s = project(*layer(loss.student_projector), batch["student"].tolist())
        t = project(*layer(loss.teacher_projector), batch["teacher"].tolist())
        expected = oracle.crd(s, memories[1], which, loss.temperature, z)
        expected += oracle.crd(t, memories[0], which, loss.temperature, z)
        value = loss(batch["student"], batch["teacher"], indices=indices, labels=labels)
        assert value.item() == pytest.approx(expected, rel=1e-10)
        memories = [renewed(m, indices.tolist(), x, loss.momentum) for m, x in zip(memories, (s, t), strict=True)]
        for bank, rows in zip((loss.student_memory, loss.teacher_memory), memories, strict=True):
            torch.testing.assert_close(bank.rows, torch.tensor(rows, dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("dim", "temperature"), [(2, 0.5), (3, 1.0), (128, 0.07)])
def test_the_normalising_constant_is_what_the_authors_take_from_the_first_batch(dim, temperature):
    samples, n, count = 500, 4, 2000
    bank, which = MemoryBank(samples, dim), torch.randint(samples, (n, count))
    features = F.normalize(torch.randn(n, dim), dim=1)
    theirs = oracle.first_z(features.tolist(), bank.rows.tolist(), which.tolist(), temperature)
    assert samples * math.exp(log_mean_exp(dim, temperature)) == pytest.approx(theirs, rel=0.15)


def test_the_mean_over_the_sphere_is_the_closed_form_in_three_dimensions():
    assert math.exp(log_mean_exp(3, 0.25)) == pytest.approx(math.sinh(4) / 4, rel=1e-8)


def test_a_student_that_has_learnt_the_teacher_has_a_smaller_loss():
    loss = CRD(8, 8, 40, negatives=200)
    loss.teacher_projector.load_state_dict(loss.student_projector.state_dict())
    teacher, indices = torch.randn(40, 8), torch.arange(40)
    for _ in range(4):
        loss(teacher, teacher, indices=indices)
    loss.eval()
    assert loss(teacher, teacher, indices=indices) < loss(torch.randn(40, 8), teacher, indices=indices) - 1


def test_training_on_the_loss_alone_teaches_who_is_who():
    loss, teacher, indices = CRD(8, 6, 20, dim=16, negatives=64), torch.randn(20, 6), torch.arange(20)
    student = torch.randn(20, 8, requires_grad=True)
    optimizer = torch.optim.Adam([student, *loss.parameters()], lr=0.05)
    values = []
    for _ in range(60):
        optimizer.zero_grad()
        value = loss(student, teacher, indices=indices)
        value.backward()
        optimizer.step()
        values.append(value.item())
    assert values[-1] < 0.5 * values[0]
    found = (loss.student_projector(student) @ loss.teacher_projector(teacher).T).argmax(1)
    assert (found == indices).float().mean() > 0.9


def test_evaluation_leaves_the_memories_untouched_and_repeats_itself():
    loss, (batch,) = small().eval(), batches(4)
    before = copy.deepcopy(loss.state_dict())
    assert torch.equal(loss(**batch), loss(**batch))
    assert all(torch.equal(value, before[name]) for name, value in loss.state_dict().items())


def test_a_run_taken_up_half_way_goes_on_bit_for_bit():
    steps, loss = batches(4, steps=6), small().float()
    for batch in steps[:3]:
        loss(**batch)
    resumed = CRD(dim=5, negatives=7)
    resumed.load_state_dict(copy.deepcopy(loss.state_dict()))
    for batch in steps[3:]:
        assert torch.equal(loss(**batch), resumed(**batch))
    assert all(torch.equal(a, b) for a, b in zip(loss.buffers(), resumed.buffers(), strict=True))


def _train(rank: int, loss: CRD, steps: list[dict[str, Tensor]], counts: list[int]) -> dict[str, Tensor]:
    mine = slice(sum(counts[:rank]), sum(counts[: rank + 1]))
    loss = copy.deepcopy(loss)  # what is sent to a process is shared memory
    for batch in steps:
        loss(**{name: gather_rows(value[mine]) for name, value in batch.items()})
    return {name: buffer.clone() for name, buffer in loss.named_buffers()}


@pytest.mark.parametrize("counts", [[3, 3], [1, 5]], ids=str)
def test_two_ranks_hold_the_same_memories_as_one_process_after_three_steps(ranks: Ranks, counts):
    loss, steps = small(), batches(6, steps=3)
    held = ranks.run(_train, loss, steps, counts)
    alone = _train(0, loss, steps, [6])
    assert int(alone["student_memory.updates"]) == 3
    for name, value in alone.items():
        assert torch.equal(held[0][name], held[1][name]), name
        assert torch.equal(held[0][name], value), name


def test_the_order_of_the_batch_changes_neither_value_nor_memories():
    one, (batch,), order = small(), batches(6), torch.randperm(6)
    other = copy.deepcopy(one)
    value = one(**batch)
    torch.testing.assert_close(other(**{name: x[order] for name, x in batch.items()}), value, rtol=1e-12, atol=0)
    torch.testing.assert_close(one.student_memory.rows, other.student_memory.rows, rtol=0, atol=1e-14)


def test_an_index_outside_the_memory_names_loss_and_cure():
    with pytest.raises(ValueError, match=r"CRD: index 70 is outside its memory of 50 samples; pass num_samples=\.\.\."):
        CRD(num_samples=50)(torch.ones(1, 3), torch.ones(1, 3), indices=torch.tensor([70]))


def test_indices_and_the_size_of_the_data_set_are_asked_for():
    with pytest.raises(ValueError, match=r"CRD needs \['indices'\]"):
        CRD(num_samples=50)(torch.ones(1, 3), torch.ones(1, 3))
    with pytest.raises(ValueError, match="num_samples"):
        CRD()(torch.ones(1, 3), torch.ones(1, 3), indices=torch.tensor([0]))


@pytest.mark.parametrize("wrong", [{"dim": 1}, {"negatives": 0}, {"temperature": 0.0}, {"momentum": 1.5}], ids=str)
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match=f"CRD takes .* got .*{next(iter(wrong))}={next(iter(wrong.values()))}"):
        CRD(**wrong)


def test_settings_show_when_printed():
    assert "CRD(\n  dim=128, negatives=16384, temperature=0.07, momentum=0.5, seed=0" in str(CRD(4, 6, 12))
