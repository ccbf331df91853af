"""A teacher that was asked once: what it showed is read from disk by sample index, and its network is not needed."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from copy import copy
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_rkd.data.fingerprint import describe
from lightning_rkd.data.indexing import loaders_in, root_size, to_batch
from lightning_rkd.distillation.features import CaptureError, Layer
from lightning_rkd.distillation.teachers.arrays import Array
from lightning_rkd.distillation.teachers.base import BaseTeacher, Lesson
from lightning_rkd.distillation.teachers.cache_format import CacheError, Shards, differences
from lightning_rkd.distillation.teachers.cache_writer import Dtype, describe_layer, describe_teacher, fill
from lightning_rkd.distillation.teachers.teacher import Teacher
from lightning_rkd.losses.base import Term
from lightning_rkd.utils.distributed import Group, gather_objects, run_on_all_ranks
from lightning_rkd.utils.types import Batch, Outputs

CACHED = ("embedding", "logits")
"""The fields of ``Outputs`` that are kept; feature maps and classifier weights are not."""


class CachedTeacher(BaseTeacher):
    """Teaches with what a teacher showed once for every row of the data set, read by sample index.

    Batches are made to say which rows they hold, in either face and from any loader over a map-style data set. Unless
    ``teacher`` is given, the teacher's network plays no part: not built, not loaded, not run.

    With one view, the cache holds what the teacher shows for the plain images; a student whose images are augmented is
    then compared with the teacher's view of the image as it is. With a data module of n ``views``, both see the same
    augmented image. A ``batch_transform`` is refused. Losses that read feature maps or the classifier are, too.

    The manifest is verified when training begins, and a file when its first row is read; see
    :class:`~lightning_rkd.distillation.teachers.cache_format.Shards`.

    Args:
        path: The folder that ``lightning-rkd cache`` wrote.
        teacher: Writes what is missing of the cache before the first step, on all ranks together; and is compared with
            the teacher that wrote it.
        ignore: Parts of the description of the data that may differ from what was cached: ``"class"``, ``"transform"``,
            ``"content"``. Only where you know that row i is the same sample still.
        dtype: In what to write, if it is to be written.

    Raises:
        FileNotFoundError: When training begins: there is no such cache.
        CacheError: When training begins or a file is first read: it is damaged, or was made for another data set,
            teacher or layer; the message says what differs.

    Example:
        >>> teacher = CachedTeacher.from_array(torch.tensor([[0.0, 1.0], [2.0, 3.0], [4.0, 5.0]]))
        >>> teacher.attach(None)
        >>> teacher.lessons(Batch(None, indices=torch.tensor([2, 0])))[0].shown[""].embedding
        tensor([[4., 5.],
                [0., 1.]])
    """

    def __init__(
        self,
        path: str | Path,
        teacher: Teacher | nn.Module | None = None,
        ignore: list[str] | None = None,
        dtype: Dtype = "float32",
    ) -> None:
        if unknown := sorted({*(ignore or ())} - {"class", "transform", "content"}):
            raise ValueError(f"CachedTeacher: ignore may name 'class', 'transform' and 'content', got {unknown}")
        if dtype not in ("float32", "float16"):
            raise ValueError(f"CachedTeacher: dtype must be 'float32' or 'float16', got {dtype!r}")
        self.path, self.ignore, self.dtype = Path(path), list(ignore or ()), dtype
        self.teacher = Teacher(teacher) if isinstance(teacher, nn.Module) else teacher
        self.layer: Layer | None = None
        self._store: Shards | Array | None = None
        self._attached, self._device, self._met = False, torch.device("cpu"), False

    @classmethod
    def from_array(
        cls, array: Tensor | npt.NDArray[Any] | str | Path, ids: Iterable[int] | Tensor | None = None
    ) -> CachedTeacher:
        """A teacher that is known only by its embeddings, one row a sample.

        Args:
            array: (N, D): a tensor, an array, or the path of a ``.npy`` file or of a ``.safetensors`` file with one
                tensor (and, if it likes, another called ``ids``), which are memory-mapped.
            ids: Row of the root data set that each row belongs to, N integers in any order, each once. Without them
                row i belongs to row i, and N must be the size of the root data set.

        Raises:
            ValueError: The array is not (N, D) of floating-point numbers, or ids that do not belong to it.

        Example:
            >>> import numpy as np
            >>> teacher = CachedTeacher.from_array(np.eye(3, dtype="float32"), ids=[7, 5, 9])
            >>> teacher.lessons(Batch(None, indices=torch.tensor([5])))[0].shown[""].embedding
            tensor([[0., 1., 0.]])
        """
        store = Array(array, ids)
        teacher = cls(store.path or "array")
        teacher._store = store
        return teacher

    def __getstate__(self) -> dict[str, Any]:
        """What shallow copies and pickles take over: the path, and no rows of a file."""
        store = self._store if isinstance(self._store, Array) else None
        own = {"_store": store, "_attached": False, "_met": False, "_device": torch.device("cpu")}
        return self.__dict__ | own | {"teacher": None if self.teacher is None else copy(self.teacher)}

    @property
    def needs_indices(self) -> bool:
        """Always."""
        return True

    def attach(self, layer: Layer | None) -> None:
        """Open the cache, and compare it with the layer; without one, get the teacher ready to write it.

        Raises:
            FileNotFoundError: There is no cache, and no teacher to write it.
            CacheError: It is damaged, or was read at another layer.
        """
        self.detach()
        self.layer = layer
        if isinstance(self._store, Array):
            return
        if self.teacher is None:
            run_on_all_ranks(self._open)
        else:
            self.teacher.attach(layer)
        self._attached = True

    def detach(self) -> None:
        """Let go of files and teacher."""
        if self.teacher is not None:
            self.teacher.detach()
        if not isinstance(self._store, Array):
            self._store = None
        self._attached = self._met = False

    def to(self, device: torch.device | str, convert: Callable[[nn.Module], nn.Module] | None = None) -> bool:
        """Remember where rows go; a teacher that writes keeps its own precision."""
        first, self._device = self._device != torch.device(device), torch.device(device)
        if self.teacher is not None and self._attached:
            first = self.teacher.to(device) or first
        return first

    def meet(self, loaders: Any, unpack: Callable[[Any], Batch], group: Group = None, *, train: bool = True) -> None:
        """Write the cache if that is to be done, and make sure that it belongs to these data, on all ranks.

        Raises:
            CacheError: It belongs to others; the message says what differs.
        """
        if train and self._met:
            return
        found = loaders_in(loaders)
        if train and self.teacher is not None and not isinstance(self._store, Array):
            loader = self._only(found)
            fill(
                self.path,
                self.teacher,
                self.layer,
                loader,
                to_batch=lambda batch: to_batch(batch, unpack),
                dtype=self.dtype,
                device=self._device,
                verify=False,
                group=group,
            )
            self._open()
        run_on_all_ranks(partial(self._check, found), group)
        if train:
            ranks = gather_objects(self._known().fingerprint, group)
            if len(set(ranks)) > 1:
                raise RuntimeError(
                    f"the caches {str(self.path)!r} of the ranks differ ({ranks}): copy one to all machines"
                )
            self._met = True

    def lessons(self, batch: Batch, calls: list[Any] | None = None) -> list[Lesson]:
        """The one lesson: what is kept for the rows of the batch, in float32.

        Raises:
            CaptureError: The batch has no indices, or is not of images as the data set shows them.
            CacheError: A row that is not in the cache, or a damaged file.
        """
        if calls is not None:
            raise CaptureError(
                "input_layer feeds the teacher what the student saw in the step, and a cached teacher is asked by "
                "sample index only: leave input_layer out, or teach with Teacher(network)"
            )
        if batch.mix is not None or batch.view is not None or batch.teacher_inputs is not None:
            raise CaptureError(
                "the batch was mixed or changed after loading, and a cached teacher has never seen such images: leave "
                "the batch_transform out, or teach with Teacher(network)"
            )
        if self._store is None and self.teacher is not None:  # asked for widths before the cache is written
            return self.teacher.lessons(batch)
        indices = batch.indices if batch.host_indices is None else batch.host_indices
        if indices is None:
            raise CaptureError(
                "a cached teacher is asked by sample index, but the batch has none: wrap the loader, "
                "with_indices(loader), or name them in the batch, indices=..."
            )
        store = self._known()
        if not isinstance(indices, Tensor) or indices.ndim != 1 or indices.is_floating_point():
            raise CaptureError(f"indices must be a tensor of N integers, got {indices!r}")
        fields = store.read(store.located(indices.cpu().long()), batch.epoch % store.views)
        taps: dict[str, Outputs] = {}
        for name, x in fields.items():
            tap, _, field = name.rpartition("/")
            setattr(taps.setdefault(tap, Outputs()), field, x.to(self._device, non_blocking=True))
        return [Lesson(taps)]

    def shares_parameters_with(self, network: nn.Module) -> bool:
        """Whether training ``network`` would change the teacher that writes."""
        return self.teacher is not None and self.teacher.shares_parameters_with(network)

    def check_same_on_ranks(self, group: Group = None) -> None:
        """Compare the teachers that write; the caches are compared in :meth:`meet`."""
        if self.teacher is not None:
            self.teacher.check_same_on_ranks(group)

    def check_loss(self, name: str, term: Term) -> None:
        """Refuse a loss that reads what is not kept.

        Raises:
            ValueError: It does.
        """
        reads = {term.reads} if isinstance(term.reads, str) else set(term.reads)
        if others := sorted(reads - set(CACHED)):
            raise ValueError(
                f"{name}: {type(term.loss).__name__} reads {others}, but a cached teacher keeps embeddings and logits "
                "only: teach with Teacher(network)"
            )

    def _known(self) -> Shards | Array:
        if self._store is None:
            self._open()
        assert self._store is not None
        return self._store

    def _open(self) -> None:
        store = Shards(self.path)
        now = {"layer": describe_layer(self.layer)}
        if self.teacher is not None and self._attached:
            now = describe_teacher(self.teacher.network, self.layer)
        self._refuse({key: store.plan["teacher"][key] for key in now}, now, "teacher ")
        self._store = store

    def _check(self, loaders: list[Any]) -> None:
        store = self._known()
        for loader in loaders:
            dataset = getattr(loader, "dataset", None)
            size = root_size(dataset)
            if size is None:
                raise CacheError(
                    f"a cached teacher needs DataLoaders over map-style data sets, whose rows have numbers; got "
                    f"{type(loader).__name__} over {type(dataset).__name__}"
                )
            if isinstance(store, Array):
                store.check_size(size)
                continue
            cached, now = dict(store.plan["data"]), describe(dataset)
            for part in (*self.ignore, *(["augmentation"] if cached["augmentation"] == "none" else [])):
                cached.pop(part), now.pop(part)
            self._refuse(cached, now, "data ")

    def _refuse(self, cached: dict[str, Any], now: dict[str, Any], part: str) -> None:
        if differing := differences(cached, now, part):
            raise CacheError(
                f"the cache {str(self.path)!r} was made for something else: {'; '.join(differing)}. Train with what it "
                "was made for, or write one for this: lightning-rkd cache --config RECIPE --out FOLDER"
            )

    def _only(self, loaders: list[Any]) -> DataLoader[Any]:
        if len(loaders) != 1:
            raise CacheError(f"a cache is written for one training loader, and there are {len(loaders)}")
        return cast("DataLoader[Any]", loaders[0])
