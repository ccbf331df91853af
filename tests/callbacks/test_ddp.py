"""Two devices under a real Trainer are one device with the whole batch."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from pytorch_metric_learning import losses, miners
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Subset, SubsetRandomSampler, TensorDataset

from lightning_rkd.callbacks.distillation import RelationalDistillation
from lightning_rkd.callbacks.retrieval import RetrievalEvaluation
from lightning_rkd.data.indices import with_indices
from lightning_rkd.losses.rkd import RKD
from lightning_rkd.metrics.agreement import RelationalAgreement
from lightning_rkd.metrics.retrieval import EmbeddingRetrieval
from lightning_rkd.module import DistillationModule
from tests import toys
from tests.ranks import Ranks

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:You defined a .validation_step. but have no:UserWarning"),
]


@contextmanager
def devices(rank: int | None, **settings: Any) -> Iterator[dict[str, Any]]:
    """Trainer settings for a process of a group that exists already; for ``None`` those of one process."""
    if rank is None:
        yield {}
        return
    os.environ.update(LOCAL_RANK=str(rank), NODE_RANK="0")
    try:
        yield {
            "strategy": DDPStrategy(process_group_backend="gloo", **settings),
            "devices": 2,
            "use_distributed_sampler": False,
        }
    finally:
        for name in ("LOCAL_RANK", "NODE_RANK"):
            del os.environ[name]


def batches(rank: int | None, counts: tuple[int, int] = (8, 8)) -> DataLoader[Any]:
    """Five batches of sixteen rows, or a rank's part of each."""
    data = toys.Rows(16 * toys.STEPS)
    start, stop = (0, 16) if rank is None else ((0, counts[0]), (counts[0], 16))[rank]
    order = [list(range(16 * n + start, 16 * n + stop)) for n in range(toys.STEPS)]
    return DataLoader(TensorDataset(data.x, data.y), batch_sampler=order)


class OnlyDistilled(toys.Student):
    """Its backbone gets a gradient from the relations alone, and one layer from nobody."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Linear(2, 2)

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(self.head(self.backbone(x).detach()), y)


def distilled(kind: str) -> tuple[pl.LightningModule, list[pl.Callback]]:
    """A module and its callbacks, the same on every rank."""
    torch.manual_seed(0)
    if kind.startswith("module"):
        module = DistillationModule(
            toys.Backbone(),
            toys.teacher(norm=True),
            RKD() + toys.Hint(),
            task_loss=nn.CrossEntropyLoss() if kind == "module, logits" else losses.ProxyAnchorLoss(toys.CLASSES, 5),
            miner=None if kind == "module, logits" else miners.MultiSimilarityMiner(),
            task_reads="logits" if kind == "module, logits" else "embedding",
            optimizer=lambda parameters: torch.optim.SGD(parameters, 0.01),
        )
        return module, []
    classes = {"manual": toys.Manual, "only distilled": OnlyDistilled}
    callback = RelationalDistillation(toys.teacher(norm=True), RKD() + toys.Hint(), student_layer="backbone")
    return classes.get(kind, toys.Student)(), [callback]


CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "accumulate": ({}, {"accumulate_grad_batches": 2}),
    "static graph": ({"static_graph": True}, {}),
    "manual": ({}, {}),
    "only distilled": ({"find_unused_parameters": True}, {}),
    "module": ({}, {}),
    "module, logits": ({}, {}),
}


def trained(rank: int | None, kind: str, counts: tuple[int, int] = (8, 8)) -> dict[str, Tensor]:
    strategy, settings = CASES[kind]
    module, callbacks = distilled(kind)
    with devices(rank, **strategy) as where:
        toys.fit(module, *callbacks, batches=batches(rank, counts), **where, **settings)
    return {name: value.clone() for name, value in module.state_dict().items()}


def largest(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert list(a) == list(b)
    return max(float((a[name] - b[name]).abs().max()) for name in a)


@pytest.mark.parametrize("kind", CASES)
def test_two_devices_train_as_one_with_the_whole_batch(ranks: Ranks, kind: str) -> None:
    first, second = ranks.run(trained, kind)
    assert largest(first, second) == 0.0
    assert largest(first, trained(None, kind)) <= 1e-6
    untrained, _ = distilled(kind)
    assert largest(first, untrained.state_dict()) > 1e-3


@pytest.mark.parametrize("kind", ["module", "module, logits"])
def test_uneven_batches_weigh_as_their_rows(ranks: Ranks, kind: str) -> None:
    first, second = ranks.run(trained, kind, (11, 5))
    assert largest(first, second) == 0.0
    assert largest(first, trained(None, kind)) <= 1e-6


# Evaluation


class Evaluated(toys.Student):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.backbone(batch[0])


def evaluated(rank: int | None, how: str) -> Any:
    """Metrics of 41 rows, which two devices can only share by counting one twice."""
    torch.manual_seed(0)
    data = Subset(TensorDataset(torch.randn(60, toys.WIDTH), torch.arange(60) % 4), range(10, 51))
    sampler = SubsetRandomSampler(range(41)) if how == "random" else None
    loader: DataLoader[Any] = DataLoader(data, batch_size=8, sampler=sampler)
    loader = with_indices(loader) if how in ("with_indices", "module") else loader
    module: pl.LightningModule = Evaluated()
    callbacks: list[pl.Callback] = [RetrievalEvaluation("backbone")]
    if how == "module":
        torch.manual_seed(0)
        metrics = {"retrieval": EmbeddingRetrieval(), "agreement": RelationalAgreement(k=3)}
        module, callbacks = DistillationModule(toys.Backbone(), toys.teacher(), RKD(), metrics=metrics), []
    with devices(rank) as where:
        trainer = toys.trainer(callbacks=callbacks, **where | {"use_distributed_sampler": True})
        try:
            trainer.validate(module, loader, verbose=False)
        except ValueError as error:
            return str(error)
        return {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("val/")}


@pytest.mark.parametrize("how", ["sampler", "with_indices", "module"])
def test_rows_that_a_sampler_repeats_count_once(ranks: Ranks, how: str) -> None:
    first, second = ranks.run(evaluated, how)
    assert first == second
    expected = evaluated(None, how)
    assert first == pytest.approx(expected)
    assert 0 < expected["val/recall_at_1"] < 1


def test_a_sampler_of_which_the_order_cannot_be_known_is_refused(ranks: Ranks) -> None:
    for answer in ranks.run(evaluated, "random"):
        assert "wrap it, with_indices(loader), or name the entry" in str(answer)


class Still(Evaluated):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


def unequal(rank: int | None, how: str) -> dict[str, float]:
    """Metrics of 300 rows with labels that bfloat16 cannot hold: five batches on one rank, one on the other."""
    torch.manual_seed(0)
    labels = torch.arange(300) // 2
    data = TensorDataset(torch.randn(150, toys.WIDTH)[labels] + 0.5 * torch.randn(300, toys.WIDTH), 257 + labels)
    starts = (range(0, 300, 50), range(0, 250, 50), range(250, 300, 50))[0 if rank is None else rank + 1]
    loader = with_indices(DataLoader(data, batch_sampler=[list(range(a, a + 50)) for a in starts]))
    module, settings = Still(), {"precision": "bf16-true"} if how == "bf16" else {"num_sanity_val_steps": 1}
    with devices(rank) as where:
        trainer = toys.trainer(callbacks=[RetrievalEvaluation("backbone")], **where, **settings)
        trainer.validate(module, loader, verbose=False) if how == "bf16" else trainer.fit(module, batches(rank), loader)
        return {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("val/")}


@pytest.mark.parametrize("how", ["bf16", "after a sanity check"])
def test_ranks_with_unequally_many_batches_measure_as_one_device(ranks: Ranks, how: str) -> None:
    expected = unequal(None, how)
    assert 0 < expected["val/recall_at_1"] < 1
    assert list(ranks.run(unequal, how)) == [expected, expected]


# Other strategies


class Sharded(toys.Student):
    def configure_model(self) -> None:
        from torch.distributed.fsdp import fully_shard

        mesh = self.device_mesh["data_parallel"]
        for part in (self.backbone, self.head):
            fully_shard(part, mesh=mesh)


def sharded(rank: int) -> dict[str, Tensor]:
    module, callbacks = Sharded(), distilled("plain")[1]
    with devices(rank) as where:
        strategy = ModelParallelStrategy(2, 1, process_group_backend="gloo")
        toys.fit(module, *callbacks, batches=batches(rank), **where | {"strategy": strategy})
        return {name: value.full_tensor().clone() for name, value in module.state_dict().items()}  # type: ignore[operator]


def test_a_sharded_student_trains_as_on_one_device(ranks: Ranks) -> None:
    first, second = ranks.run(sharded)
    assert largest(first, second) == 0.0
    assert largest(first, trained(None, "plain")) <= 1e-6


def test_a_spawned_run_pickles_clean_modules_and_leaves_no_process() -> None:
    module, callbacks = distilled("plain")
    toys.fit(module, *callbacks, strategy="ddp_spawn", devices=2)
    untrained, _ = distilled("plain")
    assert largest(dict(module.state_dict()), dict(untrained.state_dict())) > 1e-3
    assert toys.attachments(module, callbacks[0].distiller.teacher.network) == []  # type: ignore[attr-defined]
    assert not [p for p in multiprocessing.active_children() if p.name.startswith("SpawnProcess") and not p.daemon]
