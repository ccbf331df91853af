"""RetrievalEvaluation measures any module, once per sample, and leaves no trace."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, RandomSampler, Subset, TensorDataset

from lightning_rkd.callbacks.distillation import RelationalDistillation
from lightning_rkd.callbacks.retrieval import RetrievalEvaluation
from lightning_rkd.data.indexing import IndexedBatch, with_indices
from lightning_rkd.data.row_numbers import _read_order
from lightning_rkd.distillation.layers import CaptureError, LayerNotFoundError, Tap
from lightning_rkd.losses.rkd import RKD
from lightning_rkd.metrics.retrieval import EmbeddingRetrieval
from tests.harness import toys


class Evaluated(toys.Student):
    """An ordinary module with a loss of its own in validation and test."""

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.seen.add(type(batch))
        self.log("own", self.loss(*batch), on_epoch=True)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.validation_step(batch, batch_idx)

    def setup(self, stage: str) -> None:
        self.seen: set[type] = set()


def by_hand(module: toys.Student, loader: DataLoader[Any]) -> dict[str, float]:
    metric = EmbeddingRetrieval()
    with torch.no_grad():
        metric.update(module.eval().backbone(loader.dataset.tensors[0]), loader.dataset.tensors[1])
    return {name: float(value) for name, value in metric.compute().items()}


@pytest.mark.parametrize("indexed", [False, True])
def test_the_logged_value_is_the_metric_of_the_layer(indexed: bool) -> None:
    module, loader = Evaluated(dropout=0.5, norm=True), toys.loader()
    callback, wrap = RetrievalEvaluation("backbone"), with_indices if indexed else lambda loader: loader
    trainer = toys.trainer(callbacks=[callback], num_sanity_val_steps=1)
    trainer.fit(module, toys.loader(), wrap(loader))
    expected = by_hand(module, loader)
    assert {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("val/")} == {
        f"val/{name}": pytest.approx(value) for name, value in expected.items()
    }
    assert IndexedBatch not in module.seen
    (tested,) = trainer.test(module, wrap(loader), verbose=False)
    assert tested["test/recall_at_1"] == pytest.approx(expected["recall_at_1"])
    assert toys.attachments(module) == []


def test_in_bf16_the_labels_and_counts_stay_whole() -> None:
    module, loader = Evaluated(), with_indices(toys.loader(rows=320, batch_size=80))
    trainer = toys.trainer(callbacks=[RetrievalEvaluation("backbone")], precision="bf16-true")
    trainer.validate(module, loader, verbose=False)
    metric = EmbeddingRetrieval()
    half = Evaluated().bfloat16()
    rows = toys.Rows(320)
    with torch.no_grad():
        metric.update(half.backbone(rows.x.bfloat16()), rows.y)
    assert float(trainer.callback_metrics["val/recall_at_1"]) == pytest.approx(float(metric.compute()["recall_at_1"]))


def test_the_sanity_check_neither_fails_on_few_rows_nor_leaves_any() -> None:
    alone = DataLoader(TensorDataset(torch.randn(6, toys.WIDTH), torch.tensor([0, 1, 2, 0, 1, 2])), batch_size=3)
    trainer = toys.trainer(callbacks=[RetrievalEvaluation("backbone")], num_sanity_val_steps=1)
    trainer.fit(Evaluated(), toys.loader(), alone)
    assert "val/recall_at_1" in trainer.callback_metrics


@pytest.mark.parametrize("several", [list, lambda loaders: dict(zip("ab", loaders, strict=True))])
def test_several_loaders_are_measured_one_by_one(several: Any) -> None:
    loaders, module = [toys.loader(), with_indices(toys.loader(rows=16))], Evaluated()
    trainer = toys.trainer(callbacks=[RetrievalEvaluation("backbone")])
    trainer.validate(module, several(loaders), verbose=False)
    for number, rows in enumerate((40, 16)):
        expected = by_hand(module, toys.loader(rows=rows))["recall_at_1"]
        assert float(trainer.callback_metrics[f"val/{number}/recall_at_1"]) == pytest.approx(expected)


def test_several_metrics_and_keys_of_the_batch() -> None:
    class Mapped(Evaluated):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.head(self.backbone(batch["x"]))

    callback = RetrievalEvaluation(
        {"embedding": "backbone", "logits": "head"},
        {"retrieval": EmbeddingRetrieval(k=(1, 2))},
        labels="y",
        indices="i",
    )
    data = [{"x": x, "y": y, "i": torch.arange(8) + 8 * n} for n, (x, y) in enumerate(toys.loader())]
    trainer = toys.trainer(callbacks=[callback])
    trainer.validate(module := Mapped(), DataLoader(data, batch_size=None), verbose=False)
    expected = by_hand(module, toys.loader())
    assert float(trainer.callback_metrics["val/recall_at_1"]) == pytest.approx(expected["recall_at_1"])
    assert "val/recall_at_2" in trainer.callback_metrics


def test_it_goes_along_with_distillation() -> None:
    distil = RelationalDistillation(toys.teacher(), RKD(), student_layer="backbone")
    modules = [Evaluated(), toys.Student()]
    trainer = toys.trainer(callbacks=[RetrievalEvaluation("backbone"), distil], val_check_interval=2)
    trainer.fit(modules[0], with_indices(toys.loader()), with_indices(toys.loader()))
    toys.fit(modules[1], RelationalDistillation(toys.teacher(), RKD(), student_layer="backbone"))
    assert toys.gap(*modules) == 0.0
    assert toys.attachments(modules[0]) == []


def test_nothing_is_left_after_an_exception() -> None:
    class Fails(Evaluated):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            raise ArithmeticError("stop")

    module = Fails()
    with pytest.raises(ArithmeticError):
        toys.trainer(callbacks=[RetrievalEvaluation("backbone")]).validate(module, toys.loader())
    assert toys.attachments(module) == []


IN_3D = Tap("backbone", read=lambda o, a: o[:, :, None])


@pytest.mark.parametrize(
    ("layer", "error", "message"),
    [
        ("bakbone", LayerNotFoundError, "near it: 'backbone'"),
        (lambda module: module.unused, CaptureError, "was never called in this step"),
        (IN_3D, ValueError, r"embeddings must be \(N, D\), got \(8, 5, 1\)"),
        (["backbone"], ValueError, r"needs \['embeddings'\]"),
    ],
)
def test_what_cannot_work_fails_with_the_cure(layer: Any, error: Any, message: str) -> None:
    module = Evaluated()
    module.unused = nn.Identity()
    with pytest.raises(error, match=message):
        toys.trainer(callbacks=[RetrievalEvaluation(layer)]).validate(module, toys.loader(), verbose=False)


# The order of a sampler


def test_rows_are_known_only_of_samplers_with_a_fixed_order() -> None:
    data = Subset(toys.Rows(20), [5, 6, 7, 8, 9])
    assert _read_order(DataLoader(data, batch_size=2)) == [5, 6, 7, 8, 9]
    sampler = DistributedSampler(data, num_replicas=2, rank=1, shuffle=False)
    assert _read_order(DataLoader(data, sampler=sampler)) == [6, 8, 5], "the last is padding"

    class Own(DistributedSampler[Any]):
        pass

    for other in (RandomSampler(data), Own(data, num_replicas=2, rank=0)):
        assert _read_order(DataLoader(data, sampler=other)) is None
    assert _read_order([1, 2]) is None
