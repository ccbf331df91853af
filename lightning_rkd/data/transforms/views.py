"""Every image twice, as it is and strongly changed, for methods that relate the views of a sample."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_rkd.data.transforms.augment import Augment
from lightning_rkd.data.transforms.nested import on_tensors, tensors
from lightning_rkd.utils.distributed import rank_and_size
from lightning_rkd.utils.types import Batch

STRONG = Augment(rotation=30.0, scale=0.25, shear=0.3, shift=0.125, contrast=0.4)
"""A change that can hardly be overlooked, within what RandAugment does at most; nothing is mirrored."""


class AugmentedViews(nn.Module):
    """Shows each image of a training batch a second time, strongly changed.

    Meant as the ``batch_transform`` of ``DistillationModule``. N images become 2 N rows: first all as they are, then
    all changed, in the same order. ``batch.view`` is 0 for the first and 1 for the second, labels and indices are
    repeated. In evaluation mode a batch comes back as it is.

    The changes depend on (seed, rank, step, row) alone. Steps are counted in a buffer, which checkpoints save, so that
    a resumed run changes images as the uninterrupted one would have. They are made on the CPU in float32, wherever the
    batch is: on a GPU that costs the way there and back.

    Twice the rows need twice the memory and time.

    Shapes: inputs (N, C, H, W) -> (2 N, C, H, W), alike in mappings and sequences of inputs, whose images all
    undergo the same changes, as ``teacher_inputs`` do.

    Args:
        augment: The change; ``None`` takes :data:`STRONG`.
        mean: Per channel, what the images were normalised with, as a part of the full range.
        std: The same.
        task_on_both: Whether the task loss sees both views, instead of the images as they are only.
        seed: The same on all ranks.

    Raises:
        TypeError: Inputs without images, or images that are not floating point.
        ValueError: Images that are not within the full range once ``mean`` and ``std`` are undone (looked at in the
            first batch), a ``std`` that is not positive, or a batch that is mixed or has several views already.

    Reference:
        Cubuk, Zoph, Shlens and Le 2020, RandAugment: Practical Automated Data Augmentation with a Reduced Search
        Space, arXiv:1909.13719, for the ranges of rotation and shear.

    Example:
        >>> batch = AugmentedViews()(Batch(torch.rand(2, 1, 4, 4), labels=torch.tensor([7, 8])))
        >>> batch.inputs.shape, batch.labels.tolist(), batch.view.tolist(), batch.task_rows.tolist()
        (torch.Size([4, 1, 4, 4]), [7, 8, 7, 8], [0, 0, 1, 1], [0, 1])
    """

    steps: Tensor

    def __init__(
        self,
        augment: Augment | None = None,
        *,
        mean: Sequence[float] = (0.0,),
        std: Sequence[float] = (1.0,),
        task_on_both: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if min(std) <= 0:
            raise ValueError(f"AugmentedViews: std must be positive, got {tuple(std)}")
        self.augment = STRONG if augment is None else augment
        self.mean, self.std = tuple(mean), tuple(std)
        self.task_on_both, self.seed = task_on_both, seed
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self._step: int | None = 0  # the buffer's value: reading it from a GPU would wait for the step before
        self._seen = False

    def forward(self, batch: Batch) -> Batch:
        """The batch in two views; the given one is left alone."""
        if not self.training:
            return batch
        if batch.mix is not None:
            raise ValueError("AugmentedViews: the batch is mixed already; make views before you mix")
        if batch.view is not None:
            raise ValueError("AugmentedViews: the batch has several views already; use one transform that makes views")
        first = next(tensors(batch.inputs), None)
        if first is None:
            raise TypeError(
                f"AugmentedViews: the inputs hold no images (N, C, H, W), but {type(batch.inputs).__name__}"
            )
        step = int(self.steps) if self._step is None else self._step
        n, shown, device = len(first), batch.teacher_inputs, first.device
        inputs = on_tensors(batch.inputs, lambda x, name: self._both(x, step, name))
        if shown is not None:
            shown = on_tensors(shown, lambda x, name: self._both(x, step, name), "teacher_inputs")
        self.steps += 1
        self._step, self._seen = step + 1, True
        return replace(
            batch,
            inputs=inputs,
            teacher_inputs=shown,
            labels=_repeated(batch.labels),
            indices=_repeated(batch.indices),
            is_query=_repeated(batch.is_query),
            view=torch.arange(2, device=device).repeat_interleave(n),
            task_rows=None if self.task_on_both else torch.arange(n, device=device),
        )

    def extra_repr(self) -> str:
        """The settings, for ``print``."""
        return (
            f"augment={self.augment}, mean={self.mean}, std={self.std}, task_on_both={self.task_on_both}, "
            f"seed={self.seed}"
        )

    def _both(self, x: Tensor, step: int, name: str) -> Tensor:
        if x.ndim != 4 or not x.is_floating_point():
            raise TypeError(
                f"AugmentedViews: {name} must be floating-point images (N, C, H, W), got {x.dtype} of {tuple(x.shape)}"
            )
        mean, std = (torch.tensor(v, dtype=torch.float32).view(-1, 1, 1) for v in (self.mean, self.std))
        pixels = x.detach().to("cpu", torch.float32) * std + mean
        if not self._seen:
            low, high = float(pixels.min()), float(pixels.max())
            if low < -0.01 or high > 1.01:
                raise ValueError(
                    f"AugmentedViews: with mean {self.mean} and std {self.std} undone, {name} goes from {low:.3g} to "
                    f"{high:.3g} instead of 0 to 1; pass the mean and std that your data set normalises with"
                )
        changed = self.augment(pixels, self.seed, rank_and_size()[0], step, np.arange(len(x)))
        return torch.cat([x, ((changed - mean) / std).to(x)])

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self._step = None


def _repeated(rows: Tensor | None) -> Tensor | None:
    return None if rows is None else torch.cat([rows] * 2)
