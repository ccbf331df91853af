"""Training of the student on the teacher's embeddings."""

import copy
import logging
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from rich.console import Console
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_rkd.cli.distill.data import StudentInputs, evaluation_loader, to_channels_last, training_loader
from lightning_rkd.cli.distill.embedding import show_progress
from lightning_rkd.cli.trainer import WholeCheckpointIO, check_checkpoint
from lightning_rkd.distillation.teachers import CachedTeacher
from lightning_rkd.losses.weighting import Weighable, terms_of
from lightning_rkd.metrics.agreement import RelationalAgreement
from lightning_rkd.modules.distillation import DistillationModule
from lightning_rkd.utils.types import call_network

CHECKPOINT = "last.ckpt"
STEPS, EPOCHS = 1500, 15
"""Least number of steps and of epochs where neither epochs nor minutes are given."""


def make_tensors(loss: Weighable, network: nn.Module, inputs: StudentInputs, teacher: Tensor) -> None:
    """Make the loss's own tensors, such as a projection between spaces of different widths."""
    network.eval()
    with torch.no_grad():
        two = inputs.batch([0, 1])[0]
        try:
            student = call_network(network, two)
        except Exception as error:  # of the network's own
            shapes = {name: tuple(x.shape) for name, x in two.items()} if isinstance(two, dict) else tuple(two.shape)
            raise ValueError(
                f"the student {type(network).__name__} cannot take two samples, {shapes} ({error}): take a network for "
                "such inputs, or set its attribute preprocess to a Preprocess of lightning_rkd.export that makes them"
            ) from error
    if not isinstance(student, Tensor) or student.ndim != 2:
        found = tuple(student.shape) if isinstance(student, Tensor) else type(student).__name__
        raise ValueError(f"the student gives {found} for two samples: expected embeddings (2, D)")
    for term in terms_of(loss).values():
        term.loss.materialize(student, teacher, num_samples=len(inputs))


@dataclass(frozen=True)
class Plan:
    """Epochs of a training, steps in one, whether it runs in bf16 with channels last, and seconds of a step."""

    epochs: int
    steps: int
    bf16: bool
    seconds: float

    def describe(self, done: int = 0) -> str:
        """The plan in words, after some steps."""
        left = self.epochs * self.steps - done
        begun = f"Training goes on after {done // self.steps} of" if done else "Training for"
        begun = begun if left > 0 else "Training is complete:"
        what = f"{self.epochs} epoch{'s' * (self.epochs > 1)} of {self.steps} steps"
        minutes = left * self.seconds / 60
        about = f"about {minutes:.0f} minutes" if minutes >= 1.5 else f"about {60 * minutes:.0f} seconds"
        about = f" ({about})" if left > 0 else ""
        return f"{begun} {what}{' in bf16 with channels last' * self.bf16}{about}."


def plan_training(
    network: nn.Module, loss: Weighable, inputs: StudentInputs, teacher: Tensor, train: Sequence[int], *,
    batch_size: int, device: str, precision: str, epochs: int | None, minutes: float | None,
) -> dict[str, Any]:  # fmt: skip
    """Measure steps in both precisions, and choose precision and number of epochs: fields of :class:`Plan`."""
    loader = training_loader(inputs, train, batch_size, seed=0)
    choices = {"32": (False,), "bf16": (True,)}.get(precision, (False, True))
    if precision == "auto" and inputs.samples.kind != "image":
        choices = (False,)
    seconds = {bf16: _measure_step(network, loss, loader, teacher, bf16, device) for bf16 in choices}
    bf16 = min(seconds, key=lambda one: seconds[one] * (1.1 if one else 1.0))
    if epochs is None:
        epochs = max(EPOCHS, -(-STEPS // len(loader)))
    if minutes is not None:
        epochs = max(1, int(60 * minutes / (seconds[bf16] * len(loader))))
    return asdict(Plan(epochs, len(loader), bf16, seconds[bf16]))


def _measure_step(
    network: nn.Module, loss: Weighable, loader: DataLoader[Any], teacher: Tensor, bf16: bool, device: str
) -> float:
    """Seconds of a training step, median of a few, on copies of network and loss."""
    network, loss = copy.deepcopy(network).train().to(device), copy.deepcopy(loss).to(device)
    if bf16:
        network.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW([*network.parameters(), *loss.parameters()], lr=0.0)
    seconds, before = [], time.perf_counter()
    for batch in islice(iter(loader), 6):
        target, found = teacher[batch.indices].to(device), batch.to(device)
        x, *labels = found.batch
        if bf16:
            x = to_channels_last(x)
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            student = call_network(network, x)
        context = {"indices": found.indices, **({"labels": labels[0]} if labels else {})}
        value = torch.zeros((), device=device)
        for term in terms_of(loss).values():
            given = {name: x for name, x in context.items() if name in term.loss.needs}
            value = value + term.loss(student, target, **given)
        optimizer.zero_grad()
        value.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        seconds.append(time.perf_counter() - before)
        before = time.perf_counter()
    return float(torch.tensor(seconds[1:] or seconds).median())


def train_student(
    network: nn.Module, loss: Weighable, teacher: Tensor, inputs: StudentInputs, train: Sequence[int],
    validation: Sequence[int], folder: Path, plan: Plan, *, batch_size: int, lr: float, seed: int, device: str,
    console: Console,
) -> None:  # fmt: skip
    """Train the network in place, with a checkpoint after every epoch, from which the same call goes on.

    AdamW with a one-cycle schedule; the loss's own tensors are trained along.
    """
    loader = training_loader(inputs, train, batch_size, seed)
    steps = plan.epochs * plan.steps
    inputs.channels_last = plan.bf16
    few = len(validation) < 12
    metrics: dict[str, Any] = {} if few else {"agreement": RelationalAgreement(max_anchors=500, distance="cosine")}
    module = DistillationModule(
        network,
        CachedTeacher.from_array(teacher),
        loss,  # type: ignore[arg-type]
        metrics=metrics,
        optimizer=partial(torch.optim.AdamW, lr=lr),
        lr_scheduler=partial(torch.optim.lr_scheduler.OneCycleLR, max_lr=lr, total_steps=steps),
        lr_interval="step",
        compare_gradients=None,
    )
    path, done = folder / CHECKPOINT, 0
    if path.is_file():
        check_checkpoint(path)
        done = torch.load(path, map_location="cpu", weights_only=True)["global_step"]
    console.print(plan.describe(done), soft_wrap=True)
    if plan.bf16:
        network.to(memory_format=torch.channels_last)
    network.train()
    with show_progress(console, "Training the student", steps, "steps") as show, _quiet():
        trainer = pl.Trainer(
            max_epochs=plan.epochs,
            accelerator=device,
            devices=1,
            precision="bf16-mixed" if plan.bf16 else "32-true",
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            use_distributed_sampler=False,
            default_root_dir=folder,
            plugins=[WholeCheckpointIO()],
            callbacks=[
                _Show(show, seed),
                ModelCheckpoint(folder, filename=path.stem, save_on_train_epoch_end=True, enable_version_counter=False),
            ],
        )
        measured = None if few else evaluation_loader(inputs, validation)
        trainer.fit(module, loader, measured, ckpt_path=str(path) if path.is_file() else None, weights_only=True)
    network.to("cpu", memory_format=torch.contiguous_format).eval()  # type: ignore[call-overload]
    loss.to("cpu")


class _Show(pl.Callback):
    """Shows the position of a training, the loss, and the share of common neighbours on validation data."""

    def __init__(self, show: Callable[[int, str], None], seed: int) -> None:
        self.show, self.seed, self.overlap = show, seed, ""

    def on_train_epoch_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Seed the epoch, so that dropout is the same in a resumed run."""
        torch.manual_seed(self.seed + 1000 * (1 + trainer.current_epoch))

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *args: Any) -> None:
        loss = trainer.callback_metrics.get("train/loss")
        remark = ("" if loss is None else f"loss {float(loss):.4f}") + self.overlap
        self.show(trainer.global_step, remark)

    def on_validation_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        found = trainer.callback_metrics.get("val/neighbour_overlap_at_10")
        self.overlap = "" if found is None else f", common neighbours {float(found):.3f}"


@contextmanager
def _quiet() -> Iterator[None]:
    """Leaves out messages of Lightning on what the command has chosen."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The '.*_dataloader' does not have many workers")
            warnings.filterwarnings("ignore", "The number of training batches")
            warnings.filterwarnings("ignore", "Checkpoint directory .* exists and is not empty")
            warnings.filterwarnings("ignore", "You defined a .validation_step. but have no")
            warnings.filterwarnings("ignore", "GPU available but not used")
            warnings.filterwarnings("ignore", category=DeprecationWarning, module="lightning")
            warnings.filterwarnings("ignore", category=FutureWarning, module="lightning")
            yield
    finally:
        logger.setLevel(level)
