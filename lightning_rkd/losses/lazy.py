"""Tensors of a loss's own: made once their sizes are known, kept in float32, saved together with their sizes."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_rkd.utils.types import Outputs

SIZES = frozenset({"student_dim", "teacher_dim", "num_classes", "num_samples"})
"""What a loss with tensors of its own may have to know before it can make them, as parameters of its ``build``."""

Size = int | tuple[int, ...]
"""A width; for maps the channels of every map."""


class Sized(nn.Module):
    """A module that makes its tensors when it knows their sizes: in ``__init__``, later, or from what was saved.

    The base of :class:`~lightning_rkd.losses.base.RelationalLoss`, which says how a loss uses it.

    Class attributes:
        reads: What the sizes are taken from, a field of :class:`~lightning_rkd.utils.types.Outputs` or a tuple of them.
        ready: Whether files have been read and tensors made.
        called: What messages call it: the class's own name, unless a scheme gives its part the scheme's.

    Raises:
        TypeError: Where a class's ``build`` asks for a size that does not exist.

    Example:
        >>> class Linear(Sized):
        ...     def __init__(self, student_dim=None):
        ...         super().__init__()
        ...         self.sized(student_dim=student_dim)
        ...     def build(self, student_dim):
        ...         self.layer = nn.Linear(student_dim, 1)
        >>> late = Linear()
        >>> late.missing_sizes
        ('student_dim',)
        >>> late.make_ready(torch.ones(2, 5), torch.ones(2, 7)); late.layer
        Linear(in_features=5, out_features=1, bias=True)
    """

    reads: str | tuple[str, ...] = "embedding"
    ready: bool = False
    called: str = ""
    _wants: ClassVar[tuple[str, ...]] = ()
    _sizes: Mapping[str, Size] = {}
    _built = True

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "called" not in vars(cls):
            cls.called = cls.__name__
        builds = inspect.signature(cls.build).parameters if cls.build is not Sized.build else ()
        cls._wants = tuple(sorted(set(builds) - {"self"}))
        if not set(cls._wants) <= SIZES:
            raise TypeError(f"{cls.__name__}.build asks for {cls._wants}, but may only ask for {sorted(SIZES)}")

    def prepare(self) -> None:
        """Whatever must wait until training begins, such as reading a file; called once, before :meth:`build`."""

    def build(self, *args: Any, **kwargs: Any) -> None:
        """Make the loss's own tensors; a subclass names the sizes it needs as parameters."""

    def sized(self, **sizes: Size | None) -> None:
        """To be called at the end of ``__init__`` with the sizes that are known; builds if none is missing."""
        self._sizes = {name: size for name, size in sizes.items() if size is not None}
        self._built = False
        if not self.missing_sizes:
            self._build()

    @property
    def wanted_sizes(self) -> tuple[str, ...]:
        """The sizes that the loss's own tensors follow from."""
        return self._wants

    @property
    def missing_sizes(self) -> tuple[str, ...]:
        """The sizes that the loss must still be told."""
        return () if self._built else tuple(name for name in self._wants if name not in self._sizes)

    def make_ready(
        self, student: Any = None, teacher: Any = None, *, num_samples: int | None = None, like: Tensor | None = None
    ) -> None:
        """Read files and make tensors, once; the first call does it where nobody did before.

        Args:
            student: What the loss will read of the student, from which missing sizes are taken.
            teacher: The same of the teacher.
            num_samples: Size of the training set.
            like: Device and precision of what is made.

        Raises:
            ValueError: A size is still unknown.
        """
        if self.ready:
            return
        self.prepare()
        if not self._built:
            shown = self.shown_sizes(student, teacher) | ({} if num_samples is None else {"num_samples": num_samples})
            self._sizes = {k: v for k, v in shown.items() if k in self._wants} | dict(self._sizes)
            if self.missing_sizes:
                raise ValueError(
                    f"{type(self).__name__} does not know {', '.join(self.missing_sizes)}: pass {self.call_with(shown)}"
                )
            self._build()
            if like is not None:
                self.to(like.device, like.dtype)
        elif like is not None:
            self.to(like.device)
        self.ready = True

    def call_with(self, sizes: Mapping[str, Size]) -> str:
        """How to make this loss with the sizes it needs, for messages."""
        known = {**{k: v for k, v in sizes.items() if k in self._wants}, **self._sizes}
        arguments = ", ".join(f"{name}={known.get(name, '...')}" for name in self._wants)
        return f"{type(self).__name__}({arguments})"

    def shown_sizes(self, student: Any, teacher: Any) -> dict[str, Size]:
        """The sizes that can be seen from what the loss reads on both sides."""
        sizes: dict[str, Size | None] = {}
        if student is not None and teacher is not None:
            sizes = {
                "student_dim": width(student, self.reads),
                "teacher_dim": width(teacher, self.reads),
                "num_classes": classes(student, self.reads),
            }
        return {name: size for name, size in sizes.items() if size is not None}

    def check_sizes(self, student: Any, teacher: Any) -> None:
        """Refuse sides of other sizes than the tensors were made for.

        Raises:
            ValueError: They are.
        """
        for name, shown in self.shown_sizes(student, teacher).items() if self._wants else ():
            if self._sizes.get(name, shown) != shown:
                raise ValueError(
                    f"{self.called} was made for {name}={self._sizes[name]}, but is shown {name}={shown}: make it for "
                    "what the networks show, or read them elsewhere"
                )

    def _build(self) -> None:
        self.build(**{name: self._sizes[name] for name in self._wants})
        self._built = True
        if self._wants:
            self.register_buffer("sizes", _encoded([self._sizes[name] for name in self._wants]))

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        """Make the tensors that a saved loss had before they are loaded."""
        if not self._built and f"{prefix}sizes" in state_dict:
            self._sizes = dict(zip(self._wants, _decoded(state_dict[f"{prefix}sizes"]), strict=True))
            self._build()
            saved = (x for key, x in state_dict.items() if key.startswith(prefix) and x.is_floating_point())
            self.to(dtype=next(saved, torch.empty(0, dtype=torch.float32)).dtype)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Move and cast, but never to half precision."""

        def kept(x: Tensor) -> Tensor:
            moved = fn(x)
            half = moved.dtype in (torch.float16, torch.bfloat16)
            return x.to(moved.device, torch.promote_types(x.dtype, torch.float32)) if half else moved

        return super()._apply(kept, recurse)  # type: ignore[no-untyped-call]


def width(value: Any, reads: str | tuple[str, ...]) -> Size | None:
    """The size of what a loss reads: columns of an embedding or of logits, channels of every map.

    Example:
        >>> maps = [torch.ones(2, 3, 4, 4), torch.ones(2, 6, 2, 2)]
        >>> width(torch.ones(2, 5), "embedding"), width(maps, "feature_maps")
        (5, (3, 6))
    """
    if isinstance(value, Outputs):
        fields = (reads,) if isinstance(reads, str) else reads
        field = next((f for f in ("embedding", "feature_maps", "logits") if f in fields), None)
        return None if field is None else width(getattr(value, field), field)
    if isinstance(value, Tensor):
        return value.shape[1]
    if value is None or reads == "classifier":
        return None if value is None else value[0].shape[1]
    return tuple(_channels(m) for m in value)


def _channels(m: Tensor) -> int:
    return m.shape[2] if m.ndim == 3 else m.shape[1]  # tokens are (N, T, C)


def classes(value: Any, reads: str | tuple[str, ...]) -> int | None:
    """The number of classes a side shows, from its logits or from its classifier; ``None`` where it shows neither."""
    if isinstance(value, Outputs):
        if value.logits is not None:
            return value.logits.shape[1]
        return None if value.classifier is None else len(value.classifier[0])
    if reads == "logits":
        return int(value.shape[1])
    return len(value[0]) if reads == "classifier" else None


def _encoded(sizes: Sequence[Size]) -> Tensor:
    """Sizes as one row of integers, each led by its length; a plain number has length 0."""
    words: list[int] = []
    for size in sizes:
        words += [0, size] if isinstance(size, int) else [len(size), *size]
    return torch.tensor(words, dtype=torch.int64)


def _decoded(words: Tensor) -> Iterator[Size]:
    rest = words.tolist()
    while rest:
        length, rest = rest[0], rest[1:]
        yield tuple(rest[:length]) if length else rest[0]
        rest = rest[length or 1 :]
