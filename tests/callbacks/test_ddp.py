"""Two devices under a real Trainer are one device with the whole batch."""

from collections import Counter
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.accelerators import CUDAAccelerator
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, Subset, SubsetRandomSampler, TensorDataset

from lightning_rkd.callbacks.distillation import RelationalDistillation
from lightning_rkd.callbacks.retrieval import RetrievalEvaluation
from lightning_rkd.data.indexing import with_indices
from lightning_rkd.data.samplers.pk import PKBatchSampler
from lightning_rkd.functional import rkd
from lightning_rkd.losses.rkd import RKD, RKDAngle
from lightning_rkd.metrics.agreement import RelationalAgreement
from lightning_rkd.metrics.retrieval import EmbeddingRetrieval
from lightning_rkd.modules.distillation import DistillationModule
from tests.harness import toys
from tests.harness.ranks import Ranks


def batches(rank: int | None, counts: tuple[int, int] = (8, 8)) -> DataLoader[Any]:
    """Five batches of sixteen rows, or a rank's part of each."""
    data = toys.Rows(16 * toys.STEPS)
    return toys.split(TensorDataset(data.x, data.y), rank, counts)


# Work


def angles(rank: int | None) -> tuple[int, dict[str, Tensor]]:
    """Number of triplets that this process worked on in a training, and the trained weights."""
    seen, work = [0], rkd._compute

    def counted(student: Tensor, teacher: Tensor, vertices: tuple[int, int], *args: Any, **settings: Any) -> Any:
        if len(student) == 16:  # the global batch; kernels are compiled with another number of rows
            seen[0] += (vertices[1] - vertices[0]) * len(student) ** 2
        return work(student, teacher, vertices, *args, **settings)

    with pytest.MonkeyPatch.context() as patch, toys.devices(rank) as where:
        patch.setattr(rkd, "_compute", counted)
        module = toys.Student()
        callback = RelationalDistillation(toys.teacher(), RKDAngle(), student_layer="backbone")
        toys.fit(module, callback, batches=batches(rank), **where)
    return seen[0], {name: value.clone() for name, value in module.state_dict().items()}


def test_each_of_two_devices_does_half_of_the_cubic_work(ranks: Ranks) -> None:
    (first, learnt), (second, _) = ranks.run(angles)
    alone, expected = angles(None)
    assert first == second == alone / 2 == toys.STEPS * 16**3 / 2
    assert toys.largest_gap(learnt, expected) <= 1e-6


# Batches of few classes


class Sees(toys.Student):
    """Keeps the numbers of the rows it is trained on."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[list[int]] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y, rows = batch
        self.seen.append(rows.tolist())
        return self.loss(x, y)


LABELS = [row % 8 for row in range(64)]


def dealt(rank: int | None, own_sampler: bool = False) -> list[list[int]] | str:
    """The batches of two epochs, P = 2 on each of two devices or 4 on one; or what was refused."""
    rows = toys.Rows(64)
    data = TensorDataset(rows.x, rows.y, torch.arange(64))
    sampler = PKBatchSampler(LABELS, classes_per_batch=4 if rank is None else 2, samples_per_class=4)
    module = Sees()
    callback = RelationalDistillation(toys.teacher(), RKD(), student_layer="backbone")
    with toys.devices(rank) as where:
        settings = where | ({"use_distributed_sampler": True} if own_sampler else {})
        try:
            toys.fit(module, callback, batches=DataLoader(data, batch_sampler=sampler), max_epochs=2, **settings)
        except TypeError as error:
            return str(error)
    return module.seen


def test_batches_of_few_classes_reach_two_devices_intact(ranks: Ranks) -> None:
    first, second = ranks.run(dealt)
    alone = dealt(None)
    assert len(first) == len(second) == len(alone) == 2 * 4
    for own in (first, second):
        for batch in own:
            counts = Counter(LABELS[row] for row in batch)
            assert sorted(counts.values()) == [4, 4], "two classes, four rows of each"
    assert [a + b for a, b in zip(first, second, strict=True)] == alone
    assert alone[:4] != alone[4:], "each epoch in an order of its own"


def test_a_sampler_in_between_is_refused_with_the_cure(ranks: Ranks) -> None:
    for answer in ranks.run(dealt, True):
        assert "or set `Trainer(use_distributed_sampler=False)`" in answer


# Batch norm over devices


def normalised(rank: int | None) -> dict[str, Tensor]:
    """Train a student with batch norm, on two devices with the statistics of both."""
    module = toys.Student(norm=True)
    callback = RelationalDistillation(toys.teacher(), RKD(), student_layer="backbone")
    with toys.devices(rank) as where:
        settings = where | {"accelerator": "gpu"}
        if rank is not None:  # both share one GPU, which gloo allows
            gpus = CUDAAccelerator(), [torch.device("cuda", 0)] * 2
            settings |= {"sync_batchnorm": True, "strategy": DDPStrategy(*gpus, process_group_backend="gloo")}
        toys.fit(module, callback, batches=batches(rank), **settings)
    return {name: value.cpu() for name, value in module.state_dict().items()}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="SyncBatchNorm needs a GPU")
def test_with_synchronised_batch_norm_two_devices_are_one(ranks: Ranks) -> None:
    first, second = ranks.run(normalised)
    assert toys.largest_gap(first, second) == 0.0
    assert toys.largest_gap(first, normalised(None)) <= 1e-6


# Evaluation


def evaluated(rank: int | None, how: str) -> Any:
    """Metrics of 41 rows, which two devices can only share by counting one twice."""
    torch.manual_seed(0)
    data = Subset(TensorDataset(torch.randn(60, toys.WIDTH), torch.arange(60) % 4), range(10, 51))
    sampler = SubsetRandomSampler(range(41)) if "random" in how else None
    loader: DataLoader[Any] = DataLoader(data, batch_size=8, sampler=sampler)
    loader = with_indices(loader) if how in ("with_indices", "module") else loader
    module: pl.LightningModule = toys.Evaluated()
    callbacks: list[pl.Callback] = [RetrievalEvaluation("backbone")]
    if how.startswith("module"):
        torch.manual_seed(0)
        metrics = {"retrieval": EmbeddingRetrieval(), "agreement": RelationalAgreement(k=3)}
        module, callbacks = DistillationModule(toys.Backbone(), toys.teacher(), RKD(), metrics=metrics), []
    with toys.devices(rank) as where:
        trainer = toys.trainer(callbacks=callbacks, **where | {"use_distributed_sampler": True})
        try:
            trainer.validate(module, loader, verbose=False)
        except ValueError as error:
            return str(error)
        return {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("val/")}


@pytest.mark.parametrize("how", ["sampler", "with_indices", "module", "module, sampler"])
def test_rows_that_a_sampler_repeats_count_once(ranks: Ranks, how: str) -> None:
    first, second = ranks.run(evaluated, how)
    assert first == second
    expected = evaluated(None, how)
    assert first == pytest.approx(expected)
    assert 0 < expected["val/recall_at_1"] < 1


@pytest.mark.parametrize("how", ["random", "module, random"])
def test_a_sampler_of_which_the_order_cannot_be_known_is_refused(ranks: Ranks, how: str) -> None:
    for answer in ranks.run(evaluated, how):
        assert "wrap it, with_indices(loader), or name the entry" in str(answer)


class Still(toys.Evaluated):
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
    with toys.devices(rank) as where:
        trainer = toys.trainer(callbacks=[RetrievalEvaluation("backbone")], **where, **settings)
        trainer.validate(module, loader, verbose=False) if how == "bf16" else trainer.fit(module, batches(rank), loader)
        return {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("val/")}


@pytest.mark.parametrize("how", ["bf16", "after a sanity check"])
def test_ranks_with_unequally_many_batches_measure_as_one_device(ranks: Ranks, how: str) -> None:
    expected = unequal(None, how)
    assert 0 < expected["val/recall_at_1"] < 1
    assert list(ranks.run(unequal, how)) == [expected, expected]


# Sharded modules


class Sharded(toys.Student):
    def configure_model(self) -> None:
        for part in (self.backbone, self.head):
            fully_shard(part, mesh=self.device_mesh["data_parallel"])
