"""Teachers written in YAML, with their weights as paths, through the real command line and both faces."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

from lightning_rkd.callbacks.distillation import RelationalDistillation
from lightning_rkd.cli import main as cli
from lightning_rkd.distillation.teachers import BaseTeacher, EnsembleTeacher, Teacher
from tests.harness import toys
from tests.harness.faces import FACES

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:You defined a .validation_step. but have no:UserWarning"),
]


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(cli.TRACEBACK, "1")
    handler = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, handler)


class Data(pl.LightningDataModule):
    def train_dataloader(self) -> Any:
        return toys.loader()


def narrow() -> nn.Module:
    """A teacher whose own weights are nobody's business."""
    return toys.teacher(norm=True, seed=11)


class Wide(toys.Backbone):
    def __init__(self) -> None:
        super().__init__(width=12, out=9)


class Watches(pl.Callback):
    """Keeps the teacher of a run, and what it knew and showed in the middle of it."""

    teacher: ClassVar[BaseTeacher]
    weights: ClassVar[list[dict[str, torch.Tensor]]]

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        face = next((c for c in trainer.callbacks if isinstance(c, RelationalDistillation)), pl_module)
        Watches.teacher = face.distiller.teacher
        members = [Watches.teacher] if isinstance(Watches.teacher, Teacher) else Watches.teacher.teachers.values()
        Watches.weights = [{k: v.clone() for k, v in member.network.state_dict().items()} for member in members]
        assert all(member._home is not None for member in members), "they are attached"


def configuration(face: str, teacher: str, loss: str = "RKD") -> Path:
    """A recipe with that teacher, an indented block."""
    distillation = f"""loss: {loss}
        student_layer: {"backbone" if face == "callback" else "last"}
        teacher:
          {teacher.strip()}"""
    own = "{class_path: tests.harness.toys.Student}"
    if face == "module":
        own = f"""
      class_path: DistillationModule
      init_args:
        student: tests.harness.toys.Backbone
        optimizer: {{class_path: torch.optim.SGD, init_args: {{lr: 0.1}}}}
        {distillation}"""
    attached = ""
    if face == "callback":
        attached = f"""
    - class_path: RelationalDistillation
      init_args:
        {distillation}"""
    Path("mine.yaml").write_text(
        f"""
model: {own}
data: tests.distillation.teachers.test_command_line.Data
trainer:
  callbacks:
    - class_path: tests.distillation.teachers.test_command_line.Watches{attached}
  accelerator: cpu
  devices: 1
  max_epochs: 1
  logger: false
  enable_progress_bar: false
  enable_model_summary: false
"""
    )
    return Path("mine.yaml")


def holds(weights: dict[str, torch.Tensor], network: nn.Module) -> bool:
    state = network.state_dict()
    return list(weights) == list(state) and all(torch.equal(weights[k], state[k]) for k in state)


@pytest.mark.parametrize("face", FACES)
def test_a_teacher_gets_its_weights_from_a_checkpoint(face: str) -> None:
    source = toys.teacher(norm=True, seed=1)
    torch.save({"state_dict": {f"student.{k}": v for k, v in source.state_dict().items()}}, "teacher.ckpt")
    teacher = """
          class_path: Teacher
          init_args:
            network: tests.distillation.teachers.test_command_line.narrow
            weights: teacher.ckpt
    """
    assert cli.main(["fit", "--config", str(configuration(face, teacher))]) == 0
    (weights,) = Watches.weights
    assert holds(weights, source)
    assert isinstance(Watches.teacher, Teacher)
    assert toys.attachments(Watches.teacher.network) == []


@pytest.mark.parametrize("face", FACES)
def test_several_teachers_get_theirs_and_may_be_overridden_by_name(face: str) -> None:
    sources = [toys.teacher(norm=True, seed=1), Wide()]
    for name, source in zip(("narrow", "wide"), sources, strict=True):
        torch.save(source.state_dict(), f"{name}.pt")
    torch.save(Wide().state_dict(), "later.pt")
    teacher = """
          class_path: EnsembleTeacher
          init_args:
            combine: losses
            weights: {wide: 3}
            layers: {narrow: drop, wide: {class_path: Tap, init_args: {layer: last, at: output}}}
            teachers:
              narrow:
                class_path: Teacher
                init_args: {network: tests.distillation.teachers.test_command_line.narrow, weights: narrow.pt}
              wide:
                class_path: Teacher
                init_args: {network: tests.distillation.teachers.test_command_line.Wide, weights: wide.pt}
    """
    run = ["fit", "--config", str(configuration(face, teacher))]
    override = ["--model.init_args.teacher.init_args.teachers.wide.init_args.weights=later.pt"]
    for extra, wide in (([], "wide.pt"), (override, "later.pt"))[: 1 if face == "callback" else 2]:
        assert cli.main([*run, *extra]) == 0
        assert isinstance(Watches.teacher, EnsembleTeacher)
        assert holds(Watches.weights[0], sources[0])
        expected = Wide()
        expected.load_state_dict(torch.load(wide))
        assert holds(Watches.weights[1], expected)
        assert (Watches.teacher.combine, Watches.teacher.weights) == ("losses", {"narrow": 0.25, "wide": 0.75})
        assert Watches.teacher.layers["narrow"] == "drop"


@pytest.mark.parametrize("face", FACES)
def test_teachers_may_be_a_list_of_plain_networks(face: str) -> None:
    teacher = """
          class_path: EnsembleTeacher
          init_args:
            weights: [1, 4]
            layers: [first, null]
            teachers:
              - tests.distillation.teachers.test_command_line.narrow
              - tests.distillation.teachers.test_command_line.Wide
    """
    assert cli.main(["fit", "--config", str(configuration(face, teacher))]) == 0
    assert isinstance(Watches.teacher, EnsembleTeacher)
    assert (Watches.teacher.combine, Watches.teacher.weights) == ("relations", {"0": 0.2, "1": 0.8})
    assert Watches.teacher.layers == {"0": "first", "1": None}


@pytest.mark.parametrize("face", FACES)
def test_a_missing_weights_file_is_named(face: str) -> None:
    teacher = """
          class_path: Teacher
          init_args: {network: tests.distillation.teachers.test_command_line.narrow, weights: nowhere.ckpt}
    """
    with pytest.raises(FileNotFoundError, match=r"the weights file 'nowhere\.ckpt' does not exist"):
        cli.main(["fit", "--config", str(configuration(face, teacher))])
