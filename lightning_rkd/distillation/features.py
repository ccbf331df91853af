"""Features of any network without a change to its code: embeddings, logits, feature maps, classifier weights."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, Union

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_rkd.distillation.pooling import cls_token as cls_token
from lightning_rkd.distillation.pooling import global_pool as global_pool
from lightning_rkd.distillation.pooling import mean_pool as mean_pool
from lightning_rkd.utils.private import count_writes
from lightning_rkd.utils.types import Outputs


class Tap:
    """A layer of a network and how to read its features.

    Args:
        layer: Dotted path of a submodule (``""`` is the network itself), or a function from network to submodule.
        at: Whether to read the ``"output"`` or the ``"input"`` of the layer. ``None`` reads the output, except for an
            ``nn.Linear``, which is taken as the classifier: its input is the embedding, and its output the logits. Pass
            ``at="output"`` for a Linear whose output is the embedding.
        read: Function ``read(output, kwargs)`` from the layer's output and keyword arguments to a tensor or
            ``Outputs``: :func:`mean_pool`, :func:`cls_token`, :func:`global_pool` or your own.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 3), nn.ReLU())
        >>> read(net, Tap("0", at="output"), torch.ones(2, 4)).embedding.shape
        torch.Size([2, 3])
    """

    def __init__(
        self,
        layer: Union[Callable[[nn.Module], Any], str] = "",  # noqa: UP007 - Callable first, for jsonargparse
        at: Literal["output", "input"] | None = None,
        read: Callable[[Any, Mapping[str, Any]], Any] | None = None,
    ) -> None:
        if at not in (None, "output", "input"):
            raise ValueError(f"Tap.at must be 'output', 'input' or None, got {at!r}")
        self.layer, self.at, self.read = layer, at, read

    def __repr__(self) -> str:
        return f"Tap({self.layer!r}, at={self.at!r})"


Layer = Union[Tap, dict[str, Union[Tap, list[str], str]], list[str], Callable[[nn.Module], Any], str]  # noqa: UP007
"""Where features are read: a dotted path, a function from network to submodule, a :class:`Tap`, a list of paths or taps
(feature maps), or a dict of named taps.

The types serve jsonargparse: the dict stands before the function, which would turn it into a partial, and the function
returns ``Any``, since for ``nn.Module`` all importable modules would be searched for every path, which takes seconds.
"""


class LayerNotFoundError(ValueError):
    """A dotted path is not the name of a submodule."""


class CaptureError(RuntimeError):
    """A tapped layer did not provide what a loss needs in this step."""


def find_layer(network: nn.Module, layer: str | Callable[[nn.Module], nn.Module]) -> nn.Module:
    """Find a submodule by its dotted path or by a function.

    Raises:
        LayerNotFoundError: The path does not exist; the message lists similar ones.

    Example:
        >>> find_layer(nn.Sequential(nn.ReLU()), "0")
        ReLU()
    """
    if not isinstance(layer, str):
        chosen = layer(network)
        if isinstance(chosen, nn.Module):
            return chosen
        raise TypeError(f"the layer function must return a submodule, got {type(chosen).__name__}")
    full: dict[str, nn.Module] = dict(network.named_modules(remove_duplicate=False))
    if layer in full:
        return full[layer]
    # a network wrapped by torch.compile keeps its paths
    modules = {name.replace("_orig_mod.", ""): module for name, module in full.items()}
    if layer in modules:
        return modules[layer]
    near = [name for name in modules if name.endswith(f".{layer}")]  # inside the wrapper of DDP or Fabric
    near = near or difflib.get_close_matches(layer, modules, n=5, cutoff=0.5)
    near = near or [name for name, _ in network.named_children()][:8]
    raise LayerNotFoundError(
        f"{type(network).__name__} has no layer {layer!r}; near it: {', '.join(map(repr, near)) or 'it has no layers'}"
    )


class _Recorder:
    """Recorder of the calls of hooked layers, between ``start`` and ``stop``. Copies and pickles have no hooks."""

    def __init__(self) -> None:
        self.on = False
        self._handles: list[RemovableHandle] = []
        self._calls: list[list[Any]] = []
        self._earlier: list[list[Any]] = []

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_handles": [], "_calls": [], "_earlier": [], "on": False}

    def detach(self) -> None:
        """Remove the hooks; safe to call twice."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self.stop()

    def start(self) -> None:
        """Start recording; discard earlier calls."""
        self._calls, self._earlier, self.on = [[] for _ in self._handles], [], True

    def restart(self) -> None:
        """Start anew; the calls recorded so far are used if no layer runs again."""
        if self.on and any(self._calls):
            earlier = self._calls
            self.start()
            self._earlier = earlier

    def stop(self) -> None:
        """Stop recording and discard the recorded calls."""
        self._calls, self._earlier, self.on = [], [], False

    def _collect_calls(self) -> list[list[Any]]:
        calls = self._calls if any(self._calls) or not self._earlier else self._earlier
        self._calls, self._earlier, self.on = [], [], False
        return calls


class FeatureReader(_Recorder):
    """Records the outputs of a network at its taps.

    Outputs are those of the layer itself, even if an in-place operation changes the tensor later in the forward pass.

    Args:
        layer: Layer or layers, in any form of :data:`Layer`; ``None`` reads the network's own output.
        network: ``"student"`` or ``"teacher"``, for messages.

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
                self.taps[name] = [_as_tap(e) for e in entry]
            else:
                self.taps[name] = [_as_tap(entry)]
        self._all = [tap for taps in self.taps.values() for tap in taps]

    def attach(self, network: nn.Module) -> None:
        """Hook the layers.

        Raises:
            LayerNotFoundError: A layer does not exist.
            CaptureError: The network is TorchScript, whose layers cannot be hooked.
        """
        self.detach()
        if isinstance(network, torch.jit.ScriptModule):
            raise CaptureError(
                f"the {self.network} is TorchScript, whose layers cannot be hooked: wrap it in an nn.Module whose "
                "forward calls it"
            )
        for number, module in enumerate([find_layer(network, tap.layer) for tap in self._all]):
            hook = Hook(partial(self._record, number))
            if self._all[number].at == "input":  # before the layer runs: it may write over its input
                self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
            else:
                self._handles.append(module.register_forward_hook(hook, with_kwargs=True))

    def collect(self) -> tuple[dict[str, Outputs], int]:
        """Stop recording, and return the outputs by tap, with several calls concatenated, and the number of calls.

        Raises:
            CaptureError: A tapped layer was never called, or the layers were called unequally often.
        """
        recorded = self._collect_calls()
        counts = set(map(len, recorded))
        if len(counts) != 1 or 0 in counts:
            self._refuse(recorded)
        self.rows = [record.rows for record in recorded[0] if record.rows is not None]
        joined = [_join_calls(calls) for calls in recorded]
        outputs, start = {}, 0
        for name, taps in self.taps.items():
            own = joined[start : start + len(taps)]
            start += len(taps)
            if name in self._lists:
                outputs[name] = Outputs(feature_maps=[x for one in own for x in one.feature_maps or []])
            else:
                outputs[name] = own[0]
        return outputs, len(recorded[0])

    def _refuse(self, recorded: list[list[Any]]) -> None:
        if not recorded:
            raise CaptureError(
                f"nothing was recorded of the {self.network}: attach it, and call start() before its forward pass"
            )
        calls = {f"{tap.layer!r}": len(one) for tap, one in zip(self._all, recorded, strict=True)}
        for layer, count in calls.items():
            if count == 0:
                raise CaptureError(
                    f"the {self.network} layer {layer} was never called in this step. Name a layer that runs through "
                    "its __call__ (not .forward); under torch.compile attach before the first compiled call, or call "
                    "torch.compiler.reset()"
                )
        raise CaptureError(f"the {self.network} layers ran unequally often in one step: {calls}")

    def _record(self, number: int, module: nn.Module, args: Any, kwargs: Any, output: Any = None) -> None:
        if self.on:
            self._calls[number].append(_Record(_read_call(self._all[number], module, args, kwargs, output)))


class InputReader(_Recorder):
    """Records the inputs of every call of a layer that takes one argument, or keyword arguments only."""

    def __init__(self, layer: str | Callable[[nn.Module], nn.Module]) -> None:
        super().__init__()
        self.layer = layer

    def attach(self, network: nn.Module) -> None:
        """Hook the layer."""
        self.detach()
        module = find_layer(network, self.layer)
        self._handles = [module.register_forward_pre_hook(Hook(self._record), with_kwargs=True)]

    def collect(self) -> list[Any]:
        """Stop recording, and return the inputs of every call."""
        return self._collect_calls()[0]

    def _record(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.on:
            if len(args) + bool(kwargs) != 1:
                raise CaptureError(
                    f"input_layer {self.layer!r} is called with {len(args)} positional and {len(kwargs)} keyword "
                    "inputs; the teacher can be fed from a layer that takes one tensor, or keywords only"
                )
            self._calls[0].append(_copy_inputs(args[0] if args else kwargs))


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


def read(network: nn.Module, layer: Layer | None, *args: Any, **kwargs: Any) -> Outputs:
    """Call a network and return its outputs at a layer.

    Example:
        >>> net = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
        >>> out = read(net, "1", torch.ones(2, 2, 2))
        >>> out.embedding.shape, out.logits.shape, out.classifier[0].shape
        (torch.Size([2, 4]), torch.Size([2, 3]), torch.Size([3, 4]))
    """
    reader = FeatureReader(layer, "network")
    reader.attach(network)
    try:
        reader.start()
        network(*args, **kwargs)
        outputs, _ = reader.collect()
    finally:
        reader.detach()
    return next(iter(outputs.values()))


def _as_tap(entry: Any) -> Tap:
    if isinstance(entry, Tap):
        return entry
    if entry is None:
        return Tap("", at="output")
    if isinstance(entry, str) or callable(entry):
        return Tap(entry)
    raise TypeError(f"a layer is a dotted path, a function, a Tap, a list or a dict of them, got {entry!r}")


def _read_call(tap: Tap, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Outputs:
    """Outputs of one call of a tapped layer."""
    given: Any = args[0] if args else next(iter(kwargs.values()), None)
    if tap.at is None and tap.read is None and isinstance(module, nn.Linear):
        return Outputs(given, output, [given], (module.weight, module.bias))
    value = given if tap.at == "input" else output
    if tap.read is not None:
        value = tap.read(value, kwargs)
        if isinstance(value, Outputs):
            return value
    if not isinstance(value, Tensor):
        raise CaptureError(
            f"the layer {tap.layer!r} ({type(module).__name__}) gives a {type(value).__name__}, not a tensor; "
            "say how to read it: Tap(layer, read=mean_pool), cls_token, global_pool or your own function"
        )
    flat = value.flatten(1) if value.ndim == 4 and value.shape[2:] == (1, 1) else value
    return Outputs(embedding=flat, logits=flat, feature_maps=[value])


class _Record:
    """Outputs of one call, protected from later in-place operations.

    The tensors themselves are preferred to their copies, since gradients then add up in the same order, and to the same
    bits, as for a loss written in ``training_step``.
    """

    def __init__(self, outputs: Outputs) -> None:
        self._original = outputs
        self.rows: int | None = None
        self._tensors: dict[int, tuple[Tensor, Tensor, int]] = {}
        counted = not torch.compiler.is_compiling()
        for x in outputs.tensors():
            self.rows = len(x) if self.rows is None else self.rows
            if id(x) not in self._tensors:
                counted = counted and not x.is_inference()
                self._tensors[id(x)] = x, x.clone(), count_writes(x) if counted else -1
        self._counted = counted  # writes are not counted in inference mode and under compilation

    def outputs(self) -> Outputs:
        unchanged = self._counted
        for x, _, version in self._tensors.values():
            unchanged = unchanged and count_writes(x) == version
        return self._original if unchanged else self._original.map(lambda x: self._tensors[id(x)][1])


def _join_calls(records: list[_Record]) -> Outputs:
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


def _copy_inputs(inputs: Any) -> Any:
    if isinstance(inputs, Tensor):
        return inputs.detach().clone()
    if isinstance(inputs, Mapping):
        return {k: _copy_inputs(v) for k, v in inputs.items()}
    if type(inputs) in (list, tuple):
        return type(inputs)(_copy_inputs(v) for v in inputs)
    return inputs
