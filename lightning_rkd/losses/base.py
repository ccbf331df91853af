"""The base class of losses: checks and casts of inputs around a ``forward`` in plain maths."""

import inspect
import math
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_rkd.losses.inputs import FIELDS, Features, check_context, pair_tensors, select_fields, select_maps
from lightning_rkd.losses.lazy import LazyModule, Size
from lightning_rkd.losses.references import BibTeX
from lightning_rkd.losses.references import Reference as Reference
from lightning_rkd.losses.weighting import Weighable
from lightning_rkd.utils.types import Outputs

CONTEXT = frozenset({"labels", "indices", "view", "epoch", "mix", "shard"})
"""Names of the inputs that ``forward`` may take as keyword-only parameters."""

INVARIANCES = frozenset({"translation", "rotation", "scale", "row scale", "row shift"})
"""Changes of one network's outputs that may leave a loss unchanged."""


class NonFiniteError(ValueError):
    """Embeddings, logits or feature maps that hold NaN or infinity, or a loss of finite ones that overflows."""


class RelationalLoss(Weighable, LazyModule):
    r"""Base class of losses that compare the outputs of a student and a teacher for the same N samples.

    A loss is a ``forward`` in plain maths. Calling the loss checks the outputs of both networks, casts them to float32
    (float64 stays), detaches the teacher and disables autocast.

    Example:
        >>> class MeanGap(RelationalLoss):
        ...     def forward(self, student, teacher):
        ...         return (student.mean() - teacher.mean()).abs()
        >>> MeanGap()(torch.zeros(4, 2), torch.ones(4, 8))
        tensor(1.)

    Class attributes:
        reads: Field of :class:`~lightning_rkd.utils.types.Outputs` that ``forward`` receives from both networks:
            ``"embedding"`` (default), ``"logits"``, ``"feature_maps"`` or ``"classifier"``. With a tuple of fields,
            ``forward`` receives two ``Outputs``.
        feature_maps: Positions of the feature maps that ``forward`` receives, of those that are tapped; ``None``
            (default) for all. A loss that reads ``"feature_maps"`` may set it on an instance.
        gather: ``True`` (default) for a loss that relates samples to one another: it receives the rows of all ranks.
            ``False`` for a mean of per-sample terms, which each rank computes from its own rows.
        invariances: Changes of the student's or the teacher's outputs that leave the value unchanged:
            ``"translation"`` (one vector added to all rows), ``"rotation"``, ``"scale"`` (all rows times a positive
            number), ``"row scale"`` (each row times its own), ``"row shift"`` (a constant added to each row).
        aligns: ``True`` for a loss that brings the student's embedding into the teacher's space, so that it can query a
            gallery of the teacher's rows; the loss maps it there by its ``project``, where it has one. ``False``
            (default) for a loss that compares relations within each network, which any rotation leaves unchanged. A sum
            aligns if one of its terms does.
        reference: :class:`~lightning_rkd.losses.references.Reference` of the method: paper, provenance, and published
            weight and result, for the gallery. ``bibtex`` is the BibTeX entry of the paper.

    Further inputs are keyword-only parameters of ``forward``, optional if they have a default:

    - ``labels``: class of each row, (N,), or soft labels, (N, K)
    - ``indices``: row of each sample in the training set, (N,)
    - ``view``: number of each row's augmented view of its sample, (N,)
    - ``epoch``: number of the epoch
    - ``mix``: :class:`~lightning_rkd.utils.types.Mix`, the record of a mixed batch
    - ``shard``: :class:`~lightning_rkd.utils.distributed.Shard`, which splits the work on a gathered batch over ranks

    A loss with parameters or buffers (projectors, memory banks) creates them in a method ``build``, whose parameters
    name the sizes it needs: ``student_dim``, ``teacher_dim`` (columns of the embedding or the logits; for feature maps
    a tuple of channels), ``num_classes``, ``num_samples`` (of the training set). Its ``__init__`` ends with
    :meth:`set_sizes`, which calls ``build`` if all sizes are given. Otherwise ``DistillationModule`` infers the sizes
    before optimizers are created, or else the first call does. The tensors stay in float32 (float64) in any training
    precision.

    Another package registers its losses by entry points of the group ``lightning_rkd.losses``; the command line then
    accepts their short names.

    Raises:
        TypeError: A class attribute or a parameter of ``forward`` that does not exist, or a call with inputs that
            ``forward`` does not take.
        ValueError: Outputs that do not fit (rank, batch size, device, empty), hold NaN or infinity, or give a loss that
            overflows. The last two are checked on a CPU; on other devices the engine detects them.
    """

    feature_maps: Sequence[int] | None = None
    gather: bool = True
    invariances: frozenset[str] = frozenset()
    aligns: bool = False
    reference: ClassVar[Reference | None] = None
    bibtex: ClassVar[BibTeX] = BibTeX()
    needs: frozenset[str] = frozenset()
    required: frozenset[str] = frozenset()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        fields = {cls.reads} if isinstance(cls.reads, str) else set(cls.reads) if isinstance(cls.reads, tuple) else None
        if fields is not None and not fields <= FIELDS:
            raise TypeError(f"{cls.__name__}.reads must name fields of Outputs {sorted(FIELDS)}, got {cls.reads!r}")
        parameters = inspect.signature(cls.forward).parameters
        by_position = [*parameters][3:]  # behind self, student and teacher
        keywords = {name: p for name, p in parameters.items() if p.kind is inspect.Parameter.KEYWORD_ONLY}
        if misplaced := CONTEXT & set(by_position) - set(keywords):
            raise TypeError(
                f"{cls.__name__}.forward takes {sorted(misplaced)} by position, but such inputs are keyword-only "
                f"parameters: forward(self, student, teacher, *, {', '.join(sorted(misplaced))})"
            )
        if unknown := set(keywords) - CONTEXT:
            raise TypeError(f"{cls.__name__}.forward takes {sorted(unknown)}, but may only take {sorted(CONTEXT)}")
        if not set(cls.invariances) <= INVARIANCES:
            raise TypeError(f"{cls.__name__}.invariances must be among {sorted(INVARIANCES)}, got {cls.invariances}")
        cls.needs = frozenset(keywords)
        cls.required = frozenset(n for n, p in keywords.items() if p.default is inspect.Parameter.empty)

    forward: Callable[..., Tensor]
    _watches_order = True

    def __call__(self, student: Features, teacher: Features, **context: Any) -> Tensor:
        """Check and cast the inputs, and compute the loss as a scalar."""
        name, reads = self.display_name, self.reads
        if unknown := context.keys() - self.needs:
            raise TypeError(f"{name} does not use {sorted(unknown)}; it takes {sorted(self.needs) or 'no context'}")
        if missing := [n for n in sorted(self.required) if context.get(n) is None]:
            raise ValueError(f"{name} needs {missing}: pass {', '.join(f'{n}=...' for n in missing)}")
        s: Any = student
        t: Any = teacher
        if isinstance(s, Tensor) and isinstance(t, Tensor) and reads in ("embedding", "logits"):
            pairs = [(str(reads), s, t)]
        else:
            s, t = self._select(s, "student"), self._select(t, "teacher")
            pairs = pair_tensors(s, t, reads, name)
        _check_pairs(pairs, name)
        field, first, _ = pairs[0]
        if self._watches_order and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            self._warn_if_swapped(pairs)
        device, on_cpu = first.device, first.device.type == "cpu" and not torch.compiler.is_compiling()
        if on_cpu:
            _check_finite(pairs, (s, t), name)
        if not context.keys() <= _UNCHECKED:
            context = check_context(context, len(first), field, device, name)
        # float32 at least, the higher of two precisions, or that of the loss's own tensors
        dtype = torch.float32
        for _, a, b in pairs:
            dtype = torch.promote_types(dtype, torch.promote_types(a.dtype, b.dtype))
        if not self.ready:
            self.materialize(student, teacher, like=torch.empty(0, dtype=dtype, device=device))
        if self.needed_sizes:
            self.check_sizes(student, teacher)
            dtype = next((p.dtype for p in self.parameters() if p.is_floating_point()), dtype)
        casts = torch.compiler.is_compiling() or torch.is_autocast_enabled(device.type)
        with torch.autocast(device.type, enabled=False) if casts else nullcontext():  # slow to make
            value: Tensor = super().__call__(_cast(s, dtype), _cast(t, dtype, detach=True), **context)
        if on_cpu:
            widest = torch.float64 if any(a.dtype == torch.float64 for _, a, _ in pairs) else torch.float32
            largest = value.item() if value.numel() == 1 else value.detach().abs().max().item()
            if not abs(largest) <= torch.finfo(widest).max:
                raise _overflow_error(value, pairs, self)
        return value

    def infer_sizes(self, student: Any, teacher: Any) -> dict[str, Size]:
        """Infer sizes from the outputs of both networks, of the feature maps that the loss selects."""
        given = (("student", student), ("teacher", teacher))
        return super().infer_sizes(*(None if x is None else self._select(x, network) for network, x in given))

    def _select(self, features: Any, network: str) -> Any:
        """Select the fields and the feature maps that the loss reads."""
        who = f"{self.display_name}, {network}"
        return select_maps(select_fields(features, self.reads, who=who), self.feature_maps, who=who)

    def _warn_if_swapped(self, pairs: list[tuple[str, Tensor, Tensor]]) -> None:
        """Warn, once, if the second argument needs a gradient and the first does not."""
        if any(t.requires_grad for _, _, t in pairs) and not any(s.requires_grad for _, s, _ in pairs):
            self._watches_order = False
            warnings.warn(
                f"{self.display_name}: the second argument needs a gradient and the first does not, but gradients "
                "reach the first only: call loss(student, teacher), or detach the teacher's output",
                stacklevel=3,
            )

    def extra_repr(self) -> str:
        """Settings for ``print``: the arguments of ``__init__`` that are kept under their own names."""
        classes = (cls for cls in type(self).__mro__ if issubclass(cls, RelationalLoss))
        names = dict.fromkeys(name for cls in classes for name in inspect.signature(cls).parameters)
        return ", ".join(f"{name}={vars(self)[name]!r}" for name in names if name in vars(self))


_UNCHECKED = {"epoch", "shard"}
_PRECISIONS = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})


def _check_pairs(pairs: list[tuple[str, Any, Any]], name: str) -> None:
    """Refuse inputs that are not floating-point tensors with a row per sample, or do not fit the other network's."""
    first = pairs[0][1]
    for field, student, teacher in pairs:
        for network, x in (("student", student), ("teacher", teacher)):
            what = f"{name}: the {network}'s {field}"
            if not isinstance(x, Tensor):
                raise TypeError(f"{what} must be a tensor, got {type(x).__name__}")
            if x.dtype not in _PRECISIONS:
                if not x.is_floating_point():
                    raise TypeError(f"{what} must be floating point, got {x.dtype}; call .float() on it")
                raise TypeError(f"{what} is {x.dtype}, in which nothing can be computed; call .float()")
            if x.layout != torch.strided:
                raise TypeError(f"{what} must be dense, got {x.layout}; call .to_dense() on it")
            if x.is_meta:
                raise ValueError(f"{what} is on the meta device, where tensors hold no numbers")
            if field == "embedding" and x.ndim != 2:
                pool = "mean_pool), or cls_token," if x.ndim == 3 else "global_pool)"
                raise ValueError(
                    f"{what} must be (N, D), got {tuple(x.shape)}; pool it, Tap(layer, read={pool} from lightning_rkd"
                )
            if x.ndim < 2:
                raise ValueError(f"{what} must begin with (N, ...), got {tuple(x.shape)}")
            if x.numel() == 0:
                raise ValueError(f"{what} is empty, shape {tuple(x.shape)}")
            if x.device != first.device:
                both = " and ".join(sorted({str(first.device), str(x.device)}))
                raise ValueError(
                    f"{name}: student and teacher must be on one device, got {both}; call .to({str(first.device)!r}) "
                    "on the network or on its output"
                )
        rows = len(student)
        if rows != len(teacher):
            shapes = f"{tuple(student.shape)} and {tuple(teacher.shape)}"
            raise ValueError(f"{name}: student and teacher must give features of the same N samples, got {shapes}")
        if student is not first and rows != len(first):
            raise ValueError(
                f"{name}: all features of a network must be of the same N samples, got {len(first)} rows of "
                f"{pairs[0][0]} and {len(student)} of {field}"
            )


def _check_finite(pairs: list[tuple[str, Tensor, Tensor]], both: tuple[Any, Any], name: str) -> None:
    """Refuse NaN and infinity; called on a CPU only, since it would wait for other devices."""
    for _, student, teacher in pairs:
        for network, x in (("student", student), ("teacher", teacher)):
            if not _is_finite(x):
                row = int((~x.detach().isfinite().flatten(1).all(1)).nonzero()[0])
                raise NonFiniteError(
                    f"{name}: the {network}'s output holds NaN or infinity, first in row {row} of {len(x)}"
                )
    for network, outputs in zip(("student", "teacher"), both, strict=True):
        classifier = outputs.classifier if isinstance(outputs, Outputs) else None
        if classifier and not all(_is_finite(x) for x in classifier if x is not None):
            raise NonFiniteError(f"{name}: the {network}'s classifier holds NaN or infinity")


def _is_finite(x: Tensor) -> bool:
    """True if all entries are finite, as they are if their sum is, which takes a fraction of the time."""
    x = x.detach()
    return math.isfinite(x.sum()) or bool(x.isfinite().all())


def _overflow_error(value: Tensor, pairs: list[tuple[str, Tensor, Tensor]], loss: nn.Module) -> NonFiniteError:
    """Error for a loss that is not finite although its inputs are."""
    name = type(loss).__name__
    for own, x in (*loss.named_parameters(), *loss.named_buffers()):
        if not torch.isfinite(x).all():
            return NonFiniteError(
                f"{name}: its own {own} holds NaN or infinity: an earlier step has broken it; lower the learning rate, "
                "or clip gradients"
            )
    largest = ", ".join(f"{field} {a.abs().max():.1e} and {b.abs().max():.1e}" for field, a, b in pairs)
    return NonFiniteError(
        f"{name}: overflow: the inputs are finite, but the loss is {value.detach().flatten()[0]:.1e}, which "
        f"{value.dtype} cannot hold. The largest magnitudes of student and teacher are: {largest}. Scale down or "
        "normalise what is large, or pass float64"
    )


def _cast(value: Any, dtype: torch.dtype, detach: bool = False) -> Any:
    """Cast inputs and, with ``detach``, detach them."""
    if isinstance(value, Tensor):
        if not torch.compiler.is_compiling() and value.is_inference() and not torch.is_inference_mode_enabled():
            value = value.clone()  # inference tensors cannot be saved for backward
        return (value.detach() if detach else value).to(dtype)
    if isinstance(value, Outputs):
        fields = {f: _cast(v, dtype, detach) for f in FIELDS if (v := getattr(value, f)) is not None}
        return Outputs(**fields)
    return None if value is None else type(value)(_cast(v, dtype, detach) for v in value)
