"""Settings that cannot be the same computation: each is refused with a message that says what to do instead."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging

from lightning_rkd.distillation.layers import CaptureError
from tests.harness import toys
from tests.parity import Cell, users
from tests.parity.cells import INSIDE, MEMORY, pair, recomputes_reentrantly, strong_wolfe
from tests.parity.users import compiled, step


@dataclass(frozen=True, kw_only=True)
class Refused(Cell):
    """A cell that cannot be; ``message`` is a part of what the user reads."""

    error: type[Exception] = CaptureError
    message: str
    before: tuple[Any, ...] = ()  # callbacks of the trainer before those that distil


def compiled_and_run(make: Any) -> Any:
    """Its backbone was compiled, and ran, before anybody could hook a layer inside."""
    module = compiled("eager", student=True)(make())
    module.backbone(torch.zeros(8, toys.WIDTH))
    return module


def frozen(make: Any) -> Any:
    module = make()
    module.backbone.requires_grad_(False)
    return module


AVERAGES = {"averages": WeightAveraging, "stochastic weight averaging": partial(StochasticWeightAveraging, 0.05)}
BACKWARDS = "several times: say which call receives the terms, manual_backward_index=0 for the first"
PROJECTED: dict[str, Any] = {
    "loss": partial(toys.Projected, 5, 7),
    "error": ValueError,
    "message": "name the RelationalDistillation callback before it",
}
UNSIZED: dict[str, Any] = {
    "loss": toys.Projected,
    "error": ValueError,
    "message": "give the losses their sizes, Projected(student_dim=5, teacher_dim=7)",
}


def both(name: str, message: str, **fields: Any) -> list[Refused]:
    """The same refusal by callback and module."""
    return [Refused(name=name, face=face, message=message, **fields) for face in ("callback", "module")]


REFUSED = [
    *both(
        "reentrant checkpointing, the layer inside",
        "lies inside reentrant activation checkpointing (use_reentrant=False works)",
        arguments={"student_layer": "backbone.first"},
        **pair(recomputes_reentrantly),
    ),
    *both(
        "a frozen student",
        "the student layer gives a tensor without gradient: it is frozen",
        **pair(lambda make: partial(frozen, make)),
    ),
    *both(
        "two passes in a step, no input_layer",
        "ran 2 times in one step, but the teacher is fed the batch once: name the layer whose inputs it shall get",
        user=users.TwoViews,
        student=users.TwoPassesNet,
    ),
    *both(
        "LBFGS and a memory",
        "remember every evaluation of a step, and LBFGS evaluates each several times: use another optimizer",
        error=ValueError,
        optimizer=strong_wolfe,
        **MEMORY,
    ),
    *(
        Refused(name=f"{name} that came before a loss with tensors", before=(make,), **PROJECTED)
        for name, make in AVERAGES.items()
    ),
    *(
        Refused(name=f"{name}, and a loss that must be told its sizes", face="module", before=(make,), **UNSIZED)
        for name, make in AVERAGES.items()
    ),
    *both(
        "compiled and run before it is attached",
        "under torch.compile attach before the first compiled call, or call torch.compiler.reset()",
        arguments=INSIDE,
        slow=True,
        **pair(lambda make: partial(compiled_and_run, make)),
    ),
    Refused(
        name="manual, no manual_backward",
        message="the step never called self.manual_backward(loss): the terms are added there",
        user=step(lambda self, batch, _: self.loss(*batch).backward(), toys.Manual),
    ),
    Refused(name="manual, two backwards and no index", message=BACKWARDS, user=users.TwoBackwards),
    Refused(
        name="manual, an index too high",
        message="manual_backward_index=2, but the step called manual_backward 2 time(s), counted from 0",
        user=users.TwoBackwards,
        arguments={"manual_backward_index": 2},
    ),
    Refused(
        name="manual, two optimizers and no index",
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
