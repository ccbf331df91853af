"""Residual distillation: its two terms, who learns from which, and what it refuses."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_rkd.experimental.residual_kd import ResidualKD, ResidualPair
from lightning_rkd.metrics.retrieval import EmbeddingRetrieval
from tests.harness import toys
from tests.harness.scheme_toys import CASES, fit, images, net, teacher
from tests.oracles import classifiers as oracle
from tests.oracles.differences import check_gradients

CASE = CASES["ResidualKD"]


def test_both_terms_and_their_gradients_are_those_of_the_equation() -> None:
    module, x = CASE.made(), torch.randn(4, 3, 2, 2, dtype=torch.float64)
    s, a, t = (part.requires_grad_() for part in x.unbind(1))
    mimic, residual = (module.distiller.losses[name].loss for name in ("student", "assistant"))
    rows = [v.detach().flatten(1).numpy() for v in (s, t)]
    check_gradients(mimic([s, a], [t, t]), {"s": s}, lambda given: oracle.squared(given["s"].reshape(4, -1), rows[1]))
    left = rows[1] - rows[0]  # the student is a constant there
    check_gradients(residual([s, a], [t, t]), {"a": a}, lambda given: oracle.squared(given["a"].reshape(4, -1), left))
    assert torch.autograd.grad(residual([s, a], [t, t]), s, allow_unused=True) == (None,)


def test_the_student_learns_exactly_as_it_would_alone() -> None:
    ours, alone, network = CASE.made(optimizer=toys.sgd, weight=1.0), net(1, out=5), teacher(out=5).eval()
    fit(ours)
    optimizer = toys.sgd(alone.parameters())
    for x, _ in images():
        with torch.no_grad():
            target = network(x)
        optimizer.zero_grad()
        F.mse_loss(alone(x), target).backward()
        optimizer.step()
    assert toys.gap(ours.student.student, alone) == 0.0


def test_a_head_classifies_the_sum() -> None:
    head = nn.Linear(5, 3)
    before = head.weight.detach().clone()
    module = CASE.made(
        head=head, task_loss=nn.CrossEntropyLoss(), task_reads="logits", metrics={"r": EmbeddingRetrieval()}
    )
    trainer = toys.trainer()
    trainer.fit(module, images(), images())
    assert {"train/task", "distill/student", "distill/assistant", "val/recall_at_1"} <= set(trainer.callback_metrics)
    x, _ = next(iter(images()))
    assert module.eval()(x).shape == (12, 3)
    assert not torch.equal(head.weight, before)
    assert toys.trainer().predict(module, images())[0].shape == (12, 5)


@pytest.mark.parametrize("layer", ["head", "head.linear", lambda network: network.head])
def test_the_teacher_may_be_read_at_a_layer(layer: Any) -> None:
    named, plain = CASE.made(teacher_layer=layer), CASE.made()
    fit(named)
    fit(plain)
    assert toys.gap(named, plain) == 0.0


def test_maps_are_compared_as_they_are() -> None:
    def module(network: nn.Module) -> ResidualKD:
        student, assistant = (net(seed).backbone.stage1 for seed in (0, 1))
        return ResidualKD(student, assistant, network, teacher_layer="backbone.stage1", optimizer=toys.sgd)

    fit(module(net(2)))
    with pytest.raises(ValueError, match=r"student and assistant \(12, 4, 8, 8\), teacher \(12, 8, 8, 8\)"):
        fit(module(teacher()))


def test_what_cannot_work_is_refused() -> None:
    with pytest.raises(ValueError, match=r"student and assistant \(12, 5\), teacher \(12, 3\)"):
        fit(CASE.made(teacher=teacher()))
    with pytest.raises(ValueError, match=r"need one shape: got \(12, 5\) and \(12, 6\); end both with a layer"):
        fit(CASE.made(assistant=nn.Sequential(nn.Flatten(), nn.Linear(64, 6))))
    CASE.made(head=nn.Linear(5, 3).requires_grad_(False))


def test_a_pair_passes_keywords_on() -> None:
    class Keyed(nn.Module):
        def forward(self, x: torch.Tensor, factor: float = 1.0) -> torch.Tensor:
            return factor * x

    assert ResidualPair(Keyed(), Keyed())(torch.ones(1), factor=3.0) == 6.0
