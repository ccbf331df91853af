"""Teachers in YAML, with their weights as paths, through the real command line, callback and module."""

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import lightning.pytorch as pl
import pytest
import torch
import yaml
from jsonargparse import ArgumentParser
from torch import Tensor, nn

from lightning_rkd.callbacks.distillation import RelationalDistillation
from lightning_rkd.cli import main as cli
from lightning_rkd.data import Renormalize
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
        assert all(member._reader is not None for member in members), "they are attached"


def made(class_path: str, **arguments: Any) -> dict[str, Any]:
    return {"class_path": class_path, "init_args": arguments}


def fit(face: str, teacher: dict[str, Any], *options: str) -> int:
    """Train with that teacher, given in YAML."""
    ours: dict[str, Any] = {"loss": "RKD", "teacher": teacher}
    model, callbacks = made("tests.harness.toys.Student"), [made(f"{HERE}.Records")]
    if face == "callback":
        callbacks.append(made("RelationalDistillation", student_layer="backbone", **ours))
    else:
        ours |= {"student": "tests.harness.toys.Backbone", "optimizer": made("torch.optim.SGD", lr=0.1)}
        model = made("DistillationModule", student_layer="last", **ours)
    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary"), False)
    trainer = {"callbacks": callbacks, "accelerator": "cpu", "devices": 1, "max_epochs": 1, **quiet}
    Path("mine.yaml").write_text(yaml.safe_dump({"model": model, "data": f"{HERE}.Data", "trainer": trainer}))
    return cli.main(["fit", "--config", "mine.yaml", *options])


def holds(weights: dict[str, Tensor], network: nn.Module) -> bool:
    state = network.state_dict()
    return list(weights) == list(state) and all(torch.equal(weights[k], state[k]) for k in state)


@pytest.mark.parametrize("face", FACES)
def test_a_teacher_gets_its_weights_from_a_checkpoint(face: str) -> None:
    source = toys.teacher(norm=True, seed=1)
    torch.save({"state_dict": {f"student.{k}": v for k, v in source.state_dict().items()}}, "teacher.ckpt")
    teacher = made("Teacher", network=f"{HERE}.narrow", weights="teacher.ckpt")
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
    teachers = {
        "narrow": made("Teacher", network=f"{HERE}.narrow", weights="narrow.pt"),
        "wide": made("Teacher", network=f"{HERE}.Wide", weights="wide.pt"),
    }
    layers = {"narrow": "drop", "wide": made("Tap", layer="last", at="output")}
    teacher = made("EnsembleTeacher", combine="losses", weights={"wide": 3}, layers=layers, teachers=teachers)
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
    teachers = [f"{HERE}.narrow", f"{HERE}.Wide"]
    teacher = made("EnsembleTeacher", weights=[1, 4], layers=["first", None], teachers=teachers)
    assert fit(face, teacher) == 0
    assert isinstance(Records.teacher, EnsembleTeacher)
    assert (Records.teacher.combine, Records.teacher.weights) == ("relations", {"0": 0.2, "1": 0.8})
    assert Records.teacher.layers == {"0": "first", "1": None}


class Doubles(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


def halves(x: Tensor) -> Tensor:
    return x / 2


TRANSFORMS: dict[str, tuple[Any, list[str]]] = {
    "a module": (f"{HERE}.Doubles", ["Doubles()"]),
    "several": ([f"{HERE}.Doubles", f"{HERE}.Doubles"], ["Doubles()", "Doubles()"]),
    "a function": (f"{HERE}.halves", [repr(halves)]),
}


@pytest.mark.parametrize("face", FACES)
@pytest.mark.parametrize("kind", TRANSFORMS)
def test_a_teacher_gets_its_transform(kind: str, face: str) -> None:
    given, expected = TRANSFORMS[kind]
    assert fit(face, made("Teacher", network=f"{HERE}.narrow", transform=given)) == 0
    assert [repr(f) for f in Records.teacher.transforms] == expected


def test_ready_transforms_and_pretrained_teachers_are_reached_from_yaml() -> None:
    parser = ArgumentParser()
    parser.add_argument("--teacher", type=BaseTeacher | nn.Module | None)
    statistics = {"student": [[0.5, 0.5, 0.5], [0.2, 0.2, 0.2]], "teacher": [0.5, 0.25]}
    ready = [made("lightning_rkd.data.Resize", size=[8, 9]), made("lightning_rkd.data.Renormalize", **statistics)]
    teacher = made("lightning_rkd.Teacher", network=f"{HERE}.narrow", transform=ready)
    parsed = parser.instantiate(parser.parse_object({"teacher": teacher})).teacher
    assert list(map(repr, parsed.transforms)) == ["Resize((8, 9), 'bicubic')", repr(Renormalize(**statistics))]
    settings = {"name": "resnet18", "pretrained": False, "student_normalization": [[0.5] * 3, [0.25] * 3]}
    teacher = made("lightning_rkd.Teacher.from_torchvision", **settings)
    parsed = parser.instantiate(parser.parse_object({"teacher": teacher})).teacher
    assert parsed(torch.zeros(1, 3, 32, 32)).shape == (1, 512)
