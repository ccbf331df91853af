"""Mixup: samples that are convex combinations of two others."""

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from lightning_rkd.data.transforms.base import SteppedTransform, list_tensors, map_tensors
from lightning_rkd.utils.distributed import rank_and_size
from lightning_rkd.utils.types import Batch, Mix


class MixUp(SteppedTransform):
    r"""Mixes every row of a training batch with another one, as ``batch_transform``.

    .. math:: \tilde{x}_i = \lambda x_i + (1 - \lambda) x_{\pi(i)}, \qquad \lambda \sim \mathrm{Beta}(\alpha, \alpha)

    with a random permutation :math:`\pi`, which may map a row to itself. Student and teacher get the same mixed rows,
    and ``batch.mix`` describes the mixture for losses that take ``mix``. In evaluation mode batches are unchanged.

    The draws depend on (seed, rank, step) alone, also in a resumed run.

    Labels: class numbers (N,) are unchanged, unless ``num_classes`` is given; soft labels (N, K) are mixed like the
    inputs.

    Args:
        alpha: :math:`\alpha`; below 1 most rows stay nearly pure, 1 draws :math:`\lambda` uniformly.
        num_classes: K; turns class numbers into soft labels (N, K) for ``torch.nn.CrossEntropyLoss``.
        per_row: Whether each row has its own :math:`\lambda`, where the paper has one for the batch.
        clean_teacher: Whether the teacher gets the rows unmixed.
        seed: Not negative; the same on all ranks.

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

    def forward(self, batch: Batch) -> Batch:
        """Return the mixed batch; the given one is not modified."""
        if not self.training:
            return batch
        if batch.mix is not None:
            raise ValueError("MixUp: the batch is mixed already; use one MixUp")
        tensors = list_tensors(batch.inputs)
        like = next((x for x in tensors if x.is_floating_point() and x.ndim > 0), None)
        if like is None:
            kinds = ", ".join(str(x.dtype) for x in tensors) or type(batch.inputs).__name__
            raise TypeError(f"MixUp: the inputs hold no floating-point tensor to mix, but {kinds}")
        mix = self._draw(len(like), like)
        inputs, teacher_inputs = batch.inputs, batch.teacher_inputs
        mixed = map_tensors(inputs, lambda x, name: _mix(x, mix, name))
        if self.clean_teacher:
            teacher_inputs = inputs if teacher_inputs is None else teacher_inputs
        elif teacher_inputs is not None:
            teacher_inputs = map_tensors(teacher_inputs, lambda x, name: _mix(x, mix, name), "teacher_inputs")
        if batch.labels is not None:
            mix.labels = batch.labels[mix.partners]
        labels = self._mix_labels(batch.labels, mix)
        return replace(batch, inputs=mixed, teacher_inputs=teacher_inputs, labels=labels, mix=mix)

    def _draw(self, n: int, like: Tensor) -> Mix:
        rng = np.random.default_rng([self.seed, rank_and_size()[0], self.count_step()])
        ratio = np.broadcast_to(rng.beta(self.alpha, self.alpha, n if self.per_row else 1), (n,))
        partners = rng.permutation(n)
        dtype = torch.promote_types(like.dtype, torch.float32)
        return Mix(
            torch.from_numpy(partners).to(like.device),
            torch.tensor(ratio, dtype=dtype, device=like.device),
            teacher_mixed=not self.clean_teacher,
        )

    def _mix_labels(self, labels: Tensor | None, mix: Mix) -> Tensor | None:
        k = self.num_classes
        if labels is None:
            if k is not None:
                raise ValueError("MixUp: num_classes makes soft labels, but the batch has no labels: labels=...")
            return None
        if labels.is_floating_point():
            if k is not None and labels.shape[1:] != (k,):
                raise ValueError(f"MixUp: soft labels must be (N, {k}) for num_classes={k}, got {tuple(labels.shape)}")
            return _mix(labels, mix, "labels")
        if k is None:
            return labels
        if labels.ndim != 1:
            raise ValueError(f"MixUp: labels must be (N,) class numbers, got {labels.dtype} of {tuple(labels.shape)}")
        if labels.device.type == "cpu" and not 0 <= (low := int(labels.min())) <= (high := int(labels.max())) < k:
            raise ValueError(f"MixUp: labels go from {low} to {high}, but num_classes={k}")
        one_hot = torch.zeros(len(labels), k, dtype=mix.ratio.dtype, device=labels.device)
        return _mix(one_hot.scatter_(1, labels[:, None].long(), 1), mix, "labels")


def _mix(x: Tensor, mix: Mix, name: str) -> Tensor:
    if not x.is_floating_point():
        raise TypeError(
            f"MixUp: {name} is {x.dtype}, and only floating-point tensors can be mixed; turn images into floats in the "
            "data set's transform"
        )
    if x.ndim == 0 or len(x) != len(mix.ratio):
        raise ValueError(f"MixUp: {name} must have {len(mix.ratio)} rows like the rest, got {tuple(x.shape)}")
    ratio = mix.ratio.to(torch.promote_types(x.dtype, mix.ratio.dtype)).view(-1, *[1] * (x.ndim - 1))
    return (ratio * x + (1 - ratio) * x[mix.partners]).to(x.dtype)
