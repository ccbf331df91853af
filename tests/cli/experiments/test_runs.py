"""A study's runs are runs of the command line: same start for all, resolved configuration, one test, one table."""

from __future__ import annotations

import csv
import statistics
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import yaml
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_rkd.cli import main as cli
from lightning_rkd.cli import recipes
from lightning_rkd.cli.experiments import runs as study
from lightning_rkd.cli.experiments import summaries
from lightning_rkd.cli.experiments.runs import Run
from lightning_rkd.cli.experiments.settings import Config, with_settings
from lightning_rkd.data import with_indices
from lightning_rkd.metrics.retrieval import EmbeddingRetrieval


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


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


@pytest.mark.slow
def test_a_run_leaves_a_configuration_from_which_fit_trains_the_same_network(tmp_path: Path) -> None:
    study.train(tiny("glyphs_student"), Path("first"), seed=3)
    assert {path.name for path in Path("first").iterdir()} == {"config.yaml", "last.ckpt"}
    moved = ["--trainer.default_root_dir", "second", "--trainer.enable_progress_bar", "false"]
    assert cli.main(["fit", "--config", "first/config.yaml", *moved]) == 0
    assert same(weights("first/last.ckpt"), weights("second/last.ckpt"))


@pytest.mark.slow
def test_all_ways_of_training_begin_with_the_same_student_and_see_the_same_batches() -> None:
    """At learning rate 0 the weights stay, and the running statistics tell which batches went through."""
    frozen = {f"model.init_args.{name}.init_args.{rate}": 0.0 for name, rate in
              (("optimizer", "lr"), ("lr_scheduler", "max_lr"))}  # fmt: skip
    frozen |= {"model.init_args.optimizer.init_args.weight_decay": 0.0}
    untrained = {"model.init_args.teacher.init_args.weights": None}
    alone = study.train(tiny("glyphs_student", **frozen), Path("alone"), seed=1)[0].student.state_dict()
    distilled = study.train(tiny("glyphs_rkd", **frozen, **untrained), Path("rkd"), seed=1)[0].student.state_dict()
    other = study.train(tiny("glyphs_student", **frozen), Path("other"), seed=2)[0].student.state_dict()
    assert same(alone, distilled)
    assert not same(alone, other)


@pytest.mark.slow
def test_images_that_are_loaded_already_are_not_loaded_again(monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_rkd.data import GlyphDataModule

    images = GlyphDataModule(max_classes=20, image_size=12).load()
    monkeypatch.setattr(GlyphDataModule, "load", lambda self: pytest.fail("loaded again"))
    _, data, _ = study.train(tiny("glyphs_student"), Path("run"), seed=0, images=images)
    assert data.root.images is images.images


@pytest.mark.slow
def test_measuring_embeds_the_unseen_classes_once_and_agrees_with_the_metrics() -> None:
    trained = study.train(tiny("glyphs_student"), Path("run"), seed=0)
    module, data, _ = trained
    scores, embeddings = study.retrieval_and_agreement(trained, None)
    assert len(embeddings) == len(data.test_set)
    assert scores["distance_correlation"] == pytest.approx(1)
    metric = EmbeddingRetrieval()
    images = torch.stack([x for x, _ in data.test_set])
    labels = torch.tensor([y for _, y in data.test_set])
    assert int(labels.min()) >= data.num_train_classes
    metric.update(module.student.eval()(images).detach(), labels)
    assert scores["recall_at_1"] == pytest.approx(float(metric.compute()["recall_at_1"]))


class Stops(pl.Callback):
    """Ctrl-C in the middle of the third epoch; counts the steps of what is not stopped."""

    def __init__(self, at: int | None = None) -> None:
        self.at, self.steps = at, 0

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any, **kwargs: Any) -> None:
        self.steps += 1
        if trainer.global_step == self.at:
            raise ZeroDivisionError("stopped")


def three_epochs(**settings: Any) -> Config:
    return tiny("glyphs_student", 4, **{"trainer.max_epochs": 3, **settings})


def digits(run: Run) -> tuple[Any, ...]:
    return run.network, run.seed, run.parameters, run.scores, run.embeddings.tolist()


@pytest.mark.slow
def test_an_interrupted_run_goes_on_from_its_last_epoch_to_the_same_digits() -> None:
    with pytest.raises(ZeroDivisionError):
        study.run("student", three_epochs(), Path("stopped"), 1, None, [Stops(at=10)])
    assert torch.load("stopped/last.ckpt", weights_only=True)["global_step"] == 8
    assert not Path("stopped", study.RESULT).exists()
    counts, whole = Stops(), study.run("student", three_epochs(), Path("whole"), 1, None)
    resumed = study.run("student", three_epochs(), Path("stopped"), 1, None, [counts])
    assert counts.steps == 4
    assert digits(resumed) == digits(whole)
    assert same(weights("stopped/last.ckpt"), weights("whole/last.ckpt"))
    assert resumed.seconds > 0


@pytest.mark.slow
def test_a_finished_run_is_read_back_and_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = study.run("teacher", tiny("glyphs_student"), Path("teacher"), 0, None)
    student = study.run("student", tiny("glyphs_student"), Path("student"), 1, teacher)
    monkeypatch.setattr(study, "train", lambda *args, **kwargs: pytest.fail("it trained"))
    assert digits(study.run("teacher", tiny("glyphs_student"), Path("teacher"), 0, None)) == digits(teacher)
    again = study.run("student", tiny("glyphs_student"), Path("student"), 1, teacher)
    assert (*digits(again), again.seconds) == (*digits(student), student.seconds)


@pytest.mark.slow
@pytest.mark.parametrize("finished", [True, False])
def test_what_belongs_to_other_settings_is_never_taken(finished: bool) -> None:
    """Another rate, another seed, another teacher: trained from the beginning, as in a folder of its own."""
    teacher = Run("teacher", 0, 1, 1.0, embeddings=torch.eye(3), weights="others")
    try:
        study.run("a", three_epochs(), Path("run"), 1, None, [Stops(None if finished else 10)])
    except ZeroDivisionError:
        assert not finished
    assert Path("run", study.RESULT).exists() == finished
    slower = three_epochs(**{"model.init_args.optimizer.init_args.weight_decay": 0.5})
    for config, seed, taught in ((slower, 1, None), (three_epochs(), 2, None), (three_epochs(), 1, teacher)):
        counts = Stops(at=6)
        with pytest.raises(ZeroDivisionError):
            study.run("b", config, Path("run"), seed, taught, [counts])
        assert counts.steps == 6, "from the beginning"
    whole = study.run("b", slower, Path("own"), 1, None)
    assert digits(study.run("b", slower, Path("run"), 1, None)) == digits(whole)


@pytest.mark.slow
@pytest.mark.parametrize("name", [study.RESULT, "last.ckpt"])
def test_what_is_damaged_is_named(name: str) -> None:
    study.run("student", tiny("glyphs_student"), Path("run"), 1, None)
    path = Path("run", name)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)
    if name == "last.ckpt":
        Path("run", study.RESULT).unlink()
    with pytest.raises(ValueError, match=rf"'run/{name}' is damaged"):
        study.run("student", tiny("glyphs_student"), Path("run"), 1, None)


def test_embedding_keeps_order_and_evaluates_in_eval_mode() -> None:
    network = nn.Sequential(nn.Dropout(0.9), nn.Linear(3, 2))
    data = TensorDataset(torch.rand(7, 3), torch.arange(7))
    embeddings, labels, indices = study.embed(network, with_indices(DataLoader(data, batch_size=3)))
    assert labels.tolist() == indices.tolist() == list(range(7))
    assert torch.allclose(embeddings, network[1](data.tensors[0]))


def runs() -> list[Run]:
    scores = {("teacher", 0): 0.9, ("student", 0): 0.2, ("student", 1): 0.5, ("student", 2): 0.4}
    return [Run(name, seed, 100 + len(name), 10.0 + seed, {"recall_at_1": r}) for (name, seed), r in scores.items()]


def test_the_table_states_mean_and_spread_over_seeds() -> None:
    teacher, student = summaries.summarise(runs())
    assert student.mean["recall_at_1"] == pytest.approx(statistics.fmean([0.2, 0.5, 0.4]))
    assert student.spread["recall_at_1"] == pytest.approx(statistics.stdev([0.2, 0.5, 0.4]))
    assert (teacher.seeds, student.seeds) == (1, 3)
    lines = summaries.markdown([teacher, student], ["recall_at_1", "seconds"]).splitlines()
    assert lines[2:] == ["| teacher | 107 | 0.900 | 10 |", "| student | 107 | 0.367 ± 0.153 | 11 |"]


def test_csv_files_read_back_unrounded(tmp_path: Path) -> None:
    summaries.write_csv(summaries.summarise(runs()), tmp_path / "table.csv")
    summaries.write_runs_csv(runs(), tmp_path / "runs.csv")
    with (tmp_path / "table.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert [row["network"] for row in table] == ["teacher", "student"]
    assert float(table[1]["recall_at_1_spread"]) == statistics.stdev([0.2, 0.5, 0.4])
    with (tmp_path / "runs.csv").open(newline="") as file:
        every = list(csv.DictReader(file))
    assert [(row["network"], int(row["seed"]), float(row["recall_at_1"])) for row in every] == [
        (run.network, run.seed, run.scores["recall_at_1"]) for run in runs()
    ]
