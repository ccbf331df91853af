from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DistributedSampler

from lightning_rkd.data import Augment, ImageDataModule, IndexedBatch
from lightning_rkd.data.datamodules.base import LabelledImages
from lightning_rkd.data.datamodules.splits import split_samples
from tests.harness import toys


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


def ready(**settings: Any) -> Squares:
    module = data(**settings)
    module.setup()
    return module


def fit(
    root: Path, workers: int, ckpt: str | None = None, epochs: int = 3, steps: int = -1, every: int | None = None
) -> Net:
    """Train, save as ``last.ckpt`` at the end of epochs or every few steps, and resume from ``ckpt``."""
    torch.manual_seed(0)
    net = Net()
    saver = ModelCheckpoint(root, save_last=True, every_n_train_steps=every)
    trainer = toys.trainer(max_epochs=epochs, max_steps=steps, callbacks=[saver], enable_checkpointing=True)
    trainer.fit(net, datamodule=data(workers), ckpt_path=ckpt, weights_only=True if ckpt else None)
    return net


def batches(module: Squares, epoch: int) -> list[Tensor]:
    loader = module.train_dataloader()
    loader.batch_sampler.set_epoch(epoch)  # type: ignore[union-attr]
    return [x for x, _ in loader]


def test_the_three_parts_share_no_class_and_one_numbering() -> None:
    module = ready()
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


def test_test_classes_depend_on_split_seed_alone() -> None:
    usual, other, narrow, wide = (
        ready(**settings).class_names
        for settings in ({"seed": 3}, {"split_seed": 3}, {"validation": 0.15}, {"validation": 0.3})
    )
    assert usual == narrow != other
    assert wide[-5:] == narrow[-5:]


def test_channels_are_normalised_by_the_training_images() -> None:
    module = ready(augment=Augment())
    x = torch.stack([x for x, _ in module.train_set])
    assert torch.allclose(x.mean((0, 2, 3)), torch.zeros(3), atol=1e-5)
    assert torch.allclose(x.std((0, 2, 3), correction=0), torch.ones(3), atol=1e-5)


def test_training_batches_are_the_same_for_any_number_of_workers() -> None:
    alone, helped, other = ready(), ready(num_workers=2), ready(seed=1)
    for epoch in (0, 3):
        for a, b in zip(batches(alone, epoch), batches(helped, epoch), strict=True):
            assert torch.equal(a, b)
    assert not torch.equal(batches(alone, 0)[0], batches(alone, 1)[0])
    assert not torch.equal(batches(alone, 0)[0], batches(other, 0)[0])


def test_evaluation_batches_name_rows_of_the_root() -> None:
    module = ready()
    for loader, part in ((module.val_dataloader(), module.val_set), (module.predict_dataloader(), module.test_set)):
        found = list(loader)
        assert torch.cat([b.indices for b in found]).tolist() == part.indices
        for b in found:
            assert torch.equal(b.batch[1], module.root.labels[b.indices])


def test_sizes_left_open_are_chosen_from_the_data() -> None:
    module = ready(classes_per_batch=None, samples_per_class=None)
    assert (module.classes_per_batch, module.samples_per_class) == (12, 6)
    assert [x.shape for x in batches(module, 0)] == [(72, 3, 8, 8)]


def test_lightnings_own_sampler_is_refused_with_the_cure() -> None:
    module = ready()
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
    with pytest.raises(ValueError, match="below 1 together"):
        ready(test=0.9)
    with pytest.raises(ValueError, match="20 classes are too few"):
        ready(test=0.84)


def _evaluated(rank: int) -> tuple[list[int], list[list[int]]]:
    module = ready()
    loader = module.val_dataloader()
    assert isinstance(loader.sampler, DistributedSampler)
    training = [y.tolist() for _, y in module.train_dataloader()]
    return torch.cat([b.indices for b in loader]).tolist(), training


@pytest.mark.slow
def test_devices_share_the_evaluation_rows_and_the_training_classes(ranks: Any) -> None:
    (rows_0, train_0), (rows_1, train_1) = ranks.run(_evaluated)
    assert sorted({*rows_0, *rows_1}) == sorted(ready().val_set.indices)
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


# Parts with the same classes


def samples(**settings: Any) -> Squares:
    return ready(split_by="samples", **settings)


def test_all_parts_hold_all_classes_and_share_no_row() -> None:
    module = samples()
    rows = [list(part.indices) for part in (module.train_set, module.val_set, module.test_set)]
    assert sorted(row for part in rows for row in part) == list(range(120))
    assert [set(module.root.labels[torch.tensor(part)].tolist()) for part in rows] == [set(range(20))] * 3
    assert module.num_train_classes == 20
    assert module.class_names[3] == "c3"


def test_batches_are_all_rows_in_random_order_without_regard_to_classes() -> None:
    module = samples()
    batches = [y for _, y in module.train_dataloader()]
    assert [len(y) for y in batches] == [12] * (len(module.train_set) // 12)
    assert len({tuple(sorted(y.tolist())) for y in batches}) > 1
    assert any(len(set(y.tolist())) > 4 for y in batches), "not four classes with three samples each"


def test_the_test_rows_do_not_depend_on_the_validation_part() -> None:
    labels = torch.arange(10).repeat(20).tolist()
    parts = [split_samples(labels, validation, 0.2, seed=3)[2] for validation in (0.1, 0.4)]
    assert parts[0] == parts[1]
    assert split_samples(labels, 0.1, 0.2, seed=4)[2] != parts[0]


def test_classes_that_are_too_small_and_parts_that_are_none_are_refused() -> None:
    with pytest.raises(ValueError, match="class 1 has 2 samples, too few"):
        split_samples([0, 0, 0, 1, 1], 0.2, 0.2)
    with pytest.raises(ValueError, match="below 1 together"):
        split_samples([0] * 9, 0.5, 0.5)
    with pytest.raises(ValueError, match="split_by must be 'classes' or 'samples'"):
        Squares(split_by="rows")  # type: ignore[arg-type]


def test_batches_larger_than_the_training_set_are_refused() -> None:
    with pytest.raises(ValueError, match=r"= 20 x 50 on 1 device\(s\) need at least 1000 training samples, and there "):
        samples(classes_per_batch=20, samples_per_class=50).train_dataloader()
