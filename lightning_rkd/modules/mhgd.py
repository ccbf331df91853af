"""The two stages of MHGD: the teacher's attention graph, then a student trained with clipped gradients."""

import inspect
import math
from collections.abc import Collection, Iterable
from copy import copy
from dataclasses import replace
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.cli import OptimizerCallable, ReduceLROnPlateau
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn

from lightning_rkd.data.indexing import to_batch
from lightning_rkd.data.loaders import load_first_samples
from lightning_rkd.distillation.layers import Layer
from lightning_rkd.distillation.lightning import (
    has_local_backward,
    restore_after_exceptions,
    save_plain_hyperparameters,
)
from lightning_rkd.distillation.teachers import BaseTeacher, Teacher
from lightning_rkd.functional.channels import flatten_positions
from lightning_rkd.functional.singular import right_singular_vectors
from lightning_rkd.losses.base import RelationalLoss
from lightning_rkd.losses.inputs import select_fields
from lightning_rkd.losses.mhgd import MHGD
from lightning_rkd.losses.parts.attention_graph import AttentionGraph, attention_sizes, load_attention
from lightning_rkd.losses.parts.checks import check_positive
from lightning_rkd.losses.references import BibTeX
from lightning_rkd.losses.weighting import LossSum, evaluate_weight
from lightning_rkd.modules.distillation import DistillationModule
from lightning_rkd.utils.distributed import (
    data_parallel_group,
    gather_row_counts,
    gather_rows,
    rank_and_size,
    sum_over_ranks,
)
from lightning_rkd.utils.private import load_dataloaders
from lightning_rkd.utils.types import Batch, Keys, unpack


def official_sgd(parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
    """The authors' optimizer for the attention graph.

    Their loss contains 5e-4 times the sum of squares of all parameters, without a factor 1/2: a weight decay of 1e-3.
    """
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-3)


class AttentionGraphEstimator(pl.LightningModule):
    r"""Stage 1 of MHGD: learns the graphs that stage 2 transfers, from the teacher alone and without labels.

    .. math:: L = \sum_{\text{pairs}} \frac{1}{N} \sum_i \big(1 - \langle \hat V_{B,i}, V_{B,i} \rangle\big)

    :math:`V` are the first right singular vectors of the teacher's maps, :math:`\hat V_B` the estimate of a stage's
    vectors from those of the stage before, through the attention graphs between the two
    (:class:`~lightning_rkd.losses.parts.attention_graph.AttentionGraph`). The graphs relate the samples of all ranks.

    Logged: ``train/loss`` per step; ``val/cosine_error`` and ``test/cosine_error``, the mean over pairs of the same
    error, in evaluation mode, per batch. Checkpoints hold tensors and plain values only, and no teacher;
    :class:`~lightning_rkd.losses.mhgd.MHGD` reads them.

    Args:
        teacher: A network, or a :class:`~lightning_rkd.Teacher`; needed to train and to evaluate.
        teacher_layer: A list of at least two layers that output the maps of consecutive stages, front to back.
        channels: Channels of those maps; ``None`` runs the teacher on two samples to find them.
        heads: Graphs per pair of stages.
        seed: Seed of the noise that drops heads.
        optimizer: From parameters to optimizer; the default is the authors', who train for 40 epochs.
        inputs: Inputs of the teacher in a batch, in any form of :data:`~lightning_rkd.utils.types.Keys`. Required if
            batches are mappings or dataclasses.

    Reference:
        Lee and Song 2019, Graph-based Knowledge Distillation by Multi-head Attention Network, arXiv:1907.02226.

    Example:
        >>> estimator = AttentionGraphEstimator(channels=[8, 16], heads=2)
        >>> [tuple(estimate.shape) for estimate in estimator([torch.rand(5, 8), torch.rand(5, 16)])]
        [(5, 16)]
    """

    bibtex = BibTeX()
    reference = replace(MHGD.reference, weight=None, weight_note="it is a stage of its own", result="")

    def __init__(
        self,
        teacher: Teacher | nn.Module | None = None,
        teacher_layer: Layer | None = None,
        *,
        channels: list[int] | None = None,
        heads: int = 8,
        seed: int = 0,
        optimizer: OptimizerCallable = official_sgd,
        inputs: Keys | None = None,
    ) -> None:
        super().__init__()
        save_plain_hyperparameters(self, inspect.currentframe())
        self.teacher = copy(teacher) if teacher is None or isinstance(teacher, Teacher) else Teacher(teacher)
        self.teacher_layer, self.heads, self.seed, self.inputs = teacher_layer, heads, seed, inputs
        self._optimizer = optimizer
        self.graph: AttentionGraph | None = None if channels is None else AttentionGraph(channels, heads, seed)

    def forward(self, vectors: list[Tensor]) -> list[Tensor]:
        """Estimate the vectors of all stages but the first."""
        return self.graph(vectors)  # type: ignore[misc, no-any-return] # it is there after setup

    def unpack(self, batch: Any) -> Batch:
        """Build the :class:`~lightning_rkd.utils.types.Batch` of a step; override it for batches of another make."""
        return unpack(batch, inputs=self.inputs)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Create the optimizer of the graph's parameters."""
        return self._optimizer(self.parameters())

    def setup(self, stage: str) -> None:
        """Register the teacher's hooks, load its weights file if it has one, and create the graph."""
        if self.teacher is None:
            raise ValueError("AttentionGraphEstimator learns from a teacher: pass teacher=... and teacher_layer=[...]")
        restore_after_exceptions(self.trainer)
        self.teacher.attach(self.teacher_layer)
        if self.graph is None:
            self.graph = AttentionGraph([m.shape[-1] for m in self._run_once(stage)], self.heads, self.seed)

    def teardown(self, stage: str) -> None:
        """Restore the teacher."""
        self.restore()

    def restore(self) -> None:
        """Remove all hooks and restore the teacher."""
        if self.teacher is not None:
            self.teacher.detach()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Create the saved graph if its channels are not known yet."""
        if self.graph is None:
            channels, heads = attention_sizes(load_attention(checkpoint["state_dict"]))
            self.graph = AttentionGraph(channels, heads, self.seed)

    def on_fit_start(self) -> None:
        """Move the teacher to the graph's device."""
        assert self.teacher is not None
        if self.teacher.to(self.device, self.trainer.precision_plugin.convert_module):
            self.teacher.check_same_on_ranks(data_parallel_group(self.trainer.strategy))

    on_train_start = on_fit_start  # Lightning's learning rate finder trains before on_fit_start
    on_validation_start = on_test_start = on_fit_start

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Compute the sum of the estimates' cosine errors."""
        group = data_parallel_group(self.trainer.strategy)
        own = self._vectors(batch)
        counts = gather_row_counts(len(own[0]), own[0].device, group)
        if sum(counts) < 2:
            raise ValueError("a graph relates samples, but this training batch holds one: pass drop_last=True")
        loss = self._errors([gather_rows(v, counts, group) for v in own]).sum()
        self.log("train/loss", loss.detach(), prog_bar=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Log ``val/cosine_error`` or ``test/cosine_error``."""
        stage, vectors = "test" if self.trainer.testing else "val", self._vectors(batch)
        error = self._errors(vectors).mean()
        self.log(f"{stage}/cosine_error", error, prog_bar=True, sync_dist=True, batch_size=len(vectors[0]))

    test_step = validation_step

    def _errors(self, vectors: list[Tensor]) -> Tensor:
        """One minus the mean cosine, for every stage but the first."""
        with torch.autocast(vectors[0].device.type, enabled=False):
            estimates = self(vectors)
            return torch.stack([1 - (e * v).sum(1).mean() for e, v in zip(estimates, vectors[1:], strict=True)])

    def _vectors(self, batch: Any) -> list[Tensor]:
        dtype = next(self.parameters()).dtype
        with torch.autocast(self.device.type, enabled=False):
            maps = [m if m.dtype == torch.float64 else m.float() for m in self._maps(batch)]
            return [right_singular_vectors(flatten_positions(m, who="MHGD")).squeeze(2).to(dtype) for m in maps]

    def _maps(self, batch: Any) -> list[Tensor]:
        assert self.teacher is not None
        (output,) = self.teacher.outputs(to_batch(batch, self.unpack))
        maps: list[Tensor] = select_fields(output.features, "feature_maps", who="AttentionGraphEstimator, teacher")
        return maps

    @torch.no_grad()
    def _run_once(self, stage: str) -> list[Tensor]:
        """Maps of two samples, before the teacher is moved."""
        with isolate_rng(include_cuda=False):
            batch = load_first_samples(load_dataloaders(self.trainer, stage))
            if batch is None:
                raise ValueError(
                    "AttentionGraphEstimator does not know the channels of the teacher's maps, and the data set is not "
                    "map-style: pass channels=[...]"
                )
            return [flatten_positions(m, who="MHGD") for m in self._maps(batch)]


class MHGDModule(DistillationModule):
    r"""Stage 2 of MHGD: trains a student on task and relations, the relations' gradient clipped for every parameter.

    .. math::
        g = g_{task} + g_{dist} \min\!\Big(1,\; \frac{c\, \lVert g_{task} \rVert\, \varsigma(e)}{\lVert g_{dist}
        \rVert}\Big), \qquad \varsigma(e) = \frac{1}{1 + \exp(-e)}

    with e the epoch, counted from 0: with c = 1 the norm of a weight's distillation gradient is at most half of the
    task's in the first epoch, and equal to it later; where the task has no gradient, it is zero. The optimizer's weight
    decay is not part of the norms. Parameters of the loss (adapters between different channels) are clipped at the mean
    norm of the task's gradients instead. Over ranks both gradients are those of the whole batch.

    The authors' poster divides by :math:`1 + \exp(-\tau)`, :math:`\tau = \max(1, \lVert g_{task} \rVert / \lVert
    g_{dist} \rVert)`, instead; this is their code. Any relational loss can be clipped. For a fixed weight instead of
    clipping, train :class:`~lightning_rkd.losses.mhgd.MHGD` in a ``DistillationModule``.

    Optimisation is manual, so the trainer neither clips nor accumulates gradients; schedulers step as in
    ``DistillationModule``. It runs on one device or under DDP, in any precision.

    The bound is always reached: the raw gradients of convolutions were 25 to 5,400 times the task's, so every weight is
    pulled by 50 to 88 % of the task's gradient however good the match is. That suits a strong teacher and a schedule
    in which the student alone over-fits, such as the authors' 100 epochs. In short trainings it costs accuracy: 300
    steps of a small student on CIFAR-100 gave 47.0 alone, 41.9 with ``clip=1`` and 46.8 with ``clip=0.1``.

    Arguments are those of :class:`~lightning_rkd.DistillationModule` and ``clip``; ``loss`` and ``task_loss`` are
    required, ``balance`` is refused, and ``compare_gradients`` compares the terms' gradients before clipping, without a
    warning. The authors train for 100 epochs of batches of 128 with SGD, Nesterov momentum 0.9, weight decay 5e-4, and
    a rate of 0.1 that falls to a tenth after 30, 60 and 80 epochs.

    Args:
        student: The network to train.
        teacher: The teacher.
        loss: A relational loss.
        clip: c, the largest norm of a parameter's distillation gradient as a fraction of the task's; 1 is the authors'.
        kwargs: Further arguments of :class:`~lightning_rkd.DistillationModule`.

    Reference:
        Lee and Song 2019, Graph-based Knowledge Distillation by Multi-head Attention Network, arXiv:1907.02226.

    Example:
        >>> from lightning_rkd.losses.rkd import RKD
        >>> parts = {"loss": RKD(), "task_loss": nn.CrossEntropyLoss(), "task_reads": "logits"}
        >>> MHGDModule(nn.Linear(8, 2), nn.Linear(8, 4), **parts).automatic_optimization
        False
    """

    bibtex = BibTeX()
    reference = replace(
        MHGD.reference,
        source="sseung0703/KD_methods_with_TF, nets/Relation.py, nets/SVP.py and, for the clipping, op_util.py",
    )

    def __init__(
        self,
        student: nn.Module,
        teacher: BaseTeacher | nn.Module | None = None,
        loss: RelationalLoss | LossSum | dict[str, RelationalLoss | LossSum] | None = None,
        *,
        clip: float = 1.0,
        **kwargs: Any,
    ) -> None:
        check_positive("MHGDModule", clip=clip)
        super().__init__(student, teacher, loss, **kwargs)
        self.clip = clip

    @property  # type: ignore[misc] # read-only here
    def automatic_optimization(self) -> bool:
        """``False``: the step combines two gradients."""
        return False

    def setup(self, stage: str) -> None:
        """Check the arguments and the strategy, and register hooks."""
        if stage == "fit":
            if self.loss is None or self.task_loss is None:
                raise ValueError(
                    "MHGDModule clips the gradient of a relational loss by the task's: pass loss=... and task_loss=..."
                )
            if self._gradients.balance is not None:
                raise ValueError("MHGDModule clips gradients, which takes the place of balance: leave balance out")
            self._gradients.warns = False  # clipping makes weights matter less
            strategy = self.trainer.strategy
            if not has_local_backward(strategy):
                raise ValueError(
                    f"MHGDModule takes norms of whole gradients, and {type(strategy).__name__} may hold them in parts: "
                    "train on one device or with strategy='ddp'"
                )
        super().setup(stage)

    def configure_optimizers(self) -> Any:
        """Create the optimizer, and the scheduler without the settings that manual optimisation ignores."""
        configured = super().configure_optimizers()
        if isinstance(configured, dict):
            configured["lr_scheduler"] = configured["lr_scheduler"]["scheduler"]
        return configured

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Step the optimizer and return the sum of task loss and relational terms."""
        features, output, terms = self.forward_both(batch)
        task = self.task(features, output)
        weighted = evaluate_weight(self.task_weight, self.current_epoch) * task
        distillation = torch.stack(list(terms.values())).sum()
        loss = (weighted + distillation).detach()
        logged = {"train/task": task.detach(), **{f"distill/{name}": v.detach() for name, v in terms.items()}}
        self.distiller.check_losses(logged, self.global_step)
        self._apply_balance(terms, weighted, features)
        self.log("train/loss", loss, prog_bar=True)
        self.log_dict(logged)
        self._step(weighted, distillation)
        return loss

    def on_train_epoch_end(self) -> None:
        """Step a scheduler that steps per epoch."""
        if self._lr_interval == "epoch":
            self._schedule()

    def _step(self, task: Tensor, distillation: Tensor) -> None:
        optimizer: Any = self.optimizers()
        trained = [p for group in optimizer.param_groups for p in group["params"]]
        own = {id(p) for p in self.loss.parameters()} if self.loss is not None else set()
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        with torch.autocast(self.device.type, enabled=False):  # a step runs under autocast, a backward pass should not
            pulls = torch.autograd.grad(
                distillation if scaler is None else scaler.scale(distillation),
                trained,
                retain_graph=True,
                allow_unused=True,
                materialize_grads=True,
            )
            optimizer.zero_grad()
            # DDP waits for a gradient of every parameter, also of adapters, which the task does not reach
            reached = [0 * p.sum() for p in trained if id(p) in own]
            self.manual_backward(torch.stack([task, *(r.to(task) for r in reached)]).sum())
        whole = _mean_over_ranks(list(pulls), self.distiller.group)
        clip_to_task(trained, whole, self.clip / (1 + math.exp(-self.current_epoch)), own)
        optimizer.step()
        if self._lr_interval == "step":
            self._schedule()

    def _schedule(self) -> None:
        scheduler: Any = self.lr_schedulers()
        if isinstance(scheduler, ReduceLROnPlateau):
            scheduler.step(self.trainer.callback_metrics[scheduler.monitor])
        elif scheduler is not None:
            scheduler.step()


@torch.no_grad()
def clip_to_task(parameters: list[Tensor], pulls: list[Tensor], part: float, own: Collection[int] = ()) -> None:
    """Add to every parameter's ``grad`` its distillation gradient, clipped at ``part`` of the norm of ``grad``.

    Parameters whose ``id`` is in ``own`` have no task gradient: the mean norm of the others takes its place.
    """
    norms = {id(p): _norm(p.grad) for p in parameters if p.grad is not None and id(p) not in own}
    mean = torch.stack(list(norms.values())).mean() if norms else None
    for parameter, pull in zip(parameters, pulls, strict=True):
        bound = norms.get(id(parameter), mean if id(parameter) in own else None)
        if bound is None:
            continue
        bound, norm = part * bound, _norm(pull)
        clipped = pull * torch.where(norm > bound, bound / norm, 1).to(pull.dtype)
        parameter.grad = clipped if parameter.grad is None else parameter.grad.add_(clipped)


def _norm(x: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(x, dtype=torch.promote_types(x.dtype, torch.float32))
    return norm


def _mean_over_ranks(tensors: list[Tensor], group: Any) -> list[Tensor]:
    """Average in one collective operation, as DDP does not synchronise ``autograd.grad``."""
    ranks = rank_and_size(group)[1]
    if ranks == 1:
        return tensors
    dtype = torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
    flat = sum_over_ranks(torch.cat([t.flatten().to(dtype) for t in tensors]), group) / ranks
    parts = torch.split(flat, [t.numel() for t in tensors])
    return [part.view(t.shape).to(t.dtype) for part, t in zip(parts, tensors, strict=True)]
