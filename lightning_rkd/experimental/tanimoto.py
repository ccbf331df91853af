"""Distillation by Tanimoto coefficients (Shu 2022): similarities that depend on angles and norms."""

from typing import Literal

from torch import Tensor

from lightning_rkd.functional.similarities import tanimoto_coefficients, tanimoto_of_pairs
from lightning_rkd.losses.base import Reference, RelationalLoss
from lightning_rkd.losses.parts.checks import check_choice

Form = Literal["matrix", "sample"]


class Tanimoto(RelationalLoss):
    r"""Compares similarities by angle and norm, of the samples of a batch, or of each sample with its teacher.

    .. math::
        L_\text{matrix} = \frac{1}{N^2} \sum_{i,j} \big(T(s_i, s_j) - T(t_i, t_j)\big)^2, \qquad
        L_\text{sample} = \frac{1}{N} \sum_i 1 - T(s_i, t_i), \qquad
        T(a, b) = \frac{\langle a, b \rangle}{\lVert a \rVert^2 + \lVert b \rVert^2 - \langle a, b \rangle}

    This is a reconstruction from the paper's abstract, which names the two perspectives, the coefficient and that it is
    taken within the batch, but not the distance between the two matrices: the mean square is ours, and no parity with
    the paper's numbers is claimed. Between two zero rows :math:`T = 1`.

    The matrix form does not change when either embedding is rotated or scaled.

    Shapes: (N, D_s), (N, D_t) -> scalar; widths must be equal in the form ``"sample"``. In the form ``"matrix"`` a
    batch of one row gives 0.

    Args:
        form: ``"matrix"``, the first perspective, or ``"sample"``, the second, a mean of per-sample terms, which
            aligns the student with the teacher's space. The paper uses both: ``Tanimoto() + Tanimoto("sample")``, with
            weights that we do not know.

    Reference:
        Shu 2022, Two Distillation Perspectives Based on Tanimoto Coefficient, IEEE International Conference on Image
        Processing, doi:10.1109/ICIP46576.2022.9897375.

    Example:
        >>> import torch
        >>> student, teacher = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[1.0, 0.0], [2.0, 0.0]])
        >>> Tanimoto()(student, teacher), Tanimoto("sample")(student, teacher)
        (tensor(0.2222), tensor(0.5000))
    """

    reference = Reference("shu2022two", "reconstruction", source="the paper's abstract")
    invariances = frozenset({"rotation", "scale"})

    def __init__(self, form: Form = "matrix") -> None:
        super().__init__()
        check_choice("Tanimoto", Form, form=form)
        self.form = form
        if form == "sample":
            self.gather, self.aligns, self.invariances = False, True, frozenset()

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        if self.form == "matrix":
            return (tanimoto_coefficients(student) - tanimoto_coefficients(teacher)).square().mean()
        if student.shape[1] != teacher.shape[1]:
            raise ValueError(
                f"Tanimoto: form='sample' compares embeddings of equal width, got {student.shape[1]} of the "
                f"student and {teacher.shape[1]} of the teacher; use form='matrix', or a student's head as wide as the "
                "teacher's"
            )
        return (1 - tanimoto_of_pairs(student, teacher)).mean()
