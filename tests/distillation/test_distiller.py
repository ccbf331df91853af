"""One step of the engine without a Trainer: what it shows, which terms it makes, what it reports."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_rkd.distillation.distiller import BoundLoss, Distiller, combine_needs
from lightning_rkd.distillation.finite_checks import CollapseWarning, FiniteChecks
from lightning_rkd.distillation.layers import CaptureError
from lightning_rkd.distillation.step import StepFeatures
from lightning_rkd.distillation.teachers.base import TeacherOutput
from lightning_rkd.losses.base import NonFiniteError, RelationalLoss
from lightning_rkd.losses.rkd import RKD
from lightning_rkd.losses.similarity_preserving import SimilarityPreserving
from lightning_rkd.losses.weighting import Term
from lightning_rkd.utils.types import Batch, Outputs
from tests.harness import nets

X, Y = nets.Rows(8).x, nets.Rows(8).y


def step(
    distiller: Distiller, *calls: Tensor, batch: Batch | None = None, student: nn.Module | None = None, **kwargs: Any
) -> dict[str, Tensor]:
    """Attach, call the student, and take the terms."""
    student = student or nets.Backbone()
    distiller.attach(student)
    distiller.prepare("cpu")
    distiller.start()
    for x in calls or (X,):
        student(x)
    return distiller.compute_terms(distiller.collect(Batch(X, Y) if batch is None else batch), **kwargs)


def test_labels_that_no_loss_needs_may_be_anything() -> None:
    terms = step(Distiller(nets.teacher(), RKD(), input_layer=""), X, -X, batch=Batch(X, labels=["a", "b"]))
    assert terms["rkd"].requires_grad


def test_labels_that_a_loss_needs_must_be_a_tensor() -> None:
    with pytest.raises(CaptureError, match=r"the labels of a batch must be a tensor, got list: .*labels=\.\.\."):
        step(Distiller(nets.teacher(), nets.Requesting()), batch=Batch(X, labels=["a"] * 8))


def test_without_a_loss_there_are_no_terms_and_calls_may_repeat() -> None:
    distiller, student = Distiller(None, None), nets.Backbone()
    distiller.attach(student, teach=False)
    distiller.start()
    student(X)
    student(-X)
    features = distiller.collect(Batch(X), teach=False)
    assert features.embedding.embedding.shape == (16, 5)
    assert (features.teacher_embedding, features.views, distiller.compute_terms(features)) == (None, 2, {})


def test_a_batch_of_one_gives_a_zero_with_a_graph() -> None:
    terms = step(Distiller(nets.teacher(), RKD()), X[:1], batch=Batch(X[:1]))
    assert (float(terms["rkd"].detach()), terms["rkd"].requires_grad) == (0.0, True)


def test_taps_that_share_a_map_are_gathered_apart() -> None:
    class Maps(RelationalLoss):
        reads = "feature_maps"

    x, y, z = (torch.randn(2, c, 1, 1) for c in (1, 2, 3))
    features = {"a": Outputs(feature_maps=[x, y]), "b": Outputs(feature_maps=[x, z])}
    needs = combine_needs([BoundLoss.bind("maps", Term(Maps(), tap=tap), ["a", "b"], ["a", "b"]) for tap in "ab"])
    gathered = StepFeatures(Batch(X), features).gathered(needs, [2], None)
    for tap, expected in {"a": (x, y), "b": (x, z)}.items():
        maps = gathered.student[tap].feature_maps
        assert [m.shape for m in maps] == [m.shape for m in expected]


def test_maps_that_no_loss_reads_are_not_gathered(monkeypatch: pytest.MonkeyPatch) -> None:
    class Maps(RelationalLoss):
        reads = "feature_maps"

        def __init__(self, *positions: int) -> None:
            super().__init__()
            self.feature_maps = positions or None

    monkeypatch.setattr("lightning_rkd.distillation.step.gather_rows", lambda x, counts, group: torch.cat([x, x]))
    maps = Outputs(feature_maps=[torch.randn(2, c, 1, 1) for c in (1, 2, 3, 4)])
    features = StepFeatures(Batch(X), {"": maps}, [TeacherOutput({"": maps})])
    for losses, read in (([Maps(0), Maps(0, -1)], [4, 2, 2, 4]), ([Maps(0), Maps()], [4, 4, 4, 4])):
        bound = [BoundLoss.bind("maps", Term(loss), [""], [""]) for loss in losses]
        whole = features.gathered(combine_needs(bound), [2, 2], None)
        for outputs in (whole.student[""], whole.teachers[0].features[""]):
            assert [len(x) for x in outputs.feature_maps or []] == read


def test_a_frozen_map_is_refused_if_it_is_all_that_the_loss_reads() -> None:
    student = nets.Backbone()
    student.first.requires_grad_(False)
    layers = ["first", "last"]
    loss = SimilarityPreserving(reads="feature_maps", feature_maps=[0])
    distiller = Distiller(nets.teacher(), loss, student_layer=layers, teacher_layer=layers)
    with pytest.raises(CaptureError, match="the student layer gives a tensor without gradient: it is frozen"):
        step(distiller, student=student)


def test_copies_and_pickles_of_an_attached_distiller_attach_anew() -> None:
    distiller = Distiller(nets.teacher(), RKD())
    step(distiller)
    for twin in (copy.deepcopy(distiller), pickle.loads(pickle.dumps(distiller))):
        assert step(twin)["rkd"].requires_grad
    assert copy.deepcopy(distiller).teacher.network is distiller.teacher.network


def test_two_calls_without_an_input_layer_are_refused() -> None:
    message = r"ran 2 times in one step, but the teacher is fed the batch once.* no_grad or distiller\.paused\(\)"
    with pytest.raises(CaptureError, match=message):
        step(Distiller(nets.teacher(), RKD()), X, X)


@pytest.mark.parametrize("without", ["no_grad", "paused"])
@pytest.mark.parametrize("input_layer", [None, ""])
def test_passes_that_do_not_learn_are_no_views(without: str, input_layer: str | None) -> None:
    student, teacher = nets.Backbone(), nets.teacher()
    distiller = Distiller(teacher, RKD(), input_layer=input_layer)
    with distiller.attached(student, "cpu"):
        distiller.start()
        with torch.no_grad() if without == "no_grad" else distiller.paused():
            student(X.flip(0))
        student(X)
        terms = distiller.compute_terms(Batch(X))
    expected = RKD()(student(X), teacher(X))
    assert terms["rkd"] == expected
    both = torch.cat([X.flip(0), X])
    assert (RKD()(student(both), teacher(both)) - expected).abs() > 1e-3, "WRONG: as with two views"


def test_a_frozen_layer_has_a_term_of_weight_zero() -> None:
    student = nets.Backbone().requires_grad_(False)
    distiller = Distiller(nets.teacher(), RKD(), weight=lambda epoch: float(epoch > 1))
    assert step(distiller, student=student, epoch=1)["rkd"] == 0
    with pytest.raises(CaptureError, match=r"it is frozen \(give the loss a weight of 0 until it is not, weight="):
        step(distiller, student=student, epoch=2)


def test_an_input_layer_may_feed_a_teacher_of_other_inputs() -> None:
    assert step(Distiller(nn.Linear(8, 3), RKD(), input_layer="drop"))["rkd"] > 0


def test_a_step_without_a_batch_needs_an_input_layer() -> None:
    distiller, student = Distiller(nets.teacher(), RKD()), nets.Backbone()
    distiller.attach(student)
    distiller.start()
    student(X)
    with pytest.raises(CaptureError, match="was given no batch: name the layer that feeds the teacher, input_layer="):
        distiller.collect(None)


# What checks report (on a GPU a step later; here the flags arrive at once)


def check(reads: Any, student: Outputs, teacher: Outputs, value: float = 1.0, gather: bool = True) -> None:
    """Check features as on a GPU, where the loss itself does not."""

    class Reads(RelationalLoss):
        def forward(self, student: Any, teacher: Any) -> Any: ...

    loss = Reads()
    loss.reads, loss.gather = reads, gather
    bound = BoundLoss.bind("loss", Term(loss), [""], [""])
    inputs = bound.select_inputs({"": student}, {"": teacher})
    FiniteChecks().check_features(bound, inputs, torch.tensor(value), "loss", 4)


@pytest.mark.parametrize("network", ["student", "teacher"])
@pytest.mark.parametrize(
    ("reads", "field", "shape"),
    [
        ("embedding", "embedding", (6, 2)),
        ("logits", "logits", (6, 2, 3, 3)),
        (("logits", "embedding"), "embedding", (6, 2)),
    ],
)
def test_infinity_is_found_in_every_field_a_loss_reads(network: str, reads: Any, field: str, shape: Any) -> None:
    outputs = {name: Outputs(embedding=torch.randn(6, 2), logits=torch.randn(6, 2)) for name in ("student", "teacher")}
    bad = torch.randn(shape)
    bad[3:] = torch.inf
    setattr(outputs[network], field, bad)
    with pytest.raises(NonFiniteError, match=f"step 4: loss: the {network}'s output holds NaN or infinity, .* row 3"):
        check(reads, outputs["student"], outputs["teacher"])


def test_feature_maps_are_checked_and_a_classifier_alone_is_not() -> None:
    fine, bad = (Outputs(feature_maps=[torch.ones(2, 1, 2, 2) * value]) for value in (1.0, torch.nan))
    with pytest.raises(NonFiniteError, match="the teacher's output"):
        check("feature_maps", fine, bad)
    check("classifier", Outputs(), Outputs())


def test_collapse_concerns_relations_between_rows_of_embeddings() -> None:
    flat, one = Outputs(embedding=torch.ones(4, 2), logits=torch.ones(4, 2)), Outputs(embedding=torch.ones(1, 2))
    check("logits", flat, flat)
    check("embedding", one, one)
    check("embedding", flat, flat, gather=False)
    with pytest.warns(CollapseWarning, match="Lower the learning rate, or add a task loss"):
        check("embedding", flat, flat)


def test_a_loss_at_a_tap_that_no_layer_is_named_is_refused() -> None:
    with pytest.raises(ValueError, match=r"tap 'typo'.*the taps are \['deep'\]"):
        Distiller(nn.Linear(2, 2), RKD().at("typo"), student_layer={"deep": "0"})
    with pytest.raises(ValueError, match="the taps are none"):
        Distiller(nn.Linear(2, 2), RKD().at("typo"), student_layer="0")
    Distiller(nn.Linear(2, 2), RKD().at("deep"), student_layer="0", teacher_layer={"deep": "", "other": ""})


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_a_loss_that_overflows_where_no_loss_looks_is_found_with_its_step(value: float) -> None:
    fine = Outputs(embedding=torch.randn(4, 2))
    check("embedding", fine, fine)
    with pytest.raises(NonFiniteError, match="step 4: loss: overflow: the inputs are finite, but the loss is not"):
        check("embedding", fine, fine, value)
