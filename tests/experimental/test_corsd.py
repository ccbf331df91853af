"""Class-oriented self-distillation: the terms, the triplets, the memory, and what is refused."""

from typing import Any

import pytest
import torch
from torch import nn

from lightning_rkd.experimental.corsd import PARTS, ClassMemory, triplets
from lightning_rkd.losses.parts.memory import generator
from lightning_rkd.utils.types import Outputs
from tests.harness.scheme_toys import CASES, STEPS, fit, images
from tests.oracles import classifiers as oracle
from tests.oracles.differences import check_gradients

CASE = CASES["CORSD"]


def outputs(rows: int = 6) -> tuple[Outputs, torch.Tensor]:
    maps = [torch.randn(rows, width, size, size, dtype=torch.float64) for width, size in ((4, 6), (6, 3))]
    return Outputs(feature_maps=maps, logits=torch.randn(rows, 3, dtype=torch.float64)), torch.arange(rows) % 3


class Given(nn.Module):
    """A relation net with given outputs: those for positives in its first call, for negatives in the next."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        shapes = ((rows,), (rows, 3)) * 2
        self.outputs = nn.ParameterList(torch.randn(shape, dtype=torch.float64) for shape in shapes)
        self.calls = 0

    def forward(self, maps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self.calls += 1
        return tuple(self.outputs[:2] if self.calls % 2 else self.outputs[2:])


def test_gradients_of_the_terms_take_the_deepest_stage_as_constant() -> None:
    relations = CASE.made().double().relations.eval()
    here, labels = outputs()
    relations.nets = nn.ModuleList(Given(len(labels)) for _ in here.feature_maps)
    _, negative = triplets(labels, generator(0, 0))
    leaves = dict(relations.nets.named_parameters())

    def unpack(given: dict[str, Any]) -> tuple[list[Any], list[Any]]:
        each = [[given[f"{k}.outputs.{i}"].tolist() for i in range(4)] for k in range(len(relations.nets))]
        return [tuple(o[:2]) for o in each], [tuple(o[2:]) for o in each]

    deepest = tuple(both[-1] for both in unpack({name: p.detach() for name, p in leaves.items()}))
    for part in range(3):
        check_gradients(
            relations(here, here, labels=labels)[part],
            leaves,
            lambda given, part=part: oracle.relations(
                *unpack(given), labels.tolist(), labels[negative].tolist(), deepest
            )[part],
        )


def test_all_terms_but_the_memory_are_those_of_the_equation() -> None:
    relations = CASE.made().double().relations.eval()
    here, labels = outputs()
    classes, triplet, scores, _ = relations(here, here, labels=labels).tolist()
    positive, negative = triplets(labels, generator(0, 0))
    both = []
    for partner in (positive, negative):
        with torch.no_grad():
            pairs = zip(relations.nets, here.feature_maps, strict=True)
            both.append([tuple(v.tolist() for v in n(torch.cat([x, x[partner]], 1))) for n, x in pairs])
    expected = oracle.relations(*both, labels.tolist(), labels[negative].tolist())
    assert (classes, triplet, scores) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("training", [True, False])
def test_the_memory_tells_the_own_class_from_another(training: bool) -> None:
    relations = CASE.made().double().relations.train(training)
    here, labels = outputs()
    before = torch.randn(5, 3, dtype=torch.float64).softmax(1), torch.tensor([0, 2, 2, 1, 0])
    relations.memory.update(*before)
    random = generator(0, 1)
    triplets(labels, random)
    other = (labels + torch.randint(1, 3, labels.shape, generator=random)) % 3
    assert bool((other != labels).all())
    norm = relations.judge[1]
    constants = {"eps": norm.eps, "mean": None, "var": None}
    if not training:
        constants |= {"mean": norm.running_mean.item(), "var": norm.running_var.item()}

    def loops(given: dict[str, Any]) -> float:
        names = {"bias": "0.bias", "gamma": "1.weight", "beta": "1.bias", "slope": "3.weight", "offset": "3.bias"}
        judge = constants | {name: given[key].item() for name, key in names.items()}
        judge["weights"] = given["0.weight"][0]
        seen = before[0].tolist(), before[1].tolist()
        return oracle.judged(given["logits"], labels.tolist(), other.tolist(), *seen, judge)

    leaves = {"logits": here.logits.requires_grad_(), **dict(relations.judge.named_parameters())}
    check_gradients(relations(here, here, labels=labels)[3], leaves, loops)


def test_the_deepest_stage_teaches_and_does_not_learn_from_the_others() -> None:
    relations = CASE.made(positive_ce=0.0, negative_ce=0.0, triplet=0.0, memory=0.0).double().relations
    here, labels = outputs()
    relations(here, here, labels=labels).sum().backward()
    assert any(float(p.grad.abs().max()) > 0 for p in relations.nets[0].parameters())
    assert all(p.grad is None or float(p.grad.abs().max()) == 0 for p in relations.nets[1].parameters())


@pytest.mark.parametrize("seed", range(5))
def test_partners_are_of_the_same_and_of_another_class(seed: int) -> None:
    labels = torch.tensor([2, 0, 0, 1, 2, 2, 0])
    positive, negative = triplets(labels, torch.Generator().manual_seed(seed))
    assert torch.equal(labels[positive], labels)
    assert bool((labels[negative] != labels).all())
    alone = positive == torch.arange(7)
    assert alone.tolist() == [False, False, False, True, False, False, False]


def test_the_memory_is_the_mean_prediction_by_class() -> None:
    memory = ClassMemory(3)
    predictions = torch.randn(6, 3).softmax(1)
    memory.update(predictions[:4], torch.tensor([0, 0, 1, 0]))
    memory.update(predictions[4:], torch.tensor([1, 0]))
    rows = torch.cat([torch.tensor([[1.0, 0.0, 0.0]]), predictions[[0, 1, 3, 5]]])
    torch.testing.assert_close(memory.means()[0], rows.mean(0))
    assert torch.equal(memory.means()[2], torch.tensor([0.0, 0.0, 1.0]))


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_the_memory_counts_its_steps_and_keeps_its_precision(precision: Any) -> None:
    module = CASE.made()
    fit(module, precision=precision)
    memory = module.relations.memory
    assert module.student.head.linear.weight.dtype == (torch.float32 if precision == "32-true" else torch.bfloat16)
    assert int(memory.steps) == STEPS
    torch.testing.assert_close(memory.sums.sum(1), torch.tensor([41.0, 41.0, 41.0]))  # float32


def test_the_parts_are_logged_and_add_up() -> None:
    trainer = fit(CASE.made())
    logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
    parts = [logged["train/cross_entropy"], *(logged[f"distill/{name}"] for name in PARTS)]
    assert logged["train/loss"] == pytest.approx(sum(parts), rel=1e-5)


def test_batches_and_optimizers_that_cannot_work_are_refused() -> None:
    x, y = next(iter(images()))
    with pytest.raises(ValueError, match="all 12 rows of the batch are of one"):
        fit(CASE.made(), batches=[(x, 0 * y)])
    with pytest.raises(ValueError, match=r"one class per sample, \(N,\), got labels \(12, 3\)"):
        fit(CASE.made(), batches=[(x, nn.functional.one_hot(y, 3).float())])
    with pytest.raises(
        ValueError, match=r"^CORSD was made for student_dim=\(4, 7\), but received student_dim=\(4, 6\): make"
    ):
        fit(CASE.made(channels=[4, 7]), batches=[(x, y)])
    with pytest.raises(ValueError, match="LBFGS"):
        fit(CASE.made(optimizer=torch.optim.LBFGS), batches=[(x, y)])
