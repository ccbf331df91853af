"""The machinery that CRD and CRCD share: projections, a memory per network, negatives, one noise-contrastive loss."""

import math

import torch
from torch import Tensor

from lightning_rkd.losses.base import RelationalLoss
from lightning_rkd.losses.parts.checks import check_at_least, check_positive, check_share
from lightning_rkd.losses.parts.memory import MemoryBank
from lightning_rkd.losses.parts.nce import nce
from lightning_rkd.losses.parts.projector import Projector


class MemoryContrast(RelationalLoss):
    """Base of losses that contrast each network's projected rows with the memory of the other network.

    A subclass defines :meth:`similarities` and :meth:`log_mean`.
    """

    student_projector: Projector
    teacher_projector: Projector
    student_memory: MemoryBank
    teacher_memory: MemoryBank

    def __init__(
        self,
        student_dim: int | None = None,
        teacher_dim: int | None = None,
        num_samples: int | None = None,
        *,
        dim: int = 128,
        negatives: int = 16384,
        temperature: float = 0.07,
        momentum: float = 0.5,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_at_least(self.display_name, 2, dim=dim)
        check_at_least(self.display_name, 1, negatives=negatives)
        check_positive(self.display_name, temperature=temperature)
        check_share(self.display_name, momentum=momentum)
        self.dim, self.negatives, self.temperature = dim, negatives, temperature
        self.momentum, self.seed = momentum, seed
        self.set_sizes(student_dim=student_dim, teacher_dim=teacher_dim, num_samples=num_samples)

    def build(self, student_dim: int, teacher_dim: int, num_samples: int) -> None:
        self.student_projector = Projector(student_dim, self.dim)
        self.teacher_projector = Projector(teacher_dim, self.dim)
        self.student_memory = MemoryBank(num_samples, self.dim, seed=self.seed, name=self.display_name)
        self.teacher_memory = MemoryBank(num_samples, self.dim, seed=self.seed + 1, name=self.display_name)
        self._log_normaliser = math.log(num_samples) + self.log_mean()

    def similarities(self, memory: MemoryBank, features: Tensor, indices: Tensor, which: Tensor) -> Tensor:
        """Similarities of features to the memory's rows ``which``, the partner first; (R, 1 + K)."""
        raise NotImplementedError

    def log_mean(self) -> float:
        """Logarithm of the mean of the exponentials of random similarities over the temperature."""
        raise NotImplementedError

    def forward(self, student: Tensor, teacher: Tensor, *, indices: Tensor, labels: Tensor | None = None) -> Tensor:
        """The loss as a scalar; in training the memories are updated."""
        indices = self.student_memory.locate(indices)
        s, t = self.student_projector(student), self.teacher_projector(teacher)
        which = torch.cat([indices[:, None], self.student_memory.draw(indices, self.negatives, labels)], dim=1)
        of_student, of_teacher = (
            nce(self.similarities(memory, x, indices, which) / self.temperature, self._log_normaliser, len(memory))
            for memory, x in ((self.teacher_memory, s), (self.student_memory, t))
        )
        if self.training:
            self.student_memory.update(indices, s, self.momentum, labels)
            self.teacher_memory.update(indices, t, self.momentum)
        return of_student + of_teacher
