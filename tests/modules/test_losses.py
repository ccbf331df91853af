"""Losses with tensors of their own in ``DistillationModule``, views and task rows."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_rkd.data.indexing import with_indices
from lightning_rkd.losses.base import RelationalLoss
from lightning_rkd.losses.rkd import RKD
from lightning_rkd.modules.distillation import DistillationModule
from lightning_rkd.utils.types import Batch
from tests.callbacks.test_ddp import batches
from tests.harness import toys
from tests.harness.ranks import Ranks


def module(loss: RelationalLoss | dict[str, RelationalLoss], **settings: Any) -> DistillationModule:
    torch.manual_seed(0)
    return DistillationModule(
        toys.Backbone(dropout=0.5, norm=True), toys.teacher(), loss, **{"optimizer": toys.sgd, **settings}
    )


@pytest.mark.parametrize("known_from", ["loader", "example", "argument"])
def test_sizes_are_known_before_the_optimizer_is_made(known_from: str) -> None:
    told = toys.Projected(5, 7) if known_from == "argument" else toys.Projected()
    ours, expected = module(told), module(toys.Projected(5, 7))
    if known_from == "example":
        ours.example_input_array = torch.zeros(2, toys.WIDTH)
    torch.manual_seed(1)  # of the dropout
    trainer = toys.fit(ours)
    assert {id(p) for p in told.parameters()} <= {id(p) for p in trainer.optimizers[0].param_groups[0]["params"]}
    torch.manual_seed(1)
    toys.fit(expected)
    assert toys.gap(ours, expected) == 0.0, "looking changed neither weights nor running means nor random numbers"


def test_the_number_of_samples_is_that_of_the_root_data_set() -> None:
    loss = toys.Remembers()
    toys.fit(module(loss), batches=with_indices(toys.loader()))
    assert loss.state_dict()["sizes"].tolist() == [0, 40, 0, 7]


def test_sizes_that_cannot_be_found_are_requested() -> None:
    with pytest.raises(ValueError, match=r"pass Projected\(student_dim=\.\.\., teacher_dim=\.\.\.\)"):
        toys.fit(module(toys.Projected()), batches=DataLoader(toys.Stream(), 8))


@pytest.mark.parametrize("example", [(torch.zeros(2, toys.WIDTH),), {"x": torch.zeros(2, toys.WIDTH)}])
def test_an_example_is_given_to_the_networks_as_lightning_gives_it(example: Any) -> None:
    loss = toys.Projected()
    ours = module(loss)
    ours.example_input_array = example
    toys.fit(ours, batches=DataLoader(toys.Stream(), 8))
    assert loss.state_dict()["sizes"].tolist() == [0, 5, 0, 7]


class OfTwo(DistillationModule):
    def unpack(self, batch: Any) -> Batch:
        return super().unpack(batch["a"])


def test_sizes_are_found_with_several_loaders() -> None:
    loss = toys.Projected()
    ours = OfTwo(toys.Backbone(), toys.teacher(), loss, optimizer=toys.sgd)
    toys.trainer().fit(ours, {"a": toys.loader(), "b": toys.loader(rows=16)})
    assert loss.state_dict()["sizes"].tolist() == [0, 5, 0, 7]


def test_networks_are_run_for_sizes_with_what_the_batch_transform_makes() -> None:
    seen: list[int] = []

    class ToFloat(nn.Module):
        def forward(self, batch: Batch) -> Batch:
            seen.append(len(batch.inputs))
            return Batch(batch.inputs.float(), batch.labels)

    loss, transform = toys.Projected(), ToFloat()
    whole = DataLoader(TensorDataset(torch.ones(40, toys.WIDTH, dtype=torch.uint8), torch.zeros(40)), 8)
    toys.fit(module(loss, batch_transform=transform), batches=whole)
    assert seen == [2, *[8] * toys.STEPS]
    assert loss.state_dict()["sizes"].tolist() == [0, 5, 0, 7]


def test_networks_that_fail_to_give_sizes_are_reported_with_the_cure() -> None:
    wide = DataLoader(TensorDataset(torch.ones(40, 3), torch.zeros(40)), 8)
    with pytest.raises(ValueError, match=r"\(.*mat1 .*set example_input_array, or pass Projected\(student_dim"):
        toys.fit(module(toys.Projected()), batches=wide)


def test_inferring_sizes_leaves_the_random_numbers_of_augmentations_alone() -> None:
    class Noisy(TensorDataset):
        def __getitem__(self, index: int) -> Any:
            x, y = super().__getitem__(index)
            return x + float(np.random.rand()), y  # noqa: NPY002 - the global generator, as many augmentations use it

    def trained(loss: RelationalLoss) -> DistillationModule:
        ours = module(loss)
        np.random.seed(0)  # noqa: NPY002
        torch.manual_seed(1)
        toys.fit(ours, batches=DataLoader(Noisy(*toys.loader().dataset.tensors), 8))
        return ours

    assert toys.gap(trained(toys.Projected()), trained(toys.Projected(5, 7))) == 0.0


@pytest.mark.filterwarnings("ignore:Found 1 module.s. in eval mode:UserWarning")
def test_a_frozen_norm_stays_frozen_when_sizes_are_looked_for() -> None:
    student = toys.Backbone(norm=True)
    student.norm.eval()
    ours = DistillationModule(student, toys.teacher(), toys.Projected(), optimizer=toys.sgd)
    toys.fit(ours)
    assert [name for name, part in ours.student.named_modules() if not part.training] == ["norm"]
    assert int(student.norm.num_batches_tracked) == 0


def test_a_checkpoint_rebuilds_what_the_loss_had_made(tmp_path: Path) -> None:
    ours = module(toys.Projected())
    toys.fit(ours).save_checkpoint(tmp_path / "last.ckpt")
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    fresh = module(toys.Projected())
    fresh.load_state_dict(state)
    assert toys.gap(fresh, ours) == 0.0


@pytest.mark.parametrize("precision", ["bf16-true", "16-true"])
def test_tensors_of_losses_stay_in_float32(precision: Any) -> None:
    loss = toys.Projected()
    if precision == "16-true":
        ours = module(loss).half()
        assert ours.student.last.weight.dtype == torch.float16
    else:
        toys.fit(module(loss), precision=precision)
        assert {p.dtype for p in loss.parameters()} == {torch.float32}
    assert all(p.dtype == torch.float32 for p in loss.parameters())


def trained(rank: int | None, balanced: bool) -> dict[str, Tensor]:
    torch.manual_seed(0)
    losses: Any = RKD() if balanced else {"p": toys.Projected(), "r": toys.Remembers()}
    settings = {"task_loss": nn.CrossEntropyLoss(), "balance": 1.0} if balanced else {}
    ours = DistillationModule(toys.Backbone(), toys.teacher(), losses, optimizer=toys.sgd, **settings)
    with toys.devices(rank) as where:
        toys.fit(ours, batches=with_indices(batches(rank)), **where)
    assert rank is None or balanced or ours._ddp_params_and_buffers_to_ignore == ["loss.losses.r.mean.value"]
    return {name: value.clone() for name, value in ours.state_dict().items()}


def check_ranks(ranks: Ranks, balanced: bool) -> None:
    first, second = ranks.run(trained, balanced)
    for name, value in trained(None, balanced).items():
        torch.testing.assert_close(first[name], second[name], rtol=0, atol=0)
        torch.testing.assert_close(first[name], value, rtol=0, atol=1e-5)


def test_on_two_devices_parameters_and_memories_are_those_of_one_device(ranks: Ranks) -> None:
    check_ranks(ranks, balanced=False)


def test_balance_is_the_same_on_two_devices(ranks: Ranks) -> None:
    check_ranks(ranks, balanced=True)


def local_memory(rank: int | None) -> str:
    ours = module(toys.Remembers(7, 80), gather=False)
    try:
        with toys.devices(rank) as where:
            toys.fit(ours, batches=with_indices(batches(rank)), **where)
    except ValueError as error:
        return str(error)
    return ""


def test_a_memory_that_would_differ_between_ranks_is_refused(ranks: Ranks) -> None:
    assert all("leave gather=True" in message for message in ranks.run(local_memory))
    assert local_memory(None) == "", "on one device there is nothing to gather"


# What a batch transform may say


def test_the_task_loss_sees_its_rows_only() -> None:
    def twice(batch: Batch) -> Batch:
        return Batch(torch.cat([batch.inputs, -batch.inputs]), torch.cat([batch.labels] * 2), task_rows=torch.arange(8))

    task = nn.CrossEntropyLoss()
    ours = module(0.0 * RKD(), batch_transform=twice, task_loss=task, task_reads="logits")
    seen: list[int] = []
    task.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    toys.fit(ours)
    assert seen == [8] * toys.STEPS
