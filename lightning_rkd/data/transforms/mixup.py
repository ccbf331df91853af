"""Mixup (Zhang, Cisse, Dauphin and Lopez-Paz 2018): virtual samples between two real ones."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_rkd.data.transforms.nested import on_tensors, tensors
from lightning_rkd.utils.distributed import rank_and_size
from lightning_rkd.utils.types import Batch, Mix


class MixUp(nn.Module):
    r"""Mixes every row of a training batch with another one.

    .. math:: \tilde{x}_i = \lambda x_i + (1 - \lambda) x_{\pi(i)}, \qquad \lambda \sim \mathrm{Beta}(\alpha, \alpha)

    with a random permutation :math:`\pi`, in which a row may meet itself. Meant as the ``batch_transform`` of
    ``DistillationModule``: student and teacher then see the same mixed rows, and ``batch.mix`` tells losses that ask
    for ``mix`` what was done. In evaluation mode a batch comes back as it is.

    The draws depend on (seed, rank, step) alone. Steps are counted in a buffer, which checkpoints save, so that a
    resumed run mixes as the uninterrupted one would have.

    Labels: class numbers (N,) stay those of the rows themselves, unless ``num_classes`` is given; soft labels (N, K)
    are mixed like the inputs.

    Args:
        alpha: :math:`\alpha`; below 1 most rows stay nearly pure, 1 draws :math:`\lambda` uniformly.
        num_classes: K; turns class numbers into soft labels (N, K) for ``torch.nn.CrossEntropyLoss``.
        per_row: Whether each row has its own :math:`\lambda`, instead of one for the batch as in the paper.
        clean_teacher: Whether the teacher sees the rows unmixed.
        seed: Not negative; the same on all ranks.

    Raises:
        TypeError: Inputs that cannot be mixed, such as integers.
        ValueError: Settings out of range, a batch that is mixed already, or labels that do not fit ``num_classes``.

    Reference:
        Zhang, Cisse, Dauphin and Lopez-Paz 2018, mixup: Beyond Empirical Risk Minimization, arXiv:1710.09412.

    Example:
        >>> batch = MixUp(num_classes=2)(Batch(torch.tensor([[0.0], [10.0]]), torch.tensor([0, 1])))
        >>> batch.mix.partners, batch.mix.ratio
        (tensor([1, 0]), tensor([0.7025, 0.7025]))
        >>> batch.inputs, batch.labels
        (tensor([[2.9753],
                [7.0247]]), tensor([[0.7025, 0.2975],
                [0.2975, 0.7025]]))
    """

    steps: Tensor

    def __init__(
        self,
        alpha: float = 1.0,
        num_classes: int | None = None,
        per_row: bool = False,
        clean_teacher: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not alpha > 0:
            raise ValueError(f"MixUp: alpha must be positive, got {alpha}")
        if num_classes is not None and num_classes < 1:
            raise ValueError(f"MixUp: num_classes must be at least 1, got {num_classes}")
        if seed < 0:
            raise ValueError(f"MixUp: seed must not be negative, got {seed}")
        self.alpha, self.num_classes, self.per_row = alpha, num_classes, per_row
        self.clean_teacher, self.seed = clean_teacher, seed
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self._step: int | None = 0  # the buffer's value: reading it from a GPU would wait for the step before

    def forward(self, batch: Batch) -> Batch:
        """The mixed batch; the given one is left alone."""
        if not self.training:
            return batch
        if batch.mix is not None:
            raise ValueError("MixUp: the batch is mixed already; use one MixUp")
        like = next((x for x in tensors(batch.inputs) if x.is_floating_point() and x.ndim > 0), None)
        if like is None:
            kinds = ", ".join(str(x.dtype) for x in tensors(batch.inputs)) or type(batch.inputs).__name__
            raise TypeError(f"MixUp: the inputs hold no floating-point tensor to mix, but {kinds}")
        mix = self._draw(len(like), like)
        inputs, shown = batch.inputs, batch.teacher_inputs
        mixed = on_tensors(inputs, lambda x, name: _mixed(x, mix, name))
        if self.clean_teacher:
            shown = inputs if shown is None else shown
        elif shown is not None:
            shown = on_tensors(shown, lambda x, name: _mixed(x, mix, name), "teacher_inputs")
        if batch.labels is not None:
            mix.labels = batch.labels[mix.partners]
        return replace(batch, inputs=mixed, teacher_inputs=shown, labels=self._labels(batch.labels, mix), mix=mix)

    def extra_repr(self) -> str:
        """The settings, for ``print``."""
        return (
            f"alpha={self.alpha}, num_classes={self.num_classes}, per_row={self.per_row}, "
            f"clean_teacher={self.clean_teacher}, seed={self.seed}"
        )

    def _draw(self, n: int, like: Tensor) -> Mix:
        step = int(self.steps) if self._step is None else self._step
        rng = np.random.default_rng([self.seed, rank_and_size()[0], step])
        ratio = np.broadcast_to(rng.beta(self.alpha, self.alpha, n if self.per_row else 1), (n,))
        partners = rng.permutation(n)
        self.steps += 1
        self._step = step + 1
        dtype = torch.promote_types(like.dtype, torch.float32)
        return Mix(
            torch.from_numpy(partners).to(like.device),
            torch.tensor(ratio, dtype=dtype, device=like.device),
            teacher_mixed=not self.clean_teacher,
        )

    def _labels(self, labels: Tensor | None, mix: Mix) -> Tensor | None:
        k = self.num_classes
        if labels is None:
            if k is not None:
                raise ValueError("MixUp: num_classes makes soft labels, but the batch has no labels: labels=...")
            return None
        if labels.is_floating_point():
            if k is not None and labels.shape[1:] != (k,):
                raise ValueError(f"MixUp: soft labels must be (N, {k}) for num_classes={k}, got {tuple(labels.shape)}")
            return _mixed(labels, mix, "labels")
        if k is None:
            return labels
        if labels.ndim != 1:
            raise ValueError(f"MixUp: labels must be (N,) class numbers, got {labels.dtype} of {tuple(labels.shape)}")
        if labels.device.type == "cpu" and not 0 <= (low := int(labels.min())) <= (high := int(labels.max())) < k:
            raise ValueError(f"MixUp: labels go from {low} to {high}, but num_classes={k}")
        own = torch.zeros(len(labels), k, dtype=mix.ratio.dtype, device=labels.device).scatter_(
            1, labels[:, None].long(), 1
        )
        return _mixed(own, mix, "labels")

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self._step = None


def _mixed(x: Tensor, mix: Mix, name: str) -> Tensor:
    if not x.is_floating_point():
        raise TypeError(
            f"MixUp: {name} is {x.dtype}, and only floating-point tensors can be mixed; turn images into floats in the "
            "data set's transform"
        )
    if x.ndim == 0 or len(x) != len(mix.ratio):
        raise ValueError(f"MixUp: {name} must have {len(mix.ratio)} rows like the rest, got {tuple(x.shape)}")
    ratio = mix.ratio.to(torch.promote_types(x.dtype, mix.ratio.dtype)).view(-1, *[1] * (x.ndim - 1))
    return (ratio * x + (1 - ratio) * x[mix.partners]).to(x.dtype)
