"""On a GPU no loss lets the host wait for the device: tested without one, on tensors that have no values."""

import copy
import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from lightning_rkd.losses.parts import memory
from tests.harness.launches import kernels_without_triton, needs_fake_gpu
from tests.losses.test_contract import Sample, context, every_loss, pack

pytestmark = needs_fake_gpu


def on_gpu(x: Any, mode: FakeTensorMode) -> Any:
    """The same, with tensors that are on a GPU as far as PyTorch knows, and have shapes and types but no values."""
    if isinstance(x, Tensor):
        with mode:
            return torch.empty(x.shape, dtype=x.dtype, device="cuda", requires_grad=x.is_floating_point())
    if isinstance(x, list):
        return [on_gpu(value, mode) for value in x]
    if dataclasses.is_dataclass(x):
        return dataclasses.replace(x, **{f.name: on_gpu(getattr(x, f.name), mode) for f in dataclasses.fields(x)})  # type: ignore[type-var]
    return tuple(on_gpu(value, mode) for value in x) if isinstance(x, tuple) else x


class Event:
    """Stands for CUDA's."""

    def record(self) -> None: ...

    def query(self) -> bool:
        return True


@pytest.fixture
def mode(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeTensorMode]:
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(memory, "generator", lambda *seeds: None)  # a GPU's generator needs one
    with kernels_without_triton([]):  # which looks for a driver
        yield FakeTensorMode(allow_non_fake_inputs=True)


@every_loss
def test_no_loss_looks_at_a_value(cls, mode):
    sample = Sample(cls)
    loss = copy.deepcopy(sample.loss)
    for module in loss.modules():
        host = getattr(module, "on_host", ())
        for kind in (module._parameters, module._buffers):
            kind |= {name: on_gpu(x, mode).detach() for name, x in kind.items() if x is not None and name not in host}
    student, teacher = (on_gpu(pack(cls, outputs), mode) for outputs in (sample.student, sample.teacher))
    given = {name: on_gpu(value, mode) for name, value in context(cls, sample.n).items()}
    with mode:
        value = loss(student, teacher, **given)
    assert value.shape == ()
    assert value.device.type == "cuda"


def test_looking_at_a_value_would_be_noticed(mode):
    with mode, pytest.raises(DataDependentOutputException):
        float(on_gpu(torch.zeros(()), mode))
    with mode, pytest.raises(DataDependentOutputException):
        bool((on_gpu(torch.zeros(3), mode) > 0).any())
