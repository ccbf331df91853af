"""Settings that cannot be the same computation: each is refused with a message that says what to do instead."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from torch import Tensor

from lightning_rkd.distillation.features import CaptureError, Tap
from tests.harness import toys
from tests.harness.faces import Net
from tests.parity import Cell, users
from tests.parity.cells import INSIDE, MEMORY, recomputes_reentrantly, strong_wolfe


@dataclass(frozen=True, kw_only=True)
class Refused(Cell):
    """A cell that cannot be; ``message`` is a part of what the user reads.

    Attributes:
        before: Callbacks of the trainer before those that distil.
    """

    error: type[Exception]
    message: str
    before: tuple[Any, ...] = ()

    __str__ = Cell.__str__


class CompiledAndRun(toys.Student):
    """Its backbone was compiled, and ran, before anybody could hook a layer inside."""

    def __init__(self) -> None:
        super().__init__()
        users.compiled("eager", "backbone")(self)(torch.zeros(8, toys.WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        embedding: Tensor = self.backbone(x)
        return embedding


def compiled_and_run() -> Net:
    net: Any = users.compiled("eager", "backbone")(Net())
    net(torch.zeros(8, toys.WIDTH))
    return net


def frozen(make: Any) -> Any:
    module = make()
    module.backbone.requires_grad_(False)
    return module


SWA = partial(StochasticWeightAveraging, 0.05)
BACKWARDS = "several times: say which call receives the terms, manual_backward_index=0 for the first"
PROJECTED = {"loss": partial(toys.Projected, 5, 7), "message": "name the RelationalDistillation callback before it"}
UNSIZED = {
    "loss": toys.Projected,
    "message": "give the losses their sizes, Projected(student_dim=5, teacher_dim=7)",
}


def both(name: str, error: type[Exception], message: str, **fields: Any) -> list[Refused]:
    """The same refusal by callback and module."""
    return [Refused(name=name, face=face, error=error, message=message, **fields) for face in ("callback", "module")]


REFUSED = [
    *both(
        "reentrant checkpointing, the layer inside",
        CaptureError,
        "lies inside reentrant activation checkpointing (use_reentrant=False works)",
        user=recomputes_reentrantly(toys.Student),
        student=recomputes_reentrantly(Net),
        arguments={"student_layer": Tap("backbone.first", at="output")},
    ),
    *both(
        "a frozen student",
        CaptureError,
        "the student layer gives a tensor without gradient: it is frozen",
        user=partial(frozen, toys.Student),
        student=partial(frozen, Net),
    ),
    *both(
        "two passes in a step, no input_layer",
        CaptureError,
        "ran 2 times in one step, but the teacher is fed the batch once: name the layer whose inputs it shall get",
        user=users.TwoViews,
        student=users.TwoPassesNet,
    ),
    Refused(
        name="LBFGS and a memory",
        error=ValueError,
        message="remember every evaluation of a step, and LBFGS evaluates each several times: use another optimizer",
        **MEMORY | {"user": partial(users.WithTensors, optimizer=strong_wolfe)},
    ),
    Refused(
        name="LBFGS and a memory",
        face="module",
        error=ValueError,
        message="remember every evaluation of a step, and LBFGS evaluates each several times: use another optimizer",
        **MEMORY | {"arguments": {"indices": 2, "optimizer": strong_wolfe}},
    ),
    Refused(
        name="averages that came before a loss with tensors", error=ValueError, before=(WeightAveraging,), **PROJECTED
    ),
    Refused(
        name="stochastic weight averaging that came before a loss with tensors",
        error=ValueError,
        before=(SWA,),
        **PROJECTED,
    ),
    Refused(
        name="averages, and a loss that must be told its sizes",
        face="module",
        error=ValueError,
        before=(WeightAveraging,),
        **UNSIZED,
    ),
    Refused(
        name="stochastic weight averaging, and a loss that must be told its sizes",
        face="module",
        error=ValueError,
        before=(SWA,),
        **UNSIZED,
    ),
    *both(
        "compiled and run before it is attached",
        CaptureError,
        "under torch.compile attach before the first compiled call, or call torch.compiler.reset()",
        user=CompiledAndRun,
        student=compiled_and_run,
        arguments=INSIDE,
        slow=True,
    ),
    Refused(
        name="manual, no manual_backward",
        error=CaptureError,
        message="the step never called self.manual_backward(loss): the terms are added there",
        user=users.NoBackward,
    ),
    Refused(name="manual, two backwards and no index", error=CaptureError, message=BACKWARDS, user=users.TwoBackwards),
    Refused(
        name="manual, an index too high",
        error=CaptureError,
        message="manual_backward_index=2, but the step called manual_backward 2 time(s), counted from 0",
        user=users.TwoBackwards,
        arguments={"manual_backward_index": 2},
    ),
    Refused(
        name="manual, two optimizers and no index",
        error=CaptureError,
        message="say which call receives the terms",
        user=users.Adversarial,
    ),
    Refused(
        name="ddp_spawn and a lambda",
        error=Exception,  # which one depends on the version of Python
        message="student_layer, or something in it, cannot be sent to spawned processes",
        arguments={"student_layer": lambda module: module.backbone},
        settings={"strategy": "ddp_spawn", "devices": 2},
    ),
]
