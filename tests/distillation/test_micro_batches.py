"""Micro-batches are the batch at once, with the activations of one part; the parity table trains with them."""

import weakref
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from lightning_rkd import CachedTeacher, Distiller, MicroBatches, Teacher
from lightning_rkd.data.indexing import with_indices
from lightning_rkd.distillation.micro_batches import split_rows
from lightning_rkd.losses.rkd import RKD
from lightning_rkd.modules.distillation import DistillationModule
from lightning_rkd.modules.mhgd import MHGDModule
from tests.harness import faces, scheme_toys, toys

SIZE = 3


def step(network: nn.Module, x: Tensor, parts: int | None = None) -> dict[str, Tensor]:
    """Gradients and buffers after a step on a loss that relates all samples; ``parts`` keep activations."""
    torch.manual_seed(1)
    output = network(x) if parts is None else torch.cat([network(part) for part in x.tensor_split(parts)])
    (output @ output.T).square().mean().backward()
    gradients = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
    found = {name.removeprefix("network."): x.clone() for name, x in [*gradients.items(), *network.named_buffers()]}
    network.zero_grad()
    return found


# State


class Counts(nn.Module):
    """Scales by the number of its calls, which it assigns, and by a tensor of the default dtype."""

    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls = self.calls + 1
        return x * self.calls * torch.ones(5)


def stateful(layer: str) -> nn.Module:
    torch.manual_seed(0)
    normed = spectral_norm(nn.Linear(toys.WIDTH, 5)) if layer == "spectral norm" else nn.Linear(toys.WIDTH, 5)
    last = {"batch norm": nn.BatchNorm1d(5), "counter": Counts(), "dropout": nn.Dropout(0.5)}.get(layer, nn.Identity())
    return nn.Sequential(normed, nn.Tanh(), last, nn.Linear(5, 4), nn.Tanh())


@pytest.mark.filterwarnings("ignore:BatchNorm normalises:UserWarning")
@pytest.mark.parametrize("layer", ["batch norm", "spectral norm", "counter", "dropout"])
def test_a_second_pass_starts_from_and_leaves_the_state_of_the_first(layer: str) -> None:
    x = torch.randn(8, toys.WIDTH)
    expected = step(stateful(layer), x, parts=3)
    assert toys.largest_gap(step(MicroBatches(stateful(layer), SIZE), x), expected) == 0.0
    if layer == "batch norm":
        assert expected["2.num_batches_tracked"] == 3  # 6 with plain activation checkpointing


def test_the_second_pass_has_the_default_dtype_of_the_first() -> None:
    x = torch.randn(8, toys.WIDTH, dtype=torch.float64)
    network = MicroBatches(stateful("counter").double(), SIZE)
    try:
        torch.set_default_dtype(torch.float64)
        output = network(x)
    finally:
        torch.set_default_dtype(torch.float32)
    output.sum().backward()  # fails if the second pass saves tensors of another dtype
    assert torch.get_default_dtype() == torch.float32


def test_a_graph_can_be_used_twice() -> None:
    network, x = stateful("counter"), torch.randn(8, toys.WIDTH)
    loss = MicroBatches(network, SIZE)(x).square().sum()
    first = torch.autograd.grad(loss, [*network.parameters()], retain_graph=True)
    second = torch.autograd.grad(loss, [*network.parameters()])
    assert all(map(torch.equal, first, second))


# Memory


class Saved(torch.autograd.Function):
    """Saves an array, and follows how long arrays of how many rows live together."""

    live, peak = 0, 0

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        array = np.zeros(len(x))
        Saved.live += len(x)
        Saved.peak = max(Saved.peak, Saved.live)
        weakref.finalize(array, Saved.release, len(x))
        ctx.save_for_backward(torch.from_numpy(array))
        return x.clone()

    @staticmethod
    def release(rows: int) -> None:
        Saved.live -= rows

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        _ = ctx.saved_tensors
        return gradients[0]


class Saves(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return Saved.apply(super().forward(x))  # type: ignore[no-any-return]


@pytest.mark.parametrize(("micro_batch", "rows"), [(None, 40), (4, 4)])
def test_activations_of_one_part_live_at_a_time(micro_batch: int | None, rows: int) -> None:
    Saved.live = Saved.peak = 0
    student = nn.Sequential(Saves(toys.WIDTH, 8), nn.ReLU(), Saves(8, 5))
    ours = DistillationModule(student, toys.teacher(), RKD(), optimizer=toys.sgd, micro_batch=micro_batch)
    toys.fit(ours, batches=toys.loader(batch_size=40))
    assert Saved.peak == 2 * rows
    assert Saved.live == 0


def test_without_gradients_each_part_runs_once() -> None:
    rows: list[int] = []
    network = toys.Backbone()
    network.register_forward_hook(lambda module, args, output: rows.append(len(output)))
    wrapped, x = MicroBatches(network, SIZE), torch.randn(8, toys.WIDTH)
    with torch.no_grad():
        parts = wrapped(x)
    assert rows == [3, 3, 2]
    torch.testing.assert_close(parts, network(x), rtol=0, atol=1e-6)


# Inputs and outputs


class Named(nn.Module):
    """Takes keywords and a list, and gives a mapping."""

    def forward(self, tokens: Tensor, pair: list[Tensor], *, shift: Tensor, scale: float) -> dict[str, Any]:
        out = scale * (tokens + pair[0]) + shift
        return {"out": out, "tuple": (out, None), "sum": out.sum(), "name": "x", "columns": out.T}


def test_lists_and_mappings_are_split_and_single_rows_are_not() -> None:
    network, a, b = Named(), torch.randn(8, 5), torch.randn(8, 5)
    given = {"tokens": a, "pair": [b], "shift": torch.randn(1, 5), "scale": 2.0}
    whole, parts = network(**given), MicroBatches(network, SIZE)(**given)
    torch.testing.assert_close(parts["out"], whole["out"], rtol=0, atol=0)
    assert torch.equal(parts["tuple"][0], whole["out"])
    assert (parts["sum"], parts["name"], parts["columns"], parts["tuple"][1]) == (None,) * 4


@pytest.mark.parametrize(
    ("inputs", "error", "message"),
    [
        (["a", "b"], TypeError, "the inputs hold str: convert them to tensors in the loader"),
        ({"x": torch.ones(8, 2), "other": object()}, TypeError, "the inputs hold object"),
        ([torch.ones(4, 2), torch.ones(8, 2)], ValueError, r"the tensors have \[4, 8\] rows: expand them"),
    ],
)
def test_inputs_without_a_row_per_sample_are_refused(inputs: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        MicroBatches(nn.Identity(), 2)(inputs)


def test_an_output_without_a_row_per_sample_is_refused() -> None:
    with pytest.raises(TypeError, match="the output of Flatten must have one row per sample"):
        MicroBatches(nn.Flatten(0), 2)(torch.ones(8, 2))


@pytest.mark.parametrize("size", [0, -1])
def test_a_size_below_one_is_refused(size: int) -> None:
    with pytest.raises(ValueError, match=f"micro_batch must be an integer of at least 1, got {size!r}"):
        DistillationModule(nn.Linear(2, 2), micro_batch=size)
    with pytest.raises(ValueError, match=f"size must be an integer of at least 1, got {size!r}"):
        MicroBatches(nn.Linear(2, 2), size)


def test_parts_have_equal_sizes_so_that_none_is_a_single_row() -> None:
    assert [len(x) for x in split_rows(torch.ones(65, 2), 2)] == [33, 32]  # not 64 and 1


def test_batch_norm_is_warned_of_once() -> None:
    network = MicroBatches(toys.Backbone(norm=True), SIZE)
    with pytest.warns(UserWarning, match="BatchNorm normalises each micro-batch by its own statistics"):
        network(torch.randn(8, toys.WIDTH))
    network(torch.randn(8, toys.WIDTH))
    MicroBatches(toys.Backbone(norm=True).eval(), SIZE)(torch.randn(8, toys.WIDTH))


# Distillation


def distilling(micro_batch: int | None = SIZE, **settings: Any) -> DistillationModule:
    task = {"task_loss": nn.CrossEntropyLoss(), "task_reads": "logits"}
    settings = {"teacher": toys.teacher(), "loss": RKD(), "student_layer": "backbone", **task, **settings}
    return DistillationModule(faces.Net(), optimizer=toys.sgd, micro_batch=micro_batch, **settings)


def test_the_teacher_runs_in_parts_too() -> None:
    rows: list[int] = []
    network = toys.teacher()
    network.register_forward_hook(lambda module, args, output: rows.append(len(output)))
    toys.fit(distilling(teacher=Teacher(network)))
    assert rows == [3, 3, 2] * toys.STEPS  # [8] * 5 without


def test_a_cached_teacher_is_read_for_the_whole_batch() -> None:
    features = torch.randn(40, 7)
    both = [distilling(size, teacher=CachedTeacher.from_array(features)) for size in (SIZE, None)]
    runs = [faces.gradients(module, batches=with_indices(toys.loader())) for module in both]
    assert faces.largest(*runs) <= 1e-6


class Twice(faces.Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + super().forward(-x)


def test_rows_of_several_views_keep_their_labels_and_indices() -> None:
    given = []
    for size in (SIZE, None):
        loss = toys.Requesting()
        ours = DistillationModule(
            Twice(), toys.teacher(), loss, student_layer="backbone", input_layer="backbone", micro_batch=size
        )
        toys.fit(ours, batches=with_indices(toys.loader()))
        given.append(loss.given)
    parts, whole = given
    for name in ("labels", "indices", "view"):
        assert torch.equal(parts[name], whole[name])


class Skips(faces.Net):
    """Leaves the backbone out on small parts."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if len(x) > 2 else self.head(x[:, :5])


def test_a_layer_that_some_parts_leave_out_is_refused() -> None:
    ours = DistillationModule(Skips(), toys.teacher(), RKD(), student_layer="backbone", micro_batch=SIZE)
    with pytest.raises(RuntimeError, match="a layer ran 2 times in 3 micro-batches, but must run equally often"):
        toys.fit(ours)


def test_a_student_layer_inside_micro_batches_is_refused() -> None:
    student = nn.Sequential(MicroBatches(toys.Backbone(), SIZE))
    with pytest.raises(ValueError, match="name '0' itself, or use DistillationModule"):
        Distiller(toys.teacher(), RKD(), student_layer="0.network.last").attach(student)
    with pytest.raises(ValueError, match="leave student_layer out, or use DistillationModule"):
        Distiller(toys.teacher(), RKD(), student_layer="network.last").attach(student[0])


class Spread(nn.Module):
    """A task loss on embeddings."""

    def forward(self, embedding: Tensor, labels: Tensor) -> Tensor:
        return (embedding - labels[:, None]).square().mean()


def test_gradients_are_balanced_where_the_task_reads_the_features() -> None:
    task: dict[str, Any] = {"task_loss": Spread(), "optimizer": toys.sgd, "balance": 1.0}
    both = [DistillationModule(faces.Net(), toys.teacher(), RKD(), micro_batch=size, **task) for size in (SIZE, None)]
    for module in both:
        toys.fit(module)
    assert toys.gap(*both) <= 1e-6


def test_gradients_are_not_balanced_through_a_second_pass() -> None:
    with pytest.raises(RuntimeError, match=r"activation checkpointing .* leave out compiling and micro_batch"):
        toys.fit(distilling(balance=1.0))


def test_clipped_gradients_are_those_of_the_whole_batch() -> None:
    task: dict[str, Any] = {"task_loss": nn.CrossEntropyLoss(), "task_reads": "logits", "student_layer": "backbone"}
    both = [MHGDModule(faces.Net(), toys.teacher(), RKD(), micro_batch=size, **task) for size in (SIZE, None)]
    assert faces.largest(*map(faces.gradients, both)) <= 1e-6


@pytest.mark.scenario("loops", "micro-batches")
@pytest.mark.filterwarnings("ignore:BatchNorm normalises:UserWarning")
@pytest.mark.parametrize("case", scheme_toys.CASES.values(), ids=scheme_toys.CASES)
def test_every_scheme_trains_as_on_the_whole_batch(case: scheme_toys.Case) -> None:
    both = [case.made(optimizer=toys.sgd, **settings) for settings in ({}, {"micro_batch": 5})]
    for module in both:
        for norm in [part for part in module.modules() if isinstance(part, nn.BatchNorm2d)]:
            norm.register_forward_pre_hook(lambda part, _: part.eval() and None)  # always frozen
        torch.manual_seed(0)  # of the heads
        scheme_toys.fit(module, batches=list(scheme_toys.images())[:3])
    assert toys.gap(*both) <= 1e-5
