"""Several views of every image, for methods that relate the views of a sample."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from lightning_rkd.data.transforms.augment import Augment
from lightning_rkd.data.transforms.base import SteppedTransform, list_tensors, map_tensors
from lightning_rkd.utils.distributed import rank_and_size
from lightning_rkd.utils.types import Batch

STRONG = Augment(rotation=30.0, scale=0.25, shear=0.3, shift=0.125, contrast=0.4)
"""A strong augmentation within the ranges of RandAugment, without mirroring."""


class Rotations(nn.Module):
    """Adds every image of a training batch rotated by 90, 180 and 270 degrees, as ``batch_transform``.

    N images become 4 N rows: first all upright, then all rotated counter-clockwise once, twice and three times.
    ``batch.view`` counts the quarter turns, labels and indices are repeated, and the task loss gets the first N rows
    only. In evaluation mode batches are unchanged. Four times the rows need four times the memory and time.

    Shapes: inputs (N, C, H, H) -> (4 N, C, H, H), alike in mappings and sequences of inputs.

    Reference:
        Gidaris, Singh and Komodakis 2018, Unsupervised Representation Learning by Predicting Image Rotations,
        arXiv:1803.07728, for the rotations; Ding et al. 2024, arXiv:2410.14143, for their use in distillation.

    Example:
        >>> batch = Rotations()(Batch(torch.tensor([[[[1, 2], [3, 4]]]]), labels=torch.tensor([7])))
        >>> batch.inputs.flatten(1).tolist()
        [[1, 2, 3, 4], [2, 4, 1, 3], [4, 3, 2, 1], [3, 1, 4, 2]]
        >>> batch.labels.tolist(), batch.view.tolist(), batch.task_rows.tolist()
        ([7, 7, 7, 7], [0, 1, 2, 3], [0])
    """

    def forward(self, batch: Batch) -> Batch:
        """Return the batch in four rotations; the given one is not modified."""
        return _make_views(self, batch, 4, _rotate) if self.training else batch


def _rotate(x: Tensor, name: str) -> Tensor:
    if x.ndim != 4 or x.shape[2] != x.shape[3]:
        raise ValueError(
            f"Rotations: {name} must be square images (N, C, H, H), got {tuple(x.shape)}; crop or resize them"
        )
    return torch.cat([x.rot90(quarters, (2, 3)) for quarters in range(4)])


class AugmentedViews(SteppedTransform):
    """Adds a strongly augmented view of every image of a training batch, as ``batch_transform``.

    N images become 2 N rows: first all unchanged, then all augmented, in the same order. ``batch.view`` is 0 for the
    first and 1 for the second, labels and indices are repeated. In evaluation mode batches are unchanged. Twice the
    rows need twice the memory and time.

    The augmentation depends on (seed, rank, step, row) alone, and is computed on the CPU in float32, to which a batch
    on a GPU is copied and back.

    Shapes: inputs (N, C, H, W) -> (2 N, C, H, W); images in mappings and sequences of inputs, and in
    ``teacher_inputs``, are augmented alike.

    Args:
        augment: The augmentation; ``None`` takes :data:`STRONG`.
        mean: Mean per channel that the images were normalised with, as a part of the full range.
        std: Standard deviation per channel that they were normalised with.
        task_on_both: Whether the task loss gets both views, instead of the unchanged images only.
        seed: The same on all ranks.

    Reference:
        Cubuk, Zoph, Shlens and Le 2020, RandAugment: Practical Automated Data Augmentation with a Reduced Search
        Space, arXiv:1909.13719, for the ranges of rotation and shear.

    Example:
        >>> batch = AugmentedViews()(Batch(torch.rand(2, 1, 4, 4), labels=torch.tensor([7, 8])))
        >>> batch.inputs.shape, batch.labels.tolist(), batch.view.tolist(), batch.task_rows.tolist()
        (torch.Size([4, 1, 4, 4]), [7, 8, 7, 8], [0, 0, 1, 1], [0, 1])
    """

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
        self._checked = False

    def forward(self, batch: Batch) -> Batch:
        """Return the batch in two views; the given one is not modified."""
        if not self.training:
            return batch
        step = self.count_step()
        views = _make_views(self, batch, 2, lambda x, name: self._add_view(x, name, step))
        self._checked = True
        return replace(views, task_rows=None) if self.task_on_both else views

    def _add_view(self, x: Tensor, name: str, step: int) -> Tensor:
        if x.ndim != 4 or not x.is_floating_point():
            raise TypeError(
                f"AugmentedViews: {name} must be floating-point images (N, C, H, W), got {x.dtype} of {tuple(x.shape)}"
            )
        mean, std = (torch.tensor(v, dtype=torch.float32).view(-1, 1, 1) for v in (self.mean, self.std))
        pixels = x.detach().to("cpu", torch.float32) * std + mean
        if not self._checked:
            low, high = float(pixels.min()), float(pixels.max())
            if low < -0.01 or high > 1.01:
                raise ValueError(
                    f"AugmentedViews: with mean {self.mean} and std {self.std} undone, {name} goes from {low:.3g} to "
                    f"{high:.3g} instead of 0 to 1; pass the mean and std that your data set normalises with"
                )
        augmented = self.augment(pixels, self.seed, rank_and_size()[0], step, np.arange(len(x)))
        return torch.cat([x, ((augmented - mean) / std).to(x)])


def _make_views(transform: nn.Module, batch: Batch, views: int, function: Callable[[Tensor, str], Tensor]) -> Batch:
    """Apply a function from N to ``views`` N images to the inputs, and repeat what belongs to them."""
    kind = type(transform).__name__
    if batch.mix is not None:
        raise ValueError(f"{kind}: the batch is mixed already; make views before you mix")
    if batch.view is not None:
        raise ValueError(f"{kind}: the batch has several views already; use one transform that makes views")
    tensors = list_tensors(batch.inputs)
    if not tensors:
        raise TypeError(f"{kind}: the inputs hold no images (N, C, H, W), but {type(batch.inputs).__name__}")
    n, device, teacher_inputs = len(tensors[0]), tensors[0].device, batch.teacher_inputs

    def repeat(rows: Tensor | None) -> Tensor | None:
        return None if rows is None else torch.cat([rows] * views)

    return replace(
        batch,
        inputs=map_tensors(batch.inputs, function),
        teacher_inputs=None if teacher_inputs is None else map_tensors(teacher_inputs, function, "teacher_inputs"),
        labels=repeat(batch.labels),
        indices=repeat(batch.indices),
        is_query=repeat(batch.is_query),
        view=torch.arange(views, device=device).repeat_interleave(n),
        task_rows=torch.arange(n, device=device),
    )
