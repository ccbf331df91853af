"""Every private name of PyTorch and Lightning that the package uses, so that a new release breaks here first."""

import copy
import inspect
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import lightning_utilities.core.rank_zero as messages
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Subset

from lightning_rkd.utils import private
from tests.harness import toys


@pytest.mark.parametrize("owner", private.OVERRIDDEN)
def test_overridden_methods_exist(owner: str) -> None:
    module, _, name = owner.rpartition(".")
    cls = getattr(import_module(module), name)
    assert all(callable(getattr(cls, method)) for method in private.OVERRIDDEN[owner])


def test_modules_pass_a_function_and_recurse_to_apply() -> None:
    assert [*inspect.signature(nn.Module._apply).parameters] == ["self", "fn", "recurse"]
    assert [*inspect.signature(nn.Module._load_from_state_dict).parameters][:3] == ["self", "state_dict", "prefix"]


def test_trees_of_tensors() -> None:
    tree = {"a": torch.ones(2), "b": [torch.zeros(1), "text"]}
    assert len(private.tree_leaves(tree)) == 3
    assert private.tree_map(lambda x: -x if isinstance(x, torch.Tensor) else x, tree)["a"].tolist() == [-1, -1]


def test_uncompiled_functions_still_compute() -> None:
    assert private.disable_compilation(lambda x: x + 1)(1) == 2


def test_hooks_are_listed_by_their_handles() -> None:
    layer = nn.Linear(2, 2)
    handles = [layer.register_forward_pre_hook(print), layer.register_forward_hook(repr)]
    assert private.list_hooks(layer) == [(handles[0].id, print), (handles[1].id, repr)]


def test_writes_are_counted() -> None:
    x = torch.zeros(2)
    before = private.count_writes(x)
    x.add_(1)
    assert private.count_writes(x) == before + 1


def test_slots_are_put_back_with_identity() -> None:
    net = nn.BatchNorm1d(2)
    weight, mean = net.weight, net.running_mean
    slots = private.get_slots(net)
    net.weight, net.running_mean = nn.Parameter(torch.zeros(2)), torch.ones(2)
    private.set_slots(net, *slots)
    assert net.weight is weight
    assert net.running_mean is mean


def test_ddp_reads_the_ignored_names_and_earlier_ones_return() -> None:
    assert "_ddp_params_and_buffers_to_ignore" in inspect.getsource(nn.parallel.DistributedDataParallel.__init__)
    net = nn.Linear(1, 1)
    undo_first = private.set_ddp_ignored(net, ["weight"])
    undo_second = private.set_ddp_ignored(net, ["bias"])
    assert net._ddp_params_and_buffers_to_ignore == ["bias", "weight"]
    undo_second()
    assert net._ddp_params_and_buffers_to_ignore == ["weight"]
    undo_first()
    assert not hasattr(net, "_ddp_params_and_buffers_to_ignore")


def first_two(loader: Any) -> Any:
    return DataLoader(Subset(loader.dataset, range(2 * loader.batch_size)), loader.batch_size)


class Module(toys.Student):
    """Looks at the trainer during setup."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, Any] = {}

    def setup(self, stage: str) -> None:
        self.seen["loader"] = private.load_dataloaders(self.trainer)
        self.undo = private.wrap_train_dataloader(self.trainer, first_two)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.seen.setdefault("writes", []).append(private.writes_logs(self.trainer))

    def on_train_start(self) -> None:
        self.seen["copies"] = [
            private.is_copy_of_training_module(m) for m in (self, copy.deepcopy(self), nn.Linear(1, 1))
        ]


def test_a_fit_goes_through_every_private_name_of_the_trainer() -> None:
    module, trainer = Module(), toys.trainer(max_epochs=1, log_every_n_steps=2)
    connector = private.set_sigterm_handler(trainer, lambda *_: None)
    assert connector.received_sigterm is False
    assert private.replaces_samplers(trainer) is False, "one device"
    trainer.fit(module, toys.loader())
    assert isinstance(module.seen["loader"], DataLoader)
    assert trainer.global_step == 2, "the wrapped loader has two batches"
    assert module.seen["writes"] == [False, True], "every second step"
    assert module.seen["copies"] == [False, True, False]
    module.undo()


def test_arguments_are_collected_outside_of_the_command_line() -> None:
    class Collects(pl.LightningModule):
        def __init__(self, width: int = 3) -> None:
            super().__init__()
            frame = inspect.currentframe()
            self.found = private.is_built_by_cli(), private.collect_arguments(frame, pl.LightningModule)

    assert Collects(4).found == (False, [{"width": 4}])


NOISY = """
import warnings
import lightning_utilities.core.rank_zero as messages
messages.log = None
warnings.warn("a notice")
"""


def test_pytorch_lightning_is_imported_without_notices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The notice would be an error here, and messages of ``lightning`` would go elsewhere."""
    (tmp_path / "pytorch_lightning.py").write_text(NOISY)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, "pytorch_lightning", None)
    del sys.modules["pytorch_lightning"]
    log = messages.log
    monkeypatch.setattr(messages, "log", log)  # as it was, also after a failure
    assert private.import_pytorch_lightning().__file__ == str(tmp_path / "pytorch_lightning.py")
    assert messages.log is log
