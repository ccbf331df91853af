"""A teacher whose outputs are read by sample index, from files or an array, instead of running a network."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from copy import copy
from pathlib import Path
from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor, nn

from lightning_rkd.data.loaders import list_loaders
from lightning_rkd.distillation.layers import CaptureError, Layer
from lightning_rkd.distillation.teachers import cache_writer
from lightning_rkd.distillation.teachers.arrays import ArrayReader
from lightning_rkd.distillation.teachers.base import BaseTeacher, TeacherOutput
from lightning_rkd.distillation.teachers.cache_format import CacheReader
from lightning_rkd.distillation.teachers.teacher import Teacher
from lightning_rkd.losses.base import RelationalLoss
from lightning_rkd.utils.distributed import Group, gather_objects, run_on_all_ranks
from lightning_rkd.utils.types import Batch, Outputs


class CachedTeacher(BaseTeacher):
    """A teacher whose embeddings and logits are read from disk by sample index; no network is built, loaded or run.

    The training loader is made to yield the index of every sample, through any sampler and any depth of ``Subset``; the
    data set must be map-style. With one view the cache holds the outputs for the images without augmentation; with a
    data module of n ``views``, student and teacher see the same augmented image. A ``batch_transform`` is refused, and
    so are losses that read feature maps or the classifier.

    Args:
        path: The folder that ``lightning-rkd cache`` wrote.
        teacher: Writes what is missing of the cache before the first step, on all ranks together; a cache of another
            teacher is refused.
        ignore: Parts of the data's description that may differ from the cached one: ``"class"``, ``"transform"``,
            ``"content"``. Row i must still be the same sample.
        dtype: Type of the numbers in the files, where they are written.

    Raises:
        FileNotFoundError: There is no cache when training begins.
        CacheError: The cache is damaged, or was made for another data set, teacher or layer; the message says which.

    Example:
        >>> teacher = CachedTeacher.from_array(torch.tensor([[0.0, 1.0], [2.0, 3.0], [4.0, 5.0]]))
        >>> teacher.outputs(Batch(None, indices=torch.tensor([2, 0])))[0].features[""].embedding
        tensor([[4., 5.],
                [0., 1.]])
    """

    needs_indices = True

    def __init__(
        self,
        path: str | Path,
        teacher: Teacher | nn.Module | None = None,
        ignore: list[str] | None = None,
        dtype: cache_writer.Dtype = "float32",
    ) -> None:
        if unknown := sorted({*(ignore or ())} - {"class", "transform", "content"}):
            raise ValueError(f"CachedTeacher: ignore may name 'class', 'transform' and 'content', got {unknown}")
        if dtype not in ("float32", "float16"):
            raise ValueError(f"CachedTeacher: dtype must be 'float32' or 'float16', got {dtype!r}")
        self.path, self.ignore, self.dtype = Path(path), list(ignore or ()), dtype
        self.teacher = Teacher(teacher) if isinstance(teacher, nn.Module) else teacher
        self.layer: Layer | None = None
        self._array: ArrayReader | None = None
        self._reader: CacheReader | None = None
        self._device, self._prepared = torch.device("cpu"), False

    @classmethod
    def from_array(
        cls, array: Tensor | npt.NDArray[Any] | str | Path, ids: Iterable[int] | Tensor | str | Path | None = None
    ) -> CachedTeacher:
        """A teacher known only by its embeddings.

        Args:
            array: (N, D): a tensor, an array, or the path of a ``.npy`` file or of a ``.safetensors`` file with one
                tensor (and optionally another called ``ids``); files are memory-mapped.
            ids: Row of the root data set for each row of the array, N different integers, or the path of a ``.npy``
                file; by default 0 to N - 1.

        Example:
            >>> teacher = CachedTeacher.from_array(torch.eye(3), ids=[7, 5, 9])
            >>> teacher.outputs(Batch(None, indices=torch.tensor([5])))[0].features[""].embedding
            tensor([[0., 1., 0.]])
        """
        teacher = cls("array")
        teacher._array = ArrayReader(array, ids)
        return teacher

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_reader": None, "teacher": copy(self.teacher)}

    def attach(self, layer: Layer | None) -> None:
        """Read the manifest and compare the layer, or attach the teacher that writes the cache."""
        self.detach()
        self.layer = layer
        if self.teacher is not None:
            self.teacher.attach(layer)
        elif self._array is None:
            run_on_all_ranks(self._read_manifest)

    def detach(self) -> None:
        """Release files and teacher."""
        if self.teacher is not None:
            self.teacher.detach()
        self._reader, self._prepared = None, False

    def to(self, device: torch.device | str, convert: Callable[[nn.Module], nn.Module] | None = None) -> bool:
        """Set the device of the outputs; a teacher that writes the cache keeps its own precision."""
        self._device = torch.device(device)
        return self.teacher is not None and self._reader is None and self.teacher.to(device)

    def prepare_data(
        self, loaders: Any, unpack: Callable[[Any], Batch], group: Group = None, *, train: bool = True
    ) -> None:
        """Write the cache where a teacher is given, and compare it with the data, on all ranks."""
        if train and self._prepared:
            return
        found = list_loaders(loaders)
        if train and self.teacher is not None:
            loader = found[0] if len(found) == 1 else loaders  # several are refused
            how: dict[str, Any] = {"unpack": unpack, "dtype": self.dtype, "device": self._device, "group": group}
            cache_writer.write_cache(self.path, self.teacher, self.layer, loader, **how)
        run_on_all_ranks(lambda: [self._rows().check_data(loader, self.ignore) for loader in found], group)
        ranks = gather_objects(self._rows().fingerprint, group)
        if len(set(ranks)) > 1:
            raise RuntimeError(f"the caches {str(self.path)!r} of the ranks differ ({ranks}): copy one to all machines")
        self._prepared = self._prepared or train

    def outputs(self, batch: Batch, calls: list[Any] | None = None) -> list[TeacherOutput]:
        """The cached rows of a batch, in float32."""
        if calls is not None:
            raise CaptureError(
                "input_layer feeds the teacher with inputs of the student, but a cached teacher is read by sample "
                "index: leave input_layer out, or teach with Teacher(network)"
            )
        if batch.mix is not None or batch.view is not None:
            raise CaptureError(
                "the batch was mixed or changed after loading, but the cache holds outputs for the original images: "
                "leave the batch_transform out, or teach with Teacher(network)"
            )
        if self.teacher is not None and self._reader is None:  # sizes are needed before the cache is written
            return self.teacher.outputs(batch)
        indices = batch.indices if batch.host_indices is None else batch.host_indices
        if not isinstance(indices, Tensor) or indices.ndim != 1 or indices.is_floating_point():
            raise CaptureError(
                f"a cached teacher is read by sample index, N integers in a tensor, but the batch has {indices!r}: "
                "wrap the loader, with_indices(loader), or name them in the batch, indices=..."
            )
        features: dict[str, Outputs] = {}
        for name, x in self._rows().read(indices.cpu().long(), batch.epoch).items():
            tap, _, field = name.rpartition("/")
            setattr(features.setdefault(tap, Outputs()), field, x.to(self._device, non_blocking=True))
        return [TeacherOutput(features)]

    def shares_parameters_with(self, network: nn.Module) -> bool:
        """True if training ``network`` would change the teacher that writes the cache."""
        return self.teacher is not None and self.teacher.shares_parameters_with(network)

    def check_same_on_ranks(self, group: Group = None) -> None:
        """Compare the teachers that write the cache; caches are compared in :meth:`prepare_data`."""
        if self.teacher is not None:
            self.teacher.check_same_on_ranks(group)

    def check_loss(self, name: str, loss: RelationalLoss) -> None:
        """Refuse a loss that reads fields a cache does not hold."""
        reads = {loss.reads} if isinstance(loss.reads, str) else set(loss.reads)
        if missing := sorted(reads - set(cache_writer.FIELDS)):
            raise ValueError(
                f"{name}: {type(loss).__name__} reads {missing}, but a cached teacher holds embeddings and logits "
                "only: teach with Teacher(network)"
            )

    def _rows(self) -> CacheReader | ArrayReader:
        return self._array or self._reader or self._read_manifest()

    def _read_manifest(self) -> CacheReader:
        wanted = {"teacher layer": cache_writer.describe_layer(self.layer)}
        if self.teacher is not None:
            wanted = cache_writer.describe_teacher(self.teacher, self.layer)
        self._reader = CacheReader(self.path, wanted)
        return self._reader
