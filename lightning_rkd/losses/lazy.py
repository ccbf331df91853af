"""Tensors of a loss's own, made once their sizes are known, kept in float32, saved together with their sizes.

PyTorch's ``nn.Lazy*`` modules infer input sizes only: an output as wide as the teacher's, the number of maps, the rows
of a memory, float32 under ``bf16-true`` and a checkpoint that holds these are beyond them. So a loss names the sizes
that it needs as parameters of ``build``.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_rkd.utils.types import Outputs

SIZES = frozenset({"student_dim", "teacher_dim", "num_classes", "num_samples"})
"""The sizes that a ``build`` may name."""

Size = int | tuple[int, ...]
"""A width; for maps the channels of every map."""


class LazyModule(nn.Module):
    """A module that makes its tensors when their sizes are known: in ``__init__``, later, or from a checkpoint.

    The base of :class:`~lightning_rkd.losses.base.RelationalLoss`, which describes how a loss uses it.

    Class attributes:
        reads: The field of :class:`~lightning_rkd.utils.types.Outputs`, or the tuple of fields, that sizes are inferred
            from.
        needed_sizes: The parameters of ``build``; an instance that makes no tensors sets it to ``()``.
        ready: Whether files have been read and tensors made.
        display_name: The name used in messages: that of the class, or of the training scheme that the module is part
            of.

    Example:
        >>> class Linear(LazyModule):
        ...     def __init__(self, student_dim=None):
        ...         super().__init__()
        ...         self.set_sizes(student_dim=student_dim)
        ...     def build(self, student_dim):
        ...         self.layer = nn.Linear(student_dim, 1)
        >>> late = Linear()
        >>> late.missing_sizes
        ('student_dim',)
        >>> late.materialize(torch.ones(2, 5), torch.ones(2, 7)); late.layer
        Linear(in_features=5, out_features=1, bias=True)
    """

    reads: str | tuple[str, ...] = "embedding"
    needed_sizes: tuple[str, ...] = ()
    ready: bool = False
    display_name: str = ""
    _sizes: Mapping[str, Size] = {}
    _built = True

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "display_name" not in vars(cls):
            cls.display_name = cls.__name__
        parameters = inspect.signature(cls.build).parameters if cls.build is not LazyModule.build else ()
        cls.needed_sizes = tuple(sorted(set(parameters) - {"self"}))
        if not set(cls.needed_sizes) <= SIZES:
            raise TypeError(f"{cls.__name__}.build takes {cls.needed_sizes}, but may only take {sorted(SIZES)}")

    def prepare(self) -> None:
        """Read files; called once, before :meth:`build`, when training begins."""

    def build(self, *args: Any, **kwargs: Any) -> None:
        """Make the module's own tensors; a subclass names the sizes it needs as parameters."""

    def set_sizes(self, **sizes: int | Sequence[int] | None) -> None:
        """Set the known sizes, at the end of ``__init__``, and build if none is missing."""
        for name, size in sizes.items():
            if isinstance(size, int) and self.reads == "feature_maps" and name in ("student_dim", "teacher_dim"):
                raise TypeError(
                    f"{self.display_name}: {name} lists the channels of every map, got {size}; pass [{size}]"
                )
        known = {name: size for name, size in sizes.items() if size is not None}
        self._sizes = {name: size if isinstance(size, int) else tuple(size) for name, size in known.items()}
        self._built = False
        if not self.missing_sizes:
            self._build()

    @property
    def missing_sizes(self) -> tuple[str, ...]:
        """The sizes that are not known yet."""
        return () if self._built else tuple(name for name in self.needed_sizes if name not in self._sizes)

    def materialize(
        self, student: Any = None, teacher: Any = None, *, num_samples: int | None = None, like: Tensor | None = None
    ) -> None:
        """Read files and make tensors, once, with missing sizes from the outputs of both networks that the loss reads.

        The first call of a loss does so unless it has been done. ``like`` gives device and precision of the tensors.
        """
        if self.ready:
            return
        self.prepare()
        if not self._built:
            found = self.infer_sizes(student, teacher) | ({} if num_samples is None else {"num_samples": num_samples})
            self._sizes = {k: v for k, v in found.items() if k in self.needed_sizes} | dict(self._sizes)
            if missing := ", ".join(self.missing_sizes):
                raise ValueError(f"{type(self).__name__} does not know {missing}: pass {self.suggest_call(found)}")
            self._build()
            if like is not None:
                self.to(like.device, like.dtype)
        elif like is not None:
            self.to(like.device)
        self.ready = True

    def suggest_call(self, sizes: Mapping[str, Size]) -> str:
        """A call that makes this module with the sizes it needs, for messages."""
        known = {**sizes, **self._sizes}
        arguments = ", ".join(f"{name}={known.get(name, '...')}" for name in self.needed_sizes)
        return f"{type(self).__name__}({arguments})"

    def infer_sizes(self, student: Any, teacher: Any) -> dict[str, Size]:
        """Infer sizes from the outputs that the loss reads of both networks."""
        if student is None or teacher is None:
            return {}
        sizes = {
            "student_dim": _width(student, self.reads),
            "teacher_dim": _width(teacher, self.reads),
            "num_classes": _classes(student, self.reads),
        }
        return {name: size for name, size in sizes.items() if size is not None}

    def check_sizes(self, student: Any, teacher: Any) -> None:
        """Raise ``ValueError`` for outputs of other sizes than the tensors were made for."""
        for name, size in self.infer_sizes(student, teacher).items() if self.needed_sizes else ():
            if self._sizes.get(name, size) != size:
                raise ValueError(
                    f"{self.display_name} was made for {name}={self._sizes[name]}, but received {name}={size}: make it "
                    "for the sizes of the networks, or read other layers"
                )

    def _build(self) -> None:
        self.build(**{name: self._sizes[name] for name in self.needed_sizes})
        self._built = True
        if self.needed_sizes:
            self.register_buffer("sizes", _encode([self._sizes[name] for name in self.needed_sizes]))

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        """Make the tensors that a saved module had before they are loaded."""
        if not self._built and f"{prefix}sizes" in state_dict:
            self._sizes = dict(zip(self.needed_sizes, _decode(state_dict[f"{prefix}sizes"]), strict=True))
            self._build()
            saved = (x for key, x in state_dict.items() if key.startswith(prefix) and x.is_floating_point())
            self.to(dtype=next(saved, torch.empty(0, dtype=torch.float32)).dtype)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Move and cast, but never to half precision."""

        def convert(x: Tensor) -> Tensor:
            moved = fn(x)
            half = moved.dtype in (torch.float16, torch.bfloat16)
            return x.to(moved.device, torch.promote_types(x.dtype, torch.float32)) if half else moved

        return super()._apply(convert, recurse)  # type: ignore[no-untyped-call]


def _width(value: Any, reads: str | tuple[str, ...]) -> Size | None:
    """Columns of an embedding or of logits, channels of every map."""
    if isinstance(value, Outputs):
        fields = (reads,) if isinstance(reads, str) else reads
        field = next((f for f in ("embedding", "feature_maps", "logits") if f in fields), None)
        return None if field is None else _width(getattr(value, field), field)
    if value is None:
        return None
    if isinstance(value, Tensor):
        return value.shape[1]
    if reads == "classifier":
        return int(value[0].shape[1])
    return tuple(m.shape[2] if m.ndim == 3 else m.shape[1] for m in value)  # tokens are (N, T, C)


def _classes(value: Any, reads: str | tuple[str, ...]) -> int | None:
    """The number of classes, from logits or classifier."""
    if isinstance(value, Outputs):
        if value.logits is not None:
            return value.logits.shape[1]
        return None if value.classifier is None else len(value.classifier[0])
    if reads == "logits":
        return int(value.shape[1])
    return len(value[0]) if reads == "classifier" else None


def _encode(sizes: Sequence[Size]) -> Tensor:
    """Sizes as one row of integers, each after its length; a plain number has length 0."""
    words: list[int] = []
    for size in sizes:
        words += [0, size] if isinstance(size, int) else [len(size), *size]
    return torch.tensor(words, dtype=torch.int64)


def _decode(words: Tensor) -> Iterator[Size]:
    rest = words.tolist()
    while rest:
        length, rest = rest[0], rest[1:]
        yield tuple(rest[:length]) if length else rest[0]
        rest = rest[length or 1 :]
