"""What cannot be the same computation is refused, with a message that says what to do instead."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from torch import Tensor, nn

from lightning_rkd.callbacks.distillation import RelationalDistillation
from lightning_rkd.distillation.features import CaptureError, Tap
from lightning_rkd.losses.rkd import RKD
from lightning_rkd.modules.distillation import DistillationModule
from tests.harness import toys
from tests.parity import Run, users
from tests.parity.callback import compiled, indexed, strong_wolfe
from tests.parity.module import Net, TwoPasses

INSIDE = Tap("backbone.first", at="output")


@dataclass(frozen=True)
class Refused:
    """A cell that cannot be; ``message`` is a part of what the user reads."""

    name: str
    face: str
    build: Callable[[], Run]
    error: type[Exception]
    message: str
    slow: bool = False

    def __str__(self) -> str:
        return f"{self.face}: {self.name}"


def callback(
    name: str,
    error: type[Exception],
    message: str,
    user: Callable[[], Any] = toys.Student,
    loss: Callable[[], Any] = RKD,
    *,
    before: tuple[Callable[[], Any], ...] = (),
    change: Callable[[Any], Any] = lambda module: module,
    batches: Callable[[], Any] = toys.loader,
    settings: dict[str, Any] | None = None,
    slow: bool = False,
    **ours: Any,
) -> Refused:
    def build() -> Run:
        distils = RelationalDistillation(toys.teacher(), loss(), **{"student_layer": "backbone", **ours})
        callbacks = [*(make() for make in before), distils]
        return Run(change(user()), callbacks, batches(), dict(settings or {}))

    return Refused(name, "callback", build, error, message, slow)


def module(
    name: str,
    error: type[Exception],
    message: str,
    student: Callable[[], Any] = Net,
    loss: Callable[[], Any] = RKD,
    *,
    before: tuple[Callable[[], Any], ...] = (),
    batches: Callable[[], Any] = toys.loader,
    slow: bool = False,
    **ours: Any,
) -> Refused:
    def build() -> Run:
        made = {"student_layer": "backbone", "task_loss": nn.CrossEntropyLoss(), "task_reads": "logits", **ours}
        distils = DistillationModule(student(), toys.teacher(), loss(), **made)
        return Run(distils, [make() for make in before], batches(), {})

    return Refused(name, "module", build, error, message, slow)


class CompiledAndRun(toys.Student):
    """Its backbone was compiled, and ran, before anybody could hook a layer inside."""

    def __init__(self) -> None:
        super().__init__()
        compiled("eager", "backbone")(self)(torch.zeros(8, toys.WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        embedding: Tensor = self.backbone(x)
        return embedding


def compiled_and_run() -> Net:
    net: Any = compiled("eager", "backbone")(Net())
    net(torch.zeros(8, toys.WIDTH))
    return net


class NoBackward(toys.Manual):
    def training_step(self, batch: Any, batch_idx: int) -> None:
        self.loss(*batch).backward()


SWA = partial(StochasticWeightAveraging, 0.05)
MEMORY: dict[str, Any] = {"loss": partial(toys.Remembers, 7, 40), "batches": indexed, "indices": 2}
FROZEN = "the student layer shows a tensor without gradient: it is frozen"
REENTRANT = "lies inside reentrant activation checkpointing (use_reentrant=False works)"
TWICE = "ran 2 times in one step, but the teacher is fed the batch once: name the layer whose inputs it shall get"
LBFGS = "remember every evaluation of a step, and LBFGS evaluates each several times: use another optimizer"
COMPILED = "under torch.compile attach before the first compiled call, or call torch._dynamo.reset()"


def frozen(net: Any) -> Any:
    net.backbone.requires_grad_(False)
    return net


REFUSED = [
    callback(
        "reentrant checkpointing, the layer inside",
        CaptureError,
        REENTRANT,
        change=users.recomputes_reentrantly,
        student_layer=INSIDE,
    ),
    callback("a frozen student", CaptureError, FROZEN, change=frozen),
    callback("two passes in a step, no input_layer", CaptureError, TWICE, users.TwoViews),
    callback("LBFGS and a memory", ValueError, LBFGS, partial(users.WithTensors, optimizer=strong_wolfe), **MEMORY),
    callback(
        "averages that came before a loss with tensors",
        ValueError,
        "name the RelationalDistillation callback before it",
        loss=partial(toys.Projected, 5, 7),
        before=(WeightAveraging,),
    ),
    callback(
        "stochastic weight averaging that came before a loss with tensors",
        ValueError,
        "name the RelationalDistillation callback before it",
        loss=partial(toys.Projected, 5, 7),
        before=(SWA,),
    ),
    callback(
        "compiled and run before it is attached",
        CaptureError,
        COMPILED,
        CompiledAndRun,
        student_layer=Tap("backbone.last", at="output"),
        slow=True,
    ),
    callback(
        "manual, no manual_backward",
        CaptureError,
        "the step never called self.manual_backward(loss): the terms are added there",
        NoBackward,
    ),
    callback(
        "manual, two backwards and no index",
        CaptureError,
        "several times: say which call receives the terms, manual_backward_index=0 for the first",
        users.TwoBackwards,
    ),
    callback(
        "manual, an index too high",
        CaptureError,
        "manual_backward_index=2, but the step called manual_backward 2 time(s), counted from 0",
        users.TwoBackwards,
        manual_backward_index=2,
    ),
    callback(
        "manual, two optimizers and no index",
        CaptureError,
        "say which call receives the terms",
        users.Adversarial,
    ),
    callback(
        "ddp_spawn and a lambda",
        Exception,  # which one depends on the version of Python
        "student_layer, or something in it, cannot be sent to spawned processes",
        student_layer=lambda module: module.backbone,
        settings={"strategy": "ddp_spawn", "devices": 2},
    ),
    module(
        "reentrant checkpointing, the layer inside",
        CaptureError,
        REENTRANT,
        lambda: users.recomputes_reentrantly(Net()),
        student_layer=INSIDE,
    ),
    module("a frozen student", CaptureError, FROZEN, lambda: frozen(Net())),
    module("two passes in a step, no input_layer", CaptureError, TWICE, TwoPasses),
    module("LBFGS and a memory", ValueError, LBFGS, optimizer=strong_wolfe, **MEMORY),
    module(
        "averages, and a loss that must be told its sizes",
        ValueError,
        "tell the losses their sizes, Projected(student_dim=5, teacher_dim=7)",
        loss=toys.Projected,
        before=(WeightAveraging,),
    ),
    module(
        "stochastic weight averaging, and a loss that must be told its sizes",
        ValueError,
        "tell the losses their sizes, Projected(student_dim=5, teacher_dim=7)",
        loss=toys.Projected,
        before=(SWA,),
    ),
    module(
        "compiled and run before it is attached",
        CaptureError,
        COMPILED,
        compiled_and_run,
        student_layer=Tap("backbone.last", at="output"),
        slow=True,
    ),
]
