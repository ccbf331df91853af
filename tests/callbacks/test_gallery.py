"""The student searches the teacher's gallery in validation: the callback and the module, live, cached and stored."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.cli import LightningCLI
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_rkd.callbacks.distillation import RelationalDistillation
from lightning_rkd.callbacks.retrieval import RetrievalEvaluation
from lightning_rkd.data.indexing import with_indices
from lightning_rkd.distillation.teachers import CachedTeacher, Teacher
from lightning_rkd.losses.csd import CSD
from lightning_rkd.losses.rkd import RKD
from lightning_rkd.metrics import AsymmetricRetrieval, EmbeddingRetrieval, RelationalAgreement, StoredGallery
from lightning_rkd.modules.distillation import DistillationModule
from tests.harness import toys
from tests.harness.ranks import Ranks
from tests.oracles.retrieval import retrieval

ALIKE = toys.teacher(out=5)  # as wide as the student
LOADER = toys.loader()
X, Y = LOADER.dataset.tensors  # type: ignore[attr-defined]


@torch.no_grad()
def by_loop(student: Tensor, teacher: Tensor) -> dict[str, float]:
    """Values of both galleries, from float64 distances, by plain loops."""
    s, t, y = student.double().tolist(), teacher.double().tolist(), Y.tolist()
    crossed = retrieval(s, y, cosine=True, gallery_rows=t)
    own = retrieval(s, y, cosine=True)
    return {f"val/{name}": v for name, v in own.items()} | {f"val/asymmetric/{name}": v for name, v in crossed.items()}


def logged(trainer: pl.Trainer) -> dict[str, float]:
    return {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/")}


def validate(module: pl.LightningModule, *callbacks: pl.Callback, loader: Any = LOADER) -> dict[str, float]:
    trainer = toys.trainer(callbacks=list(callbacks))
    trainer.validate(module, loader, verbose=False)
    return logged(trainer)


def distil(loss: Any, teacher: Any = ALIKE, **kwargs: Any) -> RelationalDistillation:
    return RelationalDistillation(teacher, loss, student_layer="backbone", **kwargs)


SOURCES: dict[str, Callable[[], tuple[list[pl.Callback], Any]]] = {
    "own": lambda: ([RetrievalEvaluation("backbone", gallery="both", teacher=ALIKE)], LOADER),
    "of the distillation": lambda: ([RetrievalEvaluation("backbone", gallery="both"), distil(CSD())], LOADER),
    "of the distillation before": lambda: ([distil(CSD()), RetrievalEvaluation("backbone", gallery="both")], LOADER),
    "cached": lambda: (
        [RetrievalEvaluation("backbone", gallery="both", teacher=CachedTeacher.from_array(ALIKE(X)))],
        with_indices(LOADER),
    ),
    "by keys": lambda: (
        [RetrievalEvaluation("backbone", gallery="both", teacher=ALIKE, inputs="z", labels="y")],
        DataLoader([{"x": x, "y": y, "z": x} for x, y in LOADER], batch_size=None),  # type: ignore[arg-type]
    ),
}


@pytest.mark.parametrize("source", SOURCES)
def test_both_galleries_have_the_values_of_the_loop(source: str) -> None:
    module, (callbacks, loader) = toys.Evaluated(), SOURCES[source]()
    before = toys.snapshot(ALIKE)
    found = validate(module, *callbacks, loader=loader)
    assert found == pytest.approx(by_loop(module.backbone(X), ALIKE(X)), abs=1e-6)
    assert toys.same(before, ALIKE)
    assert toys.attachments(module, ALIKE) == []


def test_in_training_the_projection_of_the_loss_maps_the_queries() -> None:
    wide, loss, module = toys.teacher(norm=True), CSD(student_dim=5, teacher_dim=7), toys.Evaluated()
    trainer = toys.trainer(callbacks=[RetrievalEvaluation("backbone", gallery="both"), distil(loss, wide)])
    trainer.fit(module, LOADER, LOADER)
    s = module.backbone(X)
    crossed, own = by_loop(loss.project(s), wide.eval()(X)), by_loop(s, s)
    expected = {name: crossed[name] if "asymmetric" in name else value for name, value in own.items()}
    assert logged(trainer) == pytest.approx(expected, abs=1e-6)
    assert toys.attachments(module, wide) == []


def test_the_module_projects_its_queries_and_the_teacher_may_be_cached() -> None:
    wide = toys.teacher()
    for teacher in (wide, CachedTeacher.from_array(wide(X))):
        metrics: Any = {"retrieval": EmbeddingRetrieval(distance="cosine")}
        torch.manual_seed(0)
        module = DistillationModule(toys.Backbone(), teacher, CSD(), metrics=metrics, gallery="teacher")
        trainer = toys.trainer()
        trainer.fit(module, LOADER, with_indices(LOADER))
        project = module.loss.project  # type: ignore[union-attr]
        expected = by_loop(project(module(X)), wide(X))
        assert logged(trainer) == pytest.approx({n: v for n, v in expected.items() if "asymmetric" in n}, abs=1e-6)


@pytest.mark.parametrize("face", ["callback", "module"])
def test_a_stored_gallery_needs_no_teacher(face: str, tmp_path: Path) -> None:
    np.save(tmp_path / "rows.npy", ALIKE(X).detach().numpy())
    stored, metric = StoredGallery(tmp_path / "rows.npy"), EmbeddingRetrieval(distance="cosine")
    student = toys.Evaluated()
    if face == "callback":
        found = validate(student, RetrievalEvaluation("backbone", metric, gallery=stored), loader=with_indices(LOADER))
    else:
        module = DistillationModule(
            student.backbone, metrics={"r": metric}, gallery=stored, task_loss=nn.CrossEntropyLoss()
        )
        found = validate(module, loader=with_indices(LOADER))
    expected = by_loop(student.backbone(X), ALIKE(X))
    assert found == pytest.approx({n: v for n, v in expected.items() if "asymmetric" in n}, abs=1e-6)


def test_metrics_of_both_galleries_may_be_given_by_name() -> None:
    metrics: Any = {"own": EmbeddingRetrieval(distance="cosine"), "teacher": AsymmetricRetrieval()}
    module = toys.Evaluated()
    found = validate(module, RetrievalEvaluation("backbone", metrics, teacher=Teacher(ALIKE)))
    assert found == pytest.approx(by_loop(module.backbone(X), ALIKE(X)), abs=1e-6)


def test_agreement_with_the_teacher_is_measured_in_any_module() -> None:
    module, metric = toys.Evaluated(), RelationalAgreement(k=2, triplets=50)
    trainer = toys.trainer(callbacks=[RetrievalEvaluation("backbone", metric), distil(RKD(), toys.teacher())])
    trainer.validate(module, LOADER, verbose=False)
    expected = RelationalAgreement(k=2, triplets=50)
    expected.update(module.backbone(X), toys.teacher()(X))
    assert logged(trainer) == {f"val/{name}": pytest.approx(float(v)) for name, v in expected.compute().items()}


# advice and refusals


def test_a_loss_that_aligns_no_spaces_is_named_in_a_warning() -> None:
    callbacks = RetrievalEvaluation("backbone", gallery="teacher"), distil(RKD())
    with pytest.raises(UserWarning, match=r"no loss aligns .* \['RKD'\].* add one that does, such as CSD\(\)"):
        validate(toys.Evaluated(), *callbacks)
    module = DistillationModule(toys.Backbone(), ALIKE, RKD(), metrics={"r": EmbeddingRetrieval()}, gallery="teacher")
    with pytest.raises(UserWarning, match="no loss aligns"):
        validate(module)


def test_lengths_are_warned_of_where_the_loss_aligns_directions() -> None:
    evaluation = RetrievalEvaluation("backbone", EmbeddingRetrieval(), gallery="teacher")
    with pytest.raises(UserWarning, match="CSD aligns their directions only: pass distance='cosine'"):
        validate(toys.Evaluated(), evaluation, distil(CSD()))


@pytest.mark.parametrize(
    ("evaluation", "message"),
    [
        (
            lambda: RetrievalEvaluation("backbone", gallery="teacher"),
            r"need the teacher's rows: pass teacher=\.\.\., or gallery=StoredGallery",
        ),
        (lambda: RetrievalEvaluation("backbone", RelationalAgreement()), r"rows: pass teacher=\.\.\.$"),
        (
            lambda: RetrievalEvaluation("backbone", gallery="teacher", teacher=toys.teacher()),
            r"queries have width 5 and gallery rows width 7: .* such as CSD\(\) or Regression\(\)",
        ),
        (
            lambda: RetrievalEvaluation("backbone", gallery=StoredGallery(X[:, :5].contiguous())),
            "may hold the queries' own samples: pass indices=",
        ),
        (lambda: RetrievalEvaluation("backbone", gallery="techer"), "gallery must be 'student', 'teacher', 'both'"),  # type: ignore[arg-type]
    ],
)
def test_what_cannot_work_fails_with_the_cure(evaluation: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        validate(toys.Evaluated(), evaluation())


def test_another_layer_than_the_losses_is_refused_by_its_width() -> None:
    callbacks = RetrievalEvaluation("head", gallery="teacher"), distil(CSD(student_dim=5, teacher_dim=7))
    with pytest.raises(ValueError, match="CSD projects rows of width 5, but the evaluated layer gives width 3"):
        validate(toys.Evaluated(), *callbacks)


# ranks and YAML


def on_rank(rank: int | None) -> dict[str, float]:
    data = toys.Rows(41)  # one row comes twice
    loader: DataLoader[Any] = DataLoader(torch.utils.data.TensorDataset(data.x, data.y), batch_size=8)
    with toys.devices(rank) as where:
        evaluation = RetrievalEvaluation("backbone", gallery="both", teacher=ALIKE)
        trainer = toys.trainer(callbacks=[evaluation], **where | {"use_distributed_sampler": True})
        trainer.validate(toys.Evaluated(), loader, verbose=False)
        return logged(trainer)


def test_two_ranks_log_what_one_device_does(ranks: Ranks) -> None:
    first, second = ranks.run(on_rank)
    assert first == second == pytest.approx(on_rank(None))
    assert 0 < first["val/asymmetric/recall_at_1"] < 1


class Data(pl.LightningDataModule):
    def val_dataloader(self) -> Any:
        return with_indices(LOADER)


@pytest.mark.parametrize("gallery", ["both", "stored"])
def test_yaml_reaches_the_gallery_of_module_and_callback(
    gallery: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    np.save(tmp_path / "rows.npy", ALIKE(X).detach().numpy())
    path = tmp_path / "rows.npy"
    chosen = {
        "both": "both",
        "stored": f"{{class_path: lightning_rkd.metrics.StoredGallery, init_args: {{rows: {path}}}}}",
    }[gallery]
    (tmp_path / "run.yaml").write_text(
        f"""
model:
  class_path: lightning_rkd.modules.distillation.DistillationModule
  init_args:
    student: tests.harness.toys.Backbone
    teacher: {{class_path: tests.harness.toys.teacher, init_args: {{out: 5}}}}
    loss: lightning_rkd.losses.csd.CSD
    metrics:
      retrieval: {{class_path: lightning_rkd.metrics.EmbeddingRetrieval, init_args: {{distance: cosine}}}}
    gallery: {chosen}
data: tests.callbacks.test_gallery.Data
trainer:
  accelerator: cpu
  devices: 1
  logger: false
  enable_progress_bar: false
  enable_checkpointing: false
  callbacks:
  - class_path: lightning_rkd.RetrievalEvaluation
    init_args:
      layer: student
      metric:
        again:
          class_path: lightning_rkd.metrics.EmbeddingRetrieval
          init_args: {{k: [2, 3], distance: cosine, value: recall_at_2}}
      gallery: {chosen}
"""
    )
    monkeypatch.setattr("sys.argv", ["validate"])
    cli = LightningCLI(
        args=["validate", f"--config={tmp_path / 'run.yaml'}"],
        seed_everything_default=0,
        **toys.PLAIN_CLI,
    )
    found = logged(cli.trainer)
    expected = by_loop(cli.model.student(X), ALIKE(X))
    keys = [name for name in expected if gallery == "both" or "asymmetric" in name]
    assert {name: found[name] for name in keys} == pytest.approx({name: expected[name] for name in keys}, abs=1e-6)
    assert "val/asymmetric/again" in found
