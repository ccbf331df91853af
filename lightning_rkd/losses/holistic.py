"""Holistic knowledge distillation (Zhou et al. 2021): embeddings, and their averages over a graph, with a memory."""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_rkd.functional.graphs import knn_graph
from lightning_rkd.functional.similarities import unit_rows
from lightning_rkd.losses.base import Reference, RelationalLoss
from lightning_rkd.losses.parts.checks import check_at_least, check_choice, check_positive, check_share
from lightning_rkd.losses.parts.memory import MemoryBank
from lightning_rkd.losses.parts.projector import Projector
from lightning_rkd.utils.types import Outputs

Source = Literal["own", "other"]


def prediction_graph(logits: Tensor, k: int) -> Tensor:
    r"""Graph of each sample's k nearest neighbours by the cosine of the predictions, itself included: 1/k, else 0.

    This is :math:`D^{-1/2} A D^{-1/2}` of the graph with an edge from each neighbour, in which every sample has
    in-degree k. Shapes: (N, classes) -> (N, N). No gradient passes.
    """
    predictions = F.normalize(logits.detach().softmax(dim=1), dim=1)
    graph = knn_graph(1 - predictions @ predictions.T, k, who="HolisticKD", argument="neighbours")
    return graph.to(logits.dtype) / k


class GraphConv(nn.Module):
    r"""Topology-adaptive graph convolution of one hop, normalised: :math:`W [x, \hat{A} x] + b` on the unit sphere.

    Shapes: x (N, dim), graph (N, N) -> (N, dim).
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(2 * dim, dim, dtype=torch.float32)
        nn.init.xavier_normal_(self.linear.weight, gain=nn.init.calculate_gain("relu"))

    def forward(self, x: Tensor, graph: Tensor) -> Tensor:
        return unit_rows(self.linear(torch.cat([x, graph @ x], dim=1)))


class HolisticKD(RelationalLoss):
    r"""Contrasts rows, and rows smoothed over a graph of the batch, with the other network's memory of the sample.

    Rows are projected onto the unit sphere by a trained linear layer per network: :math:`s_i` and :math:`t_i`. Each
    network's predictions give a graph of the batch (:func:`prediction_graph`), over which a trained convolution per
    network smooths its rows (:class:`GraphConv`): :math:`\tilde s_i` and :math:`\tilde t_i`. With :math:`m^s, m^t` the
    memories, which hold a row for each of the M training samples,

    .. math::
        L = \ell(s, m^t, m^s) + \ell(t, m^s, m^t) + \ell(\tilde s, \bar t, m^s) + \ell(\tilde t, \bar s, m^t), \qquad
        \ell(v, p, m) = -\frac{1}{N} \sum_i \log
        \frac{e^{\langle v_i, p_i \rangle / \tau}}
             {e^{\langle v_i, p_i \rangle / \tau} + \sum_{j \in \mathrm{neg}(i)} e^{\langle v_i, m_j \rangle / \tau}}

    where :math:`\bar t_i` is :math:`\frac34 m^t_i + \frac14 \tilde t_i`, normalised, a constant, and :math:`\bar s_i`
    alike. Negatives are K samples of other classes. After each training step the rows s and t of the batch are updated
    in the memories (:class:`~lightning_rkd.losses.parts.memory.MemoryBank`).

    As in the authors' code, the negatives of a row are of its *own* network's memory, though its partner is the other
    network's; ``negatives_from="other"`` takes both from the same memory, which is the usual InfoNCE. The constants
    :math:`\bar s` cut the graph, so the gradient is not exactly that of the value.

    Departures from the authors' code: a batch smaller than ``neighbours`` is refused, where theirs leaves out the graph
    and does not update the memories. Negatives are drawn with replacement, theirs only where K exceeds their number. A
    sample counts as of another class until a batch has held it: its row is still a random point. Similarities come from
    products with the whole memory, N x M numbers, where they gather N x K x dim.

    Shapes: ``Outputs`` with embedding (N, D) and logits (N, classes) of both networks; indices (N,), labels (N,) or
    (N, classes) -> scalar.

    Args:
        student_dim: Width of the student's embedding; inferred if left out.
        teacher_dim: Width of the teacher's embedding; inferred if left out.
        num_samples: M, the size of the training set that ``indices`` count; inferred by the Lightning classes.
        dim: Width of the projections.
        neighbours: Of a sample in the graph, itself included.
        negatives: K.
        temperature: :math:`\tau`.
        momentum: Of the memories.
        smoothing: Share of the memory in :math:`\bar s` and :math:`\bar t`.
        negatives_from: ``"own"`` or ``"other"``.
        seed: Of the memories' first rows and of the draws.

    Reference:
        Zhou et al. 2021, Distilling Holistic Knowledge with Graph Neural Networks, arXiv:2108.05507.

    Example:
        >>> loss = HolisticKD(num_samples=50)
        >>> student = Outputs(embedding=torch.randn(8, 4), logits=torch.randn(8, 3))
        >>> teacher = Outputs(embedding=torch.randn(8, 6), logits=torch.randn(8, 3))
        >>> value = loss(student, teacher, indices=torch.arange(8), labels=torch.arange(8) % 3)
        >>> value.shape, int(loss.student_memory.updates)
        (torch.Size([]), 1)
    """

    reads = ("embedding", "logits")
    reference = Reference(
        "zhou2021distilling",
        "read in code",
        source="wyc-ruiker/HKD, distiller_zoo/GNN.py",
        weight=3.0,
        weight_note="CIFAR-100, the authors' code",
        result="CIFAR-100 resnet32x4 to resnet8x4: 75.63, with soft targets 76.13; ShuffleNetV2: 76.31, 76.92",
    )
    student_projector: Projector
    teacher_projector: Projector
    student_conv: GraphConv
    teacher_conv: GraphConv
    student_memory: MemoryBank
    teacher_memory: MemoryBank

    def __init__(
        self,
        student_dim: int | None = None,
        teacher_dim: int | None = None,
        num_samples: int | None = None,
        *,
        dim: int = 128,
        neighbours: int = 8,
        negatives: int = 16384,
        temperature: float = 0.07,
        momentum: float = 0.9,
        smoothing: float = 0.75,
        negatives_from: Source = "own",
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_at_least("HolisticKD", 1, dim=dim, neighbours=neighbours, negatives=negatives)
        check_positive("HolisticKD", temperature=temperature)
        check_share("HolisticKD", momentum=momentum, smoothing=smoothing)
        check_choice("HolisticKD", Source, negatives_from=negatives_from)
        self.dim, self.neighbours, self.negatives, self.temperature = dim, neighbours, negatives, temperature
        self.momentum, self.smoothing, self.negatives_from, self.seed = momentum, smoothing, negatives_from, seed
        self.set_sizes(student_dim=student_dim, teacher_dim=teacher_dim, num_samples=num_samples)

    def build(self, student_dim: int, teacher_dim: int, num_samples: int) -> None:
        self.student_projector = Projector(student_dim, self.dim)
        self.teacher_projector = Projector(teacher_dim, self.dim)
        self.student_conv, self.teacher_conv = GraphConv(self.dim), GraphConv(self.dim)
        self.student_memory = MemoryBank(num_samples, self.dim, seed=self.seed, name="HolisticKD")
        self.teacher_memory = MemoryBank(num_samples, self.dim, seed=self.seed + 1, name="HolisticKD")

    def forward(self, student: Outputs, teacher: Outputs, *, indices: Tensor, labels: Tensor) -> Tensor:
        """The loss as a scalar; in training the memories are updated."""
        s, s_smooth = self._rows(student, "student")
        t, t_smooth = self._rows(teacher, "teacher")
        s_memory, t_memory = self.student_memory, self.teacher_memory
        indices = s_memory.locate(indices)
        which = s_memory.draw(indices, self.negatives, labels)
        s_others, t_others = (s_memory, t_memory) if self.negatives_from == "own" else (t_memory, s_memory)
        loss = (
            self._contrast(s, t_memory.rows[indices], s_others, which)
            + self._contrast(t, s_memory.rows[indices], t_others, which)
            + self._contrast(s_smooth, self._partner(t_memory, indices, t_smooth), s_others, which)
            + self._contrast(t_smooth, self._partner(s_memory, indices, s_smooth), t_others, which)
        )
        if self.training:
            s_memory.update(indices, s, self.momentum, labels)
            t_memory.update(indices, t, self.momentum)
        return loss

    def _rows(self, outputs: Outputs, name: str) -> tuple[Tensor, Tensor]:
        assert outputs.embedding is not None
        assert outputs.logits is not None
        if outputs.logits.ndim != 2:
            raise ValueError(
                f"HolisticKD: the {name}'s logits must be (N, classes), got {tuple(outputs.logits.shape)}; tap the "
                "classifier of whole images"
            )
        x = getattr(self, f"{name}_projector")(outputs.embedding)
        return x, getattr(self, f"{name}_conv")(x, prediction_graph(outputs.logits, self.neighbours))

    def _partner(self, memory: MemoryBank, indices: Tensor, smooth: Tensor) -> Tensor:
        mixed = self.smoothing * memory.rows[indices] + (1 - self.smoothing) * smooth.detach()
        return F.normalize(mixed, dim=1)

    def _contrast(self, features: Tensor, partners: Tensor, memory: MemoryBank, which: Tensor) -> Tensor:
        to_partner = (features * partners).sum(1, keepdim=True)
        similarities = torch.cat([to_partner, memory.similarities(features, which)], dim=1)
        return F.cross_entropy(similarities / self.temperature, which.new_zeros(len(which)))
