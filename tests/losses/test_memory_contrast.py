"""CRD and CRCD, which share projections, memories and the noise-contrastive loss; the memories of HolisticKD, too."""

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_rkd.losses import CRCD, CRD, HolisticKD, crcd, crd
from lightning_rkd.losses.parts.memory import MemoryBank
from lightning_rkd.losses.parts.memory_contrast import MemoryContrast
from lightning_rkd.utils.distributed import gather_rows
from lightning_rkd.utils.types import Outputs
from tests.harness.ranks import Ranks
from tests.oracles import crcd as crcd_oracle
from tests.oracles import crd as crd_oracle
from tests.oracles.differences import check_gradients
from tests.oracles.memory import renewed
from tests.oracles.vectors import dot, project

both = pytest.mark.parametrize("cls", [CRD, CRCD])
every = pytest.mark.parametrize("cls", [CRD, CRCD, HolisticKD])


def small(cls: type[Any], **settings: Any) -> Any:
    neighbours = {"neighbours": 3} if cls is HolisticKD else {}
    return cls(4, 6, 12, **{"dim": 5, "negatives": 7, **neighbours, **settings}).double()


def batches(n: int, steps: int = 1, distinct: bool = False) -> list[dict[str, Tensor]]:
    widths = {"student": 4, "student_logits": 3, "teacher": 6, "teacher_logits": 3}
    return [
        {
            **{name: torch.randn(n, width, dtype=torch.float64) for name, width in widths.items()},
            "indices": torch.randperm(12)[:n] if distinct else torch.randint(12, (n,)),
            "labels": torch.randint(3, (n,)),
        }
        for _ in range(steps)
    ]


def value_of(loss: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    inputs = [batch[name] for name in ("student", "teacher")]
    if isinstance(loss, HolisticKD):
        inputs = [Outputs(embedding=batch[x], logits=batch[f"{x}_logits"]) for x in ("student", "teacher")]
    return loss(*inputs, indices=batch["indices"], labels=batch["labels"])


def layer(module: nn.Module) -> tuple[list[list[float]], list[float]]:
    return module.linear.weight.tolist(), module.linear.bias.tolist()


def by_loops(cls: type[MemoryContrast], rows, memory, indices, which, temperature) -> float:
    if cls is CRD:
        return crd_oracle.crd(rows, memory, which, temperature, 12 * math.exp(crd.log_mean_exp(5, temperature)))
    z = 12 * math.exp(crcd.log_mean_exp(5, temperature))
    return crcd_oracle.crcd(rows, memory, indices, which, temperature, z)


@both
@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize(
    ("n", "settings"), [(1, {}), (3, {"negatives": 1}), (5, {"temperature": 0.5, "momentum": 0.9})]
)
def test_loss_and_memories_over_several_steps_are_those_of_the_loops(cls, n, settings, labelled):
    loss = small(cls, **settings)
    memories = [bank.rows.tolist() for bank in (loss.student_memory, loss.teacher_memory)]
    for batch in batches(n, steps=3):
        indices, labels = batch["indices"], batch["labels"] if labelled else None
        drawn = loss.student_memory.draw(indices, loss.negatives, labels).tolist()
        which = [[i, *others] for i, others in zip(indices.tolist(), drawn, strict=True)]
        s = project(*layer(loss.student_projector), batch["student"].tolist())
        t = project(*layer(loss.teacher_projector), batch["teacher"].tolist())
        expected = by_loops(cls, s, memories[1], indices.tolist(), which, loss.temperature)
        expected += by_loops(cls, t, memories[0], indices.tolist(), which, loss.temperature)
        value = loss(batch["student"], batch["teacher"], indices=indices, labels=labels)
        assert value.item() == pytest.approx(expected, rel=1e-10)
        memories = [renewed(m, indices.tolist(), x, loss.momentum) for m, x in zip(memories, (s, t), strict=True)]
        for bank, rows in zip((loss.student_memory, loss.teacher_memory), memories, strict=True):
            torch.testing.assert_close(bank.rows, torch.tensor(rows, dtype=torch.float64), rtol=0, atol=1e-12)


def parameters(loss: nn.Module, *parts: str) -> dict[str, Tensor]:
    return {name: p for name, p in loss.named_parameters() if name.startswith(parts)}


@both
def test_gradients_to_rows_and_projectors_are_those_of_the_loops(cls):
    loss, (batch,) = small(cls).eval(), batches(3)
    indices = batch["indices"]
    which = torch.cat([indices[:, None], loss.student_memory.draw(indices, 7, batch["labels"])], 1).tolist()
    memories = [bank.rows.tolist() for bank in (loss.teacher_memory, loss.student_memory)]

    def loops(given: dict[str, np.ndarray]) -> float:
        given = {"teacher": batch["teacher"].numpy(), **given}
        total = 0.0
        for name, memory in zip(("student", "teacher"), memories, strict=True):
            layer = [given[f"{name}_projector.linear.{part}"] for part in ("weight", "bias")]
            rows = project(*layer, given[name])
            total += by_loops(cls, rows, memory, indices.tolist(), which, loss.temperature)
        return total

    leaves = {"student": batch["student"].requires_grad_(), **parameters(loss, "student_p", "teacher_p")}
    check_gradients(value_of(loss, batch), leaves, loops)


def test_similarities_of_relations_are_those_of_the_loops_also_in_float32():
    features, memory, anchors = (F.normalize(torch.randn(*shape), dim=-1) for shape in ((3, 5), (3, 4, 5), (2, 5)))
    memory[1, 2], memory[2, 0] = anchors[0], anchors[1] + 1e-3 * torch.randn(5)
    same = (memory[:, None] == anchors[:, None]).all(3)
    assert same.sum() == 1
    ours = crcd.relation_similarities(features, memory, anchors, same)
    for i, a, k in torch.cartesian_prod(torch.arange(3), torch.arange(2), torch.arange(4)).tolist():
        v, m, anchor = (x.double().tolist() for x in (features[i], memory[i, k], anchors[a]))
        expected = dot(crcd_oracle.relation(v, anchor), crcd_oracle.relation(m, anchor))
        assert float(ours[i, a, k]) == pytest.approx(expected, abs=2e-6)


@pytest.mark.parametrize(("dim", "temperature"), [(2, 0.5), (3, 1.0), (128, 0.07)])
def test_the_normaliser_of_crd_is_that_of_the_authors_first_batch(dim, temperature):
    samples, n, count = 500, 4, 2000
    bank, which = MemoryBank(samples, dim), torch.randint(samples, (n, count))
    features = F.normalize(torch.randn(n, dim), dim=1)
    theirs = crd_oracle.first_z(features.tolist(), bank.rows.tolist(), which.tolist(), temperature)
    assert samples * math.exp(crd.log_mean_exp(dim, temperature)) == pytest.approx(theirs, rel=0.15)


def test_the_mean_over_the_sphere_is_the_closed_form_in_three_dimensions():
    assert math.exp(crd.log_mean_exp(3, 0.25)) == pytest.approx(math.sinh(4) / 4, rel=1e-8)


def test_the_normaliser_of_crcd_is_that_of_the_authors_first_batch():
    rows = CRCD(8, 8, 300, negatives=300).teacher_memory.rows
    features = F.normalize(torch.randn(1, 128), dim=1)
    relations = F.normalize(features - rows[:20], dim=1)
    cosines = torch.stack([F.normalize(rows[20:] - a, dim=1) @ r for a, r in zip(rows[:20], relations, strict=True)])
    assert math.exp(crcd.log_mean_exp(128, 0.05)) == pytest.approx(float((cosines / 0.05).exp().mean()), rel=0.2)


@pytest.mark.parametrize(("cls", "steps", "factor"), [(CRD, 60, 0.5), (CRCD, 40, 0.6)])
def test_training_on_the_loss_alone_finds_the_partners(cls, steps, factor):
    loss, teacher, indices = cls(8, 6, 20, dim=16, negatives=64), torch.randn(20, 6), torch.arange(20)
    student = torch.randn(20, 8, requires_grad=True)
    optimizer = torch.optim.Adam([student, *loss.parameters()], lr=0.05)
    values = []
    for _ in range(steps):
        optimizer.zero_grad()
        value = loss(student, teacher, indices=indices)
        value.backward()
        optimizer.step()
        values.append(value.item())
    assert values[-1] < factor * values[0]
    if cls is CRD:
        found = (loss.student_projector(student) @ loss.teacher_projector(teacher).T).argmax(1)
        assert (found == indices).float().mean() > 0.9


@every
def test_a_resumed_run_continues_bit_for_bit(cls):
    steps, loss = batches(4, steps=6), small(cls).float()
    for batch in steps[:3]:
        value_of(loss, batch)
    resumed = cls(dim=5, negatives=7, **({"neighbours": 3} if cls is HolisticKD else {}))
    resumed.load_state_dict(copy.deepcopy(loss.state_dict()))
    for batch in steps[3:]:
        assert torch.equal(value_of(loss, batch), value_of(resumed, batch))
    assert all(torch.equal(a, b) for a, b in zip(loss.buffers(), resumed.buffers(), strict=True))


def _train(rank: int, loss: nn.Module, steps: list[dict[str, Tensor]], counts: list[int]) -> dict[str, Tensor]:
    mine = slice(sum(counts[:rank]), sum(counts[: rank + 1]))
    loss = copy.deepcopy(loss)  # what is sent to a process is shared memory
    for batch in steps:
        value_of(loss, {name: gather_rows(value[mine]) for name, value in batch.items()})
    return {name: buffer.clone() for name, buffer in loss.named_buffers()}


@pytest.mark.parametrize(
    ("cls", "counts"), [(CRD, [3, 3]), (CRD, [1, 5]), (CRCD, [4, 2]), (HolisticKD, [4, 2])], ids=str
)
def test_two_ranks_hold_the_memories_of_one_process(ranks: Ranks, cls, counts):
    loss, steps = small(cls), batches(6, steps=3)
    held = ranks.run(_train, loss, steps, counts)
    alone = _train(0, loss, steps, [6])
    assert int(alone["student_memory.updates"]) == 3
    for name, value in alone.items():
        assert torch.equal(held[0][name], held[1][name]), name
        assert torch.equal(held[0][name], value), name


@every
def test_an_index_outside_the_memory_names_loss_and_cure(cls):
    (batch,) = batches(4)
    message = rf"{cls.__name__}: index 70 is outside its memory of 12 samples; pass num_samples=\.\.\."
    with pytest.raises(ValueError, match=message):
        value_of(small(cls), batch | {"indices": torch.tensor([0, 1, 70, 2])})


def test_indices_and_the_size_of_the_data_set_are_required():
    with pytest.raises(ValueError, match=r"CRD needs \['indices'\]"):
        CRD(num_samples=50)(torch.ones(1, 3), torch.ones(1, 3))
    with pytest.raises(ValueError, match="num_samples"):
        CRD()(torch.ones(1, 3), torch.ones(1, 3), indices=torch.tensor([0]))


@every
def test_the_memories_of_student_and_teacher_start_at_different_points(cls):
    loss = cls(4, 6, 12)
    assert not torch.equal(loss.student_memory.rows, loss.teacher_memory.rows)
