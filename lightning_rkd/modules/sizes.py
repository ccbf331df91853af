"""Sizes that losses lack, inferred from one pass of both networks before optimizers and DDP exist."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from lightning_rkd.data.indexing import to_batch
from lightning_rkd.data.loaders import count_samples, load_first_samples
from lightning_rkd.distillation.layers import CaptureError
from lightning_rkd.distillation.lightning import refuse_averages
from lightning_rkd.distillation.step import StepFeatures
from lightning_rkd.utils.private import load_dataloaders
from lightning_rkd.utils.types import Batch, call_network

if TYPE_CHECKING:
    from lightning_rkd.modules.distillation import DistillationModule


def materialize_losses(module: DistillationModule) -> None:
    """Create the tensors of a module's losses, with missing sizes from the networks and the training loader."""
    distiller, trainer = module.distiller, module.trainer
    missing = distiller.missing_sizes
    if not missing:
        distiller.materialize()
        return
    losses = [term.loss for term in distiller.losses.values() if term.loss.missing_sizes]
    with isolate_rng(include_cuda=False):
        loader = load_dataloaders(trainer)
        batch = _load_example(module, loader) if missing - {"num_samples"} else None
        try:
            features = None if batch is None else _run_once(module, batch)
        except CaptureError:
            raise
        except Exception as error:
            cure = ", ".join(loss.suggest_call({}) for loss in losses)
            raise ValueError(
                f"the networks failed in the pass that finds their widths ({error}): set example_input_array, "
                f"or pass {cure}"
            ) from error
    distiller.materialize(features, count_samples(loader))
    cure = ", ".join(loss.suggest_call({}) for loss in losses)
    refuse_averages(trainer.callbacks, f"give the losses their sizes, {cure}")  # type: ignore[attr-defined]


def _load_example(module: DistillationModule, loader: Any) -> Batch | None:
    """The example input of the module, or else the first samples of the training set."""
    example = module.example_input_array
    if isinstance(example, tuple):
        example = dict(enumerate(example))
    if isinstance(example, Tensor | Mapping) and not module.distiller.teacher_needs_indices:
        return Batch(example)
    samples = load_first_samples(loader)
    if samples is None:
        return None
    batch = to_batch(samples, module.unpack)
    transform = copy.deepcopy(module.batch_transform)  # a transform may count its steps
    return batch if transform is None else transform(batch)


@torch.no_grad()
def _run_once(module: DistillationModule, batch: Batch) -> StepFeatures:
    """Features of both networks in evaluation mode."""
    modes = [(part, part.training) for part in module.student.modules()]
    module.student.eval()
    try:
        module.distiller.start()
        call_network(module, batch.inputs)
        return module.distiller.collect(batch)
    finally:
        module.distiller.discard()
        for part, training in modes:
            part.training = training
