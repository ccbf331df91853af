"""Steps that do without the student layer are refused with the cure, or trained without the loss."""

from typing import Any

import pytest
import torch
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor

from lightning_rkd.callbacks.distillation import RelationalDistillation
from lightning_rkd.distillation.layers import CaptureError
from lightning_rkd.losses.rkd import RKD
from tests.harness import toys
from tests.harness.ranks import Ranks

TEACHER = toys.teacher()


def by_hand(embedding: Tensor, x: Tensor) -> Tensor:
    with torch.no_grad():
        target = TEACHER(x)
    return RKD()(embedding, target)


class Alternates(toys.Student):
    """Every second batch is a task of the head alone."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        return self.loss(x, y) if batch_idx % 2 == 0 else self.head(x[:, :5]).square().mean()


class AlternatesManually(Alternates):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        optimizer.step()


class Combined(toys.Student):
    """Batches of two loaders, one of which ends early."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        labelled, plain = batch["labelled"], batch["plain"]
        own = self.head(plain[0][:, :5]).square().mean()
        return own if labelled is None else own + self.loss(*labelled)


def attached(**settings: Any) -> RelationalDistillation:
    return RelationalDistillation(TEACHER, RKD(), student_layer="backbone", **settings)


@pytest.mark.scenario("loops", "steps that leave the layer out")
@pytest.mark.parametrize("kind", [Alternates, AlternatesManually])
def test_steps_without_the_layer_train_the_task_alone(kind: Any) -> None:
    ours, expected, task = kind(), kind(by_hand), kind()
    trainer = toys.fit(ours, attached(absent="skip"), log_every_n_steps=1)
    toys.fit(expected)
    toys.fit(task)
    assert toys.gap(ours, expected) == 0.0
    assert toys.gap(task, expected) > 1e-3
    assert float(trainer.callback_metrics["distill/rkd"]) > 0


@pytest.mark.scenario("batches", "CombinedLoader with None")
def test_none_batches_of_a_combined_loader_are_skipped() -> None:
    def loaders() -> CombinedLoader:
        both = {"labelled": toys.loader(rows=16), "plain": toys.loader()}
        return CombinedLoader(both, "max_size")

    ours, expected = Combined(), Combined(by_hand)
    toys.fit(ours, attached(absent="skip", inputs="labelled.0", labels="labelled.1"), batches=loaders())
    toys.fit(expected, batches=loaders())
    assert toys.gap(ours, expected) == 0.0


def test_a_step_without_the_layer_is_refused_with_the_cure() -> None:
    with pytest.raises(CaptureError, match=r"'backbone' was never called.*alternating tasks.*CombinedLoader.*'skip'"):
        toys.fit(Alternates(), attached())
    with pytest.raises(ValueError, match="absent must be 'error' or 'skip', got 'ignore'"):
        attached(absent="ignore")


class Apart(toys.Student):
    """Ranks that do not agree on which step uses the layer."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        rank = torch.distributed.get_rank()
        return self.loss(*batch) if batch_idx != 1 or rank == 0 else self.head(batch[0][:, :5]).square().mean()


def train(rank: int | None, kind: type[toys.Student]) -> Any:
    data = toys.Rows(16 * toys.STEPS)
    with toys.devices(rank, find_unused_parameters=True) as where:
        module = kind()
        loader = toys.split(torch.utils.data.TensorDataset(data.x, data.y), rank, (8, 8))
        try:
            toys.fit(module, attached(absent="skip"), batches=loader, **where)
        except CaptureError as error:
            return str(error)
    return module.state_dict()


@pytest.mark.scenario("loops", "steps that leave the layer out, two ranks")
def test_ranks_skip_the_same_steps_or_fail_together(ranks: Ranks) -> None:
    for message in ranks.run(train, Apart):
        assert "ran on the ranks [0] only: a step must use or leave out the layer on all ranks alike" in message
    first, second = ranks.run(train, Alternates)
    whole = train(None, Alternates)
    for name, value in whole.items():
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], value, atol=1e-6, rtol=0)
