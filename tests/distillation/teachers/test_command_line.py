"""Teachers in YAML, with their weights as paths, through the real command line, callback and module."""

import signal
from collections.abc import Iterator
from pathlib import Path
from textwrap import indent
from typing import Any, ClassVar

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn

from lightning_rkd.callbacks.distillation import RelationalDistillation
from lightning_rkd.cli import main as cli
from lightning_rkd.distillation.teachers import BaseTeacher, EnsembleTeacher, Teacher
from tests.harness import toys
from tests.harness.faces import FACES

pytestmark = pytest.mark.slow
HERE = __name__


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
    """A teacher whose own weights are replaced by those of the file."""
    return toys.teacher(norm=True, seed=11)


class Wide(toys.Backbone):
    def __init__(self) -> None:
        super().__init__(width=12, out=9)


class Records(pl.Callback):
    """Keeps the teacher of a run and its weights in the middle of it."""

    teacher: ClassVar[BaseTeacher]
    weights: ClassVar[list[dict[str, Tensor]]]

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        face = next((c for c in trainer.callbacks if isinstance(c, RelationalDistillation)), pl_module)
        Records.teacher = face.distiller.teacher
        members = [Records.teacher] if isinstance(Records.teacher, Teacher) else Records.teacher.teachers.values()
        Records.weights = [{k: v.clone() for k, v in member.network.state_dict().items()} for member in members]
        assert all(member._saved_state is not None for member in members), "they are attached"


def fit(face: str, teacher: str, *options: str) -> int:
    """Train with that teacher, a block of YAML."""
    distillation = f"""
loss: RKD
student_layer: {"backbone" if face == "callback" else "last"}
teacher:
{indent(teacher, "  ")}"""
    model, callback = "{class_path: tests.harness.toys.Student}", ""
    if face == "callback":
        callback = f"\n    - class_path: RelationalDistillation\n      init_args:{indent(distillation, ' ' * 8)}"
    else:
        optimizer = "{class_path: torch.optim.SGD, init_args: {lr: 0.1}}"
        arguments = f"\nstudent: tests.harness.toys.Backbone\noptimizer: {optimizer}{distillation}"
        model = f"\n  class_path: DistillationModule\n  init_args:{indent(arguments, ' ' * 4)}"
    Path("mine.yaml").write_text(
        f"""
model: {model}
data: {HERE}.Data
trainer:
  callbacks:
    - class_path: {HERE}.Records{callback}
  accelerator: cpu
  devices: 1
  max_epochs: 1
  logger: false
  enable_progress_bar: false
  enable_model_summary: false
"""
    )
    return cli.main(["fit", "--config", "mine.yaml", *options])


def holds(weights: dict[str, Tensor], network: nn.Module) -> bool:
    state = network.state_dict()
    return list(weights) == list(state) and all(torch.equal(weights[k], state[k]) for k in state)


@pytest.mark.parametrize("face", FACES)
def test_a_teacher_gets_its_weights_from_a_checkpoint(face: str) -> None:
    source = toys.teacher(norm=True, seed=1)
    torch.save({"state_dict": {f"student.{k}": v for k, v in source.state_dict().items()}}, "teacher.ckpt")
    teacher = f"class_path: Teacher\ninit_args: {{network: {HERE}.narrow, weights: teacher.ckpt}}"
    assert fit(face, teacher) == 0
    (weights,) = Records.weights
    assert holds(weights, source)
    assert isinstance(Records.teacher, Teacher)
    assert toys.attachments(Records.teacher.network) == []
    Path("teacher.ckpt").unlink()
    with pytest.raises(FileNotFoundError, match=r"the weights file 'teacher\.ckpt' does not exist"):
        fit(face, teacher)


@pytest.mark.parametrize("face", FACES)
def test_several_teachers_get_theirs_and_may_be_overridden_by_name(face: str) -> None:
    sources = [toys.teacher(norm=True, seed=1), Wide()]
    for name, source in zip(("narrow", "wide"), sources, strict=True):
        torch.save(source.state_dict(), f"{name}.pt")
    torch.save(Wide().state_dict(), "later.pt")
    teacher = f"""
class_path: EnsembleTeacher
init_args:
  combine: losses
  weights: {{wide: 3}}
  layers: {{narrow: drop, wide: {{class_path: Tap, init_args: {{layer: last, at: output}}}}}}
  teachers:
    narrow: {{class_path: Teacher, init_args: {{network: {HERE}.narrow, weights: narrow.pt}}}}
    wide: {{class_path: Teacher, init_args: {{network: {HERE}.Wide, weights: wide.pt}}}}"""
    override = ["--model.init_args.teacher.init_args.teachers.wide.init_args.weights=later.pt"]
    for options, wide in (([], "wide.pt"), (override, "later.pt"))[: 1 if face == "callback" else 2]:
        assert fit(face, teacher, *options) == 0
        assert isinstance(Records.teacher, EnsembleTeacher)
        assert holds(Records.weights[0], sources[0])
        expected = Wide()
        expected.load_state_dict(torch.load(wide))
        assert holds(Records.weights[1], expected)
        assert (Records.teacher.combine, Records.teacher.weights) == ("losses", {"narrow": 0.25, "wide": 0.75})
        assert Records.teacher.layers["narrow"] == "drop"


@pytest.mark.parametrize("face", FACES)
def test_teachers_may_be_a_list_of_plain_networks(face: str) -> None:
    teacher = f"""
class_path: EnsembleTeacher
init_args:
  weights: [1, 4]
  layers: [first, null]
  teachers: [{HERE}.narrow, {HERE}.Wide]"""
    assert fit(face, teacher) == 0
    assert isinstance(Records.teacher, EnsembleTeacher)
    assert (Records.teacher.combine, Records.teacher.weights) == ("relations", {"0": 0.2, "1": 0.8})
    assert Records.teacher.layers == {"0": "first", "1": None}
