"""Several teachers at once: the student keeps the average of their relations, or of the losses against each."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import copy
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from lightning_rkd.distillation.features import Layer
from lightning_rkd.distillation.teachers.base import BaseTeacher, Lesson
from lightning_rkd.distillation.teachers.teacher import Teacher
from lightning_rkd.losses.base import Term
from lightning_rkd.losses.lazy import LazyModule
from lightning_rkd.losses.parts.state import StepState
from lightning_rkd.utils.distributed import Group
from lightning_rkd.utils.types import Batch, Outputs

T = TypeVar("T")


def joint(shown: Sequence[Outputs], shares: Sequence[float]) -> Outputs:
    """What several teachers show together: their :func:`joint_embedding`, where all of them show one, and no more.

    Raises:
        ValueError: They show unequal numbers of rows.
    """
    embeddings = [x for x in (one.embedding for one in shown) if x is not None and x.ndim == 2]
    if len(embeddings) < len(shown):
        return Outputs()
    if len({len(x) for x in embeddings}) > 1:
        shapes = [tuple(x.shape) for x in embeddings]
        raise ValueError(f"EnsembleTeacher: all teachers must show the same samples, got embeddings {shapes}")
    return Outputs(embedding=joint_embedding(embeddings, shares))


def joint_embedding(embeddings: Sequence[Tensor], shares: Sequence[float]) -> Tensor:
    r"""Several embeddings of the same samples as one, in which squared distances are the weighted sums of theirs.

    .. math:: t_i = \big[\sqrt{w_1}\, t_i^1, \dots, \sqrt{w_K}\, t_i^K\big]
        \quad\Rightarrow\quad \lVert t_i - t_j \rVert^2 = \sum_k w_k \lVert t_i^k - t_j^k \rVert^2,
        \quad t_i^\top t_j = \sum_k w_k\, t_i^{k\top} t_j^k

    Shapes: each (N, D_k) -> (N, sum of D_k), in float32 at least.

    Args:
        embeddings: Of every teacher.
        shares: The weights w.

    Example:
        >>> a, b = torch.tensor([[0.0], [3.0]]), torch.tensor([[0.0, 0.0], [0.0, 4.0]])
        >>> float(torch.pdist(joint_embedding([a, b], [1.0, 1.0])))
        5.0
    """
    dtype = torch.float32
    for x in embeddings:
        dtype = torch.promote_types(dtype, x.dtype)
    return torch.cat([math.sqrt(w) * x.to(dtype) for x, w in zip(embeddings, shares, strict=True)], dim=1)


class EnsembleTeacher(BaseTeacher):
    r"""Several teachers of any widths, in two ways of averaging.

    ``combine="losses"`` evaluates every loss once against each teacher; the term is the weighted average

    .. math:: L(s) = \sum_k w_k L(s, t^k), \qquad \sum_k w_k = 1.

    It is there for whatever a loss reads; logits and maps themselves are never averaged. Its cost grows with the number
    of teachers.

    ``combine="relations"`` makes one teacher of all: its embedding is theirs side by side, each times
    :math:`\sqrt{w_k}`. The loss is evaluated once, against averaged relations:

    - Squared distances and inner products are the weighted averages of the teachers'. A distance is the root of the
      averaged square, no average of distances.
    - A cosine between two samples is the average of the teachers' cosines, weighted by :math:`w_k` times the lengths
      of both rows, over the joint lengths: for rows of length 1 exactly the weighted average.
    - An angle at a sample likewise: its cosine is :math:`\sum_k w_k a_k b_k \cos_k / (a b)`, where a and b are the
      lengths of its two sides in the joint embedding and :math:`a_k, b_k` those that teacher k sees.

    A teacher with larger distances therefore counts for more; embeddings of length 1 (or of one scale) count as
    weighted. Only embeddings can be joined: losses that read anything else are refused here.

    A loss with tensors of its own (projectors, banks) sees one teacher, whose width is the sum, in ``"relations"``. In
    ``"losses"`` it is refused where its tensors belong to a teacher: one projector cannot serve several widths, nor a
    memory hold what several teachers show.

    Weights are divided by their sum: an ensemble of equal teachers is that teacher, and a loss keeps its weight when a
    teacher joins. Agreement with the teacher (a metric) is measured against the joint embedding in either way.

    Args:
        teachers: At least two networks or teachers, as a list, or as a dict of names, which messages use and the
            command line can override one by one. Several may share one network.
        weights: One positive number for each, as a list or by name; whom a dict does not name has 1, as all have for
            ``None``.
        combine: ``"relations"`` or ``"losses"``.
        layers: Where to read each, as a list or by name, any form of ``Layer``. ``None``, and
            teachers without an entry, take the common ``teacher_layer``. All teachers must have the same taps.

    Raises:
        ValueError: Fewer than two teachers, weights or layers that do not belong to them, or an unknown ``combine``.

    Example:
        >>> from lightning_rkd.utils.types import Batch
        >>> teacher = EnsembleTeacher({"wide": nn.Linear(4, 8), "deep": nn.Linear(4, 3)}, weights={"wide": 3})
        >>> teacher.attach(None)
        >>> teacher.shares, teacher.lessons(Batch(torch.ones(2, 4)))[0].shown[""].embedding.shape
        ({'wide': 0.75, 'deep': 0.25}, torch.Size([2, 11]))
    """

    def __init__(
        self,
        teachers: dict[str, BaseTeacher | nn.Module] | list[BaseTeacher | nn.Module],
        weights: dict[str, float] | list[float] | None = None,
        combine: Literal["relations", "losses"] = "relations",
        layers: dict[str, Layer] | list[Layer | None] | None = None,
    ) -> None:
        if combine not in ("relations", "losses"):
            raise ValueError(f"EnsembleTeacher: combine must be 'relations' or 'losses', got {combine!r}")
        named = teachers if isinstance(teachers, Mapping) else {str(n): t for n, t in enumerate(teachers)}
        if len(named) < 2:
            raise ValueError(f"EnsembleTeacher needs at least two teachers, got {len(named)}")
        # copies: one Teacher may be named twice, to be read in two places
        self.teachers = {n: copy(t) if isinstance(t, BaseTeacher) else Teacher(t) for n, t in named.items()}
        self.layers = _each("layers", layers, named, None)
        parts = _each("weights", weights, named, 1.0)
        for name, weight in parts.items():
            if not 0 < weight < math.inf:
                raise ValueError(
                    f"EnsembleTeacher: the weight of {name!r} must be positive, got {weight}; leave it out"
                )
        self.shares = {name: weight / sum(parts.values()) for name, weight in parts.items()}
        self.combine = combine

    def __getstate__(self) -> dict[str, Any]:
        """What shallow copies and pickles take over: teachers of their own, which have hooked nothing."""
        return self.__dict__ | {"teachers": {name: copy(teacher) for name, teacher in self.teachers.items()}}

    def attach(self, layer: Layer | None) -> None:
        """Attach every teacher at its own layer, or else at this one."""
        for name, teacher in self.teachers.items():
            teacher.attach(self._layer(name, layer))

    def detach(self) -> None:
        """Hand all teachers back as they were."""
        for teacher in self.teachers.values():
            teacher.detach()

    def to(self, device: torch.device | str, convert: Callable[[nn.Module], nn.Module] | None = None) -> bool:
        """Move every teacher that is to be moved; returns whether it was the first call since :meth:`attach`."""
        first = [teacher.to(device, convert) for teacher in self.teachers.values()]
        return any(first)

    def lessons(self, batch: Batch, calls: list[Any] | None = None) -> list[Lesson]:
        """A lesson from each teacher, or one from all of them together.

        Raises:
            ValueError: Embeddings are to be joined, but the teachers show none, or unequal numbers of rows.
        """
        lessons = [
            Lesson(one.shown, self.shares[name] * one.share, f"{name}.{one.teacher}" if one.teacher else name)
            for name, teacher in self.teachers.items()
            for one in teacher.lessons(batch, calls)
        ]
        return lessons if self.combine == "losses" else [_joint(lessons)]

    def shares_parameters_with(self, network: nn.Module) -> bool:
        """Whether training ``network`` would change one of the teachers."""
        return any(teacher.shares_parameters_with(network) for teacher in self.teachers.values())

    def check_same_on_ranks(self, group: Group = None) -> None:
        """Compare a checksum of every teacher over ranks.

        Raises:
            RuntimeError: Ranks hold different teachers; the message names the first that differs.
        """
        for name, teacher in self.teachers.items():
            try:
                teacher.check_same_on_ranks(group)
            except RuntimeError as error:
                raise RuntimeError(f"teacher {name!r}: {error}") from None

    @property
    def needs_indices(self) -> bool:
        """Whether one of them does."""
        return any(teacher.needs_indices for teacher in self.teachers.values())

    def meet(self, loaders: Any, unpack: Callable[[Any], Batch], group: Group = None, *, train: bool = True) -> None:
        """Show the loaders to all of them."""
        for teacher in self.teachers.values():
            teacher.meet(loaders, unpack, group, train=train)

    def taps(self, layer: Layer | None) -> frozenset[str]:
        """The names under which every teacher is read.

        Raises:
            ValueError: The teachers are read under different names.
        """
        taps = {name: teacher.taps(self._layer(name, layer)) for name, teacher in self.teachers.items()}
        first, *others = taps.values()
        if any(other != first for other in others):
            shown = {name: sorted(each) for name, each in taps.items()}
            raise ValueError(f"EnsembleTeacher: all teachers must have the same taps, got {shown}; name them alike")
        return first

    def check_loss(self, name: str, term: Term) -> None:
        """Refuse a loss that does not fit the way in which the teachers are combined.

        Raises:
            ValueError: It reads more than embeddings, which alone can be joined; or its tensors belong to one teacher.
        """
        loss = type(term.loss).__name__
        for teacher in self.teachers.values():
            teacher.check_loss(name, term)
        if self.combine == "relations" and term.reads not in ("embedding", ("embedding",)):
            raise ValueError(
                f"{name}: {loss} reads {term.reads!r}, but EnsembleTeacher(combine='relations') joins embeddings only: "
                "pass combine='losses'"
            )
        if self.combine == "losses" and any(map(_belongs_to_one_teacher, term.modules())):
            raise ValueError(
                f"{name}: {loss} has tensors that belong to one teacher, but EnsembleTeacher(combine='losses') would "
                "show it several: pass combine='relations', where all teachers are one; or distil each with a "
                "RelationalDistillation callback of its own"
            )

    def _layer(self, name: str, common: Layer | None) -> Layer | None:
        own = self.layers[name]
        return common if own is None else own


def _joint(lessons: list[Lesson]) -> Lesson:
    """All lessons as one; taps that show something else than an embedding stay empty."""
    shares = [one.share for one in lessons]
    shown = {tap: joint([one.shown[tap] for one in lessons], shares) for tap in lessons[0].shown}
    if all(outputs.embedding is None for outputs in shown.values()):
        shapes = {
            one.teacher: [tuple(x.shape) for outputs in one.shown.values() for x in outputs.tensors()]
            for one in lessons
        }
        raise ValueError(
            f"EnsembleTeacher(combine='relations') joins embeddings (N, D), but the teachers show {shapes}: name "
            "layers whose output is (N, D), or Tap(layer, read=global_pool)"
        )
    return Lesson(shown)


def _belongs_to_one_teacher(module: nn.Module) -> bool:
    """Whether it is a memory, or a loss whose tensors are as wide as the teacher."""
    return isinstance(module, StepState) or (isinstance(module, LazyModule) and "teacher_dim" in module.needed_sizes)


def _each(what: str, given: Mapping[str, T] | Sequence[T] | None, names: Iterable[str], default: T) -> dict[str, T]:
    """One value for each teacher, given by name, in order, or not at all."""
    names = list(names)
    if given is None:
        return dict.fromkeys(names, default)
    if not isinstance(given, Mapping):
        if len(given) != len(names):
            raise ValueError(f"EnsembleTeacher: {what} must be one for each of {len(names)} teachers, got {len(given)}")
        return dict(zip(names, given, strict=True))
    if unknown := sorted(set(given) - set(names)):
        raise ValueError(f"EnsembleTeacher: {what} name {unknown}, but the teachers are {names}")
    return {name: given.get(name, default) for name in names}
