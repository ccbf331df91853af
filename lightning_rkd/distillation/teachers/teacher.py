"""A frozen network as the teacher."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_rkd.data.transforms.teacher import Statistics
from lightning_rkd.distillation.features import FeatureReader, pause_hooks
from lightning_rkd.distillation.layers import CaptureError, Layer
from lightning_rkd.distillation.teachers import pretrained as pretrained_networks
from lightning_rkd.distillation.teachers.base import BaseTeacher, TeacherOutput
from lightning_rkd.distillation.teachers.saved_state import (
    SavedState,
    compute_checksum,
    is_sharded,
    is_subclass,
    plain_tensors,
)
from lightning_rkd.distillation.teachers.weights import load_weights
from lightning_rkd.losses.base import RelationalLoss
from lightning_rkd.utils.distributed import Group, gather_rows, rank_and_size, run_on_all_ranks
from lightning_rkd.utils.private import tree_leaves, tree_map
from lightning_rkd.utils.types import Batch, call_network


class Teacher(BaseTeacher):
    """A frozen network, in evaluation mode and without gradients.

    It is not an ``nn.Module``, so the network is absent from checkpoints, optimizers, parameter counts and DDP buckets,
    and ``train()`` and ``unfreeze()`` of the student do not reach it. Copies share the network.

    Inputs are cast to the type of the network's parameters, and outputs stay in it: a bfloat16 teacher works under a
    float32 trainer, and the other way round. Autocast is off in networks of another type than float32.

    Args:
        network: The teacher network. It is moved and cast when training begins, and restored afterwards.
        weights: File with the weights of the network, read when training begins, in one of the forms that
            :func:`load_weights` understands. ``None`` keeps the weights of ``network``.
        move: Whether to move and cast the network; one quantised by torchao is moved, but not cast. Pass ``False``
            for a sharded network, or one quantised otherwise, which then receives inputs on the student's device.
        channels_last: Whether to store weights and images in the channels-last format, which makes convolutional
            networks faster on GPUs in half precision and on many CPUs.
        transform: Function, or list of functions applied in order, from what the teacher receives (``teacher_inputs``
            of the batch, else its inputs or those of ``input_layer``) to the network's inputs. It runs on the device:
            :class:`~lightning_rkd.data.Resize`, :class:`~lightning_rkd.data.Renormalize`, or any other. Modules are
            moved with the network, but not cast.
        context: Function that returns a context manager, entered around each call of a network that shares its
            parameters with the student: the base of a LoRA student is
            ``Teacher(model, context=model.disable_adapter)``. Within it all shared parameters must be frozen. The
            network is neither moved nor cast, and its modes are restored after each call.

    Example:
        >>> teacher = Teacher(nn.Linear(4, 3), transform=lambda x: x[:, :4])
        >>> teacher(torch.ones(2, 9)).shape
        torch.Size([2, 3])
        >>> teacher.attach(None)
        >>> teacher.outputs(Batch(inputs=torch.ones(2, 9)))[0].features[""].embedding.shape
        torch.Size([2, 3])
    """

    def __init__(
        self,
        network: nn.Module,
        weights: str | Path | None = None,
        move: bool = True,
        channels_last: bool = False,
        transform: list[nn.Module] | nn.Module | Callable[[Any], Any] | None = None,
        context: Callable[[], AbstractContextManager[Any]] | None = None,
    ) -> None:
        if not isinstance(network, nn.Module):
            raise TypeError(f"a teacher is an nn.Module, a network and not its class, got {network!r:.80}")
        if channels_last and not (move and context is None):
            raise ValueError("channels_last=True changes how the network is stored: leave out move=False and context")
        self.network, self.weights, self.channels_last, self.context = network, weights, channels_last, context
        self.move = move and context is None
        transforms = transform if isinstance(transform, list) else [] if transform is None else [transform]
        self.transforms: list[Callable[[Any], Any]] = [*transforms]
        for name, functions in (("transform", self.transforms), ("context", [] if context is None else [context])):
            for function in functions:
                entered = name == "context" and isinstance(function, AbstractContextManager)  # some can be called
                if entered or not callable(function):
                    form = "a function" if name == "context" else "a function, or a list of functions"
                    cure = "; pass it uncalled, such as context=model.disable_adapter" if entered else ""
                    raise TypeError(f"Teacher: {name} must be {form}, got {type(function).__name__}{cure}")
        self._loaded, self._warned = weights is None, False
        self._reader: FeatureReader | None = None
        self._saved_states: list[SavedState] = []
        self._parts: list[nn.Module] = []  # of the attached network
        self._prepared = False
        self._precision: tuple[torch.dtype | None, str] | None = None  # while attached and moved

    @classmethod
    def from_timm(
        cls,
        name: str,
        student_normalization: Statistics | None = None,
        image_size: int | tuple[int, int] | None = None,
        pretrained: bool = True,
        classifier: bool = False,
        weights: str | Path | None = None,
        **kwargs: Any,
    ) -> Teacher:
        """A network of timm, with a transform to the images that it has been trained on.

        Images are resized to the whole of the size that the network's configuration names, without a crop.

        Args:
            name: Name of the model; see ``timm.list_models()``.
            student_normalization: Mean and standard deviation that the inputs are normalised with, which are replaced
                by the teacher's; ``(0, 1)`` for images from 0 to 1. ``None`` takes inputs as normalised with the
                teacher's own, and logs these.
            image_size: Size of the teacher's images; ``None`` is that of its configuration.
            pretrained: Whether to use timm's weights, which are downloaded where they are not cached.
            classifier: Whether to keep the classifier. Without it the output is the pooled features (N, D).
            weights: File of weights to use instead of timm's.
            kwargs: Further arguments of ``timm.create_model``.
        """
        network, images = pretrained_networks.build_timm(name, pretrained and weights is None, classifier, **kwargs)
        transform = pretrained_networks.match_images("from_timm", student_normalization, image_size, **images)
        return cls(network, weights, transform=transform)

    @classmethod
    def from_torchvision(
        cls,
        name: str,
        student_normalization: Statistics | None = None,
        image_size: int | tuple[int, int] | None = None,
        pretrained: bool | str = True,
        classifier: bool = False,
        weights: str | Path | None = None,
    ) -> Teacher:
        """A classification network of torchvision, with a transform to the images that it has been trained on.

        Args:
            name: Name of the model; see ``torchvision.models.list_models()``.
            student_normalization: As in :meth:`from_timm`.
            image_size: As in :meth:`from_timm`.
            pretrained: Name of torchvision's weights, such as ``"IMAGENET1K_V1"``; ``True`` takes the default ones,
                ``False`` initialises at random. Images are those of the weights, or else of the default ones.
            classifier: As in :meth:`from_timm`.
            weights: File of weights to use instead of torchvision's.
        """
        network, images = pretrained_networks.build_torchvision(
            name, pretrained, classifier, download=bool(pretrained) and weights is None
        )
        transform = pretrained_networks.match_images("from_torchvision", student_normalization, image_size, **images)
        return cls(network, weights, transform=transform)

    @classmethod
    def from_pretrained(
        cls,
        source: Any,
        student_normalization: Statistics | None = None,
        image_size: int | tuple[int, int] | None = None,
        model_class: str = "AutoModel",
        processor: Any = None,
        **kwargs: Any,
    ) -> Teacher:
        """A network of transformers; one for images with a transform to those that it has been trained on.

        Its output is a ``ModelOutput``: say what to read of it, ``teacher_layer=Tap(read=cls_token)``.

        Args:
            source: Name or folder of a model, or a ``PretrainedConfig`` for random weights.
            student_normalization: As in :meth:`from_timm`.
            image_size: As in :meth:`from_timm`.
            model_class: Class of transformers, such as ``"CLIPVisionModelWithProjection"``, or
                ``"AutoModelForImageClassification"`` to keep the classifier.
            processor: Image processor, or its name or folder, that tells size and normalisation; ``None`` takes that of
                ``source``. With a configuration and no processor, images are resized only.
            kwargs: Further arguments of ``from_pretrained`` or ``from_config``.
        """
        network, images = pretrained_networks.build_transformers(source, model_class, processor, **kwargs)
        transform = pretrained_networks.match_images("from_pretrained", student_normalization, image_size, **images)
        return cls(network, transform=transform)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {
            "_reader": None,
            "_saved_states": [],
            "_parts": [],
            "_prepared": False,
            "_precision": None,
        }

    def attach(self, layer: Layer | None) -> None:
        """Load the weights file, if any, and hook the layer."""
        if not self._loaded:
            run_on_all_ranks(self._load)  # the file may be missing on one machine
        self.detach()
        reader = FeatureReader(layer, "teacher")
        reader.attach(self.network)
        self._reader = reader
        parts = [f for f in self.transforms if isinstance(f, nn.Module)]
        # a network that belongs to the student is restored after each call
        self._saved_states = [SavedState.enter(m) for m in (*parts, *([] if self.context else [self.network]))]
        self._parts = list(self.network.modules())

    def detach(self) -> None:
        """Remove the hooks and restore the network."""
        if self._reader is not None:
            self._reader.detach()
        for state in self._saved_states:
            state.leave()
        self._reader, self._saved_states, self._parts, self._prepared, self._precision = None, [], [], False, None

    def to(self, device: torch.device | str, convert: Callable[[nn.Module], nn.Module] | None = None) -> bool:
        """Cast the network with ``convert`` and move it, once after :meth:`attach`; :meth:`detach` undoes both."""
        if self._reader is None:
            raise RuntimeError("attach the teacher to a layer before moving it")
        if self._prepared:
            return False
        self._prepared = True
        if self.move and any(map(is_sharded, self.network.parameters())):
            raise ValueError(
                "the teacher is sharded over ranks, so it could not be restored after being moved: "
                "leave it where it is, Teacher(network, move=False)"
            )
        for state in self._saved_states:
            if state.network is self.network and not self.move:
                continue
            state.remember_tensors()
            if state.network is self.network and convert is not None and not state.has_subclasses:
                convert(self.network)
            state.network.to(device)
        if self.channels_last:
            self.network.to(memory_format=torch.channels_last)
        self._precision, self._parts = self._find_precision(), list(self.network.modules())  # a cast may replace some
        return True

    def __call__(self, inputs: Any) -> Any:
        """Compute the network's output for inputs or a :class:`Batch`, attached or not."""
        if isinstance(inputs, Batch):
            inputs = inputs.inputs if inputs.teacher_inputs is None else inputs.teacher_inputs
        if not self._loaded:
            self._load()
        own = self._reader is not None and self.context is None  # an attached network is restored when it is detached
        with torch.no_grad() if own else self._evaluating():
            if not own or any(part.training for part in self._parts):  # slow in a deep network
                self.network.eval()
            for transform in self.transforms:
                inputs = transform(inputs)
            inputs = dict(inputs) if isinstance(inputs, Mapping) else inputs  # mappings of other packages are no trees
            dtype, device = self._precision or self._find_precision()
            if isinstance(inputs, Tensor):
                given = _convert(inputs, dtype, self.channels_last)
            else:
                given = tree_map(partial(_convert, dtype=dtype, channels_last=self.channels_last), inputs)
            try:
                with nullcontext() if dtype in (None, torch.float32) else torch.autocast(device, enabled=False):
                    return call_network(self.network, given)
            except (RuntimeError, TypeError, ValueError, LookupError) as error:
                if not isinstance(error, CaptureError | torch.OutOfMemoryError):
                    error.add_note(
                        f"the teacher, {type(self.network).__name__}, received {_describe(given)}: if it takes other "
                        "inputs, make them of these, Teacher(network, transform=...), or name its own in the batch, "
                        "teacher_inputs=..."
                    )
                raise

    def outputs(self, batch: Batch, calls: list[Any] | None = None) -> list[TeacherOutput]:
        """Compute the features of a batch."""
        if self._reader is None:
            raise RuntimeError("attach the teacher to a layer before its features are read")
        self._reader.start()
        try:
            for inputs in [batch] if calls is None else calls:
                self(inputs)
            features, _ = self._reader.collect()
        finally:
            self._reader.stop()
        return [TeacherOutput(features)]

    def shares_parameters_with(self, network: nn.Module) -> bool:
        """True if training ``network`` would change the teacher."""
        with self._entered():
            own = {id(p) for p in self.network.parameters() if p.requires_grad or self.context is None}
        return any(id(p) in own for p in network.parameters())

    def check_loss(self, name: str, loss: RelationalLoss) -> None:
        """Accept any loss."""

    def check_same_on_ranks(self, group: Group = None) -> None:
        """Raise ``RuntimeError`` if a checksum of the weights (of unsharded ones) differs between ranks. Collective."""
        tensors = list(self._whole_tensors())
        if not tensors or rank_and_size(group)[1] == 1:
            return
        checksum = torch.stack([number * compute_checksum(t) for number, t in enumerate(tensors, start=1)]).sum()
        every = gather_rows(checksum[None], group=group).tolist()
        if len(set(every)) > 1:
            raise RuntimeError(
                f"the teacher's weights differ between ranks (checksums {every}): build it from the same weights file "
                "or seed on every rank"
            )

    def trainable(self) -> set[str]:
        """Names of the parameters that belong to the student alone, which the context leaves out: those it trains."""
        return set() if self.context is None else {n for n, p in self.network.named_parameters() if p.requires_grad}

    def _load(self) -> None:
        if not self._loaded:
            assert self.weights is not None
            load_weights(self.network, self.weights)
            self._loaded = True

    @contextmanager
    def _entered(self) -> Iterator[None]:
        """The context, after which every parameter is trainable or frozen as before."""
        flags = [] if self.context is None else [(p, p.requires_grad) for p in self.network.parameters()]
        try:
            with nullcontext() if self.context is None else self.context():
                yield
        finally:
            for parameter, trainable in flags:
                parameter.requires_grad_(trainable)

    def _find_precision(self) -> tuple[torch.dtype | None, str]:
        """Data type of the network's parameters, which its inputs get, and type of its device."""
        floating = [p for p in self.network.parameters() if p.is_floating_point()]
        first = min(floating, key=is_subclass, default=None)  # quantised weights may state another type
        return (None, "cpu") if first is None else (first.dtype, first.device.type)

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        """The context, without gradients, after which the modes of the network are restored."""
        modes = [(module, module.training) for module in self.network.modules()]
        if self.context is not None and not self._warned:
            trains = [m for m, training in modes if training and getattr(m, "running_mean", None) is not None]
            if trains:
                self._warned = True
                warnings.warn(
                    f"the student trains with {type(trains[0]).__name__} layers that it shares with the teacher, whose "
                    "running statistics, and so the teacher, change in every step: call .eval() on these layers",
                    stacklevel=2,
                )
        try:
            shared = nullcontext() if self.context is None else pause_hooks(self.network, self._reader)
            with self._entered(), torch.no_grad(), shared:
                yield
        finally:
            for module, training in modes:
                module.training = training

    def _whole_tensors(self) -> Iterator[Tensor]:
        """Parameters, buffers and packed weights of quantised layers, without parts of sharded tensors."""
        trainable = self.trainable()
        packed = (t for t in tree_leaves(self.network.state_dict()) if isinstance(t, Tensor) and t.is_quantized)
        parameters = (p for name, p in self.network.named_parameters() if name not in trainable)
        for tensor in (*parameters, *self.network.buffers(), *packed):
            if not is_sharded(tensor):
                yield from plain_tensors(tensor)


def _convert(x: Any, dtype: torch.dtype | None, channels_last: bool) -> Any:
    if not isinstance(x, Tensor):
        return x
    if x.is_floating_point():
        x = x.to(dtype)  # None leaves it
    return x.contiguous(memory_format=torch.channels_last) if channels_last and x.ndim == 4 else x


def _describe(inputs: Any) -> str:
    """Shapes and types of a network's inputs."""
    if isinstance(inputs, Tensor):
        return f"{tuple(inputs.shape)} {str(inputs.dtype).removeprefix('torch.')}"
    if isinstance(inputs, Mapping):
        return ", ".join(f"{name!r} {_describe(x)}" for name, x in inputs.items())
    return f"a {type(inputs).__name__}"
