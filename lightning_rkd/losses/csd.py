"""Contextual similarity distillation (Wu, Wang, Zhou, Li and Tian 2022): queries of the student, the teacher's rows."""

from torch import Tensor
from torch.nn import functional as F

from lightning_rkd.losses.base import Reference
from lightning_rkd.losses.parts.anchored import AnchoredLoss, most_similar
from lightning_rkd.losses.parts.checks import check_at_least, check_positive
from lightning_rkd.losses.parts.memory import Queue


class CSD(AnchoredLoss):
    r"""Matches each sample's similarities to the teacher's rows, when the student queries and when the teacher does.

    .. math::
        L = \frac{1}{N} \sum_i \mathrm{KL}\Big(\sigma_{j \in k(i)}\big(\langle \hat t_i, \hat t_j \rangle / \tau_t\big)
        \,\Big\Vert\, \sigma_{j \in k(i)}\big(\langle \hat s_i, \hat t_j \rangle / \tau_s\big)\Big)

    where k(i) are the k rows of the gallery most similar to sample i in the teacher, itself first. Both distributions
    are over the teacher's rows, so the student learns to search a gallery that the teacher has embedded.

    The gallery is the batch, as in the code that this follows; in the paper it is the teacher's rows of the training
    set. ``bank_size`` lies in between: the teacher's rows of the batch and of the steps before it. The bank is filled
    in training only, with the rows of all ranks, and is part of the checkpoint. With all rows and equal temperatures
    it is the queue of lightly-train's distillation, which has 0.07 and up to 8192 rows (zeros until it is full, where
    this one has only what was seen): ``CSD(bank_size=8192, student_temperature=0.07, teacher_temperature=0.07)``.

    Rows are normalised first. Where D_s and D_t differ, a trained linear layer without bias maps the student's rows.

    Shapes: (N, D_s), (N, D_t) -> scalar.

    Args:
        top_k: k; ``None`` takes the whole gallery. Published code has 96.
        student_temperature: :math:`\tau_s`.
        teacher_temperature: :math:`\tau_t`.
        bank_size: Number of the teacher's last rows that are the gallery, those of the batch included; ``None`` takes
            the batch. At least the size of the batch over all ranks, and fewer than the training set has samples, which
            would stand in it twice.
        student_dim: D_s; inferred if left out.
        teacher_dim: D_t; inferred if left out.

    Reference:
        Wu, Wang, Zhou, Li and Tian 2022, Contextual Similarity Distillation for Asymmetric Image Retrieval, CVPR.

    Example:
        >>> import torch
        >>> student, teacher = torch.tensor([[1.0, 0.0], [1.0, 1.0]]), torch.eye(2)
        >>> CSD(teacher_temperature=1.0)(student, teacher)
        tensor(0.0555)
    """

    reference = Reference(
        "wu2022contextual",
        "read in code",
        source="SCY-X/D3still, AIR_Distiller/distillers/CSD.py, by other authors",
        weight=1.0,
        weight_note="metric learning with cross-entropy and a triplet loss, top_k=96 of 256 images, the same code",
        result="R@1 on CUB, student queries and the teacher's gallery, ResNet101 to ResNet18: 64.08 (RKD 0.36), "
        "D3still",
    )

    def __init__(
        self,
        top_k: int | None = None,
        student_temperature: float = 1.0,
        teacher_temperature: float = 0.01,
        *,
        bank_size: int | None = None,
        **sizes: int | None,
    ) -> None:
        self.bank_size = bank_size  # which build reads
        super().__init__(**sizes)
        check_positive("CSD", student_temperature=student_temperature, teacher_temperature=teacher_temperature)
        sizes = {"top_k": top_k, "bank_size": bank_size}
        check_at_least("CSD", 1, **{name: size for name, size in sizes.items() if size is not None})
        self.top_k, self.student_temperature, self.teacher_temperature = top_k, student_temperature, teacher_temperature

    def build(self, student_dim: int, teacher_dim: int) -> None:
        super().build(student_dim, teacher_dim)
        if self.bank_size is not None:
            self.bank = Queue(self.bank_size, teacher_dim, name="CSD", setting="bank_size")

    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The loss of unit rows; in training the teacher's are pushed into the bank."""
        gallery = teacher
        if self.bank_size is not None:  # in float32, unless the loss is in float64: a bank has many rows
            student, teacher = (x.to(self.bank.rows.dtype) for x in (student, teacher))
            gallery = self.bank.contents_with(teacher)[: self.bank.filled + len(teacher)]
            if self.training:
                self.bank.push(teacher)
        t, x = teacher @ gallery.T, student @ gallery.T
        if self.top_k is not None:
            near = most_similar(t, self.top_k)
            t, x = t.gather(1, near), x.gather(1, near)
        log_p = F.log_softmax(t / self.teacher_temperature, dim=1)
        log_q = F.log_softmax(x / self.student_temperature, dim=1)
        return F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
