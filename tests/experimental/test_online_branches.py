"""Online branches: the equation, that diversity does something, and what is refused."""

import numpy as np
import pytest
import torch
from torch import nn

from lightning_rkd.experimental.online_branches import BranchLosses, OnlineBranches, classifier_overlap
from tests.harness import toys
from tests.harness.scheme_toys import CASES, fit, images, net
from tests.oracles import classifiers as oracle
from tests.oracles.differences import check_gradients

CASE = CASES["OnlineBranches"]


@pytest.mark.parametrize(("rows", "count", "temperature"), [(1, 2, 3.0), (5, 4, 1.5)])
def test_the_terms_and_their_gradients_are_those_of_the_equation(rows: int, count: int, temperature: float) -> None:
    logits = (2 * torch.randn(rows, 3, count, dtype=torch.float64)).requires_grad_()
    labels = torch.arange(rows) % 3
    fixed = oracle.ensemble([z.tolist() for z in logits.unbind(2)])  # a constant: branches learn from its value alone
    found = BranchLosses(temperature)(logits, labels)
    for term, value in enumerate(found.unbind()):
        check_gradients(
            value,
            {"z": logits},
            lambda given, term=term: oracle.online(
                list(np.moveaxis(given["z"], 2, 0)), labels.tolist(), temperature, fixed
            )[term],
        )


def test_the_overlap_and_its_gradient_are_those_of_every_two_classifiers() -> None:
    leaves = {str(width): torch.randn(3, width, dtype=torch.float64, requires_grad=True) for width in (2, 4, 5)}
    check_gradients(classifier_overlap([*leaves.values()]), leaves, lambda given: oracle.overlap([*given.values()]))


def test_the_overlap_of_nothing_has_a_finite_gradient() -> None:
    weights = [torch.zeros(3, 2, requires_grad=True) for _ in range(2)]
    classifier_overlap(weights).backward()
    assert all(torch.equal(w.grad, torch.zeros(3, 2)) for w in weights)


def test_the_three_parts_are_logged_and_add_up() -> None:
    trainer = fit(CASE.made(diversity=0.01))
    logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
    parts = [logged[name] for name in ("train/cross_entropy", "distill/ensemble", "distill/diversity")]
    assert logged["train/loss"] == pytest.approx(sum(parts))
    assert all(part > 0 for part in parts)


def test_branches_share_the_trunk_and_one_of_them_is_deployed() -> None:
    trunk = net().backbone
    module = OnlineBranches([nn.Linear(6, 3), nn.Linear(6, 3)], trunk, optimizer=toys.sgd)
    fit(module)
    x, _ = next(iter(images()))
    single = module.eval().student.single(1)
    assert torch.equal(single(x), module.student.branches[1](trunk(x)))
    torch.testing.assert_close(module(x), (single(x) + module.student.single(0)(x)) / 2)


def test_a_named_classifier_is_the_one_kept_diverse() -> None:
    def branch() -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 3), nn.Linear(3, 3))

    grads = []
    for classifier in (None, "1"):
        torch.manual_seed(0)
        module = OnlineBranches([branch(), branch()], classifier=classifier, diversity=1.0, optimizer=toys.sgd)
        fit(module, batches=list(images())[:1])
        grads.append(module.student.branches[0][2].weight.grad)
    assert not torch.equal(*grads)


def test_branches_of_different_classes_are_refused() -> None:
    module = OnlineBranches([net(out=3), net(1, out=4)])
    with pytest.raises(ValueError, match=r"got \[\(12, 3\), \(12, 4\)\]"):
        fit(module)
