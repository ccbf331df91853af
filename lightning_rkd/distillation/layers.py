"""Layers of any network, and how their features are read."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from typing import Any, Literal, Union

from torch import nn


class Tap:
    """A layer of a network and how to read its features.

    A layer gives its output, whatever its class and however it is wrapped (compiled, quantised, LoRA): the flat output
    serves losses that read the embedding, and those that read the logits.

    Args:
        layer: Dotted path of a submodule (``""`` is the network itself), or a function from network to submodule.
        at: What is read of the layer. ``"output"`` and ``"input"`` (its first argument) read one tensor.
            ``"classifier"`` reads a layer that makes logits: its input is the embedding, its output the logits, and
            its ``weight`` (K, D) and ``bias``, if it has them, are the classifier.
        read: Reads a tensor from an output that is not one: the name of a field of a mapping or ``ModelOutput``, such
            as ``"pooler_output"``, or a function ``read(output, arguments)`` to a tensor or ``Outputs``:
            :func:`mean_pool`, :func:`last_token_pool`, :func:`cls_token`, :func:`global_pool` or your own.
            ``arguments`` maps the names of the parameters of the layer's ``forward`` to the arguments of the call,
            however they were passed; arguments without a name have their position as the key.

    Example:
        >>> import torch
        >>> from lightning_rkd.distillation.features import read
        >>> net = nn.Sequential(nn.Linear(4, 3), nn.ReLU())
        >>> read(net, "0", torch.ones(2, 4)).embedding.shape
        torch.Size([2, 3])
        >>> head = read(net, Tap("0", at="classifier"), torch.ones(2, 4))
        >>> head.embedding.shape, head.logits.shape, head.classifier[0].shape
        (torch.Size([2, 4]), torch.Size([2, 3]), torch.Size([3, 4]))
    """

    def __init__(
        self,
        layer: Union[Callable[[nn.Module], Any], str] = "",  # noqa: UP007 - Callable first, for jsonargparse
        at: Literal["output", "input", "classifier"] = "output",
        read: Union[Callable[[Any, Mapping[Any, Any]], Any], str, None] = None,  # noqa: UP007 - as above
    ) -> None:
        if at not in ("output", "input", "classifier"):
            raise ValueError(f"Tap.at must be 'output', 'input' or 'classifier', got {at!r}")
        if at == "classifier" and read is not None:
            raise ValueError("Tap(at='classifier') reads input and output as they are: leave read out")
        self.layer, self.at, self.read = layer, at, read

    def __repr__(self) -> str:
        return f"Tap({self.layer!r}, at={self.at!r})"


Layer = Union[Tap, dict[str, Union[Tap, list[str], str]], list[str], Callable[[nn.Module], Any], str]  # noqa: UP007
"""Where features are read: a dotted path, a function from network to submodule, a :class:`Tap`, a list of paths or taps
(feature maps), or a dict of named taps. A layer gives its output.

The types serve jsonargparse: the dict stands before the function, which would turn it into a partial, and the function
returns ``Any``, since for ``nn.Module`` all importable modules would be searched for every path, which takes seconds.
"""


class LayerNotFoundError(ValueError):
    """A dotted path is not the name of a submodule.

    Attributes:
        layer: The path.
    """

    def __init__(self, message: str, layer: str = "") -> None:
        super().__init__(message)
        self.layer = layer


class CaptureError(RuntimeError):
    """A tapped layer did not provide what a loss needs in this step."""


def find_layer(network: nn.Module, layer: str | Callable[[nn.Module], nn.Module]) -> nn.Module:
    """Find a submodule by its dotted path or by a function."""
    if isinstance(layer, nn.Module):
        path = next((name for name, module in network.named_modules() if module is layer), None)
        if path is None:
            raise TypeError(
                f"a layer is a dotted path, such as 'backbone', got a module ({type(layer).__name__}) that is no part "
                f"of {type(network).__name__}"
            )
        raise TypeError(
            f"a layer is a dotted path, which is {path!r} for this one, got the module itself ({type(layer).__name__})"
        )
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
        f"{type(network).__name__} has no layer {layer!r}; near it: {', '.join(map(repr, near)) or 'it has no layers'}",
        layer,
    )


def as_tap(entry: Any) -> Tap:
    """The tap of a layer in any form but a list or a dict of layers."""
    if isinstance(entry, Tap):
        return entry
    if entry is None:
        return Tap()
    if isinstance(entry, str) or callable(entry):
        return Tap(entry)
    raise TypeError(f"a layer is a dotted path, a function, a Tap, a list or a dict of them, got {entry!r}")
