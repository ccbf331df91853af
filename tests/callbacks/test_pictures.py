"""Figures of validation samples reach every logger, from both faces, and disturb nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, MLFlowLogger, TensorBoardLogger, WandbLogger
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_rkd import RKD, DistillationModule, Pictures, RelationalDistillation
from lightning_rkd.callbacks.figures import log_figure
from tests.callbacks.test_ddp import devices
from tests.ranks import Ranks

NAMES = ["angles", "distances", "map", "neighbours"]


def loader(rows: int = 24) -> DataLoader[Any]:
    torch.manual_seed(0)
    return DataLoader(TensorDataset(torch.rand(rows, 1, 4, 4), torch.arange(rows) % 4), batch_size=8)


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
        shown: Tensor = self.backbone(x)
        return shown

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch[0]).square().mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self(batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(own: pl.LightningModule, *callbacks: pl.Callback, epochs: int = 1, **kwargs: Any) -> pl.Trainer:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    trainer = pl.Trainer(max_epochs=epochs, accelerator="cpu", callbacks=list(callbacks), **{**quiet, **kwargs})
    trainer.fit(own, loader(), loader())
    return trainer


@pytest.mark.parametrize("attached", [False, True])
def test_both_faces_leave_pictures_beside_the_csv(attached: bool, tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, name="", version="")
    if attached:
        fit(Own(), RelationalDistillation(net(), RKD(), student_layer="backbone"), Pictures(), logger=logger)
    else:
        fit(module(), Pictures(), logger=logger)
    assert sorted(path.name for path in (tmp_path / "pictures").iterdir()) == [f"{name}-3.png" for name in NAMES]


def test_they_are_drawn_after_every_nth_epoch_of_the_first_samples(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []

    class Counting(Pictures):
        def draw(
            self,
            inputs: Tensor,
            labels: Tensor,
            embeddings: dict[str, Tensor],
            epoch: int,  # type: ignore[override]
        ) -> dict[str, Figure]:
            assert list(embeddings) == ["teacher", "student"]
            assert {len(x) for x in (inputs, labels, *embeddings.values())} == {10}
            seen.append((epoch, len(inputs)))
            return {}

    fit(module(), Counting(samples=10, every_n_epochs=2), epochs=4, logger=CSVLogger(tmp_path))
    assert [epoch for epoch, _ in seen] == [1, 3]


def test_training_is_the_same_with_and_without_them(tmp_path: Path) -> None:
    with_pictures, without = module(), module()
    fit(with_pictures, Pictures(), epochs=2, logger=CSVLogger(tmp_path))
    fit(without, epochs=2, logger=False)
    for a, b in zip(with_pictures.parameters(), without.parameters(), strict=True):
        assert torch.equal(a, b)


def test_without_a_logger_or_a_student_the_cure_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the Trainer has no logger"):
        fit(module(), Pictures(), logger=False)
    with pytest.raises(ValueError, match="finds neither student nor teacher in Own"):
        fit(Own(), Pictures(), logger=CSVLogger(tmp_path))
    with pytest.raises(ValueError, match="at least 3"):
        Pictures(samples=2)


def test_tensorboard_gets_images(tmp_path: Path) -> None:
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
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


def drawn_on_two_ranks(rank: int | None, folder: str) -> list[str]:
    with devices(rank) as settings:
        fit(module(), Pictures(), logger=CSVLogger(folder, name="", version=""), **settings)
    return sorted(path.name for path in Path(folder).rglob("*.png"))


@pytest.mark.slow
def test_on_two_ranks_the_first_draws_and_none_waits_for_ever(ranks: Ranks, tmp_path: Path) -> None:
    ranks.run(drawn_on_two_ranks, str(tmp_path))
    assert sorted(path.name for path in tmp_path.rglob("*.png")) == [f"{name}-3.png" for name in NAMES]
