"""Tests that need a GPU; without one everything here is skipped."""

import copy
import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_rkd import DistillationModule, MicroBatches
from lightning_rkd.functional import _kernels as kernels
from lightning_rkd.functional.angles import angle_loss
from lightning_rkd.functional.distances import squared_distances
from lightning_rkd.functional.rkd import rkd_loss
from lightning_rkd.losses import MHGD, RKD, RKDDistance
from lightning_rkd.losses.parts.memory import MemoryBank
from lightning_rkd.metrics import EmbeddingRetrieval, RelationalAgreement
from tests.harness import toys
from tests.harness.faces import User, taught
from tests.losses.test_contract import Sample, context, every_loss, pack

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def moved(x: Any, device: str) -> Any:
    """The same on another device."""
    if isinstance(x, Tensor):
        return x.detach().to(device).requires_grad_(x.requires_grad)
    if isinstance(x, list):
        return [moved(value, device) for value in x]
    if dataclasses.is_dataclass(x):
        return dataclasses.replace(x, **{f.name: moved(getattr(x, f.name), device) for f in dataclasses.fields(x)})  # type: ignore[type-var]
    return tuple(moved(value, device) for value in x) if isinstance(x, tuple) else x


@contextmanager
def no_waiting() -> Iterator[None]:
    """An error where the host would wait for the device."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_micro_batches_have_the_gradient_of_the_batch_in_less_memory() -> None:
    layers = [torch.nn.Linear(512, 512) for _ in range(20)]
    student, x = torch.nn.Sequential(*layers).cuda(), torch.randn(4096, 512).cuda()
    gradients, peaks = [], []
    for network in (student, MicroBatches(student, 256)):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        loss = RKD()(network(x)[:, :16], x[:, :32])
        gradients.append(torch.autograd.grad(loss, layers[0].weight)[0])
        peaks.append(torch.cuda.max_memory_allocated() - before)
        del loss
    assert float((gradients[0] - gradients[1]).abs().max() / gradients[0].abs().max()) <= 1e-4
    assert peaks[1] < peaks[0]


@every_loss
def test_a_loss_agrees_with_the_cpu_and_the_host_does_not_wait(cls):
    sample = Sample(cls)
    values = []
    for device in ("cpu", "cuda"):
        loss = copy.deepcopy(sample.loss).to(device)
        student, teacher = (moved(pack(cls, part), device) for part in (sample.student, sample.teacher))
        given = {name: moved(value, device) for name, value in context(cls, sample.n).items()}
        torch.manual_seed(0)
        if device == "cuda":
            copy.deepcopy(loss)(student, teacher, **given)  # compiles
            waits = cls is MHGD  # for the eigenvalues of PyTorch's own eigh
            with nullcontext() if waits else no_waiting():
                value = loss(student, teacher, **given)
                if value.requires_grad:
                    value.backward()
        else:
            value = loss(student, teacher, **given)
        values.append(value.detach().cpu().double())
    if not any(isinstance(module, MemoryBank) for module in sample.loss.modules()):  # draws other rows there
        assert values[1] == pytest.approx(float(values[0]), rel=1e-3, abs=1e-5)


def value_and_gradient(
    x: Tensor, y: Tensor, device: str, dtype: torch.dtype, reduction: Any = "official"
) -> tuple[float, Tensor]:
    own, y = x.to(device, dtype).requires_grad_(), y.to(device, dtype)
    loss = rkd_loss(own, y, reduction=reduction)
    (grad,) = torch.autograd.grad(loss, own)
    return float(loss.detach()), grad.cpu()


@pytest.mark.parametrize("reduction", ["official", "distinct"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-11)])
@pytest.mark.parametrize("n", [1, 2, 3, 5, 31, 64, 100, 257, 1000, 1500])
def test_the_kernels_of_rkd_agree_with_the_cpu(n, dtype, tolerance, reduction):
    both = [torch.randn(n, d).double() for d in (16, 32)]
    expected, expected_grad = value_and_gradient(*both, "cpu", torch.float64, reduction)
    value, grad = value_and_gradient(*both, "cuda", dtype, reduction)
    assert not kernels._failed
    assert abs(value - expected) <= tolerance * abs(expected)
    assert (grad - expected_grad).norm() <= tolerance * expected_grad.norm() + 1e-15


def test_the_angles_of_squared_distances_agree_with_the_cpu():
    s, t = (squared_distances(torch.randn(100, d)) for d in (16, 32))
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-11)):
        value = float(angle_loss(s.cuda(), t.cuda(), dtype=dtype))
        assert value == pytest.approx(float(angle_loss(s, t, dtype=torch.float64)), rel=tolerance)


@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_the_kernels_of_rkd_are_exact_for_duplicates_and_near_rows(offset):
    x, y = (torch.randn(200, d, dtype=torch.float64) for d in (16, 32))
    x[1] = x[0]
    y[2] = y[3] + 1e-4 * y[2]
    x[4] = x[3] + 1e-5 * x[4]
    y[6] = y[5]
    x, y = (x + offset).float().double(), (y + offset).float().double()
    _, expected = value_and_gradient(x, y, "cpu", torch.float64)
    _, grad = value_and_gradient(x, y, "cuda", torch.float32)
    for rows in (slice(0, 2), slice(2, 7), slice(7, None)):
        assert (grad[rows] - expected[rows]).norm() <= 1e-3 * expected[rows].norm()


def test_the_kernels_of_rkd_give_the_same_bits_twice():
    both = [torch.randn(300, d) for d in (16, 32)]
    grads = [value_and_gradient(*both, "cuda", torch.float32)[1] for _ in range(2)]
    assert torch.equal(*grads)


@pytest.mark.parametrize(("loss", "most"), [(RKD(), 12), (RKDDistance(), 6)], ids=str)
def test_the_device_sees_as_few_launches_as_are_counted_without_one(loss, most):
    student, teacher = torch.randn(64, 16, device="cuda", requires_grad=True), torch.randn(64, 32, device="cuda")
    for _ in range(2):  # the first compiles
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            loss(student, teacher).backward()
            torch.cuda.synchronize()
        student.grad = None
    assert 0 < sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profile.events()) <= most


def test_a_cuda_graph_captures_rkd_and_replays_it_on_other_rows():
    student, teacher = torch.randn(100, 16, device="cuda", requires_grad=True), torch.randn(100, 32, device="cuda")
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        torch.autograd.grad(RKD()(student, teacher), student)
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        (grad,) = torch.autograd.grad(RKD()(student, teacher), student)
    with torch.no_grad():
        student.copy_(torch.randn(100, 16))
        student[1] = student[0] + 1e-4  # the capture saw no near rows
    graph.replay()
    (expected,) = torch.autograd.grad(RKD()(student, teacher), student)
    assert torch.equal(grad, expected)


def test_compiled_the_loss_is_the_same():
    student, teacher = torch.randn(64, 16, device="cuda"), torch.randn(64, 32, device="cuda")
    loss = RKD()
    grads = []
    for call in (loss, torch.compile(loss, fullgraph=True)):
        own = student.clone().requires_grad_()
        call(own, teacher).backward()
        grads.append(own.grad)
    assert (grads[1] - grads[0]).norm() <= 1e-5 * grads[0].norm()


def computed(metric: Any, device: str, *columns: Tensor) -> dict[str, float]:
    metric = metric.to(device)
    metric.update(*(column.to(device) for column in columns))
    return {name: float(value) for name, value in metric.compute().items()}


@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_retrieval_is_the_same_to_the_last_digit(distance, dtype):
    labels = torch.arange(3000) % 300
    rows = (torch.randn(300, 32)[labels] + 2 * torch.randn(3000, 32)).to(dtype)
    rows[7] = rows[8]
    cpu, gpu = (computed(EmbeddingRetrieval((1, 5), distance), device, rows, labels) for device in ("cpu", "cuda"))
    assert cpu == gpu


def test_agreement_is_the_same():
    both = torch.randn(2000, 16), torch.randn(2000, 32)
    assert computed(RelationalAgreement(), "cuda", *both) == pytest.approx(
        computed(RelationalAgreement(), "cpu", *both), abs=1e-6
    )


SETTINGS: dict[str, Any] = {"accelerator": "gpu", "max_steps": 12}


def batches() -> DataLoader[Any]:
    return toys.loader(rows=12 * 64, batch_size=64, pin_memory=True)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("precision", ["32-true", "16-mixed", "bf16-mixed"])
def test_attached_it_is_what_is_written_by_hand_to_the_last_bit(precision):
    teacher = toys.teacher().cuda()

    def by_hand(embedding: Tensor, x: Tensor) -> Tensor:
        with torch.no_grad():
            target = teacher(x)
        return RKD()(embedding, target)

    (attached, callbacks), written = taught("callback", toys.teacher(), RKD()), User(by_hand)
    toys.fit(attached, *callbacks, batches=batches(), precision=precision, **SETTINGS)
    toys.fit(written, batches=batches(), precision=precision, **SETTINGS)
    assert toys.gap(attached, written) == 0.0


class NoWaiting(pl.Callback):
    """From the batch's arrival to the step's end the host must not wait, but for the first steps, which compile."""

    def __init__(self) -> None:
        self.steps = 0

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.global_step >= 3:
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")

    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        self.steps += torch.cuda.get_sync_debug_mode() == 2
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("face", ["callback", "module"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_in_a_step_the_host_never_waits_for_the_device(face, precision):
    watch = NoWaiting()
    module, callbacks = taught("callback", toys.teacher(), RKD())
    if face == "module":
        module, callbacks = DistillationModule(toys.Backbone(), toys.teacher(), RKD(), optimizer=toys.sgd), []
    try:
        toys.fit(module, *callbacks, watch, batches=batches(), precision=precision, **SETTINGS)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert watch.steps == 9
