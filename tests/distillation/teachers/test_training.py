"""Teachers of every kind under a Trainer, through both faces, against the loss written by hand."""

import copy
import math
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from lightning_rkd.data.indexing import with_indices
from lightning_rkd.distillation.teachers import EnsembleTeacher, Teacher
from lightning_rkd.losses.rkd import RKD, RKDAngle, RKDDistance
from lightning_rkd.metrics.agreement import RelationalAgreement
from tests.harness import toys
from tests.harness.faces import FACES, Net, User, gradients, largest, taught

COMBINE = ("relations", "losses")
PRECISIONS = {"32-true": torch.float32, "bf16-true": torch.bfloat16, "64-true": torch.float64}
"""Precisions that a teacher is cast to."""


def wide() -> nn.Module:
    """A teacher of width 9, with dropout and batch norm, handed in in training mode; that of ``toys`` has 7."""
    return toys.teacher(dropout=0.5, norm=True, seed=1, width=12, out=9).train()


def embed(network: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return network(x)


# Several teachers


def pair() -> list[nn.Module]:
    return [toys.teacher(dropout=0.5, norm=True).train(), wide()]


@pytest.mark.parametrize("face", FACES)
def test_averaged_losses_have_the_gradient_of_the_average_written_by_hand(face: str) -> None:
    first, second = (network.eval() for network in pair())

    def by_hand(embedding: Tensor, x: Tensor) -> Tensor:
        return 0.75 * RKD()(embedding, embed(first, x)) + 0.25 * RKD()(embedding, embed(second, x))

    expected = gradients(User(by_hand))
    module, callbacks = taught(face, EnsembleTeacher(pair(), [3, 1], "losses"), RKD())
    assert largest(gradients(module, *callbacks), expected) <= 1e-6
    assert largest(gradients(User()), expected) > 1e-3


def angles(parts: list[tuple[float, Tensor]]) -> Tensor:
    """Cosines at every sample j between every i and k; inner products are those of all parts, weighted."""
    dots = [w * torch.einsum("jid,jkd->jik", *[x[None] - x[:, None]] * 2) for w, x in parts]
    total = torch.stack(dots).sum(0)
    lengths = total.diagonal(dim1=1, dim2=2).clamp(min=1e-30).sqrt()
    return total / (lengths[:, :, None] * lengths[:, None, :])


def distances(parts: list[tuple[float, Tensor]]) -> Tensor:
    """Distances between different samples, in units of their mean; squares are those of all parts, weighted."""
    squares = torch.stack([w * (x[:, None] - x[None]).square().sum(2) for w, x in parts]).sum(0)
    roots = squares[~torch.eye(len(squares), dtype=torch.bool)].sqrt()
    return roots / roots.mean()


@pytest.mark.parametrize("face", FACES)
def test_averaged_relations_have_the_gradient_of_the_loss_written_by_hand(face: str) -> None:
    first, second = (network.double().eval() for network in pair())

    def by_hand(embedding: Tensor, x: Tensor) -> Tensor:
        student, teachers = [(1.0, embedding)], [(0.75, embed(first, x)), (0.25, embed(second, x))]
        of_distances = F.smooth_l1_loss(distances(student), distances(teachers), reduction="sum") / len(x) ** 2
        gram = torch.stack([w * t @ t.T for w, t in teachers]).sum(0)
        of_angles = F.smooth_l1_loss(angles(student), angles(teachers))
        return of_distances + 2 * of_angles + F.mse_loss(embedding @ embedding.T, gram)

    expected = gradients(User(by_hand), precision="64-true")
    loss = RKDDistance() + 2 * RKDAngle() + toys.Gram()
    module, callbacks = taught(face, EnsembleTeacher(pair(), [3, 1]), loss)
    assert largest(gradients(module, *callbacks, precision="64-true"), expected) <= 1e-9
    assert largest(gradients(User(), precision="64-true"), expected) > 1e-3


def loud() -> list[nn.Module]:
    """Two teachers, of which the second has distances a hundred times as large."""
    first, second = pair()
    for p in second.last.parameters():
        p.data *= 100
    return [first, second]


@pytest.mark.parametrize("face", FACES)
def test_standardised_teachers_weigh_alike_as_written_by_hand(face: str) -> None:
    every = toys.Rows(40).x.double()  # the training set
    networks = [network.double().eval() for network in loud()]
    means = [embed(network, every).mean(0) for network in networks]
    scales = [embed(network, every).var(0).mean().sqrt() for network in networks]
    assert scales[1] > 50 * scales[0]

    def by_hand(embedding: Tensor, x: Tensor) -> Tensor:
        parts = [(embed(n, x) - m) / s for n, m, s in zip(networks, means, scales, strict=True)]
        gram = 0.75 * parts[0] @ parts[0].T + 0.25 * parts[1] @ parts[1].T
        of_distances = F.smooth_l1_loss(
            distances([(1.0, embedding)]), distances([(0.75, parts[0]), (0.25, parts[1])]), reduction="sum"
        )
        return of_distances / len(x) ** 2 + F.mse_loss(embedding @ embedding.T, gram)

    expected, loss = gradients(User(by_hand), precision="64-true"), RKDDistance() + toys.Gram()
    module, callbacks = taught(face, EnsembleTeacher(loud(), [3, 1], standardise_rows=40), loss)
    assert largest(gradients(module, *callbacks, precision="64-true"), expected) <= 1e-9
    module, callbacks = taught(face, EnsembleTeacher(loud(), [3, 1]), loss)  # one step; then the loss explodes
    assert largest(gradients(module, *callbacks, precision="64-true", max_steps=1), expected[:1]) > 1


@pytest.mark.parametrize("face", FACES)
def test_a_projector_and_a_memory_see_one_teacher_as_wide_as_all(face: str) -> None:
    first, second = (network.eval() for network in pair())
    written = toys.Projected(5, 16), toys.Remembers(16, 40)

    def by_hand(embedding: Tensor, x: Tensor) -> Tensor:
        both = torch.cat([math.sqrt(0.75) * embed(first, x), 0.5 * embed(second, x)], dim=1)
        return written[0](embedding, both) + written[1](embedding, both, indices=torch.arange(8))

    loss = {"projected": toys.Projected(), "remembers": toys.Remembers()}
    batches, teacher = with_indices(toys.loader()), EnsembleTeacher(pair(), [3, 1])
    module, callbacks = taught(face, teacher, loss)
    if face == "callback":
        with pytest.raises(ValueError, match=r"pass Projected\(student_dim=5, teacher_dim=16\)"):
            toys.fit(module, *callbacks, batches=batches)
        loss = {"projected": toys.Projected(5, 16), "remembers": toys.Remembers(16, 40)}
        module, callbacks = taught(face, teacher, loss)
    expected = gradients(User(by_hand), max_steps=1)
    assert largest(gradients(module, *callbacks, max_steps=1, batches=batches), expected) <= 1e-6
    assert largest(gradients(User(), max_steps=1), expected) > 1e-3
    assert toys.gap(loss["remembers"], written[1]) <= 1e-6
    assert float(written[1].mean.value.abs().max()) > 0


class Stops(pl.Callback):
    """Notes the teachers' precision, and stops a fit in the middle."""

    def __init__(self, networks: list[nn.Module], stop: bool) -> None:
        self.networks, self.stop = networks, stop
        self.seen: set[torch.dtype] = set()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.seen |= {t.dtype for n in self.networks for t in (*n.parameters(), *n.buffers()) if t.is_floating_point()}
        assert not any(module.training for network in self.networks for module in network.modules())
        if self.stop and batch_idx == 1:
            raise ArithmeticError("stop")


@pytest.mark.parametrize("face", FACES)
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("kind", ["one", *COMBINE])
def test_it_runs_in_the_precision_of_the_student_and_is_restored(kind: Any, precision: str, face: str) -> None:
    networks = pair()
    before = [toys.snapshot(network) for network in networks]
    teacher = networks[1] if kind == "one" else EnsembleTeacher(networks, combine=kind)
    taught_networks = networks[1:] if kind == "one" else networks
    for stop in (True, False):
        module, callbacks = taught(face, teacher, RKD())
        watch = Stops(taught_networks, stop)
        with pytest.raises(ArithmeticError) if stop else nullcontext():
            toys.fit(module, *callbacks, watch, precision=precision)
        assert watch.seen == {PRECISIONS[precision]}
        assert all(toys.same(*each) for each in zip(before, networks, strict=True)), "batch statistics included"
        assert toys.attachments(module, *networks) == []


@pytest.mark.parametrize("face", FACES)
@pytest.mark.parametrize("kind", ["one", *COMBINE])
def test_no_teacher_is_in_a_checkpoint_optimizer_or_average(kind: Any, face: str, tmp_path: Path) -> None:
    networks = pair()
    module, callbacks = taught(face, networks[1] if kind == "one" else EnsembleTeacher(networks, combine=kind), RKD())
    own = {id(p) for network in networks for p in network.parameters()}
    assert not own & {id(p) for p in module.parameters()}
    trainer = toys.fit(module, *callbacks, WeightAveraging())
    assert not own & {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    shapes = {tuple(p.shape) for network in networks for p in network.parameters()}
    shapes -= {tuple(p.shape) for p in Net().parameters()}
    assert not shapes & {tuple(t.shape) for t in tree_leaves(saved) if isinstance(t, Tensor)}
    assert "teacher" not in saved.get("hyper_parameters", {})


def test_agreement_with_an_ensemble_is_that_with_the_joint_embedding() -> None:
    x, _ = toys.loader().dataset.tensors
    for combine in COMBINE:
        first, second = (network.eval() for network in pair())
        teacher = EnsembleTeacher([first, second], [1, 3], combine)
        module, _ = taught("module", teacher, RKD(), metrics={"agreement": RelationalAgreement(k=2, triplets=50)})
        trainer = toys.trainer()
        trainer.fit(module, toys.loader(), toys.loader())
        expected = RelationalAgreement(k=2, triplets=50)
        joined = torch.cat([0.5 * embed(first, x), math.sqrt(0.75) * embed(second, x)], dim=1)
        expected.update(embed(module.student.backbone, x), joined)
        for name, value in expected.compute().items():
            assert float(trainer.callback_metrics[f"val/{name}"]) == pytest.approx(float(value), abs=1e-4)


class TrainsACopy(pl.Callback):
    """Copies the module in the middle of its fit, and trains the copy."""

    def __init__(self) -> None:
        self.copies: list[pl.LightningModule] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        if not self.copies:
            self.copies = [copy.deepcopy(pl_module)]
            toys.fit(self.copies[0], precision="bf16-true")


@pytest.mark.parametrize("kind", ["one", *COMBINE])
def test_training_a_copy_during_a_fit_does_not_take_the_teacher_away(kind: Any) -> None:
    networks = pair()
    before = [toys.snapshot(network) for network in networks]
    teacher = networks[1] if kind == "one" else EnsembleTeacher(networks, combine=kind)
    trains = TrainsACopy()
    disturbed, _ = taught("module", teacher, RKD())
    quiet, _ = taught("module", teacher, RKD())
    assert largest(gradients(disturbed, trains, precision="bf16-true"), gradients(quiet, precision="bf16-true")) == 0.0
    assert toys.gap(trains.copies[0].student, Net()) > 1e-3
    assert all(toys.same(*each) for each in zip(before, networks, strict=True))


# Left alone, and compiled


@pytest.mark.parametrize("face", FACES)
@pytest.mark.parametrize("layer", [None, "first"])
def test_a_quantised_teacher_teaches_and_is_left_alone(layer: str | None, face: str) -> None:
    network = toys.quantised(wide())
    part: Any = network if layer is None else network.first
    assert not isinstance(part, nn.Linear)
    x = toys.Rows(8).x
    before = embed(network, x)
    assert 0 < float((before - embed(wide().eval(), x)).abs().max()) < 0.1, "in eight bits it gives about the same"
    expected = gradients(User(lambda embedding, x: RKD()(embedding, embed(part, x))))
    module, callbacks = taught(face, Teacher(network, move=False), RKD(), teacher_layer=layer)
    assert largest(gradients(module, *callbacks), expected) == 0.0
    assert largest(gradients(User()), expected) > 1e-3
    assert torch.equal(embed(network, x), before)
    assert toys.attachments(network) == []


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


BACKENDS = ["eager", pytest.param("inductor", marks=pytest.mark.slow)]


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("face", FACES)
@pytest.mark.parametrize("layer", [None, "drop"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_compiled_teacher_teaches_as_the_plain_one(backend: str, layer: str | None, face: str) -> None:
    network, plain = wide(), wide()
    before = toys.snapshot(network)
    compiled: Any = torch.compile(network, backend=backend)
    for _ in range(2):  # a second fit hooks what is compiled by then
        runs = [taught(face, each, RKD(), teacher_layer=layer) for each in (compiled, plain)]
        ours, expected = (gradients(module, *callbacks) for module, callbacks in runs)
        assert largest(ours, expected) <= 1e-6
        assert toys.same(before, network)
        assert toys.attachments(network, compiled) == []
    assert counters["frames"]["ok"] > 0, "nothing was compiled, so the test would prove nothing"
    assert largest(gradients(User()), expected) > 1e-3
