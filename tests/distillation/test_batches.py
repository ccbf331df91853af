"""Every form of a batch trains both faces as the loss written by hand does, with inputs of the teacher's own."""

from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jsonargparse
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lightning_rkd.callbacks.distillation import RelationalDistillation
from lightning_rkd.callbacks.retrieval import RetrievalEvaluation
from lightning_rkd.data.indexing import IndexedBatch, with_indices
from lightning_rkd.distillation.layers import CaptureError
from lightning_rkd.distillation.teachers import CachedTeacher
from lightning_rkd.losses.rkd import RKD
from lightning_rkd.modules.distillation import DistillationModule
from lightning_rkd.utils.types import Batch
from tests.harness import faces, toys

Named = namedtuple("Named", "target small large")


@dataclass
class Views:
    small: Tensor
    large: Tensor


@dataclass
class Sample:
    views: Views
    target: Tensor


@dataclass(frozen=True)
class Form:
    """A form of batches: made of the tensors x, scale, t and y, and read by a user's step as arguments and labels."""

    make: Callable[..., Any]
    read: Callable[[Any], tuple[tuple[Any, ...], tuple[Any, ...], Tensor]]
    keys: dict[str, Any]


def tensordict(x: Tensor, s: Tensor, t: Tensor, y: Tensor) -> Any:
    return pytest.importorskip("tensordict").TensorDict({"views": {"small": x, "large": t}, "y": y}, [len(x)])


def encoding(x: Tensor, s: Tensor, t: Tensor, y: Tensor) -> Any:
    return pytest.importorskip("transformers").BatchEncoding({"x": x, "scale": s, "t": t, "y": y})


FORMS = {
    "a list": Form(
        lambda x, s, t, y: [x, t, y],
        lambda b: ((b[0],), (b[1],), b[2]),
        {"labels": 2, "teacher_inputs": 1},
    ),
    "a named tuple": Form(
        lambda x, s, t, y: Named(y, x, t),
        lambda b: ((b.small,), (b.large,), b.target),
        {"inputs": "small", "labels": "target", "teacher_inputs": "large"},
    ),
    "a dataclass": Form(
        lambda x, s, t, y: Sample(Views(x, t), y),
        lambda b: ((b.views.small,), (b.views.large,), b.target),
        {"inputs": "views.small", "labels": "target", "teacher_inputs": "views.large"},
    ),
    "a nested dict": Form(
        lambda x, s, t, y: {"views": {"global": {"image": x}, "large": t}, "y": y},
        lambda b: ((b["views"]["global"]["image"],), (b["views"]["large"],), b["y"]),
        {"inputs": "views.global.image", "labels": "y", "teacher_inputs": "views.large"},
    ),
    "a dict in a tuple": Form(
        lambda x, s, t, y: ({"image": x, "large": t}, y),
        lambda b: ((b[0]["image"],), (b[0]["large"],), b[1]),
        {"inputs": "0.image", "teacher_inputs": "0.large"},
    ),
    "a TensorDict": Form(
        tensordict,
        lambda b: ((b["views", "small"],), (b["views", "large"],), b["y"]),
        {"inputs": "views.small", "labels": "y", "teacher_inputs": "views.large"},
    ),
    "an encoding of transformers": Form(
        encoding,
        lambda b: ((b["x"], b["scale"]), (b["t"], b["scale"]), b["y"]),
        {"inputs": ["x", "scale"], "labels": "y", "teacher_inputs": {"x": "t", "scale": "scale"}},
    ),
    "several positions": Form(
        lambda x, s, t, y: (x, s, t, y),
        lambda b: ((b[0], b[1]), (b[2], b[1]), b[3]),
        {"inputs": [0, 1], "labels": 3, "teacher_inputs": [2, 1]},
    ),
    "a pair in a tuple": Form(
        lambda x, s, t, y: ((x, s), y, (t, s)),
        lambda b: (b[0], b[2], b[1]),
        {"inputs": ["0.0", "0.1"], "teacher_inputs": ["2.0", "2.1"]},
    ),
    "keywords of nested dicts": Form(
        lambda x, s, t, y: {"student": {"x": x, "scale": s}, "teacher": {"x": t, "scale": s}, "y": y},
        lambda b: (tuple(b["student"].values()), tuple(b["teacher"].values()), b["y"]),
        {"inputs": ["student.x", "student.scale"], "labels": "y", "teacher_inputs": ["teacher.x", "teacher.scale"]},
    ),
}


class Scaled(faces.Net):
    """A classifier of one input or of two."""

    def forward(self, x: Tensor, scale: Any = 1.0) -> Tensor:
        return super().forward(x * scale)


class ScaledTeacher(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = toys.teacher(dropout=0.5, norm=True)

    def forward(self, x: Tensor, scale: Any = 1.0) -> Tensor:
        return self.net(x * scale)  # type: ignore[no-any-return]


class Reads(faces.User):
    """A user's module that reads its batches itself, and adds the loss by hand where asked."""

    def __init__(self, form: Form, loss: Any = None) -> None:
        super().__init__()
        self.form, self.extra = form, [loss, ScaledTeacher().eval()]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        (x, *scale), taught, y = self.form.read(batch)
        embedding = self.backbone(x * (scale[0] if scale else 1.0))
        task, (loss, teacher) = self.task(embedding, y), self.extra
        if loss is None:
            return task
        with torch.no_grad():
            targets = teacher(*taught)
        return task + loss(embedding, targets)


class Tensors(Dataset[Any]):
    """Rows of inputs, a second input, a teacher's view and labels; collated to a form."""

    def __init__(self, rows: int = 40) -> None:
        data = toys.Rows(rows)
        scale = torch.linspace(0.5, 1.5, rows)[:, None]
        self.tensors = data.x, scale, data.x.flip(1).abs(), data.y

    def __len__(self) -> int:
        return len(self.tensors[0])

    def __getitem__(self, index: int) -> Any:
        return tuple(x[index] for x in self.tensors)

    def loader(self, form: Form, indexed: bool) -> DataLoader[Any]:
        def collate(samples: list[Any]) -> Any:
            return form.make(*map(torch.stack, zip(*samples, strict=True)))

        loader = DataLoader(self, batch_size=8, collate_fn=collate)
        return with_indices(loader) if indexed else loader


def taught(face: str, form: Form, teacher: Any = None, **settings: Any) -> tuple[Any, list[Any]]:
    settings, teacher = {"student_layer": "backbone", **form.keys, **settings}, teacher or ScaledTeacher()
    if face == "callback":
        return Reads(form), [RelationalDistillation(teacher, RKD(), **settings)]
    task = {"task_loss": nn.CrossEntropyLoss(), "task_reads": "logits", "optimizer": toys.sgd}
    return DistillationModule(Scaled(), teacher, RKD(), **task, **settings), []


@pytest.mark.scenario("batches", "")
@pytest.mark.parametrize("indexed", [False, True], ids=["plain", "with indices"])
@pytest.mark.parametrize("face", faces.FACES)
@pytest.mark.parametrize("name", FORMS)
def test_gradients_are_those_of_the_loss_by_hand(name: str, face: str, indexed: bool) -> None:
    form = FORMS[name]
    module, callbacks = taught(face, form)
    ours = faces.gradients(module, *callbacks, batches=Tensors().loader(form, indexed))
    by_hand = faces.gradients(Reads(form, RKD()), batches=Tensors().loader(form, False))
    assert faces.largest(ours, by_hand) == 0.0
    alone = faces.gradients(Reads(form), batches=Tensors().loader(form, False))
    assert faces.largest(ours, alone) > 1e-3, "the loss has an effect"


@pytest.mark.parametrize("face", faces.FACES)
def test_the_teacher_gets_the_students_inputs_unless_told(face: str) -> None:
    form = FORMS["a dict in a tuple"]
    fits = [
        taught(face, form, **settings) for settings in ({}, {"teacher_inputs": None}, {"teacher_inputs": "0.image"})
    ]
    own, default, same = (
        faces.gradients(module, *callbacks, batches=Tensors().loader(form, False)) for module, callbacks in fits
    )
    assert faces.largest(default, same) == 0.0
    assert faces.largest(own, same) > 1e-3


@pytest.mark.parametrize("face", faces.FACES)
def test_inputs_of_a_layer_and_of_a_batch_exclude_each_other(face: str) -> None:
    module, callbacks = taught(face, FORMS["a list"], input_layer="backbone")
    with pytest.raises(CaptureError, match="both input_layer and teacher_inputs"):
        toys.fit(module, *callbacks, batches=Tensors().loader(FORMS["a list"], False))


@pytest.mark.parametrize("name", FORMS)
def test_an_indexed_batch_of_every_form_moves_as_a_whole(name: str) -> None:
    form = FORMS[name]
    batch = next(iter(Tensors().loader(form, True)))
    moved = batch.to("meta", non_blocking=True)
    assert isinstance(moved, IndexedBatch)
    assert type(moved.batch) is type(batch.batch)
    inputs, teacher_inputs, y = form.read(moved.batch)
    assert all(x.is_meta for x in (*inputs, *teacher_inputs, y, moved.indices))


@pytest.mark.parametrize("name", FORMS)
def test_retrieval_of_a_layer_needs_no_inputs(name: str) -> None:
    class Validates(Reads):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.backbone(self.form.read(batch)[0][0])

    form, values = FORMS[name], []
    for own in (FORMS["a named tuple"], form):
        callback = RetrievalEvaluation("backbone", labels=own.keys.get("labels"))
        trainer = toys.trainer(callbacks=[callback])
        trainer.validate(Validates(own), Tensors().loader(own, False), verbose=False)
        values.append(float(trainer.callback_metrics["val/recall_at_1"]))
    assert values[0] == values[1] > 0


class Scene:
    """A batch with attributes only, as graph libraries have it."""

    def __init__(self, x: Tensor, t: Tensor, y: Tensor) -> None:
        self.x, self.t, self.y = x, t, y


SCENES = Form(lambda x, s, t, y: Scene(x, t, y), lambda b: ((b.x,), (b.t,), b.y), {})


@pytest.mark.scenario("batches", "any other form, by an override of unpack")
@pytest.mark.parametrize("face", faces.FACES)
def test_any_other_batch_is_unpacked_by_an_override(face: str) -> None:
    module, callbacks = taught(face, SCENES)
    with pytest.raises(TypeError, match=r"a dataclass, got Scene: override unpack\(batch\)"):
        toys.fit(module, *callbacks, batches=Tensors().loader(SCENES, False))
    module, callbacks = taught(face, SCENES)
    face_of_it: Any = callbacks[0] if callbacks else module
    face_of_it.unpack = lambda b: Batch(b.x, b.y, teacher_inputs=b.t)
    ours = faces.gradients(module, *callbacks, batches=Tensors().loader(SCENES, False))
    by_hand = faces.gradients(Reads(SCENES, RKD()), batches=Tensors().loader(SCENES, False))
    assert faces.largest(ours, by_hand) == 0.0


KEYS = ["image", 1, -1, "views.global", [0, 1], ["ids", "mask"], [0, "mask"], {"x": "views.small", "y": 1}]


@pytest.mark.parametrize("face", [DistillationModule, RelationalDistillation])
def test_every_form_of_keys_can_be_written_in_yaml(face: type) -> None:
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(face, "face", skip={"student", "teacher", "loss", "student_layer"})
    for keys in KEYS:
        parsed = parser.parse_object({"face": {"inputs": keys, "teacher_inputs": keys}}).face
        assert parsed.inputs == parsed.teacher_inputs == keys


@pytest.mark.parametrize("face", faces.FACES)
@pytest.mark.parametrize("name", ["a dataclass", "several positions", "an encoding of transformers"])
def test_a_cache_is_written_with_the_inputs_of_the_teacher(name: str, face: str, tmp_path: Path) -> None:
    form, found = FORMS[name], []
    for teacher in (ScaledTeacher(), CachedTeacher(tmp_path, ScaledTeacher())):
        module, callbacks = taught(face, form, teacher)
        found.append(faces.gradients(module, *callbacks, batches=Tensors().loader(form, False)))
    assert faces.largest(*found) < 1e-6
