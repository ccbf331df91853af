"""The studies of the results page: their runs are kept, their gradients balanced, their intervals right."""

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from scipy.stats import ttest_rel
from torch import Tensor

from benchmarks.studies import methods
from benchmarks.studies.images import ImageStudy, augment
from benchmarks.studies.methods import BALANCES, EmbeddingStudy, Objective, list_anchored, list_losses
from benchmarks.studies.park import ParkStudy
from benchmarks.studies.report import compare, correct
from benchmarks.studies.runner import Row, Run, read_rows, run_study
from benchmarks.studies.text import VARIANTS
from lightning_rkd.losses import CSD, RKD

ALONE = Run("toy", "data", "net", "final", "none", "triplet", 0.0, 0)


class Toy:
    """Scores are seeds; the second stage needs the rows of the first; seed 2 fails until a file is there."""

    name, scores = "toy", ("score",)

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def plan(self, rows: Sequence[Row]) -> Iterator[Run]:
        yield from (Run("toy", "d", "s", "tune", "none", "none", 0.0, seed) for seed in range(3))
        if len(rows) >= 2:
            yield Run("toy", "d", "s", "final", "none", "none", 0.0, 7)

    def train(self, run: Run) -> Mapping[str, float]:
        with (self.folder / "trained").open("a") as file:
            file.write(f"{run.seed} ")
        if run.seed == 2 and not (self.folder / "cured").exists():
            raise ValueError("broken")
        return {"score": run.seed / 2}


def test_a_study_goes_on_where_it_was_cut(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, trained = tmp_path / "runs.csv", tmp_path / "trained"
    run_study(Toy(tmp_path), tmp_path, start_method="fork")
    assert trained.read_text() == "0 1 2 7 "
    assert "broken" in capsys.readouterr().out
    assert [(row["seed"], row["score"]) for row in read_rows(path)] == [("0", "0"), ("1", "0.5"), ("7", "3.5")]

    whole = path.read_bytes()
    path.write_bytes(whole[:-20])  # a kill while the last line was written
    (tmp_path / "cured").touch()
    assert len(read_rows(path)) == 2
    run_study(Toy(tmp_path), tmp_path, start_method="fork")
    assert trained.read_text() == "0 1 2 7 2 7 "
    assert path.read_bytes().startswith(whole[: whole[:-1].rfind(b"\n") + 1])
    assert [row["seed"] for row in read_rows(path)] == ["0", "1", "2", "7"]


def test_every_loss_that_reads_embeddings_is_in_the_study() -> None:
    assert {"RKD", "RKDDistance", "RKDAngle", "AnchoredRKD", "CSD", "CRD", "Tanimoto"} <= set(list_losses(VARIANTS))
    assert not {"SoftTarget", "AttentionTransfer", "Matryoshka", "PCKD"} & set(list_losses(VARIANTS))
    assert "RKD" not in list_anchored(list_losses(VARIANTS))
    assert {"CSD", "Regression", "VkD"} <= set(list_anchored(list_losses(VARIANTS)))


def tuned(loss: str, weight: float, seed: int, score: float) -> Row:
    run = Run("toy", "data", "net", "tune", loss, "triplet", weight, seed)
    return {name: str(x) for name, x in asdict(run).items()} | {"map_at_r": str(score)}


def test_weights_are_those_with_the_best_mean_on_validation_classes() -> None:
    class Study(EmbeddingStudy):
        name, settings, tuning_seeds = "toy", (("data", "net"),), (100, 101)

        def parts(self) -> Iterator[tuple[Sequence[str], Sequence[int]]]:
            yield ["RKD", "CSD"], range(2)

    scores = {0.25: (0.1, 0.1), 1.0: (0.9, 0.0), 4.0: (0.5, 0.6), 16.0: (0.2, 0.3)}
    rows = [tuned("RKD", w, seed, scores[w][seed - 100]) for w in BALANCES for seed in (100, 101)]
    rows += [row | {"stage": "final", "map_at_r": "1.0"} for row in rows if row["weight"] == "16.0"]
    for known, expected in ((rows, {4.0}), (rows[1:], set())):
        found = [run for run in Study().plan(known) if (run.stage, run.loss, run.beside) == ("final", "RKD", "triplet")]
        assert {run.weight for run in found} == expected
    assert {run.seed for run in Study().plan(rows) if run.stage == "final"} == {0, 1}


def test_images_without_labels_have_no_task_loss_and_others_always_one() -> None:
    runs = [run for run in ImageStudy(Path(), Path()).plan([]) if run.student != "teacher"]
    assert {run.beside for run in runs if run.data == "unlabelled"} == {"none"}
    assert {run.beside for run in runs if run.data == "labelled"} == {"triplet", "multi-similarity"}
    seeds = {loss: {run.seed for run in runs if run.loss == loss and run.stage == "final"} for loss in ("RKD", "PKT")}
    assert seeds == {"RKD": set(range(5)), "PKT": set(range(3))}


def test_each_generation_is_taught_by_the_one_before_with_its_seed() -> None:
    study = ParkStudy(Path(), Path())
    runs = list(study.plan([]))
    students = {(run.loss, run.beside): run for run in runs if run.seed == 3}
    first, second = (students[f"RKD of generation {number}", "none"] for number in (1, 2))
    assert study.teacher_of(first) == students["none", "triplet"]
    assert study.teacher_of(second) == first
    assert {study.teacher_of(run) for key, run in students.items() if "generation" not in key[0]} == {runs[0]}


@pytest.mark.parametrize("loss", list_losses(VARIANTS))
def test_a_loss_of_the_queue_trains_without_labels(loss: str) -> None:
    student, teacher = torch.randn(12, 4, requires_grad=True), torch.randn(12, 6)
    run = Run("toy", "unlabelled", "net", "final", loss, "none", 0.0, 0)
    objective = Objective(run, student.detach(), teacher, 12)
    objective.backward(student, teacher, indices=torch.arange(12))
    assert student.grad is not None
    assert student.grad.abs().max() > 0


def test_crops_are_windows_of_the_padded_image_or_their_mirror_images() -> None:
    padded = torch.randint(256, (20, 3, 40, 40), dtype=torch.uint8)
    mirrored = 0
    for image, crop in zip(padded, augment(padded, torch.Generator().manual_seed(0)), strict=True):
        windows = image.unfold(1, 32, 1).unfold(2, 32, 1).flatten(1, 2).transpose(0, 1)
        as_it_is, mirror = ((windows == x).flatten(1).all(1).sum() for x in (crop, crop.flip(2)))
        assert as_it_is + mirror == 1
        mirrored += int(mirror)
    assert 0 < mirrored < 20


def test_two_losses_have_the_stated_ratio_of_gradients_at_the_embedding() -> None:
    x, teacher, labels = torch.randn(12, 6), torch.randn(12, 6), torch.arange(4).repeat_interleave(3)
    run = Run("toy", "data", "net", "final", "RKD", "CSD", 4.0, 0)
    student = x.clone().requires_grad_()
    Objective(run, x, teacher, 12).backward(student, teacher, labels=labels, indices=torch.arange(12))

    def gradient(loss: RKD | CSD) -> Tensor:
        leaf = x.clone().requires_grad_()
        return torch.autograd.grad(loss(leaf, teacher), leaf)[0]

    first, second = gradient(CSD()), gradient(RKD())
    torch.testing.assert_close(student.grad, first + 4 * first.norm() / second.norm() * second)


def test_triplets_that_are_listed_once_give_the_loss_of_all_triplets() -> None:
    torch.manual_seed(0)
    for labels in (torch.arange(4).repeat_interleave(3), torch.tensor([0, 1, 1, 2, 0, 2, 1, 1, 0, 0, 3, 3])):
        objective, x = Objective(ALONE, torch.ones(1, 6), torch.ones(1, 6), 12), torch.randn(12, 6)
        for _ in range(2):
            student, other = x.clone().requires_grad_(), x.clone().requires_grad_()
            objective.backward(student, x, labels=labels)
            methods.TASKS["triplet"]()(other, labels).backward()
            assert torch.equal(student.grad, other.grad)  # type: ignore[arg-type]


def test_gains_have_the_paired_interval_and_holms_p_values() -> None:
    rng = random.Random(0)
    baseline = {"recall_at_1": {seed: rng.random() for seed in range(6)}}
    others = [
        {"recall_at_1": {s: x + rng.gauss(mean, 0.1) for s, x in baseline["recall_at_1"].items()}}
        for mean in (0, 0.1, 0.3)
    ]
    lines = compare([("base", "0.0", baseline), *((str(i), "1.0", v) for i, v in enumerate(others))], baseline)
    tests = [ttest_rel([*v["recall_at_1"].values()], [*baseline["recall_at_1"].values()]) for v in others]
    for line in lines:
        if line.name == "base":
            assert line.gains == {}
            continue
        gain, p = line.gains["recall_at_1"]
        one = tests[int(line.name)]
        interval = one.confidence_interval(0.95)
        assert (gain.low, gain.high) == pytest.approx((interval.low, interval.high))
        # the least level at which Holm's procedure, which stops at the first that is not small enough, rejects it
        ordered = sorted(t.pvalue for t in tests)
        level = max((3 - k) * q for k, q in enumerate(ordered) if q <= one.pvalue)
        assert p == pytest.approx(min(1, level))
    assert correct([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])  # Wikipedia's example
