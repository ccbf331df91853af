"""Every image in four rotations, for methods that relate the views of a sample."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from lightning_rkd.data.transforms.nested import on_tensors, tensors
from lightning_rkd.utils.types import Batch


class Rotations(nn.Module):
    """Shows each image of a training batch turned by 0, 90, 180 and 270 degrees.

    Meant as the ``batch_transform`` of ``DistillationModule``. N images become 4 N rows: first all as they are, then
    all turned counter-clockwise once, twice and three times. ``batch.view`` counts the quarter turns, labels and
    indices are repeated, and the task loss sees the first N rows only: the task stays that of upright images. In
    evaluation mode a batch comes back as it is.

    Four times the rows need four times the memory and time.

    Shapes: inputs (N, C, H, H) -> (4 N, C, H, H), alike in mappings and sequences of inputs.

    Raises:
        TypeError: Inputs without images.
        ValueError: Images that are not square, or a batch that is mixed or has several views already.

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
        """The batch in four rotations; the given one is left alone."""
        if not self.training:
            return batch
        if batch.mix is not None:
            raise ValueError("Rotations: the batch is mixed already; rotate before you mix")
        if batch.view is not None:
            raise ValueError("Rotations: the batch has several views already; use one transform that makes views")
        first = next(tensors(batch.inputs), None)
        if first is None:
            raise TypeError(f"Rotations: the inputs hold no images (N, C, H, H), but {type(batch.inputs).__name__}")
        n, shown = len(first), batch.teacher_inputs
        return replace(
            batch,
            inputs=on_tensors(batch.inputs, _turned),
            teacher_inputs=None if shown is None else on_tensors(shown, _turned, "teacher_inputs"),
            labels=_repeated(batch.labels),
            indices=_repeated(batch.indices),
            is_query=_repeated(batch.is_query),
            view=torch.arange(4, device=first.device).repeat_interleave(n),
            task_rows=torch.arange(n, device=first.device),
        )


def _turned(x: Tensor, name: str) -> Tensor:
    if x.ndim != 4 or x.shape[2] != x.shape[3]:
        raise ValueError(
            f"Rotations: {name} must be square images (N, C, H, H), got {tuple(x.shape)}; crop or resize them"
        )
    return torch.cat([x.rot90(quarters, (2, 3)) for quarters in range(4)])


def _repeated(rows: Tensor | None) -> Tensor | None:
    return None if rows is None else torch.cat([rows] * 4)
