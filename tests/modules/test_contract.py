"""Promises of every training scheme: it learns, saves, resumes, trains in half precision and on several devices."""

import copy
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import lightning_rkd.experimental
import lightning_rkd.modules
from lightning_rkd import DistillationModule
from lightning_rkd.losses.references import Reference
from tests.harness import toys
from tests.harness.ranks import Ranks
from tests.harness.scheme_toys import CASES, CLASSES, MIDDLE, SIZE, STEPS, Case, Losses, fit, images, keeps, net

every_scheme = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
with_a_teacher = [name for name, case in CASES.items() if case.teacher is not None]


def test_every_scheme_is_here_or_has_tests_of_its_own() -> None:
    packages = (lightning_rkd.modules, lightning_rkd.experimental)
    found = [getattr(package, name) for package in packages for name in package.__all__]
    schemes = {c.__name__ for c in found if issubclass(c, DistillationModule) and c is not DistillationModule}
    assert schemes - {"MHGDModule"} == set(CASES)


@every_scheme
def test_the_loss_falls_and_all_that_is_logged_is_finite(case: Case) -> None:
    losses = Losses()
    trainer = fit(case.made(), losses, max_epochs=2)
    assert sum(losses.values[-STEPS:]) < 0.95 * sum(losses.values[:STEPS])
    assert all(torch.isfinite(torch.tensor(v)) for v in losses.values)
    logged = trainer.callback_metrics
    assert sum(name.startswith("distill/") for name in logged) >= 2
    assert all(torch.isfinite(value) for value in logged.values())


@every_scheme
def test_every_parameter_gets_a_gradient(case: Case) -> None:
    module = case.made()
    fit(module, batches=list(images())[:1])
    assert [name for name, p in module.named_parameters() if p.grad is None] == []


@every_scheme
def test_a_checkpoint_is_safe_and_loads_without_the_teacher(case: Case, tmp_path: Path) -> None:
    network = None if case.teacher is None else case.teacher()
    module = case.made() if network is None else case.made(teacher=network)
    fit(module, keeps(tmp_path), enable_checkpointing=True)
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    tensors = [t for t in tree_leaves(saved) if isinstance(t, Tensor)]
    for parameter in () if network is None else network.parameters():
        assert not [t for t in tensors if parameter.ndim > 1 and torch.equal(t, parameter.detach())]
    assert saved["hyper_parameters"].items() >= case.settings.items()
    networks = {name: make() for name, make in case.networks.items()}
    loaded = case.scheme.load_from_checkpoint(tmp_path / "last.ckpt", **networks)
    assert toys.gap(loaded, module) == 0.0
    x, _ = next(iter(images()))
    assert torch.equal(loaded.eval()(x), module.eval()(x))


@pytest.mark.slow
@every_scheme
def test_a_resumed_run_is_the_uninterrupted_run(case: Case, tmp_path: Path) -> None:
    whole, first, resumed = (case.made() for _ in range(3))
    torch.manual_seed(5)
    fit(whole, max_epochs=3)
    torch.manual_seed(5)
    fit(first, keeps(tmp_path), enable_checkpointing=True)
    torch.manual_seed(9)  # what follows may not hang on the global generator
    resuming = toys.trainer(max_epochs=3, enable_checkpointing=True, callbacks=[keeps(tmp_path)])
    resuming.fit(resumed, images(), ckpt_path=tmp_path / "last.ckpt")
    assert toys.gap(resumed, whole) == 0.0
    assert toys.gap(first, whole) > 1e-3


@pytest.mark.slow
@every_scheme
@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_other_precisions_train(case: Case, precision: Any) -> None:
    losses = Losses()
    fit(case.made(), losses, precision=precision, max_epochs=2)
    assert sum(losses.values[-STEPS:]) < sum(losses.values[:STEPS])


@pytest.mark.parametrize("name", with_a_teacher)
def test_the_teacher_is_registered_nowhere_and_comes_back_as_it_was(name: str) -> None:
    case = CASES[name]
    assert case.teacher is not None
    network = case.teacher().train()
    before, module = toys.snapshot(network), case.made(teacher=network)
    fit(module, precision="bf16-true")
    assert not {id(p) for p in network.parameters()} & {id(p) for p in module.parameters()}
    assert toys.same(before, network)
    assert toys.attachments(module, network) == []
    assert copy.deepcopy(module).distiller.teacher.network is network


@every_scheme
def test_validation_and_prediction_need_no_teacher(case: Case) -> None:
    module = case.made(teacher=None) if case.teacher is not None else case.made()
    (measured,) = toys.trainer().validate(module, images(), verbose=False)
    assert sorted(measured) == (["val/accuracy"] if case.classifies else [])
    (first, *_) = toys.trainer().predict(module, images())
    assert len(first) == 12


@every_scheme
def test_missing_labels_are_an_error_with_the_cure_where_they_are_needed(case: Case) -> None:
    batches = [x for x, _ in images()]
    if not case.classifies:
        fit(case.made(), batches=batches)
        return
    with pytest.raises((ValueError, RuntimeError), match="the batch has none: say where they are, labels="):
        fit(case.made(), batches=batches)


@every_scheme
def test_it_says_where_it_comes_from(case: Case) -> None:
    scheme: Any = case.scheme
    assert isinstance(scheme.reference, Reference)
    assert scheme.bibtex.startswith("@")
    assert scheme.reference.citation.split("arXiv:")[1] in inspect.getdoc(scheme)


SHARED = [nn.Linear(1, 1)] * 2
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("MultiHeadDistillation", {"student_layers": [], "teacher_layers": []}, "at least one"),
    ("MultiHeadDistillation", {"student_layers": MIDDLE}, "as many student_layers as teacher_layers"),
    ("MultiHeadDistillation", {"temperature": 0.0}, "temperature must be a positive number"),
    ("MultiHeadDistillation", {"alpha": 1.5}, "alpha must be between 0 and 1, got 1.5"),
    ("MultiHeadDistillation", {"beta": -1.0}, "beta must be at least 0"),
    ("OnlineBranches", {"branches": [net()]}, "at least two branches"),
    ("OnlineBranches", {"branches": [nn.Sequential(layer) for layer in SHARED]}, "branches share parameters"),
    ("OnlineBranches", {"temperature": -1.0}, "temperature must be a positive number"),
    ("OnlineBranches", {"diversity": -1.0}, "diversity must be at least 0"),
    ("OnlineBranches", {"branches": [nn.Conv2d(1, 3, 8), nn.Conv2d(1, 3, 8)]}, "in branch 0 is a Conv2d"),
    ("OnlineBranches", {"classifier": "0"}, "'0' in branch 0 is a ReLU"),
    ("ResidualKD", {"head": nn.Linear(5, 3)}, "nothing trains the head: pass task_loss="),
    ("ResidualKD", {"teacher_layer": ["head", "backbone"]}, "name one teacher_layer"),
    ("CORSD", {"stages": MIDDLE[:1], "channels": [4]}, "two stages at least"),
    ("CORSD", {"channels": [4]}, "the channels of each"),
    ("CORSD", {"num_classes": 1}, "num_classes must be at least 2, got 1"),
]


@pytest.mark.parametrize(("name", "settings", "message"), REFUSED)
def test_settings_that_cannot_work_are_refused(name: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CASES[name].made(**settings)


# Two devices


def linear(seed: int, out: int) -> nn.Module:
    """A network without batch norm, whose statistics would be those of a device."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(SIZE**2, out))


UNNORMALISED: dict[str, Callable[[], dict[str, Any]]] = {
    "OnlineBranches": lambda: {"branches": [linear(seed, CLASSES) for seed in (1, 2)], "diversity": 0.1},
    "ResidualKD": lambda: {"student": linear(1, 5), "assistant": linear(2, 5), "weight": 0.1},
}


def trained(rank: int | None, name: str, counts: tuple[int, int], normalised: bool = True) -> dict[str, Tensor]:
    """Parameters after the rank's part of every batch, or on one device after whole batches."""
    module = CASES[name].made(**({} if normalised else UNNORMALISED[name]() | {"optimizer": toys.sgd}))
    with toys.devices(rank) as where:
        fit(module, batches=toys.split(images().dataset, rank, counts), **where)
    return {key: p.detach().clone() for key, p in module.named_parameters()}


def largest(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """The largest difference; heads that a fit makes are in one of the two only."""
    return max((a[key] - b[key]).abs().max().item() for key in a.keys() & b.keys())


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_two_devices_end_with_the_same_weights(ranks: Ranks, name: str) -> None:
    first, second = ranks.run(trained, name, (8, 4))
    assert list(first) == list(second)
    assert largest(first, second) == 0.0
    untrained = {key: p.detach() for key, p in CASES[name].made().named_parameters()}
    assert largest(first, untrained) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("name", UNNORMALISED)
@pytest.mark.parametrize("counts", [(6, 6), (8, 4)])
def test_two_devices_train_as_one_with_the_whole_batch(ranks: Ranks, name: str, counts: tuple[int, int]) -> None:
    first, second = ranks.run(trained, name, counts, False)
    assert largest(first, second) == 0.0
    assert largest(first, trained(None, name, counts, False)) <= 1e-6
