"""Similarity transfer (after Zhao, Gong, Sun, Dong and Yu 2021): soft targets for virtual samples made by mixup."""

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_rkd.losses.base import Reference, RelationalLoss
from lightning_rkd.losses.parts.checks import check_choice, check_classes, check_logits, check_positive, check_share
from lightning_rkd.utils.types import Mix

Form = Literal["virtual", "blended", "wrong classes"]


def similarity_transfer(
    student: Tensor,
    teacher: Tensor,
    mix: Mix,
    labels: Tensor | None = None,
    *,
    form: Form = "virtual",
    share: float = 0.9,
    temperature: float = 4.0,
) -> Tensor:
    """STKD as a function; see :class:`STKD`."""
    check_logits(student, teacher, "STKD", dims=(2,))
    if len(mix.ratio) != len(student):
        raise ValueError(f"STKD: {len(mix.ratio)} rows were mixed, but the student gives {len(student)}")
    if mix.teacher_mixed is (form == "blended"):
        sees = "the samples themselves" if mix.teacher_mixed else "mixed samples"
        raise ValueError(
            f"STKD: with form {form!r} the teacher must see {sees}: MixUp(clean_teacher={mix.teacher_mixed})"
        )
    mixed = _mixed_labels(labels, mix, student) if share < 1 or form == "wrong classes" else None
    z, t = student / temperature, teacher.detach() / temperature
    target = None
    if form == "blended":
        if mix.partners.device.type == "cpu" and not 0 <= int(mix.partners.min()) <= int(mix.partners.max()) < len(t):
            raise ValueError(
                f"STKD: mix.partners are rows of the batch, from 0 to {len(t) - 1}, but go from "
                f"{int(mix.partners.min())} to {int(mix.partners.max())}"
            )
        ratio, p = mix.ratio.to(t.dtype)[:, None], t.softmax(1)
        target = ratio * p + (1 - ratio) * p[mix.partners]
    elif form == "wrong classes" and mixed is not None:
        never = torch.finfo(z.dtype).min / 2  # probability 0, and no NaN where all classes are right
        z, t = (x.masked_fill(mixed > 0, never) for x in (z, t))
    target = t.softmax(1) if target is None else target
    imitation = temperature**2 * F.kl_div(z.log_softmax(1), target, reduction="batchmean")
    if share == 1 or mixed is None:
        return imitation
    return (1 - share) * F.cross_entropy(student, mixed) + share * imitation


class STKD(RelationalLoss):
    r"""STKD-style similarity transfer, a reconstruction: soft targets for mixtures of two samples.

    With :math:`\tilde{x} = \lambda x + (1 - \lambda) x_\pi` of :class:`~lightning_rkd.data.MixUp`, labels
    :math:`y` and :math:`y_\pi`, and the logits s and t of student and teacher,

    .. math::
        L = (1 - w) \big[\lambda \mathrm{CE}(s(\tilde{x}), y) + (1 - \lambda) \mathrm{CE}(s(\tilde{x}), y_\pi)\big]
        + w T^2 \, \mathrm{KL}\big(p \,\Vert\, \sigma(s(\tilde{x}) / T)\big)

    as a mean over samples, where the target p is

    - ``"virtual"``: :math:`\sigma(t(\tilde{x}) / T)`, the teacher's probabilities of the mixture;
    - ``"blended"``: :math:`\lambda \sigma(t(x) / T) + (1 - \lambda) \sigma(t(x_\pi) / T)`, the mixture of its
      probabilities of the two samples, which it must see unmixed, ``MixUp(clean_teacher=True)``;
    - ``"wrong classes"``: as ``"virtual"``, with p and :math:`\sigma(s)` restricted to the classes that have no part in
      the mixture's label, and normalised there.

    **A reconstruction, not the paper's loss.** Only the abstract could be read, and no code was found. It says that
    virtual samples are made by mixup, that a virtual sample should have "a similar probability distribution in the
    teacher and student networks", and that the loss "can fully utilize the incorrect classes similarities by the mixed
    labels". The equations above are the plainest reading of that, w, T and the forms are ours, and no published
    number belongs to them.

    The loss does not change when a constant is added to all logits of a sample.

    Shapes: (N, K), (N, K) -> scalar. A mixture of which no class is wrong has nothing to imitate in
    ``"wrong classes"`` and adds 0 there.

    Args:
        form: ``"virtual"``, ``"blended"`` or ``"wrong classes"``.
        share: w, between 0 and 1. With 1 the cross-entropy is left to a task loss, for which ``MixUp(num_classes=K)``
            mixes the labels; labels are then needed by ``"wrong classes"`` only.
        temperature: T.

    Reference:
        Zhao, Gong, Sun, Dong and Yu 2021, Similarity Transfer for Knowledge Distillation, arXiv:2103.10047.

    Example:
        >>> mix = Mix(torch.tensor([1, 0]), torch.tensor([0.75, 0.75]), labels=torch.tensor([1, 0]))
        >>> student, teacher = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[4.0, 0.0], [0.0, 2.0]])
        >>> STKD()(student, teacher, mix=mix, labels=torch.tensor([0, 1]))
        tensor(0.5492)
        >>> STKD(share=1.0)(student, teacher, mix=mix)
        tensor(0.5476)
    """

    reads = "logits"
    gather = False
    invariances = frozenset({"row shift"})
    reference = Reference("zhao2021similarity", "reconstruction", source="the abstract; no code was found")

    def __init__(self, form: Form = "virtual", share: float = 0.9, temperature: float = 4.0) -> None:
        super().__init__()
        check_choice("STKD", Form, form=form)
        check_share("STKD", share=share)
        check_positive("STKD", temperature=temperature)
        self.form, self.share, self.temperature = form, share, temperature

    def forward(self, student: Tensor, teacher: Tensor, *, mix: Mix, labels: Tensor | None = None) -> Tensor:
        return similarity_transfer(
            student, teacher, mix, labels, form=self.form, share=self.share, temperature=self.temperature
        )


def _mixed_labels(labels: Tensor | None, mix: Mix, logits: Tensor) -> Tensor:
    """Soft labels (N, K): mixed already, or from the classes of both partners."""
    if labels is None:
        raise ValueError(
            "STKD needs labels: say where the batch has them, labels=..., or leave out what needs them, "
            "STKD(share=1.0) with form 'virtual' or 'blended'"
        )
    classes = logits.shape[1]
    if labels.is_floating_point():
        if labels.shape != logits.shape:
            raise ValueError(
                f"STKD: soft labels must be {tuple(logits.shape)} like the logits, got {tuple(labels.shape)}"
            )
        return labels.to(logits.dtype)
    if mix.labels is None:
        raise ValueError("STKD: the mix has no labels of the partners, Mix(partners, ratio, labels=...)")
    ratio = mix.ratio.to(logits.dtype)[:, None]
    mixed = logits.new_zeros(logits.shape)
    for one, part in ((labels, ratio), (mix.labels, 1 - ratio)):
        check_classes(one, classes, "STKD")
        mixed = mixed.scatter_add(1, one[:, None].long(), part)
    return mixed
