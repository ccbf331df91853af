"""DistillationModule: what it trains, saves, resumes, evaluates, and refuses."""

import copy
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.cli import LightningCLI
from pytorch_metric_learning import losses, miners
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy

from lightning_rkd.data.indexing import with_indices
from lightning_rkd.distillation.layers import CaptureError, LayerNotFoundError, Tap
from lightning_rkd.distillation.teachers import Teacher
from lightning_rkd.losses.base import RelationalLoss
from lightning_rkd.losses.rkd import RKD, RKDDistance
from lightning_rkd.metrics.agreement import RelationalAgreement
from lightning_rkd.metrics.retrieval import EmbeddingRetrieval
from lightning_rkd.modules.distillation import DistillationModule
from lightning_rkd.utils.types import Batch
from tests.harness import toys


def student() -> toys.Backbone:
    torch.manual_seed(0)
    return toys.Backbone()


def module(**kwargs: Any) -> DistillationModule:
    return DistillationModule(**{"student": student(), "optimizer": toys.sgd, **kwargs})


def distilling(**kwargs: Any) -> DistillationModule:
    return module(**{"teacher": toys.teacher(norm=True), "loss": RKD(), **kwargs})


# Training


def test_it_logs_the_weighted_sum_of_task_and_terms() -> None:
    task = {"task_loss": losses.TripletMarginLoss(), "miner": miners.BatchHardMiner(), "task_weight": 0.5}
    logged = toys.fit(distilling(loss={"rkd": RKD()}, weight=2, **task)).callback_metrics
    assert sorted(logged) == ["distill/rkd", "train/loss", "train/task"]
    torch.testing.assert_close(logged["train/loss"], 0.5 * logged["train/task"] + logged["distill/rkd"])


@pytest.mark.parametrize("reads", ["embedding", "logits"])
def test_without_a_teacher_it_trains_the_task_alone(reads: Any) -> None:
    ours, plain = module(task_loss=nn.CrossEntropyLoss(), task_reads=reads), student()
    toys.fit(ours)
    optimizer = toys.sgd(plain.parameters())
    for x, y in toys.loader():
        optimizer.zero_grad()
        F.cross_entropy(plain(x), y).backward()
        optimizer.step()
    assert toys.gap(ours.student, plain) == 0.0


def test_parameters_of_losses_are_trained_along() -> None:
    proxies = losses.ProxyAnchorLoss(toys.CLASSES, 5)
    before = proxies.proxies.detach().clone()
    projected = toys.Projected(5, 7)
    toys.fit(distilling(loss=projected + RKD(), task_loss=proxies, optimizer=torch.optim.AdamW))
    assert not torch.equal(proxies.proxies, before)
    assert toys.gap(projected, toys.Projected(5, 7)) > 0


def test_a_classifier_gives_embedding_and_logits() -> None:
    net = nn.Sequential(student(), nn.ReLU(), nn.Linear(5, toys.CLASSES))
    metrics = {"accuracy": MulticlassAccuracy(toys.CLASSES), "retrieval": EmbeddingRetrieval()}
    task = {"task_loss": nn.CrossEntropyLoss(), "task_reads": "logits"}
    ours = distilling(student=net, student_layer=Tap("2", at="classifier"), metrics=metrics, **task)
    trainer = toys.trainer()
    trainer.fit(ours, toys.loader(), toys.loader())
    x, y = toys.loader().dataset.tensors
    expected = MulticlassAccuracy(toys.CLASSES)(net(x), y)
    assert float(trainer.callback_metrics["val/accuracy"]) == pytest.approx(float(expected))
    assert toys.trainer().predict(ours, toys.loader())[0].shape == (8, 5)


def test_views_of_the_batch_and_of_the_student_are_numbered_together() -> None:
    class TwoPasses(toys.Backbone):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + super().forward(-x)

    def pairs(batch: Batch) -> Batch:
        return Batch(batch.inputs, batch.labels, batch.indices, view=torch.arange(8) % 2)

    loss = toys.Requesting()
    at = "last"
    ours = distilling(
        student=TwoPasses(), loss=loss, batch_transform=pairs, student_layer=at, teacher_layer=at, input_layer="first"
    )
    toys.fit(ours, batches=with_indices(toys.loader()))
    assert loss.given["view"].tolist() == [0, 1] * 4 + [2, 3] * 4


def test_schedulers_step_as_configured() -> None:
    def halves(optimizer: torch.optim.Optimizer) -> Any:
        return torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)

    for interval, rate in (("epoch", 0.1 / 2**2), ("step", 0.1 / 2**10)):
        trainer = toys.fit(distilling(lr_scheduler=halves, lr_interval=interval), max_epochs=2)
        assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(rate)


# The teacher


@pytest.mark.parametrize("start", ["fit", "validate"])
def test_it_comes_back_after_an_exception_too(start: str) -> None:
    class Fails(Metric):
        def update(self, embeddings: Tensor) -> None:
            raise ArithmeticError("stop")

        def compute(self) -> None: ...

    teacher = toys.teacher(norm=True).train()
    before = toys.snapshot(teacher)
    ours = distilling(teacher=teacher, metrics={"fails": Fails(), "agreement": RelationalAgreement(k=2)})
    trainer = toys.trainer(precision="bf16-true", num_sanity_val_steps=0)
    loaders = [toys.loader()] * (2 if start == "fit" else 1)
    with pytest.raises(ArithmeticError):
        getattr(trainer, start)(ours, *loaders)
    assert toys.same(before, teacher)
    assert toys.attachments(ours, teacher) == []


def test_agreement_is_measured_in_validation_and_training_goes_on() -> None:
    teacher = toys.teacher(norm=True)
    ours = distilling(teacher=teacher, metrics={"agreement": RelationalAgreement(k=2, triplets=50)})
    trainer = toys.trainer(max_epochs=2, num_sanity_val_steps=1)
    trainer.fit(ours, toys.loader(), toys.loader())
    expected = RelationalAgreement(k=2, triplets=50)
    x, _ = toys.loader().dataset.tensors
    with torch.no_grad():
        expected.update(ours(x), teacher.eval()(x))
    for name, value in expected.compute().items():
        assert float(trainer.callback_metrics[f"val/{name}"]) == pytest.approx(float(value), abs=1e-4)
    before = toys.snapshot(teacher)
    (tested,) = toys.trainer(precision="64-true").test(ours.double(), toys.loader(), verbose=False)
    assert sorted(tested) == [f"test/{name}" for name in sorted(expected.compute())]
    assert toys.same(before, teacher)


def test_the_sanity_check_neither_fails_on_few_rows_nor_leaves_any() -> None:
    class Counts(Metric):
        def __init__(self) -> None:
            super().__init__()
            self.add_state("rows", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

        def update(self, embeddings: Tensor) -> None:
            self.rows += len(embeddings)

        def compute(self) -> Tensor:
            return self.rows.float()

    ours = distilling(metrics={"rows": Counts(), "agreement": RelationalAgreement(k=10)})
    trainer = toys.trainer(num_sanity_val_steps=1)
    trainer.fit(ours, toys.loader(), toys.loader())
    assert float(trainer.callback_metrics["val/rows"]) == 40.0


@pytest.mark.parametrize("several", [list, lambda loaders: dict(zip("ab", loaders, strict=True))])
def test_several_validation_loaders_are_told_apart(several: Any) -> None:
    ours = distilling(metrics={"retrieval": EmbeddingRetrieval()})
    loaders = [toys.loader(), toys.loader(rows=16)]
    trainer = toys.trainer()
    trainer.fit(ours, toys.loader(), several(loaders))
    for number, loader in enumerate(loaders):
        metric = EmbeddingRetrieval()
        with torch.no_grad():
            metric.update(ours(loader.dataset.tensors[0]), loader.dataset.tensors[1])
        assert float(trainer.callback_metrics[f"val/{number}/recall_at_1"]) == float(metric.compute()["recall_at_1"])


# Checkpoints


class Subclass(DistillationModule):
    """With arguments of its own, one of which is no plain value."""

    def __init__(self, network: nn.Module, width: int = 3) -> None:
        super().__init__(network, toys.teacher(norm=True), RKD(), optimizer=toys.sgd, weight=0.5)


@pytest.mark.parametrize("kind", ["plain", "subclass"])
def test_checkpoints_are_safe_hold_no_teacher_and_plain_hyper_parameters(kind: str, tmp_path: Path) -> None:
    ours = Subclass(student(), width=4) if kind == "subclass" else distilling(task_loss=nn.CrossEntropyLoss())
    toys.fit(ours, toys.keeps(tmp_path), enable_checkpointing=True)
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert set(checkpoint["state_dict"]) == {f"student.{k}" for k in ours.student.state_dict()}
    saved = checkpoint["hyper_parameters"]
    assert {"teacher", "student", "loss", "optimizer", "network"}.isdisjoint(saved)
    assert saved["weight"] == (0.5 if kind == "subclass" else 1.0)
    assert saved.get("width") == (4 if kind == "subclass" else None)
    assert "lightning_rkd" not in str(checkpoint["callbacks"])
    networks = {"network" if kind == "subclass" else "student": toys.Backbone()}
    loaded = type(ours).load_from_checkpoint(tmp_path / "last.ckpt", **networks)
    assert toys.gap(loaded.student, ours.student) == 0.0
    assert type(loaded.hparams["weight"]) is float


def test_a_checkpoint_loaded_without_its_student_says_what_to_pass(tmp_path: Path) -> None:
    toys.fit(distilling(), toys.keeps(tmp_path), enable_checkpointing=True)
    message = r"DistillationModule\.load_from_checkpoint\(path, student=\.\.\.\), and to train on also teacher=, loss="
    with pytest.raises(TypeError, match=message):
        DistillationModule.load_from_checkpoint(tmp_path / "last.ckpt")


def test_losses_that_a_loaded_module_lacks_are_named_when_it_trains_on(tmp_path: Path) -> None:
    toys.fit(distilling(task_loss=nn.CrossEntropyLoss()), toys.keeps(tmp_path), enable_checkpointing=True)
    both = {"student": toys.Backbone(), "teacher": toys.teacher(), "loss": RKD()}
    loaded = DistillationModule.load_from_checkpoint(tmp_path / "last.ckpt", **both)
    with pytest.raises(UserWarning, match=r"to keep it, pass task_loss=CrossEntropyLoss\(\.\.\.\)"):
        toys.fit(loaded)  # trained on in silence
    trainer = toys.trainer(max_epochs=2, callbacks=[toys.keeps(tmp_path)], enable_checkpointing=True)
    with pytest.raises(UserWarning, match="goes on without what the checkpoint was trained with"):
        trainer.fit(DistillationModule(**both), toys.loader(), ckpt_path=tmp_path / "last.ckpt")
    whole = DistillationModule.load_from_checkpoint(tmp_path / "last.ckpt", **both, task_loss=nn.CrossEntropyLoss())
    toys.fit(whole)


def test_a_resumed_run_is_the_uninterrupted_run(tmp_path: Path) -> None:
    def training() -> DistillationModule:
        return distilling(
            task_loss=losses.ProxyAnchorLoss(toys.CLASSES, 5),
            lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5),
            weight=lambda epoch: 1.0 + epoch,
            metrics={"retrieval": EmbeddingRetrieval()},
        )

    torch.manual_seed(5)
    whole = training()
    first = copy.deepcopy(whole)
    toys.trainer(max_epochs=3).fit(whole, toys.loader(), toys.loader())
    for ours, epochs, start in ((first, 1, None), (resumed := training(), 3, tmp_path / "last.ckpt")):
        trainer = toys.trainer(max_epochs=epochs, enable_checkpointing=True, callbacks=[toys.keeps(tmp_path)])
        trainer.fit(ours, toys.loader(), toys.loader(), ckpt_path=start)
    assert toys.gap(resumed, whole) == 0.0
    assert toys.gap(first, whole) > 1e-3


# What cannot work


class Tuple(toys.Backbone):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x), x


TASK = {"task_loss": nn.CrossEntropyLoss()}
TEACHER = {"teacher": toys.teacher(), "loss": RKD()}
FAILURES: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no teacher": ({"loss": RKD()}, ValueError, "there is a loss but no teacher"),
    "nothing to train with": ({"teacher": toys.teacher()}, ValueError, "pass task_loss=..., or teacher=... and"),
    "frozen": (
        TASK | {"student": toys.Backbone().requires_grad_(False)},
        ValueError,
        "the student is frozen: none of its parameters requires a gradient",
    ),
    "no labels": (TASK, ValueError, "the batch has none: say where they are, labels="),
    "no logits": (
        TASK | {"student": Tuple(), "student_layer": "last", "task_reads": "logits"},
        ValueError,
        "for the task loss the student gives tuple and no logits: return them from its forward, or override task",
    ),
    "no embedding": (
        TASK | {"student_layer": ["first", "last"]},
        ValueError,
        "no embedding at its taps: add one, student_layer={'embedding': ...",
    ),
    "tuple": (TEACHER | {"student": Tuple()}, CaptureError, "gives a tuple, not a tensor; say how to read it"),
    "agreement without teacher": (
        TASK | {"metrics": {"a": RelationalAgreement()}},
        ValueError,
        r"the metrics \['a'\] compare with the teacher",
    ),
    "mapping": (TASK, TypeError, "say which are the inputs, inputs="),
    "unknown layer": (
        TASK | {"student_layer": "lats"},
        LayerNotFoundError,
        "Backbone has no layer 'lats'; near it: 'last'",
    ),
    "missing weights": (
        TEACHER | {"teacher": Teacher(toys.teacher(), weights="none.ckpt")},
        FileNotFoundError,
        "the weights file 'none.ckpt' does not exist",
    ),
}
BATCHES = {"no labels": lambda x, y: x, "mapping": lambda x, y: {"x": x, "y": y}}


@pytest.mark.parametrize("case", FAILURES)
def test_what_cannot_work_fails_with_the_cure(case: str) -> None:
    arguments, error, message = FAILURES[case]
    batches = [BATCHES[case](*batch) for batch in toys.loader()] if case in BATCHES else None
    with pytest.raises(error, match=message):
        toys.fit(module(**arguments), batches=batches)


def test_prediction_and_validation_need_no_teacher() -> None:
    ours = module(loss=RKD(), metrics={"retrieval": EmbeddingRetrieval()})
    toys.trainer().validate(ours, toys.loader(), verbose=False)
    (first, *_) = toys.trainer().predict(ours, toys.loader())
    with torch.no_grad():
        assert torch.equal(first, ours(toys.loader().dataset.tensors[0][:8]))


def test_weights_are_read_when_training_begins_and_not_before(tmp_path: Path) -> None:
    source = toys.teacher(seed=1)
    trained = module(student=source, task_loss=nn.CrossEntropyLoss())
    toys.fit(trained, toys.keeps(tmp_path), enable_checkpointing=True)
    network = toys.teacher(seed=2)
    ours = distilling(teacher=Teacher(network, weights=tmp_path / "last.ckpt"))
    toys.trainer().validate(ours, toys.loader(), verbose=False)
    assert toys.gap(network, source) > 0
    toys.fit(ours)
    assert toys.gap(network, source) == 0.0


# Configuration


def find_last(network: nn.Module) -> nn.Module:
    return network.get_submodule("last")


class Maps(RelationalLoss):
    """Reads a list of layers."""

    reads = "feature_maps"

    def forward(self, student: Any, teacher: Any) -> Tensor:
        return torch.stack([RKDDistance()(s, t) for s, t in zip(student, teacher, strict=True)]).sum()


class Data(pl.LightningDataModule):
    def train_dataloader(self) -> Any:
        return toys.loader()


def configured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str) -> LightningCLI:
    """Fit what a YAML file says about the model, with one override on the command line."""
    (tmp_path / "model.yaml").write_text(
        f"""
model:
  class_path: lightning_rkd.modules.distillation.DistillationModule
  init_args:
    student: {{class_path: tests.harness.toys.Backbone, init_args: {{out: 3}}}}
    teacher: {{class_path: tests.harness.toys.teacher, init_args: {{norm: true}}}}
    optimizer: {{class_path: torch.optim.SGD, init_args: {{lr: 0.1}}}}
    {model}
data: tests.modules.test_distillation.Data
trainer: {{accelerator: cpu, devices: 1, max_epochs: 1, logger: false, enable_progress_bar: false,
           enable_model_summary: false, default_root_dir: {tmp_path}}}
"""
    )
    monkeypatch.setattr("sys.argv", ["fit"])
    return LightningCLI(
        args=["fit", f"--config={tmp_path / 'model.yaml'}", "--model.init_args.student.init_args.out=4"],
        seed_everything_default=0,
        **toys.PLAIN_CLI,
        trainer_defaults={"callbacks": [toys.keeps(tmp_path)]},
    )


LAST = "{class_path: lightning_rkd.distillation.layers.Tap, init_args: {layer: last, at: classifier}}"
LAYERS: dict[str, tuple[str, str, list[Any]]] = {
    "path": ("last", "lightning_rkd.losses.rkd.RKD", ["last"]),
    "tap": (LAST, "lightning_rkd.losses.rkd.RKD", ["last"]),
    "list": ("[norm, last]", "tests.modules.test_distillation.Maps", ["norm", "last"]),
    "dict": (f"{{hidden: norm, embedding: {LAST}}}", "lightning_rkd.losses.rkd.RKD", ["norm", "last"]),
    "function": ("tests.modules.test_distillation.find_last", "lightning_rkd.losses.rkd.RKD", [find_last]),
}


@pytest.mark.slow
@pytest.mark.parametrize("form", LAYERS)
def test_every_form_of_layer_comes_through_a_configuration(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, loss, expected = LAYERS[form]
    cli = configured(tmp_path, monkeypatch, f"loss: {loss}\n    student_layer: {layer}\n    teacher_layer: {layer}")
    taps = [tap for taps in cli.model.distiller.student.taps.values() for tap in taps]
    assert [tap.layer for tap in taps] == expected
    assert taps[-1].at == ("classifier" if LAST in layer else "output")
    assert cli.model.student.last.out_features == 4, "the command line overrides"
    assert float(cli.trainer.callback_metrics["train/loss"]) > 0
    torch.load(tmp_path / "last.ckpt", weights_only=True)


@pytest.mark.slow
def test_a_checkpoint_of_a_configured_run_rebuilds_all_but_the_teacher(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loss = "{a: RKDDistance, b: {class_path: RKD, init_args: {angle_weight: 3}}}"
    cli = configured(tmp_path, monkeypatch, f"loss: {loss}\n    weight: 0.5")
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert "teacher" not in checkpoint["hyper_parameters"]
    assert "norm" not in str(list(checkpoint["state_dict"]))
    loaded = DistillationModule.load_from_checkpoint(tmp_path / "last.ckpt")
    assert toys.gap(loaded, cli.model) == 0.0
    assert list(loaded.distiller.losses) == ["a", "b"]
    assert loaded.distiller.losses["b"].loss.angle_weight == 3
    assert (loaded.distiller.weight, loaded.distiller.teacher) == (0.5, None)
