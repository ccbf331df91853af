import pytest
import torch

from lightning_rkd.losses import HolisticKD
from lightning_rkd.utils.types import Outputs
from tests.losses.test_memory_contrast import batches, small, value_of
from tests.oracles import holistic as oracle
from tests.oracles.differences import check_gradients
from tests.oracles.memory import renewed
from tests.oracles.vectors import project

NETWORKS = ("student", "teacher")


def by_loops(loss, batch, given, memories, which, partners=None):
    """The loss of rows and parameters by name, the projected rows and the smoothed ones, whose values partners take."""
    indices, rows, smooth, total = batch["indices"].tolist(), [], [], 0.0
    for name in NETWORKS:
        first, second = (
            [given[f"{name}_{layer}.linear.{part}"] for part in ("weight", "bias")] for layer in ("projector", "conv")
        )
        rows.append(project(*first, given[name]))
        near = oracle.neighbours(batch[f"{name}_logits"].tolist(), 3)
        smooth.append(oracle.tag_conv(rows[-1], near, *second))
    for mine, other in ((0, 1), (1, 0)):
        noise = memories[mine if loss.negatives_from == "own" else other]
        matched = [memories[other][i] for i in indices]
        total += oracle.info_nce(rows[mine], matched, noise, which, loss.temperature)
        mixed = renewed(memories[other], indices, (partners or smooth)[other], loss.smoothing)
        matched = [mixed[i] for i in indices]
        total += oracle.info_nce(smooth[mine], matched, noise, which, loss.temperature)
    return total, rows, smooth


def given_to(loss, batch):
    return {name: batch[name] for name in NETWORKS} | dict(loss.named_parameters())


@pytest.mark.parametrize("negatives_from", ["own", "other"])
@pytest.mark.parametrize(
    ("n", "settings"), [(3, {}), (6, {"negatives": 1}), (7, {"temperature": 0.5, "smoothing": 0.2})]
)
def test_loss_and_memories_over_several_steps_are_those_of_the_loops(n, settings, negatives_from):
    loss = small(HolisticKD, negatives_from=negatives_from, **settings)
    banks = (loss.student_memory, loss.teacher_memory)
    memories = [bank.rows.tolist() for bank in banks]
    for batch in batches(n, steps=3, distinct=True):
        which = loss.student_memory.draw(batch["indices"], loss.negatives, batch["labels"]).tolist()
        given = {name: x.tolist() for name, x in given_to(loss, batch).items()}
        expected, rows, _ = by_loops(loss, batch, given, memories, which)
        assert value_of(loss, batch).item() == pytest.approx(expected, rel=1e-10)
        memories = [
            renewed(m, batch["indices"].tolist(), x, loss.momentum) for m, x in zip(memories, rows, strict=True)
        ]
        for bank, expected_rows in zip(banks, memories, strict=True):
            torch.testing.assert_close(bank.rows, torch.tensor(expected_rows, dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize("negatives_from", ["own", "other"])
def test_the_gradients_are_those_of_the_loops_with_partners_as_constants(negatives_from):
    loss, (batch,) = small(HolisticKD, negatives_from=negatives_from).eval(), batches(5, distinct=True)
    which = loss.student_memory.draw(batch["indices"], loss.negatives, batch["labels"]).tolist()
    memories = [bank.rows.tolist() for bank in (loss.student_memory, loss.teacher_memory)]
    batch["student"].requires_grad_()
    leaves = given_to(loss, batch)
    teacher = leaves.pop("teacher").numpy()
    start = {name: x.tolist() for name, x in leaves.items()} | {"teacher": teacher}
    partners = by_loops(loss, batch, start, memories, which)[2]

    def loops(given):
        return by_loops(loss, batch, given | {"teacher": teacher}, memories, which, partners)[0]

    check_gradients(value_of(loss, batch), leaves, loops)


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


def test_logits_of_pixels_are_refused():
    outputs = Outputs(embedding=torch.ones(8, 2), logits=torch.ones(8, 3, 4, 4))
    with pytest.raises(
        ValueError, match=r"HolisticKD: the student's logits must be \(N, classes\), got \(8, 3, 4, 4\)"
    ):
        HolisticKD(num_samples=9)(outputs, outputs, indices=torch.arange(8), labels=torch.arange(8) % 3)
