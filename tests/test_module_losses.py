"""Losses with tensors of their own in ``DistillationModule``, balanced weights, views and task rows."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import IterableDataset

from lightning_rkd.balance import balance_weights
from lightning_rkd.data.indices import first_samples, root_size, with_indices
from lightning_rkd.losses.base import RelationalLoss, named_terms
from lightning_rkd.losses.rkd import RKD, RKDDistance
from lightning_rkd.module import DistillationModule
from lightning_rkd.records import Batch, Outputs
from tests import toys
from tests.callbacks.test_ddp import batches, devices
from tests.ranks import Ranks

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:You defined a .validation_step. but have no:UserWarning"),
]


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


def test_sizes_that_cannot_be_found_are_asked_for() -> None:
    class Stream(IterableDataset[Any]):
        def __iter__(self) -> Any:
            return iter(toys.loader().dataset)

    with pytest.raises(ValueError, match=r"pass Projected\(student_dim=\.\.\., teacher_dim=\.\.\.\)"):
        toys.fit(module(toys.Projected()), batches=torch.utils.data.DataLoader(Stream(), 8))


def test_a_checkpoint_rebuilds_what_the_loss_had_made(tmp_path: Path) -> None:
    ours = module(toys.Projected())
    toys.fit(ours).save_checkpoint(tmp_path / "last.ckpt")
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    fresh = module(toys.Projected())
    fresh.load_state_dict(state)
    assert toys.gap(fresh, ours) == 0.0


def test_a_resumed_run_with_a_memory_is_the_uninterrupted_run(tmp_path: Path) -> None:
    loader = with_indices(toys.loader())
    whole, half, rest = (module({"p": toys.Projected(), "r": toys.Remembers()}) for _ in range(3))
    for each in (whole, half, rest):
        each.student.drop.p = 0.0
    toys.fit(whole, batches=loader, max_epochs=2)
    toys.fit(half, batches=loader).save_checkpoint(tmp_path / "half.ckpt")
    toys.trainer(max_epochs=2).fit(rest, loader, ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    assert toys.gap(whole, rest) == 0.0


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


def test_a_memory_and_lbfgs_are_refused() -> None:
    with pytest.raises(ValueError, match="LBFGS evaluates each several times"):
        toys.fit(module(toys.Remembers(), optimizer=torch.optim.LBFGS), batches=with_indices(toys.loader()))


def in_two_processes(rank: int | None) -> dict[str, Tensor]:
    ours = module({"p": toys.Projected(), "r": toys.Remembers()})
    ours.student = toys.Backbone()
    torch.manual_seed(3)
    with devices(rank) as where:
        toys.fit(ours, batches=with_indices(batches(rank)), **where)
    assert rank is None or ours._ddp_params_and_buffers_to_ignore == ["loss.terms.r.loss.mean.value"]
    return {name: value.clone() for name, value in ours.state_dict().items() if name != "student"}


@pytest.mark.slow
def test_on_two_devices_parameters_and_memories_are_those_of_one_device(ranks: Ranks) -> None:
    first, second = ranks.run(in_two_processes)
    alone = in_two_processes(None)
    for name in (key for key in alone if not key.startswith("student")):
        torch.testing.assert_close(first[name], second[name], rtol=0, atol=0)
        torch.testing.assert_close(first[name], alone[name], rtol=0, atol=1e-5)


def local_memory(rank: int | None) -> str:
    ours = module(toys.Remembers(7, 80), gather=False)
    try:
        with devices(rank) as where:
            toys.fit(ours, batches=with_indices(batches(rank)), **where)
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.slow
def test_a_memory_that_would_differ_between_ranks_is_refused(ranks: Ranks) -> None:
    assert all("leave gather=True" in message for message in ranks.run(local_memory))
    assert local_memory(None) == "", "on one device there is nothing to gather"


# Balance


def by_hand(task: Tensor, term: Tensor, at: Tensor) -> Tensor:
    norms = [torch.autograd.grad(loss, at, retain_graph=True)[0].norm() for loss in (task, term)]
    return norms[0] / norms[1]


def test_balanced_gradients_have_the_norm_of_the_tasks() -> None:
    torch.manual_seed(2)
    x, t, y = torch.randn(6, 4, requires_grad=True), torch.randn(6, 3), torch.arange(6) % 4
    losses = named_terms(3 * RKD())
    terms, task = {"rkd": losses["rkd"](x, t)}, F.cross_entropy(x, y)
    factor = balance_weights(terms, task, {"": Outputs(embedding=x)}, losses)["rkd"]
    torch.testing.assert_close(factor, by_hand(task, terms["rkd"], x))
    scaled = torch.autograd.grad(factor * terms["rkd"], x)[0].norm()
    torch.testing.assert_close(scaled, torch.autograd.grad(task, x)[0].norm())


def test_balance_weighs_the_terms_of_a_run_and_logs_what_it_found() -> None:
    settings: dict[str, Any] = {"task_loss": nn.CrossEntropyLoss(), "task_reads": "embedding", "weight": 0.5}
    ours = module({"rkd": RKD()}, balance=2.0, **settings)
    plain = module({"rkd": RKD()}, **settings)
    logged = toys.fit(ours, max_steps=1).callback_metrics
    assert sorted(logged) == ["balance/rkd", "distill/rkd", "train/loss", "train/task"]
    toys.fit(plain, max_steps=1)
    fixed = module({"rkd": RKD()}, **{**settings, "weight": float(logged["balance/rkd"])})
    toys.fit(fixed, max_steps=1)
    assert toys.gap(ours, fixed) <= 1e-6, "the logged weight, written down, trains alike"
    assert toys.gap(ours, plain) > 1e-4


def test_a_term_without_a_gradient_gets_no_weight() -> None:
    x = torch.ones(4, 3, requires_grad=True)
    losses = named_terms(RKDDistance())
    terms = {"rkd_distance": losses["rkd_distance"](x, torch.randn(4, 2))}
    assert float(balance_weights(terms, x.sum(), {"": Outputs(embedding=x)}, losses)["rkd_distance"]) == 0.0


def test_a_task_that_does_not_depend_on_what_a_term_reads_is_refused() -> None:
    x, y = torch.randn(4, 3, requires_grad=True), torch.randn(4, 3, requires_grad=True)
    losses = named_terms(RKDDistance())
    terms = {"rkd_distance": losses["rkd_distance"](x, torch.randn(4, 2))}
    with pytest.raises(ValueError, match="the task loss does not depend on what rkd_distance reads"):
        balance_weights(terms, y.sum(), {"": Outputs(embedding=x)}, losses)


def test_balance_without_a_task_is_refused() -> None:
    with pytest.raises(ValueError, match="balance needs a task_loss"):
        module(RKD(), balance=1.0)


def balanced_in_two_processes(rank: int | None) -> dict[str, Tensor]:
    torch.manual_seed(0)
    ours = DistillationModule(
        toys.Backbone(), toys.teacher(), RKD(), task_loss=nn.CrossEntropyLoss(), balance=1.0, optimizer=toys.sgd
    )
    with devices(rank) as where:
        toys.fit(ours, batches=batches(rank), **where)
    return {name: value.clone() for name, value in ours.state_dict().items()}


@pytest.mark.slow
def test_balance_is_the_same_on_two_devices(ranks: Ranks) -> None:
    first, second = ranks.run(balanced_in_two_processes)
    for name, value in balanced_in_two_processes(None).items():
        torch.testing.assert_close(first[name], second[name], rtol=0, atol=0)
        torch.testing.assert_close(first[name], value, rtol=0, atol=1e-5)


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


def test_views_of_a_batch_transform_reach_the_loss() -> None:
    def twice(batch: Batch) -> Batch:
        view = torch.arange(2).repeat_interleave(8)
        return Batch(torch.cat([batch.inputs] * 2), torch.cat([batch.labels] * 2), torch.arange(16), view=view)

    loss = toys.Asking()
    toys.fit(module(loss, batch_transform=twice))
    assert loss.given["view"].tolist() == [0] * 8 + [1] * 8


# Looking at a loader


def test_first_samples_are_as_the_steps_would_see_them() -> None:
    loader = toys.loader(shuffle=True)
    x, y = loader.dataset.tensors
    state = copy.deepcopy(torch.get_rng_state())
    first = first_samples([loader])
    assert torch.equal(first[0], x[:2])
    assert torch.equal(first[1], y[:2])
    indexed = first_samples({"train": with_indices(loader)})
    assert indexed.indices.tolist() == [0, 1]
    assert torch.equal(torch.get_rng_state(), state)
    assert first_samples([1, 2, 3]) is None
    assert root_size(with_indices(loader).dataset) == 40
