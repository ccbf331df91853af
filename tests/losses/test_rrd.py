import numpy as np
import pytest
import torch
from torch.nn import functional as F

from lightning_rkd.losses import RRD
from tests.oracles import rrd as oracle
from tests.oracles.differences import check_gradients
from tests.oracles.vectors import project


def small(**kwargs: float) -> RRD:
    return RRD(3, 4, dim=2, queue_size=5, **kwargs).double()  # type: ignore[arg-type]


def by_loops(loss: RRD, student: torch.Tensor, teacher: torch.Tensor, queue: list[list[float]]) -> float:
    layers = loss.student_projector.linear, loss.teacher_projector.linear
    s, t = (
        project(m.weight.tolist(), m.bias.tolist(), x.tolist()) for m, x in zip(layers, (student, teacher), strict=True)
    )
    queue += t
    return oracle.rrd(s, t, queue[-5:], loss.student_temperature, loss.teacher_temperature)


@pytest.mark.parametrize("temperatures", [(0.1, 0.02), (0.5, 1.0)])
def test_the_loss_over_several_steps_is_that_of_the_loops(temperatures):
    torch.manual_seed(0)
    loss = small(student_temperature=temperatures[0], teacher_temperature=temperatures[1])
    queue = loss.queue.rows.tolist()
    for n in (2, 4, 1, 5, 3):
        student, teacher = torch.randn(n, 3, dtype=torch.float64), torch.randn(n, 4, dtype=torch.float64)
        expected = by_loops(loss, student, teacher, queue)
        assert loss(student, teacher).item() == pytest.approx(expected, rel=1e-9)


def test_gradients_to_rows_and_projector_are_those_of_the_loops():
    loss = small().eval()
    student, teacher = torch.randn(4, 3, dtype=torch.float64), torch.randn(4, 4, dtype=torch.float64)
    fixed = loss.teacher_projector.linear
    t = project(fixed.weight.tolist(), fixed.bias.tolist(), teacher.tolist())
    queue = [*loss.queue.rows.tolist(), *t][-5:]

    def loops(given):
        s = project(given["weight"], given["bias"], given["student"])
        return oracle.rrd(s, t, queue, loss.student_temperature, loss.teacher_temperature)

    leaves = {"student": student.requires_grad_(), **dict(loss.student_projector.linear.named_parameters())}
    check_gradients(loss(student, teacher), leaves, loops)


def test_the_teachers_map_never_learns_and_the_students_does():
    loss = small()
    loss(torch.randn(4, 3), torch.randn(4, 4)).backward()
    assert not any(p.requires_grad for p in loss.teacher_projector.parameters())
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in loss.student_projector.parameters())


def test_a_sharp_teacher_makes_it_info_nce():
    torch.manual_seed(1)
    loss = small(student_temperature=0.1, teacher_temperature=1e-9)
    student, teacher = torch.randn(5, 3, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)
    s, t = loss.student_projector(student), loss.teacher_projector(teacher)
    torch.testing.assert_close(loss(student, teacher), F.cross_entropy(s @ t.T / 0.1, torch.arange(5)))


def test_the_defaults_are_those_of_the_authors_scripts():
    loss = RRD(2, 2)
    assert (loss.dim, loss.queue_size) == (128, 16384)
    assert (loss.student_temperature, loss.teacher_temperature) == (0.1, 0.02)
    np.testing.assert_allclose(loss.queue.rows.norm(dim=1).numpy(), 1, rtol=1e-5)


def test_what_does_not_fit_is_refused_with_the_cure():
    with pytest.raises(ValueError, match="RRD: a batch of 6 rows does not fit into the queue of 5; pass a larger"):
        small()(torch.randn(6, 3), torch.randn(6, 4))
    with pytest.raises(ValueError, match="RRD: teacher_temperature must be a positive number, got 0"):
        RRD(teacher_temperature=0)
