"""Losses inside a module under a Trainer: DDP's buffers, averaged weights, sharded parameters."""

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.distributed.fsdp import fully_shard

from lightning_rkd.callbacks.distillation import RelationalDistillation
from lightning_rkd.losses.base import RelationalLoss
from lightning_rkd.losses.rkd import RKD
from lightning_rkd.modules.distillation import DistillationModule
from tests.callbacks.test_ddp import Sharded, batches
from tests.harness import toys
from tests.harness.ranks import Ranks
from tests.harness.scheme_toys import CASES, fit


class PerSample(toys.Projected):
    """A mean over samples, with parameters: its gradient differs between ranks."""

    gather = False


class WholeSharded(Sharded):
    def configure_model(self) -> None:
        super().configure_model()
        fully_shard(self, mesh=self.device_mesh["data_parallel"])


def test_the_memory_of_a_scheme_is_kept_from_ddp_too() -> None:
    module = CASES["CORSD"].made()
    fit(module)
    assert module._ddp_params_and_buffers_to_ignore == ["relations.memory.steps", "relations.memory.sums"]


class Holds(pl.Callback):
    """Has a network of its own, which Lightning has trained before or not."""

    def __init__(self, network: pl.LightningModule) -> None:
        self.network = network


def test_a_callback_that_holds_another_network_has_copied_nothing() -> None:
    trained, loss = toys.Student(), toys.Projected(5, 7)
    toys.fit(trained)
    ours = RelationalDistillation(toys.teacher(), loss, student_layer="backbone")
    toys.fit(toys.Student(), Holds(trained), Holds(toys.Student()), ours)
    assert toys.gap(loss, toys.Projected(5, 7)) > 1e-3


# Sharded modules, over two processes


def on_a_mesh(rank: int | None, module: pl.LightningModule, *callbacks: pl.Callback) -> dict[str, Tensor]:
    with toys.devices(rank) as where:
        if rank is not None:
            where["strategy"] = ModelParallelStrategy(2, 1, process_group_backend="gloo")
        toys.fit(module, *callbacks, batches=batches(rank), **where)
        whole = {name: getattr(x, "full_tensor", lambda x=x: x)() for name, x in module.state_dict().items()}
        return {name: x.clone() for name, x in whole.items()}


def attached(rank: int, student: type[toys.Student], loss: RelationalLoss) -> Any:
    callback = RelationalDistillation(toys.teacher(), loss, student_layer="backbone")
    try:
        on_a_mesh(rank, student(), callback)
    except ValueError as error:
        return str(error)
    return dict(loss.state_dict())


@pytest.mark.parametrize(
    ("student", "loss"), [(Sharded, PerSample), (WholeSharded, PerSample), (WholeSharded, toys.Projected)]
)
def test_parameters_that_a_mesh_would_not_keep_alike_are_refused(ranks: Ranks, student: Any, loss: Any) -> None:
    for answer in ranks.run(attached, student, loss(5, 7)):
        assert "under ModelParallelStrategy every rank would train its own parameters" in str(answer)


def test_parameters_of_a_loss_that_sees_all_rows_stay_alike_on_a_mesh(ranks: Ranks) -> None:
    first, second = ranks.run(attached, Sharded, toys.Projected(5, 7))
    assert toys.largest_gap(first, second) == 0.0
    assert toys.largest_gap(first, toys.Projected(5, 7).state_dict()) > 1e-3


def balanced(rank: int | None, layer: str) -> dict[str, Tensor]:
    loss = {"student_layer": layer, "teacher_layer": "first", "balance": 0.5}
    student = toys.Student if rank is None else Sharded
    return on_a_mesh(rank, student(), RelationalDistillation(toys.teacher(), RKD(), **loss))  # type: ignore[arg-type]


@pytest.mark.scenario("loops", "FSDP2 with balance")
@pytest.mark.parametrize("layer", ["backbone", "backbone.first", "head"])
def test_balance_on_a_mesh_is_that_of_one_device(ranks: Ranks, layer: str) -> None:
    first, second = ranks.run(balanced, layer)
    assert toys.largest_gap(first, second) == 0.0
    assert toys.largest_gap(first, balanced(None, layer)) <= 1e-6


class ShardsItsLoss(DistillationModule):
    def configure_model(self) -> None:
        if isinstance(self.trainer.strategy, ModelParallelStrategy):
            for part in (self.loss, self.student):
                fully_shard(part, mesh=self.device_mesh["data_parallel"])


def itself_sharded(rank: int | None) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return on_a_mesh(rank, ShardsItsLoss(toys.Backbone(), toys.teacher(), PerSample(), optimizer=toys.sgd))


def test_a_loss_that_is_sharded_by_itself_trains_as_on_one_device(ranks: Ranks) -> None:
    first, second = ranks.run(itself_sharded)
    assert toys.largest_gap(first, second) == 0.0
    assert toys.largest_gap(first, itself_sharded(None)) <= 1e-6
