"""The teacher: a frozen network that is nobody's submodule."""

from __future__ import annotations

import os
import pickle
import zipfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_rkd.distributed import Group, gather_rows, rank_and_size, together
from lightning_rkd.records import Batch, Outputs
from lightning_rkd.taps import Layer, Reader


class Teacher:
    """Holds a network that teaches: in eval mode, without gradients, and registered nowhere.

    Being no ``nn.Module``, it is absent from checkpoints, optimizers, parameter counts, DDP buckets, ``train()`` and
    ``unfreeze()``. Copies of whatever refers to it share the one network.

    Args:
        network: The teacher network. It is moved and cast when training begins and handed back as it was.
        weights: File with the network's weights, read when training begins and never before: a Lightning checkpoint
            (of ``DistillationModule`` or any module that holds the network under some prefix), a state dict saved with
            ``torch.save``, or a ``.safetensors`` file. ``None`` takes the network as it is.
        move: Whether to move and cast the network; ``False`` for one that is sharded or quantised.

    Example:
        >>> teacher = Teacher(nn.Linear(4, 3))
        >>> teacher.attach(None)
        >>> teacher(Batch(inputs=torch.ones(2, 4)))[""].embedding.shape
        torch.Size([2, 3])
    """

    def __init__(self, network: nn.Module, weights: str | Path | None = None, move: bool = True) -> None:
        if not isinstance(network, nn.Module):
            raise TypeError(f"a teacher is an nn.Module, got {type(network).__name__}")
        self.network, self.weights, self.move = network, weights, move
        self._loaded = weights is None
        self._reader: Reader | None = None
        self._modes: list[tuple[nn.Module, bool]] = []
        self._away = False

    def __deepcopy__(self, memo: dict[int, Any]) -> Teacher:
        return self

    def __getstate__(self) -> dict[str, Any]:
        """What shallow copies and pickles take over: not the hooks, nor the duty to hand the network back."""
        return self.__dict__ | {"_reader": None, "_modes": [], "_away": False}

    def attach(self, layer: Layer | None) -> None:
        """Read the weights file if there is one, and hook the layer."""
        if not self._loaded:
            assert self.weights is not None
            together(partial(load_weights, self.network, self.weights))  # a machine may lack the file
            self._loaded = True
        self.detach()
        self._reader = Reader(layer, "teacher")
        self._reader.attach(self.network)
        self._modes = [(module, module.training) for module in self.network.modules()]

    def detach(self) -> None:
        """Take the hooks off and hand the network back as it was."""
        if self._reader is not None:
            self._reader.detach()
        for module, training in self._modes:
            module.training = training
        self._modes = []
        if self._away:
            self._away = False
            _homes[self.network].leave()

    def to(self, device: torch.device | str, convert: Callable[[nn.Module], nn.Module] | None = None) -> bool:
        """Move the network, after ``convert`` (a precision plugin's) has cast it; :meth:`detach` undoes both.

        Returns whether there was something to do: not for a teacher that has been moved already, or that must not be.
        """
        if not self.move or self._away:
            return False
        _Home.of(self.network).enter()
        self._away = True
        if convert is not None:
            convert(self.network)
        self.network.to(device)
        return True

    def __call__(self, batch: Batch, calls: list[Any] | None = None) -> dict[str, Outputs]:
        """What the teacher shows for a batch, per tap.

        Args:
            batch: Its ``teacher_inputs`` are used where given, else its ``inputs``.
            calls: Inputs to use instead, one entry per student call; the results are concatenated.
        """
        if self._reader is None:
            raise RuntimeError("attach the teacher to a layer before calling it")
        if calls is None:
            calls = [batch.inputs if batch.teacher_inputs is None else batch.teacher_inputs]
        self.network.eval()
        self._reader.start()
        try:
            with torch.no_grad():
                for inputs in calls:
                    self.network(**inputs) if isinstance(inputs, Mapping) else self.network(inputs)
            outputs, _ = self._reader.take()
        finally:
            self._reader.stop()
        return outputs

    def shares_parameters_with(self, network: nn.Module) -> bool:
        """Whether training ``network`` would change the teacher."""
        own = {id(p) for p in self.network.parameters()}
        return any(id(p) in own for p in network.parameters())

    def check_same_on_ranks(self, group: Group = None) -> None:
        """Compare a checksum of the weights over ranks, which DDP does not broadcast for a teacher.

        Raises:
            RuntimeError: Ranks hold different teachers.
        """
        tensors = [t.detach() for t in (*self.network.parameters(), *self.network.buffers())]
        if not tensors or rank_and_size(group)[1] == 1:
            return
        checksum = torch.stack([number * _checksum(t) for number, t in enumerate(tensors, start=1)]).sum()
        every = gather_rows(checksum[None], group=group).tolist()
        if len(set(every)) > 1:
            raise RuntimeError(
                f"the teacher's weights differ between ranks (checksums {every}): build it from the same weights file "
                "or seed on every rank"
            )


class _Home:
    """Where the tensors of a network were before teachers moved it. The last teacher to leave puts them back."""

    def __init__(self, network: nn.Module) -> None:
        self.network, self.teachers = network, 0
        self.tensors = [(p, p.data) for p in network.parameters()]
        self.slots = [(m, dict(m._parameters), dict(m._buffers)) for m in network.modules()]  # .to() replaces buffers

    @staticmethod
    def of(network: nn.Module) -> _Home:
        return _homes[network] if network in _homes else _Home(network)

    def enter(self) -> None:
        _homes[self.network] = self
        self.teachers += 1

    def leave(self) -> None:
        self.teachers -= 1
        if self.teachers:
            return
        del _homes[self.network]
        for tensor, data in self.tensors:
            tensor.data = data
        for module, parameters, buffers in self.slots:
            module._parameters.update(parameters)
            module._buffers.update(buffers)


_homes: dict[nn.Module, _Home] = {}  # of the networks that are away; several callbacks may share one


def _checksum(x: Tensor) -> Tensor:
    """Of the bits, in integers: the same on every machine, in whatever order it is summed up."""
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    flat = torch.view_as_real(x).reshape(-1) if x.is_complex() else x.reshape(-1)
    return flat.view(kinds[flat.element_size()]).sum(dtype=torch.int64)


def load_weights(network: nn.Module, path: str | os.PathLike[str]) -> None:
    """Load a network's weights from a Lightning checkpoint, a state dict or a safetensors file, every key matched.

    A prefix common to the network's keys (``student.`` in a checkpoint of ``DistillationModule``, ``model.`` in many
    others) is found and taken off.

    Raises:
        FileNotFoundError: No such file.
        ValueError: The file is damaged, or its keys or shapes do not fit the network.

    Example:
        >>> import tempfile
        >>> net, file = nn.Linear(2, 1), tempfile.NamedTemporaryFile(suffix=".pt")
        >>> torch.save({"state_dict": {"student.weight": torch.ones(1, 2), "student.bias": torch.ones(1)}}, file.name)
        >>> load_weights(net, file.name); net.weight
        Parameter containing:
        tensor([[1., 1.]], requires_grad=True)
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"the weights file {str(path)!r} does not exist; train the network first, or correct it"
        )
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            state: Any = load_file(path)
        except SafetensorError as error:
            raise ValueError(f"the weights file {str(path)!r} is damaged or cut short ({error})") from error
    else:
        check_file(path)
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
            raise ValueError(f"{str(path)!r} holds no weights that can be read safely: {error}") from error
        state = state.get("state_dict", state) if isinstance(state, Mapping) else {}
    shapes = {k: tuple(v.shape) for k, v in state.items() if isinstance(v, Tensor)}
    wanted = {k: tuple(v.shape) for k, v in network.state_dict().items()}
    first = next(iter(wanted), "")
    prefixes = {key.removesuffix(first) for key in shapes if f".{key}".endswith(f".{first}")}
    misfits = {p: [k for k, shape in wanted.items() if shapes.get(p + k) != shape] for p in prefixes}
    fitting = sorted(p for p, misfit in misfits.items() if not misfit)
    for prefix in ("student.", "", *fitting):
        if prefix in fitting and (prefix in ("student.", "") or len(fitting) == 1):
            network.load_state_dict({k: state[prefix + k] for k in wanted})
            return
    if fitting:
        raise ValueError(
            f"{str(path)!r} holds weights of this {type(network).__name__} under several prefixes, {fitting}; "
            "save the state dict of the one you mean to a file of its own"
        )
    message = f"{str(path)!r} does not hold the weights of this {type(network).__name__}: "
    if misfits:
        prefix = min(misfits, key=lambda p: (len(misfits[p]), p))
        key = misfits[prefix][0]
        have = f"has shape {shapes[prefix + key]} in the file" if prefix + key in shapes else "is not in the file"
        raise ValueError(
            f"{message}{prefix + key!r} {have}, the network needs {wanted[key]} "
            f"({len(misfits[prefix])} of {len(wanted)} tensors do not fit)"
        )
    raise ValueError(
        f"{message}it needs {len(wanted)} tensors such as {first!r}, the file has {sorted(shapes)[:3] or 'none'}"
    )


def check_file(path: str | os.PathLike[str]) -> None:
    """Verify the checksums inside a file written by ``torch.save``; a flipped bit would otherwise load in silence.

    Raises:
        ValueError: The file is cut short or damaged; the message names it.
    """
    with Path(path).open("rb") as file:
        if file.read(2) != b"PK":
            return  # the format before torch 1.6 carries no checksums
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except (zipfile.BadZipFile, EOFError) as error:
        raise ValueError(
            f"the checkpoint {str(path)!r} is damaged or cut short ({error}); use an earlier one"
        ) from error
    if damaged is not None:
        raise ValueError(f"the checkpoint {str(path)!r} is damaged in {damaged!r}; use an earlier one")
