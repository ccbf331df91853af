import copy

import pytest
import torch

from lightning_rkd.losses import HolisticKD
from lightning_rkd.losses.holistic import prediction_graph
from lightning_rkd.utils.types import Outputs
from tests.losses.test_memory_contrast import batches, layer, small, value_of
from tests.oracles import holistic as oracle
from tests.oracles.memory import renewed
from tests.oracles.vectors import project


@pytest.mark.parametrize("negatives_from", ["own", "other"])
@pytest.mark.parametrize(
    ("n", "settings"), [(3, {}), (6, {"negatives": 1}), (7, {"temperature": 0.5, "smoothing": 0.2})]
)
def test_loss_and_memories_over_several_steps_are_those_of_the_loops(n, settings, negatives_from):
    loss = small(HolisticKD, negatives_from=negatives_from, **settings)
    banks = (loss.student_memory, loss.teacher_memory)
    memories = [bank.rows.tolist() for bank in banks]
    for batch in batches(n, steps=3, distinct=True):
        indices = batch["indices"].tolist()
        which = loss.student_memory.draw(batch["indices"], loss.negatives, batch["labels"]).tolist()
        rows, smooth = [], []
        for name in ("student", "teacher"):
            rows.append(project(*layer(getattr(loss, f"{name}_projector")), batch[name].tolist()))
            near = oracle.neighbours(batch[f"{name}_logits"].tolist(), 3)
            smooth.append(oracle.tag_conv(rows[-1], near, *layer(getattr(loss, f"{name}_conv"))))
        expected = 0.0
        for mine, other in ((0, 1), (1, 0)):
            noise = memories[mine if negatives_from == "own" else other]
            partners = [memories[other][i] for i in indices]
            expected += oracle.info_nce(rows[mine], partners, noise, which, loss.temperature)
            mixed = renewed(memories[other], indices, smooth[other], loss.smoothing)
            partners = [mixed[i] for i in indices]
            expected += oracle.info_nce(smooth[mine], partners, noise, which, loss.temperature)
        assert value_of(loss, batch).item() == pytest.approx(expected, rel=1e-10)
        memories = [renewed(m, indices, x, loss.momentum) for m, x in zip(memories, rows, strict=True)]
        for bank, expected_rows in zip(banks, memories, strict=True):
            torch.testing.assert_close(bank.rows, torch.tensor(expected_rows, dtype=torch.float64), rtol=0, atol=1e-12)


def test_the_graph_is_the_normalised_adjacency_of_the_neighbours():
    logits = torch.randn(9, 4, dtype=torch.float64)
    graph = prediction_graph(logits, 4)
    for i, near in enumerate(oracle.neighbours(logits.tolist(), 4)):
        assert near[0] == i
        assert set(graph[i].nonzero().flatten().tolist()) == set(near)
    assert set(graph.flatten().tolist()) == {0.0, 0.25}


def test_the_gradient_is_right_where_no_constant_cuts_it():
    loss, (batch,) = small(HolisticKD, smoothing=1.0), batches(5, distinct=True)
    batch["student"].requires_grad_()
    assert torch.autograd.gradcheck(lambda *_: value_of(copy.deepcopy(loss), batch), [batch["student"]])


def test_the_gradient_takes_partners_as_constants():
    loss, (batch,) = small(HolisticKD).eval(), batches(5, distinct=True)
    x = batch["student"].requires_grad_()
    (grad,) = torch.autograd.grad(value_of(loss, batch), x)
    frozen = {name: value.detach().clone() for name, value in batch.items()}
    partner = loss._partner
    s = loss.student_projector(frozen["student"])
    smooth = loss.student_conv(s, prediction_graph(frozen["student_logits"], 3)).detach()

    def with_frozen(memory, indices, rows):
        return partner(memory, indices, smooth if memory is loss.student_memory else rows)

    loss._partner = with_frozen
    step = 1e-6
    for i, k in ((0, 0), (2, 3), (4, 1)):
        values = []
        for sign in (1, -1):
            moved = x.detach().clone()
            moved[i, k] += sign * step
            values.append(value_of(loss, batch | {"student": moved}).item())
        assert (values[0] - values[1]) / (2 * step) == pytest.approx(grad[i, k].item(), rel=1e-5, abs=1e-8)


def test_logits_receive_no_gradient():
    loss, (batch,) = small(HolisticKD), batches(5, distinct=True)
    batch["student_logits"].requires_grad_()
    batch["student"].requires_grad_()
    value_of(loss, batch).backward()
    assert batch["student_logits"].grad is None


@pytest.mark.parametrize("n", [1, 2])
def test_a_batch_smaller_than_the_neighbourhood_names_loss_and_cure(n):
    with pytest.raises(
        ValueError,
        match=f"HolisticKD: a graph with neighbours=3, .* at least 3 samples, got a batch of {n}; lower neighbours,",
    ):
        value_of(small(HolisticKD), batches(n, distinct=True)[0])


def test_labels_are_required():
    outputs = Outputs(embedding=torch.ones(8, 2), logits=torch.ones(8, 3))
    with pytest.raises(ValueError, match=r"HolisticKD needs \['labels'\]"):
        HolisticKD(num_samples=9)(outputs, outputs, indices=torch.arange(8))


def test_logits_of_pixels_are_refused():
    outputs = Outputs(embedding=torch.ones(8, 2), logits=torch.ones(8, 3, 4, 4))
    with pytest.raises(
        ValueError, match=r"HolisticKD: the student's logits must be \(N, classes\), got \(8, 3, 4, 4\)"
    ):
        HolisticKD(num_samples=9)(outputs, outputs, indices=torch.arange(8), labels=torch.arange(8) % 3)
