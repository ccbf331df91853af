"""Relational representation distillation (Giakoumoglou and Stathaki 2024): similarities to previous batches."""

from torch import Tensor
from torch.nn import functional as F

from lightning_rkd.losses.base import Reference, RelationalLoss
from lightning_rkd.losses.parts.checks import check_positive
from lightning_rkd.losses.parts.memory import Queue
from lightning_rkd.losses.parts.projector import Projector


class RRD(RelationalLoss):
    r"""Cross-entropy between the similarities to the teacher's last embeddings, as distributions.

    .. math::
        L = -\frac{1}{N} \sum_i \sum_{m} p^t_{im} \log p^s_{im}, \qquad
        p^t_i = \mathrm{softmax}(Q\, \hat t_i / \tau_t), \quad p^s_i = \mathrm{softmax}(Q\, \hat s_i / \tau_s)

    with :math:`\hat s = g_s(s) / \lVert g_s(s) \rVert`, :math:`\hat t = g_t(t) / \lVert g_t(t) \rVert`, linear maps
    :math:`g_s, g_t` to d dimensions, and Q the M last rows :math:`\hat t`, those of the batch included. It is the
    cross entropy of the authors' code: the Kullback-Leibler divergence of the paper plus the teacher's entropy, which
    is constant, so that a match does not give 0. As :math:`\tau_t \to 0` it becomes InfoNCE.

    :math:`g_t` keeps its random initialisation: in the authors' code the optimizer has it too, but no gradient reaches
    it; here it is frozen. The queue is filled in training only; in evaluation the batch temporarily replaces the oldest
    rows.

    Departures: the rows of the first queue have unit norm, where the authors' code normalises columns; after M samples
    there is no difference. Any batch size up to M will do, where theirs must divide M. The temperatures are the
    defaults of the authors' training scripts, a sharp teacher and a soft student, as the current abstract says; a
    comment in their class and earlier versions of the abstract say the reverse. Their second variant, with one memory
    row for every training sample, is not here.

    :math:`g_t` makes a space of its own: the student does not learn to query the teacher's gallery. The same comparison
    with the teacher's rows as they are is ``CSD(bank_size=M, student_temperature=tau, teacher_temperature=tau)``.

    Shapes: student (N, D_s), teacher (N, D_t) -> scalar.

    Args:
        student_dim: D_s; inferred if left out.
        teacher_dim: D_t; inferred if left out.
        dim: d.
        queue_size: M.
        student_temperature: :math:`\tau_s`.
        teacher_temperature: :math:`\tau_t`.
        seed: Of the first rows of the queue.

    Reference:
        Giakoumoglou and Stathaki 2024, Relational Representation Distillation, arXiv:2407.12073.

    Example:
        >>> import torch
        >>> loss = RRD(student_dim=4, teacher_dim=8, queue_size=16)
        >>> loss(torch.randn(6, 4), torch.randn(6, 8)).shape, loss.queue.filled
        (torch.Size([]), 6)
    """

    reference = Reference(
        "giakoumoglou2024relational",
        "read in code",
        source="giakoumoglou/rrd, cifar/distillers/RRD.py and cifar/train_student.py",
        weight=1.0,
        weight_note="CIFAR-100, the authors' README",
    )
    student_projector: Projector
    teacher_projector: Projector
    queue: Queue

    def __init__(
        self,
        student_dim: int | None = None,
        teacher_dim: int | None = None,
        *,
        dim: int = 128,
        queue_size: int = 16384,
        student_temperature: float = 0.1,
        teacher_temperature: float = 0.02,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_positive("RRD", student_temperature=student_temperature, teacher_temperature=teacher_temperature)
        self.dim, self.queue_size, self.seed = dim, queue_size, seed
        self.student_temperature, self.teacher_temperature = student_temperature, teacher_temperature
        self.set_sizes(student_dim=student_dim, teacher_dim=teacher_dim)

    def build(self, student_dim: int, teacher_dim: int) -> None:
        self.student_projector = Projector(student_dim, self.dim)
        self.teacher_projector = Projector(teacher_dim, self.dim).requires_grad_(False)
        self.queue = Queue(self.queue_size, self.dim, seed=self.seed, name="RRD")

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The loss as a scalar; in training the teacher's rows are pushed into the queue."""
        s, t = self.student_projector(student), self.teacher_projector(teacher)
        memory = self.queue.contents_with(t)
        target = (t.detach() @ memory.T / self.teacher_temperature).softmax(1)
        loss: Tensor = -(target * F.log_softmax(s @ memory.T / self.student_temperature, dim=1)).sum(1).mean()
        if self.training:
            self.queue.push(t)
        return loss
