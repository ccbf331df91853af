"""Matryoshka: the copies of the wrapped loss, their tensors, and both faces."""

import pytest
import torch
from torch import Tensor

from lightning_rkd.losses import CRD, CSD, RKD, RRD, Matryoshka
from tests.harness import toys
from tests.harness.faces import FACES, User, gradients, largest, taught


def test_every_copy_has_tensors_for_its_own_columns():
    loss = Matryoshka(CSD(student_dim=9, teacher_dim=6), dims=[2, 4])
    assert [one.project.weight.shape for one in loss.losses] == [(6, 2), (6, 4)]
    assert loss.missing_sizes == ()
    lazy = Matryoshka(CRD(num_samples=10, negatives=4), dims=[2, 4])
    assert lazy.missing_sizes == ("teacher_dim",)
    assert lazy.suggest_call({"teacher_dim": 7, "student_dim": 9}) == "Matryoshka(CRD(teacher_dim=7), dims=[2, 4])"


def test_memories_of_the_copies_are_apart_and_filled_together():
    loss = Matryoshka(RRD(queue_size=8), dims=[2, 4])
    loss(torch.randn(3, 4), torch.randn(3, 6))
    first, second = (one.queue for one in loss.losses)
    assert (first.filled, second.filled) == (3, 3)
    assert not torch.equal(*(next(x for x in queue.buffers() if x.ndim == 2) for queue in (first, second)))


def test_what_the_wrapped_loss_needs_is_handed_on():
    loss = Matryoshka(CRD(num_samples=10, negatives=4), dims=[2])
    assert (loss.needs, loss.required) == (CRD.needs, CRD.required)
    with pytest.raises(ValueError, match=r"Matryoshka needs \['indices'\]"):
        loss(torch.randn(3, 4), torch.randn(3, 6))
    assert torch.isfinite(loss(torch.randn(3, 4), torch.randn(3, 6), indices=torch.arange(3)))


@pytest.mark.scenario("loops", "Matryoshka")
@pytest.mark.parametrize("face", FACES)
def test_both_faces_train_as_the_sum_written_by_hand(face: str) -> None:
    teacher = toys.teacher()
    written = [toys.Projected(d, 7) for d in (2, 5)]

    def by_hand(embedding: Tensor, x: Tensor) -> Tensor:
        with torch.no_grad():
            target = teacher.eval()(x)
        own = sum(0.5 * loss(embedding[:, :d], target) for d, loss in zip((2, 5), written, strict=True))
        return own + 0.5 * RKD()(embedding[:, :3], target) + 0.5 * RKD()(embedding, target)

    loss = Matryoshka(toys.Projected(teacher_dim=7 if face == "callback" else None), [2, 5]) + Matryoshka(RKD(), [3, 5])
    expected = gradients(User(by_hand), max_steps=1)
    module, callbacks = taught(face, toys.teacher(), loss)
    assert largest(gradients(module, *callbacks, max_steps=1), expected) <= 1e-6
    assert largest(gradients(User(), max_steps=1), expected) > 1e-3
