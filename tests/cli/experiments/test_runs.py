"""A run of an experiment is a run of ``fit``: same start, resolved configuration, resumed to the same digits."""

import re
import shutil
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import yaml

from lightning_rkd.cli import main as cli
from lightning_rkd.cli import recipes
from lightning_rkd.cli.experiments import runs
from lightning_rkd.cli.experiments.runs import Run
from lightning_rkd.cli.experiments.settings import Config, with_settings, with_steps
from lightning_rkd.data import GlyphDataModule
from lightning_rkd.metrics.retrieval import EmbeddingRetrieval


def tiny(recipe: str, steps: int = 2, **settings: Any) -> Config:
    config = yaml.safe_load((recipes.FOLDER / f"{recipe}.yaml").read_text())
    data = {"max_classes": 20, "image_size": 12, "classes_per_batch": 4, "batches_per_epoch": steps}
    small = {f"data.init_args.{name}": value for name, value in data.items()}
    return with_settings(config, {"trainer.max_epochs": 1, "trainer.accelerator": "cpu", **small, **settings})


def weights(path: Path | str) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = torch.load(path, weights_only=True)["state_dict"]
    return state


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Run]:
    """A run of two steps."""
    folder = tmp_path_factory.mktemp("run")
    return folder, runs.run(tiny("glyphs_student"), folder, 1)


def test_fit_trains_the_same_network_from_the_configuration_of_a_run(finished: tuple[Path, Run]) -> None:
    folder = finished[0]
    assert {path.name for path in folder.iterdir()} == {"config.yaml", "last.ckpt", runs.RESULT}
    moved = ["--trainer.default_root_dir", "second", "--trainer.enable_progress_bar", "false"]
    assert cli.main(["fit", "--config", str(folder / "config.yaml"), *moved]) == 0
    assert same(weights(folder / "last.ckpt"), weights("second/last.ckpt"))


@pytest.mark.slow
def test_all_networks_start_from_the_same_student_and_see_the_same_batches() -> None:
    """At learning rate 0 the weights stay, and the running statistics depend on the batches."""
    frozen = {f"model.init_args.{name}.init_args.{rate}": 0.0 for name, rate in
              (("optimizer", "lr"), ("lr_scheduler", "max_lr"))}  # fmt: skip
    frozen |= {"model.init_args.optimizer.init_args.weight_decay": 0.0}
    untrained = {"model.init_args.teacher.init_args.weights": None}
    alone = runs.train(tiny("glyphs_student", **frozen), Path("alone"), seed=1)[0].student.state_dict()
    distilled = runs.train(tiny("glyphs_rkd", **frozen, **untrained), Path("rkd"), seed=1)[0].student.state_dict()
    other = runs.train(tiny("glyphs_student", **frozen), Path("other"), seed=2)[0].student.state_dict()
    assert same(alone, distilled)
    assert not same(alone, other)


def test_images_are_loaded_once_for_runs_of_the_same_data(monkeypatch: pytest.MonkeyPatch) -> None:
    def data(**settings: int) -> GlyphDataModule:
        changed = {f"data.init_args.{name}": value for name, value in settings.items()}
        found: GlyphDataModule = runs.prepare(tiny("glyphs_student", **changed), Path("run"), 0).datamodule
        found.setup()
        return found

    loaded = data()
    monkeypatch.setattr(GlyphDataModule, "load", lambda self: 1 / 0)
    assert data(batches_per_epoch=1, seed=7).root.images is loaded.root.images
    with pytest.raises(ZeroDivisionError):
        data(max_classes=18)
    assert not runs._images, "the old images are released first"


def test_scores_are_those_of_the_unseen_classes(finished: tuple[Path, Run]) -> None:
    folder, run = finished
    built = runs.prepare(tiny("glyphs_student"), Path("run"), 1)
    data, student = built.datamodule, built.model.student
    built.model.load_state_dict(torch.load(folder / "last.ckpt", weights_only=True)["state_dict"])
    data.setup("test")
    embeddings, labels, _ = runs.embed(student, data.test_dataloader())
    assert len(embeddings) == len(data.test_set)
    assert int(labels.min()) >= data.num_train_classes
    metric = EmbeddingRetrieval()
    metric.update(embeddings, labels)
    assert run.scores["recall_at_1"] == pytest.approx(float(metric.compute()["recall_at_1"]))


class Stops(pl.Callback):
    """Fails after a step, or counts the steps."""

    def __init__(self, at: int | None = None) -> None:
        self.at, self.steps = at, 0

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any, **kwargs: Any) -> None:
        self.steps += 1
        if trainer.global_step == self.at:
            raise ZeroDivisionError("stopped")


def three_epochs(**settings: Any) -> Config:
    return tiny("glyphs_student", 4, **{"trainer.max_epochs": 3, **settings})


def digits(run: Run) -> tuple[Any, ...]:
    return run.parameters, run.scores, run.weights


@pytest.mark.slow
def test_an_interrupted_run_resumes_from_its_last_epoch_to_the_same_digits() -> None:
    with pytest.raises(ZeroDivisionError):
        runs.run(three_epochs(), Path("stopped"), 1, callbacks=[Stops(at=10)])
    assert torch.load("stopped/last.ckpt", weights_only=True)["global_step"] == 8
    assert not Path("stopped", runs.RESULT).exists()
    counts, whole = Stops(), runs.run(three_epochs(), Path("whole"), 1)
    resumed = runs.run(three_epochs(), Path("stopped"), 1, callbacks=[counts])
    assert counts.steps == 4
    assert digits(resumed) == digits(whole)
    assert same(weights("stopped/last.ckpt"), weights("whole/last.ckpt"))
    assert resumed.seconds > 0


def test_a_finished_run_is_read_and_not_repeated(finished: tuple[Path, Run], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "train", lambda *args, **kwargs: pytest.fail("it trained"))
    again = runs.run(tiny("glyphs_student"), finished[0], 1)
    assert (*digits(again), again.seconds) == (*digits(finished[1]), finished[1].seconds)


@pytest.mark.slow
@pytest.mark.parametrize("done", [True, False])
def test_results_of_other_settings_are_never_used(done: bool) -> None:
    """Another rate, another seed, another teacher: trained from the beginning, as in a folder of its own."""
    try:
        runs.run(three_epochs(), Path("run"), 1, callbacks=[Stops(None if done else 10)])
    except ZeroDivisionError:
        assert not done
    assert Path("run", runs.RESULT).exists() == done
    slower = three_epochs(**{"model.init_args.optimizer.init_args.weight_decay": 0.5})
    for config, seed, teacher in ((slower, 1, None), (three_epochs(), 2, None), (three_epochs(), 1, "others")):
        counts = Stops(at=6)
        with pytest.raises(ZeroDivisionError):
            runs.run(config, Path("run"), seed, teacher, [counts])
        assert counts.steps == 6, "from the beginning"
    whole = runs.run(slower, Path("own"), 1)
    assert digits(runs.run(slower, Path("run"), 1)) == digits(whole)


@pytest.mark.parametrize(
    ("name", "damage", "verb"),
    [
        (runs.RESULT, "flip", "measures"),
        (runs.RESULT, "empty", "measures"),
        (runs.RESULT, "text", "measures"),
        ("last.ckpt", "flip", "trains"),
    ],
)
def test_a_damaged_file_is_named_with_the_cure(name: str, damage: str, verb: str, finished: tuple[Path, Run]) -> None:
    shutil.copytree(finished[0], "run")
    path = Path("run", name)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes({"flip": bytes(content), "empty": b"", "text": b"no result"}[damage])
    if name == "last.ckpt":
        Path("run", runs.RESULT).unlink()
    message = f"{str(path)!r} is damaged: delete it, and the same command {verb} this network again"
    with pytest.raises(ValueError, match=re.escape(message)):
        runs.run(tiny("glyphs_student"), Path("run"), 1)
    path.unlink()
    assert digits(runs.run(tiny("glyphs_student"), Path("run"), 1)) == digits(finished[1])


@pytest.mark.parametrize(("steps", "epochs"), [(1, 1), (97, 1), (100, 2), (500, 10), (5000, 100), (101 * 50, 101)])
def test_steps_are_divided_into_epochs_that_each_leave_a_checkpoint(steps: int, epochs: int) -> None:
    config = with_steps(tiny("glyphs_student"), steps)
    assert config["trainer"]["max_epochs"] == epochs
    assert config["data"]["init_args"]["batches_per_epoch"] * epochs == steps
    assert config["model"]["init_args"]["lr_scheduler"]["init_args"]["total_steps"] == steps
