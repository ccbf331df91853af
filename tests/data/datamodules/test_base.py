from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DistributedSampler

from lightning_rkd.data import Augment, ImageDataModule, IndexedBatch
from lightning_rkd.data.datamodules.base import LabelledImages

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*num_workers"),
    pytest.mark.filterwarnings("ignore:.*lower value for log_every_n_steps"),
    # Lightning on torch 2.15
    pytest.mark.filterwarnings("ignore:.*treespec, LeafSpec:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*treespec, LeafSpec:DeprecationWarning"),
]


class Squares(ImageDataModule):
    """20 classes x 6 images of noise whose mean tells the class."""

    def load(self) -> LabelledImages:
        labels = torch.arange(20).repeat(6)
        generator = torch.Generator().manual_seed(5)
        noise = torch.randint(0, 60, (120, 3, 8, 8), dtype=torch.uint8, generator=generator)
        return LabelledImages(
            noise + 9 * labels.to(torch.uint8).view(-1, 1, 1, 1), labels, [f"c{i}" for i in range(20)]
        )


class Net(LightningModule):
    """Learns something from every pixel and writes down what it saw."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(192, 4))
        self.seen: list[tuple[int, float]] = []

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        self.seen.append((self.current_epoch, float(x.double().sum())))
        loss: Tensor = ((self.net(x) - y[:, None]) ** 2).mean()
        return loss

    def validation_step(self, batch: Any) -> None:
        assert isinstance(batch, IndexedBatch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.01)


def data(workers: int = 0, **settings: Any) -> Squares:
    return Squares(
        **{"classes_per_batch": 4, "samples_per_class": 3, "num_workers": workers, "eval_batch_size": 16, **settings}
    )


def fit(
    root: Path, workers: int, ckpt: str | None = None, epochs: int = 3, steps: int = -1, every: int | None = None
) -> Net:
    """Train, save as ``last.ckpt`` at the end of epochs or every few steps, and resume from ``ckpt``."""
    torch.manual_seed(0)
    net = Net()
    saver = ModelCheckpoint(root, save_last=True, every_n_train_steps=every)
    trainer = Trainer(
        accelerator="cpu", max_epochs=epochs, max_steps=steps, logger=False, callbacks=[saver],
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=root,
    )  # fmt: skip
    trainer.fit(net, datamodule=data(workers), ckpt_path=ckpt, weights_only=True if ckpt else None)
    return net


def batches(module: Squares, epoch: int) -> list[Tensor]:
    loader = module.train_dataloader()
    loader.batch_sampler.set_epoch(epoch)  # type: ignore[union-attr]
    return [x for x, _ in loader]


def test_the_three_parts_share_no_class_and_one_numbering() -> None:
    module = data()
    module.setup()
    parts = [{y for _, y in part} for part in (module.train_set, module.val_set, module.test_set)]
    assert parts == [set(range(12)), set(range(12, 15)), set(range(15, 20))]
    assert module.num_train_classes == 12
    assert sorted(module.class_names) == sorted(f"c{i}" for i in range(20))
    raw = module.load()
    for i in range(120):
        assert module.class_names[int(module.root.labels[i])] == raw.class_names[int(raw.labels[i])]
    rows = [*module.train_set.indices, *module.val_set.indices, *module.test_set.indices]
    assert sorted(rows) == list(range(120))
    assert module.image_shape == (3, 8, 8)


def test_the_division_hangs_on_split_seed_and_not_on_seed() -> None:
    names = []
    for settings in ({}, {"seed": 3}, {"split_seed": 3}):
        module = data(**settings)
        module.setup()
        names.append(module.class_names)
    assert names[0] == names[1] != names[2]


def test_validation_classes_come_out_of_the_training_side() -> None:
    wide, narrow = data(validation=0.3), data(validation=0.15)
    wide.setup()
    narrow.setup()
    assert wide.class_names[-5:] == narrow.class_names[-5:]


def test_channels_are_normalised_by_the_training_images() -> None:
    module = data(augment=Augment())
    module.setup()
    x = torch.stack([x for x, _ in module.train_set])
    assert torch.allclose(x.mean((0, 2, 3)), torch.zeros(3), atol=1e-5)
    assert torch.allclose(x.std((0, 2, 3), correction=0), torch.ones(3), atol=1e-5)


def test_training_batches_are_the_same_for_any_number_of_workers() -> None:
    alone, helped = data(0), data(2)
    alone.setup()
    helped.setup()
    for epoch in (0, 3):
        for a, b in zip(batches(alone, epoch), batches(helped, epoch), strict=True):
            assert torch.equal(a, b)
    assert not torch.equal(batches(alone, 0)[0], batches(alone, 1)[0])
    other = data(seed=1)
    other.setup()
    assert not torch.equal(batches(alone, 0)[0], batches(other, 0)[0])


def test_evaluation_batches_name_rows_of_the_root() -> None:
    module = data()
    module.setup()
    for loader, part in ((module.val_dataloader(), module.val_set), (module.predict_dataloader(), module.test_set)):
        found = list(loader)
        assert torch.cat([b.indices for b in found]).tolist() == part.indices
        for b in found:
            assert torch.equal(b.batch[1], module.root.labels[b.indices])


def test_sizes_left_open_are_chosen_from_the_data() -> None:
    module = data(classes_per_batch=None, samples_per_class=None)
    module.setup()
    assert (module.classes_per_batch, module.samples_per_class) == (12, 6)
    assert [x.shape for x in batches(module, 0)] == [(72, 3, 8, 8)]


def test_lightnings_own_sampler_is_refused_with_the_cure() -> None:
    module = data()
    module.setup()
    for distributed, own in ((True, True), (True, False), (False, True)):
        connector = SimpleNamespace(is_distributed=distributed, use_distributed_sampler=own)
        module.trainer = SimpleNamespace(_accelerator_connector=connector)  # type: ignore[assignment]
        if distributed and own:
            with pytest.raises(ValueError, match=r"Trainer\(use_distributed_sampler=False\)"):
                module.train_dataloader()
        else:
            module.train_dataloader()


def test_impossible_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="eval_batch_size must be at least 1"):
        data(eval_batch_size=0)
    module = data(test=0.9)
    with pytest.raises(ValueError, match="below 1 together"):
        module.setup()
    module = data(test=0.84)
    with pytest.raises(ValueError, match="20 classes are too few"):
        module.setup()


def _evaluated(rank: int) -> tuple[list[int], list[list[int]]]:
    module = data()
    module.setup()
    loader = module.val_dataloader()
    assert isinstance(loader.sampler, DistributedSampler)
    training = [y.tolist() for _, y in module.train_dataloader()]
    return torch.cat([b.indices for b in loader]).tolist(), training


@pytest.mark.slow
def test_devices_share_the_evaluation_rows_and_the_training_classes(ranks: Any) -> None:
    (rows_0, train_0), (rows_1, train_1) = ranks.run(_evaluated)
    module = data()
    module.setup()
    assert sorted({*rows_0, *rows_1}) == sorted(module.val_set.indices)
    assert len(train_0) == len(train_1)
    assert all(not set(a) & set(b) for a, b in zip(train_0, train_1, strict=True))


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("stop", "resumes_at"),
    [
        pytest.param({"epochs": 1}, 6, id="at the end of an epoch"),
        pytest.param({"steps": 10, "every": 4}, 8, id="in the middle of an epoch"),
        # after the last batch of epoch 1, before Lightning counts the epoch as done
        pytest.param({"steps": 12, "every": 6}, 12, id="before its epoch was counted"),
    ],
)
def test_a_run_saved_and_resumed_is_the_uninterrupted_run(
    tmp_path: Path, stop: dict[str, int], resumes_at: int, workers: int
) -> None:
    every = stop.get("every")
    whole = fit(tmp_path / "whole", workers, every=every)
    assert len(whole.seen) == 18
    fit(tmp_path, workers, **stop)
    resumed = fit(tmp_path, workers, str(tmp_path / "last.ckpt"), every=every)
    assert resumed.seen == whole.seen[resumes_at:]
    assert torch.equal(whole.net[1].weight, resumed.net[1].weight)
