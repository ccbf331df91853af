"""Ensembles of teachers, which average their relations or the losses against each."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import copy
from dataclasses import replace
from functools import reduce
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_rkd.data.indexing import count_root_rows, to_batch
from lightning_rkd.data.loaders import list_loaders, load_samples
from lightning_rkd.distillation.layers import CaptureError, Layer
from lightning_rkd.distillation.teachers.base import BaseTeacher, TeacherOutput
from lightning_rkd.distillation.teachers.teacher import Teacher
from lightning_rkd.functional.standardisation import phi_standardisation
from lightning_rkd.losses.base import RelationalLoss
from lightning_rkd.losses.lazy import LazyModule
from lightning_rkd.losses.parts.state import StepState
from lightning_rkd.utils.distributed import Group, gather_objects, rank_and_size, run_on_all_ranks
from lightning_rkd.utils.private import tree_map
from lightning_rkd.utils.types import Batch, Outputs

T = TypeVar("T")
_Place = tuple[str, str, str]  # the teacher, its member where it is an ensemble, the tap
_Statistics = tuple[Tensor, Tensor]


def join_outputs(outputs: Sequence[Outputs], weights: Sequence[float]) -> Outputs:
    """Join the embeddings of several teachers by :func:`joint_embedding`; empty if one of them has no embedding."""
    embeddings = [x for x in (one.embedding for one in outputs) if x is not None and x.ndim == 2]
    if len(embeddings) < len(outputs):
        return Outputs()
    shapes = [tuple(x.shape) for x in embeddings]
    if len({rows for rows, _ in shapes}) > 1:
        raise ValueError(f"EnsembleTeacher: teachers must give features of the same samples, got embeddings {shapes}")
    return Outputs(embedding=joint_embedding(embeddings, weights))


def joint_embedding(embeddings: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    r"""Concatenate weighted embeddings of the same samples, so that squared distances are the weighted sums of theirs.

    .. math:: t_i = \big[\sqrt{w_1}\, t_i^1, \dots, \sqrt{w_K}\, t_i^K\big]
        \quad\Rightarrow\quad \lVert t_i - t_j \rVert^2 = \sum_k w_k \lVert t_i^k - t_j^k \rVert^2,
        \quad t_i^\top t_j = \sum_k w_k\, t_i^{k\top} t_j^k

    Shapes: each (N, D_k) -> (N, sum of D_k), in float32 at least.

    Args:
        embeddings: Embedding of every teacher.
        weights: Weight w of every teacher.

    Example:
        >>> a, b = torch.tensor([[0.0], [3.0]]), torch.tensor([[0.0, 0.0], [0.0, 4.0]])
        >>> float(torch.pdist(joint_embedding([a, b], [1.0, 1.0])))
        5.0
    """
    dtype = reduce(torch.promote_types, (x.dtype for x in embeddings), torch.float32)
    return torch.cat([math.sqrt(w) * x.to(dtype) for x, w in zip(embeddings, weights, strict=True)], dim=1)


class EnsembleTeacher(BaseTeacher):
    r"""An ensemble of teachers of any widths.

    ``combine="losses"`` evaluates every loss against each teacher and averages the values,
    :math:`L(s) = \sum_k w_k L(s, t^k)` with :math:`\sum_k w_k = 1`. It works for losses that read any field, at a cost
    that grows with the number of teachers.

    ``combine="relations"`` concatenates the embeddings of all teachers, each times :math:`\sqrt{w_k}`, and evaluates
    every loss once against the averaged relations:

    - Squared distances and inner products are the weighted averages of the teachers'. A distance is the root of the
      averaged square, not an average of distances.
    - The cosine of two samples is the average of the teachers' cosines, weighted by :math:`w_k` times the norms of both
      rows, divided by the joint norms; for rows of unit norm it is exactly the weighted average.
    - The cosine of an angle is :math:`\sum_k w_k a_k b_k \cos_k / (a b)`, where a and b are the lengths of its two legs
      in the joint embedding and :math:`a_k, b_k` those in the embedding of teacher k.

    A teacher with larger distances therefore counts for more; embeddings of unit norm (or of one scale) count as
    weighted. Losses that read other fields than embeddings are refused.

    For a loss with tensors (projectors, banks), ``"relations"`` is one teacher, whose width is the sum of all.
    ``"losses"`` refuses a loss whose tensors belong to a teacher: one projector cannot serve several widths, and one
    memory cannot hold the features of several teachers.

    Weights are divided by their sum, so that an ensemble of equal teachers is that teacher. The metric
    ``RelationalAgreement`` compares with the joint embedding in both modes.

    Args:
        teachers: At least two networks or teachers, as a list, or as a dict of names, which messages use and the
            command line can override one by one. Several may share one network.
        weights: Positive weights, as a list or by name. Default: 1 for every teacher that is not named.
        combine: ``"relations"`` or ``"losses"``.
        standardise_rows: Standardise the embeddings of every teacher by PHI-S
            (:func:`~lightning_rkd.functional.phi_standardisation`), so that teachers weigh alike whatever their scale:
            centred, rotated, and divided by one number until every column has variance 1. The statistics are those of
            this many samples, evenly spaced over the training set (or that of an evaluation before any training), which
            every teacher embeds once before the first step; some times the width of the embeddings are enough. 0, the
            default, leaves embeddings as they are. A loop of your own calls ``distiller.prepare_data(loader, unpack)``.
        layers: Layer of each teacher, as a list or by name, in any form of
            :data:`~lightning_rkd.distillation.layers.Layer`; a layer gives its output. Default: the common
            ``teacher_layer``. All teachers must have the same taps.

    Example:
        >>> from lightning_rkd.utils.types import Batch
        >>> teacher = EnsembleTeacher({"wide": nn.Linear(4, 8), "deep": nn.Linear(4, 3)}, weights={"wide": 3})
        >>> teacher.attach(None)
        >>> teacher.weights, teacher.outputs(Batch(torch.ones(2, 4)))[0].features[""].embedding.shape
        ({'wide': 0.75, 'deep': 0.25}, torch.Size([2, 11]))
    """

    def __init__(
        self,
        teachers: dict[str, BaseTeacher | nn.Module] | list[BaseTeacher | nn.Module],
        weights: dict[str, float] | list[float] | None = None,
        combine: Literal["relations", "losses"] = "relations",
        layers: dict[str, Layer] | list[Layer | None] | None = None,
        *,
        standardise_rows: int = 0,
    ) -> None:
        if standardise_rows < 0:
            raise ValueError(f"EnsembleTeacher: standardise_rows must be at least 0, got {standardise_rows}")
        if combine not in ("relations", "losses"):
            raise ValueError(f"EnsembleTeacher: combine must be 'relations' or 'losses', got {combine!r}")
        named = teachers if isinstance(teachers, Mapping) else {str(n): t for n, t in enumerate(teachers)}
        if len(named) < 2:
            raise ValueError(f"EnsembleTeacher needs at least two teachers, got {len(named)}")
        # copies, since one Teacher may be named twice to be read at two layers
        self.teachers = {n: copy(t) if isinstance(t, BaseTeacher) else Teacher(t) for n, t in named.items()}
        self.layers = _each("layers", layers, named, None)
        parts = _each("weights", weights, named, 1.0)
        for name, weight in parts.items():
            if not 0 < weight < math.inf:
                raise ValueError(f"EnsembleTeacher: weight of {name!r} must be positive, got {weight}; leave it out")
        self.weights = {name: weight / sum(parts.values()) for name, weight in parts.items()}
        self.combine, self.standardise_rows = combine, standardise_rows
        self._statistics: dict[_Place, _Statistics] = {}
        self._layer: tuple[Layer | None] | None = None  # that the statistics belong to
        self._measured = False  # since it was attached, on training data
        self._device: torch.device | str | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"teachers": {name: copy(teacher) for name, teacher in self.teachers.items()}}

    def attach(self, layer: Layer | None) -> None:
        """Hook every teacher at its own layer, or else at this one."""
        self._device, self._measured = None, False
        if self._layer != (layer,):
            self._layer, self._statistics = (layer,), {}
        for name, teacher in self.teachers.items():
            own = self.layers[name]
            teacher.attach(layer if own is None else own)

    def detach(self) -> None:
        """Restore all teachers."""
        for teacher in self.teachers.values():
            teacher.detach()

    def to(self, device: torch.device | str, convert: Callable[[nn.Module], nn.Module] | None = None) -> bool:
        """Cast and move every teacher; returns whether this is the first call since :meth:`attach`."""
        self._device = device
        first = [teacher.to(device, convert) for teacher in self.teachers.values()]
        return any(first)

    def outputs(self, batch: Batch, calls: list[Any] | None = None) -> list[TeacherOutput]:
        """Compute the features of a batch, of each teacher or joined."""
        if self.standardise_rows and not self._statistics and self._device is not None:  # sizes need no statistics
            raise CaptureError(
                "EnsembleTeacher(standardise_rows=...) has no statistics of its teachers yet: call "
                "distiller.prepare_data(loader, unpack) after distiller.prepare(...)"
            )
        outputs = [
            TeacherOutput(
                self._standardise(name, one),
                self.weights[name] * one.weight,
                f"{name}.{one.name}" if one.name else name,
            )
            for name, teacher in self.teachers.items()
            for one in teacher.outputs(batch, calls)
        ]
        return outputs if self.combine == "losses" else [_join(outputs)]

    def shares_parameters_with(self, network: nn.Module) -> bool:
        """True if training ``network`` would change one of the teachers."""
        return any(teacher.shares_parameters_with(network) for teacher in self.teachers.values())

    def check_same_on_ranks(self, group: Group = None) -> None:
        """Raise ``RuntimeError`` with the name of the first teacher that differs between ranks. Collective."""
        for name, teacher in self.teachers.items():
            try:
                teacher.check_same_on_ranks(group)
            except RuntimeError as error:
                raise RuntimeError(f"teacher {name!r}: {error}") from None

    @property
    def needs_indices(self) -> bool:
        """True if one of the teachers needs sample indices."""
        return any(teacher.needs_indices for teacher in self.teachers.values())

    def prepare_data(
        self, loaders: Any, unpack: Callable[[Any], Batch], group: Group = None, *, train: bool = True
    ) -> None:
        """Let every teacher check the loaders of a run, or read from them."""
        for teacher in self.teachers.values():
            teacher.prepare_data(loaders, unpack, group, train=train)
        if self.standardise_rows and (not self._statistics or (train and not self._measured)):
            self._measured, self._statistics = train, {}
            found = run_on_all_ranks(lambda: self._measure(loaders, unpack, train), group)
            found = gather_objects({} if rank_and_size(group)[0] else found, group)[0]  # one rotation for all ranks
            self._statistics = {key: (x.to(self._device), y.to(self._device)) for key, (x, y) in found.items()}

    @torch.no_grad()
    def _measure(self, loaders: Any, unpack: Callable[[Any], Batch], train: bool) -> dict[_Place, _Statistics]:
        """Mean and standardising matrix of every teacher and tap, on the CPU."""
        found_loaders = list_loaders(loaders)
        loader = found_loaders[0] if len(found_loaders) == 1 or (found_loaders and not train) else None
        if not isinstance(loader, DataLoader) or count_root_rows(loader.dataset) is None:
            found_data = [type(getattr(x, "dataset", x)).__name__ for x in found_loaders]
            raise ValueError(
                "EnsembleTeacher(standardise_rows=...) takes samples from one loader over a map-style data set, got "
                f"{len(found_data)} over {', '.join(found_data)}; leave standardise_rows out"
            )
        count = len(loader.dataset)  # type: ignore[arg-type] # it has a size
        rows = range(0, count, max(1, count // self.standardise_rows))[: self.standardise_rows]
        found: dict[_Place, list[Tensor]] = {}
        for start in range(0, len(rows), 128):
            batch = to_batch(load_samples(loader, rows[start : start + 128]), unpack)
            inputs = batch.inputs if batch.teacher_inputs is None else batch.teacher_inputs
            inputs = tree_map(lambda x: x.to(self._device) if isinstance(x, Tensor) else x, inputs)
            batch = replace(batch, inputs=inputs, teacher_inputs=None)
            for name, teacher in self.teachers.items():
                for one in teacher.outputs(batch):
                    for tap, outputs in one.features.items():
                        if outputs.embedding is not None and outputs.embedding.ndim == 2:
                            found.setdefault((name, one.name, tap), []).append(outputs.embedding.cpu())
        whole = {key: torch.cat(parts) for key, parts in found.items()}
        for (name, _, _), x in whole.items():
            if bool((x == x[0]).all()):
                raise ValueError(
                    f"EnsembleTeacher(standardise_rows={self.standardise_rows}): the teacher {name!r} gives equal "
                    f"embeddings for {len(x)} samples: take more rows, read another layer, or leave it out"
                )
        return {key: phi_standardisation(x) for key, x in whole.items()}

    def _standardise(self, name: str, one: TeacherOutput) -> dict[str, Outputs]:
        features = dict(one.features)
        for tap, outputs in one.features.items():
            if outputs.embedding is not None and (name, one.name, tap) in self._statistics:
                mean, matrix = self._statistics[name, one.name, tap]
                x = (outputs.embedding.to(mean.dtype) - mean) @ matrix.T
                dtype = torch.promote_types(outputs.embedding.dtype, torch.float32)
                features[tap] = replace(outputs, embedding=x.to(dtype))
        return features

    @property
    def needs_data(self) -> bool:
        """True if a teacher reads from the loaders, or statistics are needed."""
        return self.standardise_rows > 0 or any(teacher.needs_data for teacher in self.teachers.values())

    def taps(self, layer: Layer | None) -> frozenset[str]:
        """Names of the taps, which must be the same for all teachers."""
        layers = {name: layer if own is None else own for name, own in self.layers.items()}
        taps = {name: sorted(teacher.taps(layers[name])) for name, teacher in self.teachers.items()}
        first, *others = taps.values()
        if any(other != first for other in others):
            raise ValueError(f"EnsembleTeacher: all teachers must have the same taps, got {taps}; name them alike")
        return frozenset(first)

    def check_loss(self, name: str, loss: RelationalLoss) -> None:
        """Refuse a loss that does not fit ``combine``."""
        kind = type(loss).__name__
        for teacher in self.teachers.values():
            teacher.check_loss(name, loss)
        if self.combine == "relations" and loss.reads not in ("embedding", ("embedding",)):
            raise ValueError(
                f"{name}: {kind} reads {loss.reads!r}, but EnsembleTeacher(combine='relations') joins embeddings only: "
                "pass combine='losses'"
            )
        if self.combine == "losses" and any(map(_belongs_to_one_teacher, loss.modules())):
            raise ValueError(
                f"{name}: {kind} has tensors that belong to one teacher, but EnsembleTeacher(combine='losses') has "
                "several: pass combine='relations', where all teachers are one; or distil each with a "
                "RelationalDistillation callback of its own"
            )


def _join(teachers: list[TeacherOutput]) -> TeacherOutput:
    """Joint outputs of all teachers; taps without embeddings stay empty."""
    weights = [one.weight for one in teachers]
    features = {tap: join_outputs([one.features[tap] for one in teachers], weights) for tap in teachers[0].features}
    if all(outputs.embedding is None for outputs in features.values()):
        shapes = {t.name: [tuple(x.shape) for o in t.features.values() for x in o.tensors()] for t in teachers}
        raise ValueError(
            f"EnsembleTeacher(combine='relations') joins embeddings (N, D), but the teachers give {shapes}: name "
            "layers whose output is (N, D), or Tap(layer, read=global_pool)"
        )
    return TeacherOutput(features)


def _belongs_to_one_teacher(module: nn.Module) -> bool:
    """True if a module is a memory, or a loss with tensors as wide as the teacher."""
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
