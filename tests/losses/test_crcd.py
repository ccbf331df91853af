from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_rkd.losses import CRCD
from lightning_rkd.losses.crcd import log_mean_exp, relation_similarities
from lightning_rkd.utils.distributed import gather_rows
from tests.harness.ranks import Ranks
from tests.oracles import crcd as oracle
from tests.oracles.memory import dot, project, renewed


def small(**settings) -> CRCD:
    return CRCD(4, 6, 12, **{"dim": 5, "negatives": 7, **settings}).double()


def batches(n: int, steps: int = 1) -> list[dict[str, Tensor]]:
    return [
        {
            "student": torch.randn(n, 4, dtype=torch.float64),
            "teacher": torch.randn(n, 6, dtype=torch.float64),
            "indices": torch.randint(12, (n,)),
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
        expected = oracle.crcd(s, memories[1], indices.tolist(), which, loss.temperature, z)
        expected += oracle.crcd(t, memories[0], indices.tolist(), which, loss.temperature, z)
        value = loss(batch["student"], batch["teacher"], indices=indices, labels=labels)
        assert value.item() == pytest.approx(expected, rel=1e-10)
        memories = [renewed(m, indices.tolist(), x, loss.momentum) for m, x in zip(memories, (s, t), strict=True)]
        for bank, rows in zip((loss.student_memory, loss.teacher_memory), memories, strict=True):
            torch.testing.assert_close(bank.rows, torch.tensor(rows, dtype=torch.float64), rtol=0, atol=1e-12)


def test_similarities_of_relations_are_those_of_the_loops_also_in_float32():
    features, memory, anchors = (F.normalize(torch.randn(*shape), dim=-1) for shape in ((3, 5), (3, 4, 5), (2, 5)))
    memory[1, 2], memory[2, 0] = anchors[0], anchors[1] + 1e-3 * torch.randn(5)
    same = (memory[:, None] == anchors[:, None]).all(3)
    assert same.sum() == 1
    ours = relation_similarities(features, memory, anchors, same)
    for i, a, k in torch.cartesian_prod(torch.arange(3), torch.arange(2), torch.arange(4)).tolist():
        v, m, anchor = (x.double().tolist() for x in (features[i], memory[i, k], anchors[a]))
        expected = dot(oracle.relation(v, anchor), oracle.relation(m, anchor))
        assert float(ours[i, a, k]) == pytest.approx(expected, abs=2e-6)


def test_the_normalising_constant_is_what_the_authors_take_from_the_first_batch():
    loss = CRCD(8, 8, 300, negatives=300)
    rows = loss.teacher_memory.rows
    features = F.normalize(torch.randn(1, 128), dim=1)
    relations = F.normalize(features - rows[:20], dim=1)
    cosines = torch.stack([F.normalize(rows[20:] - a, dim=1) @ r for a, r in zip(rows[:20], relations, strict=True)])
    assert math.exp(log_mean_exp(128, 0.05)) == pytest.approx(float((cosines / 0.05).exp().mean()), rel=0.2)


def test_evaluation_leaves_the_memories_untouched_and_repeats_itself():
    loss, (batch,) = small().eval(), batches(4)
    before = copy.deepcopy(loss.state_dict())
    assert torch.equal(loss(**batch), loss(**batch))
    assert all(torch.equal(value, before[name]) for name, value in loss.state_dict().items())


def test_a_run_taken_up_half_way_goes_on_bit_for_bit():
    steps, loss = batches(4, steps=6), small().float()
    for batch in steps[:3]:
        loss(**batch)
    resumed = CRCD(dim=5, negatives=7)
    resumed.load_state_dict(copy.deepcopy(loss.state_dict()))
    for batch in steps[3:]:
        assert torch.equal(loss(**batch), resumed(**batch))


def _train(rank: int, loss: CRCD, steps: list[dict[str, Tensor]], counts: list[int]) -> dict[str, Tensor]:
    mine = slice(sum(counts[:rank]), sum(counts[: rank + 1]))
    loss = copy.deepcopy(loss)  # what is sent to a process is shared memory
    for batch in steps:
        loss(**{name: gather_rows(value[mine]) for name, value in batch.items()})
    return {name: buffer.clone() for name, buffer in loss.named_buffers()}


def test_two_ranks_hold_the_same_memories_as_one_process_after_three_steps(ranks: Ranks):
    loss, steps = small(), batches(6, steps=3)
    held = ranks.run(_train, loss, steps, [4, 2])
    for name, value in _train(0, loss, steps, [6]).items():
        assert torch.equal(held[0][name], held[1][name]), name
        assert torch.equal(held[0][name], value), name


def test_training_on_the_loss_alone_lowers_it():
    loss, teacher, indices = CRCD(8, 6, 20, dim=16, negatives=32), torch.randn(20, 6), torch.arange(20)
    student = torch.randn(20, 8, requires_grad=True)
    optimizer = torch.optim.Adam([student, *loss.parameters()], lr=0.05)
    values = []
    for _ in range(40):
        optimizer.zero_grad()
        value = loss(student, teacher, indices=indices)
        value.backward()
        optimizer.step()
        values.append(value.item())
    assert values[-1] < 0.6 * values[0]


def test_an_index_outside_the_memory_names_loss_and_cure():
    with pytest.raises(
        ValueError, match=r"CRCD: index 70 is outside its memory of 50 samples; pass num_samples=\.\.\."
    ):
        CRCD(num_samples=50)(torch.ones(1, 3), torch.ones(1, 3), indices=torch.tensor([70]))


@pytest.mark.parametrize("wrong", [{"dim": 1}, {"negatives": 0}, {"temperature": 0.0}, {"momentum": -1}], ids=str)
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match=f"CRCD takes .* got .*{next(iter(wrong))}={next(iter(wrong.values()))}"):
        CRCD(**wrong)
