"""Indexed loaders fit modules that know nothing of them."""

from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_rkd.callbacks.distillation import RelationalDistillation
from lightning_rkd.data.indexing import with_indices
from lightning_rkd.losses.rkd import RKD


class Plain(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(4, 3), nn.Tanh())
        self.seen: set[str] = set()

    def _loss(self, batch: Any, where: str) -> Tensor:
        x, y = batch
        self.seen.add(where)
        return nn.functional.cross_entropy(self.backbone(x), y)

    def training_step(self, batch: Any) -> Tensor:
        return self._loss(batch, "training")

    def validation_step(self, batch: Any) -> None:
        self._loss(batch, "validation")

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def test_all_steps_of_a_plain_module_see_the_batches_its_loaders_made(one_thread: None) -> None:
    def loader() -> DataLoader[Any]:
        return with_indices(DataLoader(TensorDataset(torch.randn(8, 4), torch.arange(8) % 3), batch_size=4))

    module = Plain()
    teacher = nn.Linear(4, 5)
    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[RelationalDistillation(teacher, RKD(), student_layer="backbone")],
    )
    trainer.fit(module, loader(), loader())
    assert module.seen == {"training", "validation"}
    assert not {"training_step", "validation_step", "test_step", "predict_step"} & set(vars(module))
