"""Reads embedding, logits, maps and classifier out of any network, without touching its code."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Union

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_rkd.distillation.pooling import cls_token as cls_token
from lightning_rkd.distillation.pooling import global_pool as global_pool
from lightning_rkd.distillation.pooling import mean_pool as mean_pool
from lightning_rkd.utils.types import Outputs


class Tap:
    """A place in a network, and how to read it.

    Args:
        layer: Dotted path of a submodule (``""`` is the network itself), or a function from network to submodule.
        at: ``"output"`` or ``"input"`` of the layer. ``None`` reads the output, except at an ``nn.Linear``, which is
            taken for a classifier: its input is the embedding, its output the logits. For a Linear that *makes* the
            embedding write ``at="output"``.
        read: ``read(output, kwargs)`` turns what the layer returned (and was called with by keyword) into a tensor or
            an ``Outputs``: :func:`mean_pool`, :func:`cls_token`, :func:`global_pool`, or
            your own.

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
"""Where to read a network; a function must return a submodule.

The order matters to jsonargparse: Callable first would turn a dict into a partial. And were the function declared to
return an ``nn.Module``, it would look for every path among the names of all modules there are, for seconds.
"""


class LayerNotFoundError(ValueError):
    """A dotted path that names no submodule."""


class CaptureError(RuntimeError):
    """The tapped layer did not show in this step what the loss needs."""


def find_layer(network: nn.Module, layer: str | Callable[[nn.Module], nn.Module]) -> nn.Module:
    """The submodule behind a dotted path or a function.

    Raises:
        LayerNotFoundError: No such path; the message lists the nearest ones.

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
    # what torch.compile wraps keeps the names that it had
    modules = {name.replace("_orig_mod.", ""): module for name, module in full.items()}
    if layer in modules:
        return modules[layer]
    near = difflib.get_close_matches(layer, modules, n=5, cutoff=0.5) or [n for n, _ in network.named_children()][:8]
    raise LayerNotFoundError(
        f"{type(network).__name__} has no layer {layer!r}; near it: {', '.join(map(repr, near)) or 'it has no layers'}"
    )


class FeatureReader:
    """Records what one network shows at its taps while it is switched on.

    ``attach`` hooks the network, ``start`` switches on, ``take`` returns what was seen since and switches off. A tensor
    that was written to after the layer (an in-place operation) is returned as the layer gave it.

    Args:
        layer: Any form of :data:`Layer`; ``None`` is the network's own output.
        side: ``"student"`` or ``"teacher"``, for messages.

    Attributes:
        rows: How many rows the first layer showed in each call, as last taken.
    """

    def __init__(self, layer: Layer | None, side: str) -> None:
        self.side = side
        self.taps: dict[str, list[Tap]] = {}
        self._lists: set[str] = set()
        entries = layer if isinstance(layer, Mapping) else {"": layer}
        if not entries:
            raise ValueError(f"{side}_layer is an empty dict; name at least one tap")
        for name, entry in entries.items():
            if isinstance(entry, Sequence) and not isinstance(entry, str):
                self._lists.add(name)
                self.taps[name] = [_as_tap(e) for e in entry]
            else:
                self.taps[name] = [_as_tap(entry)]
        self.rows: list[int] = []
        self._handles: list[RemovableHandle] = []
        self._seen: dict[str, list[list[_Kept]]] = {}
        self._before: dict[str, list[list[_Kept]]] = {}
        self.on = False

    def __getstate__(self) -> dict[str, Any]:
        """What copies and pickles take over: they have hooked nothing."""
        return self.__dict__ | {"_handles": [], "_seen": {}, "_before": {}, "on": False}

    def attach(self, network: nn.Module) -> None:
        """Hook the layers, after checking that they all exist.

        Raises:
            LayerNotFoundError: One does not.
            CaptureError: The network is TorchScript.
        """
        self.detach()
        if isinstance(network, torch.jit.ScriptModule):
            raise CaptureError(
                f"the {self.side} is TorchScript, whose layers PyTorch lets nobody read: wrap it in an nn.Module whose "
                "forward calls it"
            )
        found = {name: [(find_layer(network, tap.layer), tap) for tap in taps] for name, taps in self.taps.items()}
        for name, layers in found.items():
            for position, (module, tap) in enumerate(layers):
                hook = Hook(lambda *call, n=name, p=position, t=tap: self._record(n, p, t, *call))
                if tap.at == "input":  # before the layer runs: it may write over its input
                    self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
                else:
                    self._handles.append(module.register_forward_hook(hook, with_kwargs=True))

    def detach(self) -> None:
        """Take the hooks off; safe to call twice."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self.stop()

    def start(self) -> None:
        """Forget what was seen and record from now on."""
        self._seen, self._before = {name: [[] for _ in taps] for name, taps in self.taps.items()}, {}
        self.on = True

    def start_again(self) -> None:
        """Record from now on; what was seen before is taken only if no layer runs again."""
        if self.on and _any_call(self._seen):
            before = self._seen
            self.start()
            self._before = before

    def stop(self) -> None:
        """Record no more and forget what was seen."""
        self.on, self._seen, self._before = False, {}, {}

    def collect(self) -> tuple[dict[str, Outputs], int]:
        """What was seen since ``start``, per tap, calls concatenated; and how many calls there were.

        Raises:
            CaptureError: A tapped layer never ran, or the layers ran unequally often.
        """
        seen = self._seen if _any_call(self._seen) or not self._before else self._before
        self.stop()
        calls = {
            f"{tap.layer!r}": len(one)
            for name, layers in seen.items()
            for tap, one in zip(self.taps[name], layers, strict=True)
        }
        for layer, count in calls.items():
            if count == 0:
                raise CaptureError(
                    f"the {self.side} layer {layer} was never called in this step. Name a layer that runs through "
                    "its __call__ (not .forward); under torch.compile attach before the first compiled call, or call "
                    "torch._dynamo.reset()"
                )
        if len(set(calls.values())) > 1:
            raise CaptureError(f"the {self.side} layers ran unequally often in one step: {calls}")
        first = next(iter(seen.values()))[0]
        self.rows = [len(tensors[0]) for kept in first if (tensors := kept.shown().tensors())]
        outputs = {}
        for name, layers in seen.items():
            if name in self._lists:
                shown = [_joined([kept.shown() for kept in one]) for one in layers]
                outputs[name] = Outputs(feature_maps=[m for o in shown for m in o.feature_maps or []])
            else:
                outputs[name] = _joined([kept.shown() for kept in layers[0]])
        return outputs, next(iter(calls.values()))

    def _record(
        self, name: str, position: int, tap: Tap, module: nn.Module, args: Any, kwargs: Any, output: Any = None
    ) -> None:
        if self.on:
            self._seen[name][position].append(_Kept(_show(tap, module, args, kwargs, output)))


class Hook:
    """A forward hook that stays behind when its module is copied or pickled: the copy gets an inert one."""

    def __init__(self, function: Callable[..., None] | None = None) -> None:
        self.function = function

    def __call__(self, *call: Any) -> None:
        """Pass module, args, kwargs and, after the layer ran, output on."""
        if self.function is not None:
            self.function(*call)

    def __deepcopy__(self, memo: dict[int, Any]) -> Hook:
        return Hook()

    def __reduce__(self) -> tuple[type[Hook], tuple[()]]:
        return Hook, ()


class InputReader:
    """Records the positional and keyword inputs of every call of one layer while it is switched on."""

    def __init__(self, layer: str | Callable[[nn.Module], nn.Module]) -> None:
        self.layer = layer
        self._handle: RemovableHandle | None = None
        self._seen: list[Any] = []
        self._before: list[Any] = []
        self.on = False

    def __getstate__(self) -> dict[str, Any]:
        """What copies and pickles take over: they have hooked nothing."""
        return self.__dict__ | {"_handle": None, "_seen": [], "_before": [], "on": False}

    def attach(self, network: nn.Module) -> None:
        """Hook the layer."""
        self.detach()
        module = find_layer(network, self.layer)
        self._handle = module.register_forward_pre_hook(Hook(self._record), with_kwargs=True)

    def detach(self) -> None:
        """Take the hook off; safe to call twice."""
        if self._handle is not None:
            self._handle.remove()
        self._handle = None
        self.stop()

    def start(self) -> None:
        """Forget what was seen and record from now on."""
        self._seen, self._before, self.on = [], [], True

    def start_again(self) -> None:
        """Record from now on; what was seen before is taken only if the layer does not run again."""
        if self.on and self._seen:
            self._seen, self._before = [], self._seen

    def stop(self) -> None:
        """Record no more and forget what was seen."""
        self._seen, self._before, self.on = [], [], False

    def collect(self) -> list[Any]:
        """The inputs of every call since ``start``."""
        seen = self._seen or self._before
        self.stop()
        return seen

    def _record(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.on:
            if len(args) + bool(kwargs) != 1:
                raise CaptureError(
                    f"input_layer {self.layer!r} is called with {len(args)} positional and {len(kwargs)} keyword "
                    "inputs; the teacher can be fed from a layer that takes one tensor, or keywords only"
                )
            self._seen.append(_copied(args[0] if args else kwargs))


def read(network: nn.Module, layer: Layer | None, *args: Any, **kwargs: Any) -> Outputs:
    """Call a network once and return what it showed at one layer.

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


def _show(tap: Tap, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Outputs:
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


class _Kept:
    """What a layer showed, safe from in-place operations behind it.

    The tensors themselves are preferred to their copies: gradients then add up in the order in which they would had the
    loss been written into the step, to the last bit.
    """

    def __init__(self, shown: Outputs) -> None:
        self.original, self.writes = shown, _writes(shown)
        copies = {id(t): t.clone() for t in {id(t): t for t in shown.tensors()}.values()}
        self.copy = Outputs(
            embedding=None if shown.embedding is None else copies[id(shown.embedding)],
            logits=None if shown.logits is None else copies[id(shown.logits)],
            feature_maps=None if shown.feature_maps is None else [copies[id(m)] for m in shown.feature_maps],
            classifier=shown.classifier,
        )

    def shown(self) -> Outputs:
        return self.original if self.writes is not None and self.writes == _writes(self.original) else self.copy


def _any_call(seen: Mapping[str, list[list[_Kept]]]) -> bool:
    return any(one for layers in seen.values() for one in layers)


def _writes(shown: Outputs) -> list[int] | None:
    """How often each tensor has been written to; ``None`` where that is not counted."""
    tensors = shown.tensors()
    if torch.compiler.is_compiling() or any(t.is_inference() for t in tensors):
        return None
    return [t._version for t in tensors]


def _joined(shown: list[Outputs]) -> Outputs:
    """Several calls as one: rows concatenated, call by call."""
    if len(shown) == 1:
        return shown[0]

    def cat(parts: list[Tensor | None]) -> Tensor | None:
        tensors = [p for p in parts if p is not None]
        same = len(tensors) == len(parts) and len({p.shape[1:] for p in tensors}) == 1
        return torch.cat(tensors) if same else None  # maps of different crops cannot be one tensor

    maps = [cat(list(level)) for level in zip(*(o.feature_maps or [] for o in shown), strict=True)]
    return Outputs(
        embedding=cat([o.embedding for o in shown]),
        logits=cat([o.logits for o in shown]),
        feature_maps=[m for m in maps if m is not None] if maps and all(m is not None for m in maps) else None,
        classifier=shown[-1].classifier,
    )


def _copied(inputs: Any) -> Any:
    if isinstance(inputs, Tensor):
        return inputs.detach().clone()
    if isinstance(inputs, Mapping):
        return {k: _copied(v) for k, v in inputs.items()}
    if type(inputs) in (list, tuple):
        return type(inputs)(_copied(v) for v in inputs)
    return inputs
