"""Correlation congruence (Peng et al. 2019): the kernel matrix of the batch; and two losses known by its name."""

import math
from typing import Literal

import torch
from torch import Tensor, nn

from lightning_rkd.functional.similarities import row_norms, unit_rows
from lightning_rkd.losses.base import Reference, RelationalLoss
from lightning_rkd.losses.parts.checks import check_at_least, check_choice, check_positive

Form = Literal["kernel", "norm", "rows"]


def gaussian_taylor(inner: Tensor, gamma: float, order: int) -> Tensor:
    r"""Taylor expansion of the Gaussian kernel :math:`e^{-\gamma \lVert a - b \rVert^2}` of unit vectors.

    Shapes: inner products of any shape -> the same.
    """
    total = term = torch.ones_like(inner)
    for p in range(1, order + 1):
        term = term * inner * (2 * gamma / p)
        total = total + term
    return total * math.exp(-2 * gamma)


class CorrelationCongruence(RelationalLoss):
    r"""Matches the teacher's similarities between samples, measured by a Gaussian kernel.

    .. math::
        L = \frac{1}{N^2} \sum_{i,j} \big(k(\hat s_i, \hat s_j) - k(\hat t_i, \hat t_j)\big)^2, \qquad
        k(a, b) = e^{-2 \gamma} \sum_{p=0}^P \frac{(2 \gamma)^p}{p!} \langle a, b \rangle^p

    with unit rows, for which :math:`k` is the Taylor expansion of :math:`e^{-\gamma \lVert a - b \rVert^2}`. The loss
    does not change when either embedding is rotated, or any row scaled.

    Two different losses are known by the same name, and often stand in tables beside it:

    .. math::
        L_\text{norm} = \frac{1}{N^2} \Big( \sum_{i,j} \big(k(s_i, s_j) - k(t_i, t_j)\big)^2 \Big)^{1/2}, \qquad
        L_\text{rows} = \frac{1}{N-1} \sum_{i=1}^{N-1} \sum_d |s_{id} - t_{id}| \, |s_{i+1,d} - t_{i+1,d}|

    ``"norm"`` is torchdistill's: rows as given, the root of the sum instead of the sum. ``"rows"`` is
    RepDistiller's, by whose account the author sent it: products of neighbouring rows, so that the order of the batch
    matters. Both read embeddings behind a linear layer of width 128 on either network (``dim=128``), and train the two
    layers with the student. The paper adds a loss on logits, which is a term of its own here.

    Shapes: (N, D_s), (N, D_t) -> scalar; widths must be equal in the form ``"rows"`` without ``dim``. A batch of one
    row gives 0.

    Args:
        form: ``"kernel"``, the paper's, or ``"norm"`` or ``"rows"``.
        gamma: Of the Gaussian kernel, positive; 0.4 in published code.
        order: Of its Taylor expansion, at least 1; 2 in published code.
        dim: Width of linear layers that embed both networks' rows first and are trained by the loss; 128 in published
            code of the forms ``"norm"`` and ``"rows"``. ``None`` compares the rows as they are.
        student_dim: D_s, for ``dim``; inferred if left out.
        teacher_dim: D_t, for ``dim``; inferred if left out.

    Reference:
        Peng et al. 2019, Correlation Congruence for Knowledge Distillation, arXiv:1904.01802.

    Example:
        >>> student, teacher = torch.eye(2), torch.ones(2, 2)
        >>> CorrelationCongruence()(student, teacher)
        tensor(0.1266)
        >>> CorrelationCongruence("norm")(student, teacher), CorrelationCongruence("rows")(student, teacher)
        (tensor(0.5362), tensor(0.))
    """

    reference = Reference(
        "peng2019correlation",
        "read in code",
        source="JDAI-CV/FaceX-Zoo, addition_module/face_lightning/KDF/loss/cc.py; yoshitomo-matsubara/torchdistill, "
        "losses/mid_level.py (norm); HobbitLong/RepDistiller, distiller_zoo/CC.py (rows)",
        weight_note="0.02 for form='rows' and dim=128, CIFAR-100, the last embeddings, RepDistiller; 0.003 for "
        "form='norm' and dim=128, ImageNet, torchdistill",
        result="CIFAR-100 resnet32x4 to resnet8x4: 72.97 for form='rows' and dim=128 (student alone 72.50), "
        "RepDistiller",
    )
    invariances = frozenset({"rotation", "row scale", "scale"})

    def __init__(
        self,
        form: Form = "kernel",
        gamma: float = 0.4,
        order: int = 2,
        *,
        dim: int | None = None,
        student_dim: int | None = None,
        teacher_dim: int | None = None,
    ) -> None:
        super().__init__()
        check_choice("CorrelationCongruence", Form, form=form)
        check_positive("CorrelationCongruence", gamma=gamma)
        check_at_least("CorrelationCongruence", 1, order=order, **({} if dim is None else {"dim": dim}))
        self.form, self.gamma, self.order, self.dim = form, gamma, order, dim
        if form != "kernel" or dim is not None:
            self.invariances = frozenset({"rotation"} if form == "norm" and dim is None else ())
        self.embed: nn.ModuleList | None = None
        if dim is None:
            self.needed_sizes = ()
        else:
            self.set_sizes(student_dim=student_dim, teacher_dim=teacher_dim)

    def build(self, student_dim: int, teacher_dim: int) -> None:
        assert self.dim is not None  # or there would be no sizes to wait for
        widths = student_dim, teacher_dim
        self.embed = nn.ModuleList(nn.Linear(width, self.dim, dtype=torch.float32) for width in widths)

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        if self.embed is not None:
            student, teacher = self.embed[0](student), self.embed[1](teacher)
        if len(student) == 1:
            return student.sum() * 0
        if self.form == "rows":
            return self._compare_neighbours(student, teacher)
        if self.form == "kernel":
            student, teacher = unit_rows(student), unit_rows(teacher)
        s, t = (gaussian_taylor(x @ x.T, self.gamma, self.order) for x in (student, teacher))
        if self.form == "kernel":
            return (s - t).square().mean()
        return row_norms((s - t).reshape(1, -1)).squeeze(0) / len(student) ** 2

    def _compare_neighbours(self, student: Tensor, teacher: Tensor) -> Tensor:
        if student.shape[1] != teacher.shape[1]:
            raise ValueError(
                f"CorrelationCongruence: form='rows' compares embeddings of equal width, got {student.shape[1]} of "
                f"the student and {teacher.shape[1]} of the teacher; pass dim=128 for trained linear layers of equal "
                "width, or use form='kernel'"
            )
        delta = (student - teacher).abs()
        return (delta[:-1] * delta[1:]).sum() / max(1, len(delta) - 1)
