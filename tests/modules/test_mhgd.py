"""Both stages of MHGD under a real Trainer: what they learn, clip, save, resume and refuse; and two devices as one."""

import copy
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.cli import ReduceLROnPlateau
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_rkd.data.indexing import with_indices
from lightning_rkd.distillation.layers import Tap
from lightning_rkd.losses.base import RelationalLoss
from lightning_rkd.losses.mhgd import MHGD
from lightning_rkd.losses.parts.attention_graph import AttentionGraph, freeze_attention, load_attention
from lightning_rkd.losses.rkd import RKD
from lightning_rkd.modules import AttentionGraphEstimator, MHGDModule
from lightning_rkd.modules.distillation import DistillationModule
from tests.harness import toys
from tests.harness.ranks import Ranks
from tests.harness.scheme_toys import keeps
from tests.oracles import mhgd as oracle

LAYERS = ["stage1", "stage2", "stage3"]
CLASSES = 3


class Stages(nn.Module):
    """Three stages and a classifier; batch norm only with ``norm``."""

    def __init__(self, widths: tuple[int, int, int] = (4, 6, 6), norm: bool = False) -> None:
        super().__init__()
        channels = (1, *widths)
        for n in range(3):
            conv = nn.Conv2d(channels[n], channels[n + 1], 3, stride=1 if n == 0 else 2, padding=1)
            middle = nn.BatchNorm2d(channels[n + 1]) if norm else nn.Identity()
            setattr(self, f"stage{n + 1}", nn.Sequential(conv, middle, nn.ReLU(inplace=True)))
        self.classify = nn.Linear(widths[-1], CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.classify(self.stage3(self.stage2(self.stage1(x))).mean((2, 3)))
        return logits


def net(seed: int, **kwargs: Any) -> Stages:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Stages(**kwargs)


def images(rows: int, seed: int = 3) -> TensorDataset:
    """Bars of three directions in noise: random, but with structure."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (rows,), generator=generator)
    place = torch.arange(8.0)
    phase, contrast = (torch.rand(rows, 1, 1, generator=generator) for _ in range(2))
    waves = torch.stack([place[:, None].expand(8, 8), place.expand(8, 8), place[:, None] + place])[labels]
    x = (0.5 + contrast) * torch.sin(1.3 * waves + 6 * phase) + 0.1 * torch.randn(rows, 8, 8, generator=generator)
    return TensorDataset(x[:, None], labels)


def loader(rows: int = 40, batch_size: int = 8, **kwargs: Any) -> DataLoader[Any]:
    return DataLoader(images(rows), batch_size=batch_size, **kwargs)


def heads_for(channels: tuple[int, ...]) -> AttentionGraph:
    with torch.random.fork_rng():
        torch.manual_seed(5)
        return AttentionGraph(channels)


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, 0.05, momentum=0.9, nesterov=True, weight_decay=5e-4)


# Stage 1


def estimator(**kwargs: Any) -> AttentionGraphEstimator:
    torch.manual_seed(0)
    return AttentionGraphEstimator(**{"teacher": net(7), "teacher_layer": LAYERS, **kwargs})


def cosine_error(module: AttentionGraphEstimator, **kwargs: Any) -> float:
    held_out = DataLoader(images(64, seed=11), batch_size=16)
    (logged,) = toys.trainer(**kwargs).validate(module, held_out, verbose=False)
    return float(logged["val/cosine_error"])


def test_the_estimator_halves_the_error_of_an_untrained_one():
    ours = estimator()
    untrained = cosine_error(ours)
    toys.fit(ours, batches=loader(320, 32, shuffle=True), max_epochs=4)
    assert cosine_error(ours) <= untrained / 2
    assert untrained > 0.5


def test_the_logged_losses_are_those_of_the_vectors():
    ours = estimator(optimizer=lambda parameters: torch.optim.SGD(parameters, 0.0))
    trainer = toys.fit(ours, batches=loader(8))
    assert ours.graph is not None
    x, _ = images(8)[:]
    with torch.no_grad():
        vectors, teacher = [], net(7)
        for name in LAYERS:
            x = teacher.get_submodule(name)(x)
            vectors.append(torch.tensor(np.array([oracle.first_vectors(m, 1)[0] for m in x.numpy()])))
        twin = copy.deepcopy(ours.graph).train()
        twin.updates -= 1
        errors = [1 - (e * v).sum(1).mean() for e, v in zip(twin(vectors), vectors[1:], strict=True)]
    assert float(trainer.callback_metrics["train/loss"]) == pytest.approx(float(sum(errors)), rel=1e-4)


def test_its_checkpoint_is_plain_and_restores_the_graph(tmp_path: Path):
    teacher = net(7, norm=True).train()
    before, ours = toys.snapshot(teacher), estimator(teacher=teacher)
    toys.fit(ours, keeps(tmp_path), batches=loader(), enable_checkpointing=True)
    assert toys.same(before, teacher)
    assert toys.attachments(ours, teacher) == []
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert {key.split(".")[0] for key in saved["state_dict"]} == {"graph"}
    assert saved["hyper_parameters"]["teacher_layer"] == LAYERS
    loaded = AttentionGraphEstimator.load_from_checkpoint(tmp_path / "last.ckpt")
    assert toys.gap(loaded, ours) == 0.0
    assert loaded.graph.channels == (4, 6, 6)


def test_indexed_batches_mappings_and_the_test_set_are_understood():
    ours = estimator(inputs="x")
    toys.fit(ours, batches=[{"x": x} for x, _ in loader()])
    (logged,) = toys.trainer().test(estimator(channels=[4, 6, 6]), with_indices(loader()), verbose=False)
    assert 0 < float(logged["test/cosine_error"]) < 2


def test_what_stage_1_cannot_work_with_is_refused():
    with pytest.raises(ValueError, match="AttentionGraphEstimator learns from a teacher: pass teacher="):
        toys.fit(estimator(teacher=None), batches=loader())
    with pytest.raises(ValueError, match="needs the channels of at least two"):
        toys.fit(estimator(teacher_layer=["stage1"]), batches=loader())
    with pytest.raises(ValueError, match=r"this training batch holds one: pass drop_last=True"):
        toys.fit(estimator(), batches=loader(9))
    teacher = net(7).train()
    with pytest.raises(ValueError, match=r"pass channels=\[\.\.\.\]"):
        toys.fit(estimator(teacher=teacher), batches=iter(loader()))
    assert toys.attachments(teacher) == []


# Stage 2


def student_module(**kwargs: Any) -> MHGDModule:
    arguments: dict[str, Any] = {
        "student": net(0),
        "teacher": net(7),
        "loss": MHGD(heads_for((4, 6, 6))),
        "task_loss": nn.CrossEntropyLoss(),
        "task_reads": "logits",
        "student_layer": {"feature_maps": LAYERS, "embedding": Tap("classify", at="input")},
        "teacher_layer": {"feature_maps": LAYERS, "embedding": Tap("classify", at="input")},
        "optimizer": sgd,
    }
    torch.manual_seed(0)
    return MHGDModule(**{**arguments, **kwargs})


def by_hand(epochs: int = 2, widths: tuple[int, int, int] = (4, 6, 6), clip: float = 1.0) -> tuple[Stages, MHGD]:
    """The same training with two backward passes of its own for every step, clipped by the oracle; in float64."""
    student, teacher = net(0, widths=widths).double(), net(7).double()
    examples = [torch.zeros(1, c, 1, 1) for c in widths], [torch.zeros(1, c, 1, 1) for c in (4, 6, 6)]
    torch.manual_seed(0)
    loss = MHGD(heads_for((4, 6, 6)))
    loss.materialize(*examples)
    loss.double()
    trained = [*student.parameters(), *(p for p in loss.parameters() if p.requires_grad)]
    optimizer = sgd(trained)

    def maps(network: Stages, x: Tensor) -> list[Tensor]:
        first = network.stage1(x)
        second = network.stage2(first)
        return [first, second, network.stage3(second)]

    for epoch in range(epochs):
        for x, y in loader():
            x = x.double()
            seen = maps(student, x)
            with torch.no_grad():
                wanted = maps(teacher, x)
            task = F.cross_entropy(student.classify(seen[-1].mean((2, 3))), y)
            of_task = torch.autograd.grad(task, trained, retain_graph=True, allow_unused=True)
            pulls = torch.autograd.grad(loss(seen, wanted), trained, allow_unused=True)
            lengths = [float(g.norm()) for g in of_task if g is not None]
            for p, g, pull in zip(trained, of_task, pulls, strict=True):
                if g is None:  # an adapter: clipped at the mean norm
                    unit = np.array([sum(lengths) / len(lengths)])
                    bound = float(oracle.clipped(unit, 1e9 * unit, epoch, clip)[0] - unit[0])
                    p.grad = pull * min(1.0, bound / float(pull.norm()))
                elif pull is None:
                    p.grad = g
                else:
                    p.grad = torch.from_numpy(oracle.clipped(g.numpy(), pull.numpy(), epoch, clip))
            optimizer.step()
    return student, loss


@pytest.mark.parametrize("clip", [1.0, 0.1])
@pytest.mark.parametrize("widths", [(4, 6, 6), (3, 6, 5)], ids=["equal channels", "adapters"])
def test_stage_2_trains_with_the_gradient_clipped_for_every_parameter(widths, clip):
    student, loss = by_hand(widths=widths, clip=clip)
    ours = student_module(student=net(0, widths=widths), clip=clip)
    assert ours.hparams["clip"] == clip
    trainer = toys.fit(ours, batches=loader(), max_epochs=2, precision="64-true")
    assert toys.gap(ours.student, student) <= 1e-8
    assert toys.gap(ours.loss, loss) <= 1e-8
    assert toys.gap(ours.student, net(0, widths=widths)) > 1e-2
    assert trainer.global_step == 10
    logged = trainer.callback_metrics
    assert sorted(logged) == ["distill/mhgd", "train/loss", "train/task"]
    assert float(logged["train/loss"]) == pytest.approx(
        float(logged["train/task"]) + float(logged["distill/mhgd"]), rel=1e-5
    )


def test_heads_are_saved_with_the_student_and_need_no_estimator(tmp_path: Path):
    toys.fit(estimator(), keeps(tmp_path / "1"), enable_checkpointing=True, batches=loader())
    first = torch.load(tmp_path / "1" / "last.ckpt", weights_only=True)["state_dict"]
    loss = MHGD(tmp_path / "1" / "last.ckpt")
    ours = adapted(loss=loss)
    toys.fit(ours, keeps(tmp_path / "2"), enable_checkpointing=True, batches=loader(), max_epochs=2)
    second = torch.load(tmp_path / "2" / "last.ckpt", weights_only=True)
    heads = {k: v for k, v in second["state_dict"].items() if ".attention." in k}
    assert heads
    expected = freeze_attention(load_attention(first))
    assert all(torch.equal(v, expected[k.removeprefix("loss.attention.")].float()) for k, v in heads.items())
    held = {id(p) for group in ours.trainer.optimizers[0].param_groups for p in group["params"]}
    assert not held & {id(p) for p in loss.attention.parameters()}
    assert held >= {id(p) for p in loss.adapters.parameters()}
    parts = {"student": net(1, widths=(3, 6, 6)), "loss": MHGD("gone.ckpt"), "task_loss": nn.CrossEntropyLoss()}
    loaded = MHGDModule.load_from_checkpoint(tmp_path / "2" / "last.ckpt", **parts)
    assert toys.gap(loaded, ours) == 0.0


def adapted(**kwargs: Any) -> MHGDModule:
    return student_module(student=net(0, widths=(3, 6, 6)), **kwargs)


both_stages = pytest.mark.parametrize("make", [estimator, adapted], ids=["stage 1", "stage 2"])


@both_stages
def test_a_resumed_stage_is_the_uninterrupted_one(tmp_path: Path, make: Any):
    whole, first, resumed = (make() for _ in range(3))
    torch.manual_seed(0)  # of the adapter
    toys.fit(whole, max_epochs=2, batches=loader())
    torch.manual_seed(0)
    toys.fit(first, keeps(tmp_path), max_epochs=1, enable_checkpointing=True, batches=loader())
    resuming = toys.trainer(max_epochs=2, enable_checkpointing=True, callbacks=[keeps(tmp_path)])
    resuming.fit(resumed, loader(), ckpt_path=tmp_path / "last.ckpt")
    assert toys.gap(resumed, whole) == 0.0


def scaled(scale: float) -> MixedPrecision:
    return MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=scale))


def test_a_gradient_scaler_changes_nothing():
    plain, big = student_module(), student_module()
    toys.fit(plain, batches=loader(), plugins=scaled(1.0))
    toys.fit(big, batches=loader(), plugins=scaled(256.0))
    assert toys.gap(big.student, plain.student) <= 2e-3, "float16 gradients round otherwise"
    assert toys.gap(big.student, net(0)) > 1e-2


def test_a_step_whose_scaled_gradient_overflows_is_skipped():
    ours = student_module()
    toys.fit(ours, batches=loader(), plugins=scaled(2.0**120), max_steps=1)
    assert toys.gap(ours.student, net(0)) == 0.0


@both_stages
@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_both_stages_train_in_other_precisions(precision: Any, make: Any):
    trainer = toys.fit(make(teacher=net(7, norm=True)), batches=loader(), precision=precision)
    assert torch.isfinite(trainer.callback_metrics["train/loss"])


def test_logging_gradients_before_clipping_changes_nothing():
    ours, plain = student_module(compare_gradients="step"), student_module()
    logged = toys.fit(ours, batches=loader(), log_every_n_steps=1, max_steps=1).callback_metrics
    assert "gradient/mhgd" not in toys.fit(plain, batches=loader(), log_every_n_steps=1, max_steps=1).callback_metrics
    assert toys.gap(ours, plain) == 0
    weak = student_module(compare_gradients="step", weight=0.25)
    weaker = toys.fit(weak, batches=loader(), log_every_n_steps=1, max_steps=1).callback_metrics
    assert float(logged["gradient/mhgd"]) > 0
    torch.testing.assert_close(weaker["gradient/mhgd"], logged["gradient/mhgd"] / 4)


def test_schedulers_step_per_epoch_or_per_step_or_on_a_plateau():
    halves = partial(torch.optim.lr_scheduler.StepLR, step_size=1, gamma=0.5)
    plateau = partial(ReduceLROnPlateau, monitor="train/loss", factor=0.5, patience=0, mode="max")
    rates = []
    for scheduler, interval in ((halves, "epoch"), (halves, "step"), (plateau, "epoch")):
        module = student_module(lr_scheduler=scheduler, lr_interval=interval)
        trainer = toys.fit(module, batches=loader(), max_epochs=2 if scheduler is halves else 4)
        rates.append(trainer.optimizers[0].param_groups[0]["lr"])
    assert rates[:2] == pytest.approx([0.05 / 2**2, 0.05 / 2**10])
    assert rates[2] < 0.05


def test_it_is_an_ordinary_loss_with_a_fixed_weight_too():
    arguments = {"student": net(0), "teacher": net(7), "loss": 0.01 * MHGD(heads_for((4, 6, 6)), reduction="mean")}
    ours = DistillationModule(**arguments, student_layer=LAYERS, teacher_layer=LAYERS, optimizer=toys.sgd)
    toys.fit(ours, batches=loader())
    assert toys.gap(ours.student, net(0)) > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"loss": None}, "pass loss=... and task_loss=..."),
        ({"task_loss": None}, "pass loss=... and task_loss=..."),
        ({"balance": 1.0}, "leave balance out"),
        ({"clip": 0.0}, "MHGDModule: clip must be a positive number, got 0.0"),
        ({"loss": MHGD()}, "MHGD needs the attention graph of its teacher"),
    ],
    ids=["no loss", "no task", "balance", "no clip", "no estimator"],
)
def test_what_stage_2_cannot_work_with_is_refused(arguments: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        toys.fit(student_module(**arguments), batches=loader())


# Two devices


class Biased(RelationalLoss):
    """A mean of per-sample terms, of which the ranks hold parts."""

    reads, gather = "embedding", False

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        return (student.sum(1) - teacher.sum(1)).square().mean()


def trained(rank: int | None, stage: int, counts: tuple[int, int], settings: dict[str, Any]) -> dict[str, Tensor]:
    module: pl.LightningModule = estimator()
    if stage == 2:
        loss = {"mhgd": MHGD(heads_for((4, 6, 6))), "rkd": RKD(), "biased": Biased()}
        module = student_module(student=net(0, widths=(3, 6, 5)), loss=loss)
    with toys.devices(rank, **settings) as where:
        # float64, in which rounding stays invisible: singular vectors that lie close amplify it
        toys.fit(module, batches=toys.split(images(80), rank, counts), max_epochs=2, precision="64-true", **where)
    return {name: value.clone() for name, value in module.state_dict().items()}


@pytest.mark.slow
@pytest.mark.parametrize("counts", [(8, 8), (11, 5)])
def test_two_devices_learn_the_graph_of_one_with_the_whole_batch(ranks: Ranks, counts):
    first, second = ranks.run(trained, 1, counts, {})
    assert toys.largest_gap(first, second) == 0.0
    assert toys.largest_gap(first, trained(None, 1, counts, {})) <= 1e-8


@pytest.mark.slow
@pytest.mark.parametrize(
    ("counts", "settings"),
    [
        ((8, 8), {}),
        ((11, 5), {}),
        ((8, 8), {"find_unused_parameters": True}),
        ((8, 8), {"gradient_as_bucket_view": True}),
    ],
)
def test_two_devices_clip_the_gradient_of_the_whole_batch(ranks: Ranks, counts, settings):
    first, second = ranks.run(trained, 2, counts, settings)
    assert toys.largest_gap(first, second) == 0.0
    assert toys.largest_gap(first, trained(None, 2, counts, {})) <= 1e-8
    untrained = student_module(student=net(0, widths=(3, 6, 5))).student.state_dict()
    assert max(float((first[f"student.{k}"] - v).abs().max()) for k, v in untrained.items()) > 1e-2


def test_a_strategy_that_shards_parameters_is_refused():
    class Sharding(pl.strategies.FSDPStrategy):
        pass

    ours = student_module()
    ours._trainer = type("T", (), {"strategy": Sharding.__new__(Sharding), "callbacks": []})()
    with pytest.raises(ValueError, match="Sharding may hold them in parts: train on one device or with strategy='ddp'"):
        ours.setup("fit")
