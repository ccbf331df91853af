"""Features of any network without a change to its code: embeddings, logits, feature maps, classifier weights."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_rkd.distillation import pooling
from lightning_rkd.distillation.layers import CaptureError, Layer, Tap, as_tap, find_layer
from lightning_rkd.distillation.micro_batches import refuse_inside
from lightning_rkd.utils.arguments import bind_arguments, find_signature
from lightning_rkd.utils.distributed import rank_and_size
from lightning_rkd.utils.private import count_writes, list_hooks
from lightning_rkd.utils.types import Outputs

_log = logging.getLogger(__name__)


class Hook:
    """A forward hook that does nothing in copies and pickles of its module."""

    def __init__(self, function: Callable[..., None] | None = None) -> None:
        self.function = function

    def __call__(self, *call: Any) -> None:
        """Pass on module, args, kwargs and, in a hook after the layer, its output."""
        if self.function is not None:
            self.function(*call)

    def __deepcopy__(self, memo: dict[int, Any]) -> Hook:
        return Hook()

    def __reduce__(self) -> tuple[type[Hook], tuple[()]]:
        return Hook, ()


class Recorder:
    """Recorder of the calls of hooked layers, between ``start`` and ``stop``. Copies and pickles have no hooks."""

    def __init__(self) -> None:
        self.on = False
        self._handles: list[RemovableHandle] = []
        self._calls: list[list[Any]] = []
        self._without_gradient: dict[int, list[Any]] = {}
        self._earlier: list[list[Any]] = []

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_handles": [], "_calls": [], "_without_gradient": {}, "_earlier": [], "on": False}

    def detach(self) -> None:
        """Remove the hooks; safe to call twice."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self.stop()

    def start(self) -> None:
        """Start recording; discard earlier calls."""
        self._calls, self._without_gradient = [[] for _ in self._handles], {}
        self._earlier, self.on = [], True

    @property
    def ran(self) -> bool:
        """True if a layer has run since :meth:`start`."""
        return bool(any(self._calls) or self._without_gradient or any(self._earlier))

    @property
    def ran_with_gradient(self) -> bool:
        """True if a layer has run since :meth:`start`, and not under ``no_grad``."""
        return any(self._calls)

    def restart(self) -> None:
        """Start anew; the calls recorded so far are used if no layer runs again."""
        if self.on and (any(self._calls) or self._without_gradient):
            earlier = self._collect_calls()
            self.start()
            self._earlier = earlier

    def stop(self) -> None:
        """Stop recording and discard the recorded calls."""
        self._calls, self._without_gradient, self._earlier, self.on = [], {}, [], False

    def _add_call(self, number: int, call: Any) -> None:
        if torch.is_grad_enabled():
            self._calls[number].append(call)
        else:
            self._without_gradient.setdefault(number, []).append(call)

    def _collect_calls(self) -> list[list[Any]]:
        calls, earlier = self._calls, self._earlier
        for number, others in self._without_gradient.items():  # beside calls with gradient they are no views
            calls[number] = calls[number] or others
        self._calls, self._earlier, self._without_gradient, self.on = [], [], {}, False
        return calls if any(calls) or not earlier else earlier


@contextmanager
def pause_hooks(network: nn.Module, own: Recorder | None) -> Iterator[None]:
    """Pause the hooks of all recorders but one, while a teacher runs layers that belong to the student as well."""
    kept = set() if own is None else {handle.id for handle in own._handles}
    every = [(number, hook) for part in network.modules() for number, hook in list_hooks(part)]
    paused = [(hook, hook.function) for number, hook in every if isinstance(hook, Hook) and number not in kept]
    for hook, _ in paused:
        hook.function = None
    try:
        yield
    finally:
        for hook, function in paused:
            hook.function = function


class Record:
    """Outputs of one call, protected from later in-place operations.

    The tensors themselves are preferred to their copies, since gradients then add up in the same order, and to the same
    bits, as for a loss written in ``training_step``.
    """

    def __init__(self, outputs: Outputs) -> None:
        self._original = outputs
        self.rows: int | None = None
        self._tensors: list[tuple[Tensor, Tensor, int]] = []  # no dict by id, for which a compiler has no graph
        counted = not torch.compiler.is_compiling()
        for x in outputs.tensors():
            self.rows = len(x) if self.rows is None else self.rows
            for known, _, _ in self._tensors:
                if known is x:
                    break
            else:
                counted = counted and not x.is_inference()
                self._tensors.append((x, x.clone(), count_writes(x) if counted else -1))
        self._counted = counted  # writes are not counted in inference mode and under compilation

    def outputs(self) -> Outputs:
        """The outputs as they were when the layer returned."""
        unchanged = self._counted
        for x, _, version in self._tensors:
            unchanged = unchanged and count_writes(x) == version
        if unchanged:
            return self._original
        copies = {id(x): copy for x, copy, _ in self._tensors}
        return self._original.map(lambda x: copies[id(x)])


def join_calls(records: list[Record]) -> Outputs:
    """Concatenate the rows of several calls."""
    if len(records) == 1:
        return records[0].outputs()
    calls = [record.outputs() for record in records]

    def cat(parts: list[Tensor | None]) -> Tensor | None:
        tensors = [p for p in parts if p is not None]
        same = len(tensors) == len(parts) and len({p.shape[1:] for p in tensors}) == 1
        return torch.cat(tensors) if same else None  # maps of different crops cannot be one tensor

    maps = [cat(list(level)) for level in zip(*(one.feature_maps or [] for one in calls), strict=True)]
    return Outputs(
        embedding=cat([one.embedding for one in calls]),
        logits=cat([one.logits for one in calls]),
        feature_maps=[m for m in maps if m is not None] if maps and all(m is not None for m in maps) else None,
        classifier=calls[-1].classifier,
    )


class FeatureReader(Recorder):
    """Records the outputs of a network at its taps.

    Outputs are those of the layer itself, even if an in-place operation changes the tensor later in the forward pass.

    Args:
        layer: Layer or layers, in any form of :data:`Layer`; a layer gives its output. ``None`` reads the network's.
        network: ``"student"`` or ``"teacher"``, for messages. The first step after :meth:`attach` logs one line for
            every tap: layer, class, what is read, shape and dtype.

    Attributes:
        taps: Taps by name; an unnamed tap has the name ``""``.
        rows: Number of rows of the first layer in each call of the last step.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 3), nn.ReLU())
        >>> reader = FeatureReader("1", "student")
        >>> reader.attach(net)
        >>> reader.start()
        >>> output = net(torch.ones(2, 4))
        >>> outputs, calls = reader.collect()
        >>> torch.equal(outputs[""].embedding, output), calls
        (True, 1)
    """

    def __init__(self, layer: Layer | None, network: str) -> None:
        super().__init__()
        self.network = network
        self.taps: dict[str, list[Tap]] = {}
        self.rows: list[int] = []
        self._lists: set[str] = set()
        entries = layer if isinstance(layer, Mapping) else {"": layer}
        if not entries:
            raise ValueError(f"{network}_layer is an empty dict; name at least one tap")
        for name, entry in entries.items():
            if isinstance(entry, Sequence) and not isinstance(entry, str):
                self._lists.add(name)
                self.taps[name] = [as_tap(e) for e in entry]
            else:
                self.taps[name] = [as_tap(entry)]
        self._titles: list[str] = []
        self._logged = True
        self._all = [tap for taps in self.taps.values() for tap in taps]

    def attach(self, network: nn.Module) -> None:
        """Hook the layers."""
        self.detach()
        if isinstance(network, torch.jit.ScriptModule):
            raise CaptureError(
                f"the {self.network} is TorchScript, whose layers cannot be hooked: wrap it in an nn.Module whose "
                "forward calls it"
            )
        paths = {id(module): name for name, module in network.named_modules()}
        modules = [find_layer(network, tap.layer) for tap in self._all]
        if self.network == "student":
            refuse_inside(network, modules)
        self._titles, self._logged = [], not self.network
        for number, (tap, module) in enumerate(zip(self._all, modules, strict=True)):
            path = paths.get(id(module), tap.layer)
            place = f"{self.network} layer {path!r}" if path else self.network
            self._titles.append(f"{place} ({type(module).__name__})")
            hook = Hook(partial(self._record, number, find_signature(module) if callable(tap.read) else None))
            if tap.at == "input":  # before the layer runs: it may write over its input
                self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
            else:
                self._handles.append(module.register_forward_hook(hook, with_kwargs=True))

    def collect(self, parts: int = 1) -> tuple[dict[str, Outputs], int]:
        """Stop recording, and return the outputs by tap, with several calls concatenated, and the number of calls.

        Of a network that ran on ``parts`` of the batch, the rows of each view are concatenated before those of the
        next, and calls are counted for one part.
        """
        recorded = self._collect_calls()
        if parts > 1:
            recorded = [_sort_calls(calls, parts) for calls in recorded]
        counts = set(map(len, recorded))
        if len(counts) != 1 or 0 in counts:
            self._refuse(recorded)
        rows = [record.rows or 0 for record in recorded[0]]
        self.rows = rows if parts == 1 else [sum(rows[n : n + parts]) for n in range(0, len(rows), parts)]
        joined = [join_calls(calls) for calls in recorded]
        if not self._logged and not torch.compiler.is_compiling():
            self._log_taps(joined)
        outputs, start = {}, 0
        for name, taps in self.taps.items():
            own = joined[start : start + len(taps)]
            start += len(taps)
            if name in self._lists:
                outputs[name] = Outputs(feature_maps=[x for one in own for x in one.feature_maps or []])
            else:
                outputs[name] = own[0]
        return outputs, len(self.rows)

    def _refuse(self, recorded: list[list[Any]]) -> None:
        if not recorded:
            raise CaptureError(
                f"nothing was recorded of the {self.network}: attach it, and call start() before its forward pass"
            )
        calls = {f"{tap.layer!r}": len(one) for tap, one in zip(self._all, recorded, strict=True)}
        for layer, count in calls.items():
            if count == 0:
                absent = (
                    ". If some steps do without the layer (alternating tasks, a CombinedLoader with None batches), "
                    "RelationalDistillation(absent='skip') trains them without the loss"
                )
                raise CaptureError(
                    f"the {self.network} layer {layer} was never called in this step. Name a layer that runs through "
                    "its __call__ (not .forward); under torch.compile attach before the first compiled call, or call "
                    f"torch.compiler.reset(){absent if self.network == 'student' else ''}"
                )
        raise CaptureError(f"the {self.network} layers ran unequally often in one step: {calls}")

    def _record(
        self, number: int, signature: Any, module: nn.Module, args: Any, kwargs: Any, output: Any = None
    ) -> None:
        if self.on:
            self._add_call(number, Record(_read_call(self._all[number], signature, module, args, kwargs, output)))

    def _log_taps(self, joined: list[Outputs]) -> None:
        self._logged = True
        if rank_and_size()[0] > 0:
            return
        names = [f" as {name!r}" if name else "" for name, taps in self.taps.items() for _ in taps]
        for title, name, tap, outputs in zip(self._titles, names, self._all, joined, strict=True):
            _log.info("%s%s: %s", title, name, _describe(tap, outputs))


class InputReader(Recorder):
    """Records the inputs of every call of a layer: one object, or all arguments by name, or else by position."""

    def __init__(self, layer: str | Callable[[nn.Module], nn.Module]) -> None:
        super().__init__()
        self.layer = layer

    def attach(self, network: nn.Module) -> None:
        """Hook the layer."""
        self.detach()
        module = find_layer(network, self.layer)
        self._handles = [module.register_forward_pre_hook(Hook(self._record), with_kwargs=True)]

    def collect(self, parts: int = 1) -> list[Any]:
        """Stop recording, and return the inputs of every call, those of a view in several parts one after another."""
        return _sort_calls(self._collect_calls()[0], parts)

    def _record(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.on:
            single = len(args) == 1 and not kwargs and not isinstance(args[0], Mapping)
            self._add_call(0, _copy_inputs(args[0] if single else {**dict(enumerate(args)), **kwargs}))


def read(network: nn.Module, layer: Layer | None, *args: Any, **kwargs: Any) -> Outputs:
    """Call a network and return its outputs at a layer."""
    reader = FeatureReader(layer, "")
    reader.attach(network)
    try:
        reader.start()
        network(*args, **kwargs)
        outputs, _ = reader.collect()
    finally:
        reader.detach()
    return next(iter(outputs.values()))


def _read_call(
    tap: Tap,
    signature: inspect.Signature | None,
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    output: Any,
) -> Outputs:
    """Outputs of one call of a tapped layer."""
    given: Any = args[0] if args else next(iter(kwargs.values()), None)
    if tap.at == "classifier":
        if not isinstance(output, Tensor):
            raise CaptureError(
                f"the layer {tap.layer!r} ({type(module).__name__}) gives a {type(output).__name__}, but a classifier "
                "gives a tensor of logits: name the layer that makes them"
            )
        return Outputs(given, output, [given], _find_weight(module))
    value = given if tap.at == "input" else output
    if isinstance(tap.read, str):
        value = _read_field(value, tap.read)
    elif tap.read is not None:
        value = tap.read(value, bind_arguments(signature, args, kwargs))
        if isinstance(value, Outputs):
            return value
    if not isinstance(value, Tensor):
        raise CaptureError(
            f"the layer {tap.layer!r} ({type(module).__name__}) gives a {type(value).__name__}, not a tensor; "
            "say how to read it: Tap(layer, read='field'), read=mean_pool, last_token_pool, cls_token, global_pool or "
            "your own function(output, arguments)"
        )
    flat = value.flatten(1) if value.ndim == 4 and value.shape[2:] == (1, 1) else value
    return Outputs(embedding=flat, logits=flat, feature_maps=[value])


def _find_weight(module: nn.Module) -> tuple[Tensor, Tensor | None] | None:
    """Weight and bias of a classifier, unless they are packed (quantised) or not all of its weight (LoRA)."""
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    if not isinstance(weight, Tensor) or weight.ndim != 2 or hasattr(module, "base_layer"):
        return None
    return weight, bias if isinstance(bias, Tensor) else None


def _read_field(output: Any, name: str) -> Any:
    value = output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)
    if value is None:
        has = list(output) if isinstance(output, Mapping) else list(getattr(output, "_fields", ())) or "no fields"
        cure = "name one of them" if has != "no fields" else "pass a function, read=lambda output, arguments: output[0]"
        if name in vars(pooling):
            cure = f"pass the function itself, lightning_rkd.{name}"
        elif isinstance(output, Tensor):
            cure = "leave read out"
        raise CaptureError(f"Tap(read={name!r}): the layer gives a {type(output).__name__}, which has {has}; {cure}")
    return value


def _describe(tap: Tap, outputs: Outputs) -> str:
    """Shape and dtype of what a tap reads."""
    if tap.at == "classifier":
        embedding, logits = (_describe_tensors([x]) for x in (outputs.embedding, outputs.logits))
        return f"classifier, embedding {embedding}, logits {logits}"
    how = "" if tap.read is None else f" read by {getattr(tap.read, '__name__', repr(tap.read))}"
    return f"{tap.at}{how} {_describe_tensors(list({id(x): x for x in outputs.tensors()}.values()))}"


def _describe_tensors(tensors: Sequence[Tensor | None]) -> str:
    return ", ".join(f"{tuple(x.shape)}, {str(x.dtype).removeprefix('torch.')}" for x in tensors if x is not None)


def _sort_calls(calls: list[Any], parts: int) -> list[Any]:
    """Sort the calls of a layer by view, then by part."""
    views, rest = divmod(len(calls), parts)
    if rest:
        raise CaptureError(
            f"a layer ran {len(calls)} times in {parts} micro-batches, but must run equally often in each: tap a layer "
            "that every sample passes through, or leave micro_batch out"
        )
    return [call for view in range(views) for call in calls[view::views]]


def _copy_inputs(inputs: Any) -> Any:
    if isinstance(inputs, Tensor):
        return inputs.detach().clone()
    if isinstance(inputs, Mapping):
        return {k: _copy_inputs(v) for k, v in inputs.items()}
    if type(inputs) in (list, tuple):
        return type(inputs)(_copy_inputs(v) for v in inputs)
    return inputs
