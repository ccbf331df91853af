"""Figures of validation samples reach every logger, from both faces, and disturb nothing."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, MLFlowLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.strategies import ModelParallelStrategy
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, TensorDataset

from lightning_rkd import RKD, DistillationModule, Pictures, RelationalDistillation, RetrievalEvaluation
from lightning_rkd.callbacks.figures import log_figure
from tests.harness.ranks import Ranks
from tests.harness.toys import devices

NAMES = ["angles", "distances", "map", "neighbours"]


def loader(rows: int = 24, shuffle: bool = False) -> DataLoader[Any]:
    torch.manual_seed(0)
    return DataLoader(TensorDataset(torch.rand(rows, 1, 4, 4), torch.arange(rows) % 4), batch_size=8, shuffle=shuffle)


def net() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 3))


def module() -> DistillationModule:
    return DistillationModule(net(), teacher=net(), loss=RKD())


class Own(pl.LightningModule):
    """A module of a user's."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = net()

    def forward(self, x: Tensor) -> Tensor:
        return self.backbone(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch[0]).square().mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self(batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(
    own: pl.LightningModule,
    *callbacks: pl.Callback,
    epochs: int = 1,
    shuffle: bool = False,
    data: DataLoader[Any] | None = None,
    **kwargs: Any,
) -> pl.Trainer:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    trainer = pl.Trainer(max_epochs=epochs, accelerator="cpu", callbacks=list(callbacks), **{**quiet, **kwargs})
    trainer.fit(own, data or loader(shuffle=shuffle), data or loader())
    return trainer


@pytest.mark.parametrize("attached", [False, True])
def test_both_faces_leave_pictures_beside_the_csv(attached: bool, tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, name="", version="")
    if attached:
        fit(Own(), RelationalDistillation(net(), RKD(), student_layer="backbone"), Pictures(), logger=logger)
    else:
        fit(module(), Pictures(), logger=logger)
    assert sorted(path.name for path in (tmp_path / "pictures").iterdir()) == [f"{name}-3.png" for name in NAMES]


class Kept(Pictures):
    """Keeps what it is given to draw."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.given: list[tuple[Any, ...]] = []

    def draw(self, *given: Any) -> dict[str, Figure]:
        self.given.append(given)
        return {}


def test_they_are_drawn_after_every_nth_epoch_of_the_first_samples(tmp_path: Path) -> None:
    kept = Kept(samples=10, every_n_epochs=2)
    fit(module(), kept, epochs=4, logger=CSVLogger(tmp_path))
    assert [epoch for *_, epoch in kept.given] == [1, 3]
    for inputs, labels, embeddings, _ in kept.given:
        assert list(embeddings) == ["teacher", "student"]
        assert {len(x) for x in (inputs, labels, *embeddings.values())} == {10}


def test_the_drawn_embeddings_are_those_of_the_first_validation_samples(tmp_path: Path) -> None:
    own, kept = module(), Kept(samples=10)
    fit(own, kept, logger=CSVLogger(tmp_path))
    ((inputs, labels, embeddings, epoch),) = kept.given
    x, y = loader().dataset.tensors
    assert torch.equal(inputs, x[:10])
    assert torch.equal(labels, y[:10])
    assert epoch == 0
    with torch.no_grad():
        torch.testing.assert_close(embeddings["student"], own.student.eval()(x[:10]))
        torch.testing.assert_close(embeddings["teacher"], net()(x[:10]))


def test_training_is_the_same_with_and_without_them(tmp_path: Path) -> None:
    """Also where training draws random numbers, for its batches and in the network."""

    def trained(*callbacks: pl.Callback) -> Tensor:
        torch.manual_seed(2)
        student = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.Dropout(), nn.Linear(8, 3))
        own = DistillationModule(student, teacher=net(), loss=RKD())
        fit(own, *callbacks, epochs=3, shuffle=True, logger=CSVLogger(tmp_path))
        return torch.cat([p.detach().flatten() for p in own.parameters()])

    assert torch.equal(trained(Pictures()), trained())


def test_metrics_are_the_same_with_and_without_them(tmp_path: Path) -> None:
    """They call a layer once more that others read in the validation steps."""

    def recall(*callbacks: pl.Callback) -> float:
        distillation = RelationalDistillation(net(), RKD(), student_layer="backbone")
        found = fit(Own(), distillation, *callbacks, logger=CSVLogger(tmp_path)).callback_metrics
        return float(found["val/recall_at_1"])

    alone = recall(RetrievalEvaluation("backbone"))
    assert recall(Pictures(), RetrievalEvaluation("backbone")) == alone
    assert recall(RetrievalEvaluation("backbone"), Pictures()) == alone


@pytest.mark.parametrize("precision", ["64-true", "bf16-true", "bf16-mixed"])
def test_any_precision_is_drawn(precision: str, tmp_path: Path) -> None:
    kept = Kept()
    fit(module(), kept, precision=precision, logger=CSVLogger(tmp_path))
    ((inputs, _, embeddings, _),) = kept.given
    assert {x.dtype for x in (inputs, *embeddings.values())} == {torch.float32}


def test_inputs_that_are_no_images_have_distances_and_angles(tmp_path: Path) -> None:
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = net()

        def forward(self, *, first: Tensor, second: Tensor) -> Tensor:
            return self.layer(first + second)

    x = torch.rand(24, 1, 4, 4)
    rows = [{"first": x[n], "second": x[-n], "label": n % 4} for n in range(24)]
    data = DataLoader(rows, batch_size=8)
    own = DistillationModule(Words(), teacher=Words(), loss=RKD(), inputs=["first", "second"], labels="label")
    fit(own, Pictures(), data=data, logger=CSVLogger(tmp_path, name="", version=""))
    assert sorted(path.name for path in (tmp_path / "pictures").iterdir()) == ["angles-3.png", "distances-3.png"]


def test_nothing_is_drawn_outside_of_a_fit_or_in_its_dress_rehearsals(tmp_path: Path) -> None:
    fit(module(), Pictures(), fast_dev_run=True, logger=CSVLogger(tmp_path))
    logger, quiet = CSVLogger(tmp_path), {"enable_progress_bar": False, "enable_model_summary": False}
    trainer = pl.Trainer(accelerator="cpu", callbacks=[Pictures()], logger=logger, **quiet)
    trainer.validate(module(), loader(), verbose=False)
    fit(module(), Pictures(every_n_epochs=2), logger=CSVLogger(tmp_path), num_sanity_val_steps=2)
    assert not list(tmp_path.rglob("*.png"))


def test_what_cannot_be_drawn_is_refused_before_anything_is_trained(tmp_path: Path) -> None:
    def refused(own: pl.LightningModule, cure: str, **kwargs: Any) -> None:
        before = [p.clone() for p in own.parameters()]
        with pytest.raises(ValueError, match=cure):
            fit(own, Pictures(), **{"logger": CSVLogger(tmp_path), **kwargs})
        assert all(torch.equal(a, b) for a, b in zip(before, own.parameters(), strict=True))

    refused(module(), "the Trainer has no logger", logger=False)
    refused(Own(), "finds neither student nor teacher in Own")
    refused(module(), "this fit validates nothing", limit_val_batches=0)
    x = torch.rand(24, 1, 4, 4)
    for labels, got in ((torch.rand(24, 4), r"\(8, 4\)"), (torch.rand(24), r"\(8,\)")):
        data = DataLoader(TensorDataset(x, labels), batch_size=8)
        refused(module(), f"one class number a sample, .* got {got}", data=data)
    with pytest.raises(ValueError, match="at least 3"):
        Pictures(samples=2)


def test_tensorboard_gets_images(tmp_path: Path) -> None:
    accumulators = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="needs pip install tensorboard"
    )
    fit(module(), Pictures(), logger=TensorBoardLogger(tmp_path, name="", version=""))
    events = accumulators.EventAccumulator(str(tmp_path), size_guidance={"images": 0}).Reload()
    assert sorted(events.Tags()["images"]) == [f"pictures/{name}" for name in NAMES]
    assert [event.step for event in events.Images("pictures/angles")] == [3]


class Run:
    """Keeps what it is given, as the clients of the two services would."""

    def __init__(self) -> None:
        self.kept: list[tuple[Any, ...]] = []

    def log_figure(self, run_id: str, figure: Figure, artifact_file: str) -> None:  # mlflow.MlflowClient's signature
        assert isinstance(figure, Figure)
        self.kept.append((run_id, artifact_file))

    def log_image(self, key: str, images: list[Any], step: int) -> None:  # WandbLogger's signature
        assert images[0].size == (640, 480)
        self.kept.append((key, step))


def test_mlflow_and_wandb_get_what_their_clients_take(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run()
    mlflow, wandb = object.__new__(MLFlowLogger), object.__new__(WandbLogger)
    monkeypatch.setattr(MLFlowLogger, "experiment", run)
    monkeypatch.setattr(MLFlowLogger, "run_id", "7")
    monkeypatch.setattr(WandbLogger, "log_image", lambda self, key, images, step: run.log_image(key, images, step))
    log_figure(mlflow, "pictures/angles", Figure(), 20)
    log_figure(wandb, "pictures/angles", Figure(), 20)
    assert run.kept == [("7", "pictures/angles-20.png"), ("pictures/angles", 20)]


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # those of the service's package are its own affair
def test_a_store_of_mlflow_keeps_them_under_their_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow", reason="needs pip install mlflow-skinny")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    logger = MLFlowLogger("pictures", tracking_uri=tmp_path.as_uri())
    fit(module(), Pictures(), logger=logger)
    found = logger.experiment.list_artifacts(logger.run_id, "pictures")
    assert sorted(one.path for one in found) == [f"pictures/{name}-3.png" for name in NAMES]


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_a_run_of_wandb_without_a_network_keeps_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="needs pip install wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    logger = WandbLogger(project="pictures", save_dir=tmp_path, offline=True)
    try:
        fit(module(), Pictures(), logger=logger)
    finally:
        logger.experiment.finish()
    found = tmp_path.rglob("media/images/pictures/*.png")
    assert sorted(path.name.split("_")[0] for path in found) == NAMES


class Sharded(DistillationModule):
    def configure_model(self) -> None:
        for part in (self.student[1], self.student):
            fully_shard(part, mesh=self.device_mesh["data_parallel"])


def drawn_on_two_ranks(rank: int, folder: str, sharded: bool) -> None:
    with devices(rank) as settings:
        if sharded:
            settings["strategy"] = ModelParallelStrategy(2, 1, process_group_backend="gloo")
        own = (Sharded if sharded else DistillationModule)(net(), teacher=net(), loss=RKD())
        fit(own, Pictures(), logger=CSVLogger(folder, name="", version=""), **settings)


@pytest.mark.slow
@pytest.mark.parametrize("sharded", [False, True])
def test_on_two_ranks_the_first_draws_and_none_waits_for_ever(ranks: Ranks, tmp_path: Path, sharded: bool) -> None:
    """Every rank holds a part of a sharded network: all must call it."""
    ranks.run(drawn_on_two_ranks, str(tmp_path), sharded, timeout=120)
    assert sorted(path.name for path in tmp_path.rglob("*.png")) == [f"{name}-3.png" for name in NAMES]
