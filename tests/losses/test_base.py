import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_rkd.losses import RKD
from lightning_rkd.losses.base import RelationalLoss
from lightning_rkd.losses.weighting import LossSum, evaluate_weight, terms_of
from lightning_rkd.utils.types import Mix, Outputs


class Gap(RelationalLoss):
    """Mean absolute difference of the means; keeps what it was given."""

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        self.seen = student, teacher
        return (student.mean() - teacher.mean()).abs()


class Labelled(RelationalLoss):
    def forward(self, student: Tensor, teacher: Tensor, *, labels: Tensor, epoch: int = 0) -> Tensor:
        return student.sum() * 0 + labels.sum() + epoch


class LogitGap(RelationalLoss):
    reads = "logits"

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        return (student - teacher).abs().mean()


class MapGap(RelationalLoss):
    reads = "feature_maps"

    def forward(self, student: list[Tensor], teacher: list[Tensor]) -> Tensor:
        return torch.stack([(s - t).abs().mean() for s, t in zip(student, teacher, strict=True)]).sum()


class Two(RelationalLoss):
    reads = ("embedding", "logits")

    def forward(self, student: Outputs, teacher: Outputs) -> Tensor:
        assert student.embedding is not None
        assert teacher.logits is not None
        return student.embedding.mean() + teacher.logits.mean()


class RKDLike(Gap):
    pass


def doubled(epoch: int) -> float:
    return 2.0 * epoch


ZEROS, ONES = torch.zeros(4, 2), torch.ones(4, 3)


# what a class declares


def test_what_a_loss_needs_is_read_from_its_signature():
    assert Gap.needs == frozenset()
    assert Labelled.needs == {"labels", "epoch"}


def test_an_unknown_name_in_forward_is_refused_at_class_definition():
    with pytest.raises(TypeError, match=r"Bad.forward takes \['label'\].*'labels'"):

        class Bad(RelationalLoss):
            def forward(self, student: Tensor, teacher: Tensor, *, label: Tensor) -> Tensor: ...


def test_an_input_that_is_not_keyword_only_is_refused_with_the_cure():
    with pytest.raises(TypeError, match=r"Bad.forward takes \['labels'\] by position.*teacher, \*, labels\)"):

        class Bad(RelationalLoss):
            def forward(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor: ...


@pytest.mark.parametrize("reads", ["embeddings", ("embedding", "logit")])
def test_an_unknown_field_in_reads_is_refused_at_class_definition(reads):
    with pytest.raises(TypeError, match="must name fields of Outputs"):
        type("Bad", (RelationalLoss,), {"reads": reads, "forward": lambda self, student, teacher: None})


# what a call accepts


class Mixed(RelationalLoss):
    def forward(self, student: Tensor, teacher: Tensor, *, mix: Mix) -> Tensor:
        return student.sum()


REFUSED: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: Gap()(ZEROS, ONES, labels=ZEROS), TypeError, r"Gap does not use \['labels'\]; it takes no context"),
    (lambda: Labelled()(ZEROS, ONES, indices=ZEROS), TypeError, r"use \['indices'\]; it takes \['epoch', 'labels'\]"),
    (lambda: Labelled()(ZEROS, ONES), ValueError, r"Labelled needs \['labels'\]: pass labels=\.\.\."),
    (lambda: Labelled()(ZEROS, ONES, labels=ZEROS[:3]), ValueError, "labels has 3 rows, but the embedding has 4"),
    (lambda: Labelled()(ZEROS, ONES, labels=[0, 1, 2, 3]), TypeError, r"must be a tensor, got list; torch\.as_tensor"),
    (
        lambda: Mixed()(ZEROS, ONES, mix=Mix(torch.arange(3), torch.ones(3))),
        ValueError,
        "Mixed: mix has 3 rows, but the embedding has 4",
    ),
    (
        lambda: LogitGap()(Outputs(embedding=ZEROS), Outputs(logits=ONES)),
        ValueError,
        "LogitGap, student: the tapped layer has no logits",
    ),
    (lambda: LogitGap()(ZEROS[:, 0], ZEROS[:, 0]), ValueError, r"logits must begin with \(N, \.\.\.\), got \(4,\)"),
    (lambda: Two()(ZEROS, ONES), TypeError, r"Two, student: this loss reads .* so it takes Outputs, got Tensor"),
    (
        lambda: Gap()(dict.fromkeys("ab", Outputs(embedding=ZEROS)), {"x": Outputs(embedding=ONES)}),
        ValueError,
        r"tapped at \['a', 'b'\]; say which one with loss.at\('a'\)",
    ),
    *(
        (lambda wrong=wrong: Gap() * wrong, TypeError, "a weight is a number or a function")
        for wrong in ("25", None, [1])
    ),
    *((lambda wrong=x: LossSum(wrong), ValueError, "at least one loss") for x in ({}, [])),
    *(
        (lambda name=name: LossSum({name: Gap()}), ValueError, f"cannot have that name, .*{name}")
        for name in ("a.b", "keys")
    ),
    (lambda: LossSum(torch.nn.Linear(1, 1)), TypeError, "or a dict of them, got Linear"),
    (
        lambda: LossSum({"a": Gap() + Gap()}),
        TypeError,
        "the loss named 'a' must be one RelationalLoss, weighted or not",
    ),
    (lambda: terms_of("RKD"), TypeError, "or a dict of them, got '"),
]


@pytest.mark.parametrize(("call", "error", "message"), REFUSED)
def test_what_a_loss_or_a_sum_cannot_take_is_refused_with_the_cure(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize(
    ("student", "teacher", "error", "message"),
    [
        (torch.zeros(3, 2), ONES, ValueError, r"same N samples, got \(3, 2\) and \(4, 3\)"),
        (torch.zeros(4), ONES, ValueError, r"student's embedding must be \(N, D\), got \(4,\)"),
        (ZEROS, torch.zeros(4, 3, 2), ValueError, r"teacher's embedding must be \(N, D\), got \(4, 3, 2\)"),
        (torch.zeros(0, 2), torch.zeros(0, 3), ValueError, r"student's embedding is empty, shape \(0, 2\)"),
        (ZEROS.long(), ONES, TypeError, r"student's embedding must be floating point, got torch.int64"),
        (ZEROS, [[1.0]], TypeError, r"teacher's embedding must be a tensor, got list"),
    ],
)
def test_inputs_that_do_not_fit_are_refused_with_network_and_shape(student, teacher, error, message):
    with pytest.raises(error, match=f"Gap: .*{message}"):
        Gap()(student, teacher)


# what forward receives


@pytest.mark.parametrize(
    ("student", "teacher", "inside"),
    [
        (torch.float16, torch.float16, torch.float32),
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.float32, torch.float64, torch.float64),
        (torch.float64, torch.float16, torch.float64),
    ],
)
def test_forward_runs_in_float32_or_the_higher_of_two_precisions(student, teacher, inside):
    loss = Gap()
    loss(ZEROS.to(student), ONES.to(teacher))
    assert [x.dtype for x in loss.seen] == [inside, inside]


def test_a_loss_picks_its_field_from_outputs_and_from_the_only_tap():
    student, teacher = (Outputs(embedding=x, logits=x + 1) for x in (torch.zeros(4, 2), torch.ones(4, 2)))
    assert float(Gap()(student, teacher)) == 1
    assert float(LogitGap()({"head": student}, {"backbone": teacher})) == 1
    assert float(Two()(student, teacher)) == 2


def test_maps_are_compared_one_by_one_and_cast_one_by_one():
    maps = [torch.zeros(4, 2, 3, 3), torch.zeros(4, 5, 1, 1)]
    assert float(MapGap()(maps, [m.half() + 1 for m in maps])) == 2


@pytest.mark.parametrize("reads", ["feature_maps", ("feature_maps", "logits")])
def test_unequally_many_maps_are_refused_however_they_come(reads: Any) -> None:
    class Reads(RelationalLoss):
        def forward(self, student: Any, teacher: Any) -> Tensor:
            raise AssertionError("not reached")

    Reads.reads = reads
    two, three = (Outputs(feature_maps=[torch.ones(2, 1, 3, 3)] * n, logits=torch.ones(2, 3)) for n in (2, 3))
    for inputs, message in (
        ((two, three), "2 feature maps of the student and 3 of the teacher"),
        ((three, two), "3 feature maps of the student and 2 of the teacher"),
    ):
        with pytest.raises(ValueError, match=f"Reads: {message}; name as many layers of each"):
            Reads()(*inputs)


def test_a_map_without_a_list_around_it_is_refused_with_the_cure():
    one = torch.ones(2, 3, 4, 4)
    for student, teacher in ((one, one), ([one], one), (one, [one])):
        with pytest.raises(TypeError, match=r"MapGap: feature maps come as a list, also a single one: pass \[map\]"):
            MapGap()(student, teacher)


# weights, taps and sums


@pytest.mark.parametrize("make", [lambda loss: 25 * loss, lambda loss: loss * 25, lambda loss: 5 * (5 * loss)])
def test_a_weight_multiplies_the_value(make):
    term = make(Gap())
    assert isinstance(term, LossSum)
    assert float(term(ZEROS, ONES)) == 25
    assert float(term.terms["gap"].loss(ZEROS, ONES)) == 1


def test_a_weight_may_follow_the_epoch_also_inside_a_product():
    term = 3 * (Gap() * doubled)
    assert [float(term(ZEROS, ONES, epoch=e)) for e in (0, 1, 2)] == [0, 6, 12]
    assert evaluate_weight(doubled, 4) == 8
    assert float(pickle.loads(pickle.dumps(term))(ZEROS, ONES, epoch=2)) == 12


def test_at_reads_the_named_tap_and_the_outer_name_wins():
    taps = {"low": Outputs(embedding=ZEROS), "high": Outputs(embedding=ZEROS + 3)}
    teacher = {"low": Outputs(embedding=ONES), "high": Outputs(embedding=ONES)}
    assert float(Gap().at("low")(taps, teacher)) == 1
    assert float((2 * Gap()).at("high")(taps, teacher)) == 4
    assert [term.tap for term in (2 * Gap().at("low")).at("high").terms.values()] == ["high"]
    with pytest.raises(ValueError, match=r"there is no tap 'mid'; the taps are \['high', 'low'\]"):
        Gap().at("mid")(taps, teacher)


def test_a_sum_adds_weighted_terms_under_the_names_of_their_classes():
    total = 25 * Gap() + 50 * LogitGap() + RKDLike().at("layer.3")
    assert list(total.terms) == ["gap", "logit_gap", "rkd_like_layer_3"]
    assert isinstance(total, LossSum)
    both = Outputs(embedding=ZEROS, logits=ZEROS), Outputs(embedding=ONES, logits=ZEROS + 1)
    assert float((25 * Gap() + 50 * LogitGap())(*both)) == 75


def test_two_losses_of_one_class_get_different_names():
    assert list((Gap() + Gap() + 3 * Gap()).terms) == ["gap", "gap_2", "gap_3"]


@pytest.mark.parametrize(
    "make",
    [
        lambda: sum([Gap(), 2 * Gap()]),
        lambda: LossSum([Gap(), 2 * Gap()]),
        lambda: LossSum({"a": Gap(), "b": 2 * Gap()}),
        lambda: 0.5 * (2 * Gap() + 4 * Gap()),
        lambda: (Gap() + 2 * Gap()).at("only"),
    ],
)
def test_every_way_to_write_a_sum_has_the_same_value(make: Callable[[], LossSum]):
    assert float(make()(ZEROS, ONES)) == 3


def test_a_dict_names_the_terms():
    assert list(LossSum({"near": Gap(), "far": 2 * Gap()}).terms) == ["near", "far"]
    assert {name: term.weight for name, term in terms_of({"near": Gap(), "far": 2 * Gap()}).items()} == {
        "near": 1.0,
        "far": 2,
    }


def test_a_sum_takes_the_context_of_its_losses_and_refuses_the_rest():
    total = Gap() + Labelled()
    assert float(total(ZEROS, ONES, labels=torch.ones(4, dtype=torch.int64), epoch=2)) == 7
    with pytest.raises(TypeError, match=r"no loss of this sum uses \['indices'\]"):
        total(ZEROS, ONES, indices=torch.zeros(4))


def test_sums_survive_deepcopy_and_pickle_and_register_their_losses():
    class WithParameter(Gap):
        pass

    total = 2 * Gap() + Gap() * doubled
    for twin in (copy.deepcopy(total), pickle.loads(pickle.dumps(total))):
        assert float(twin(ZEROS, ONES, epoch=3)) == float(total(ZEROS, ONES, epoch=3)) == 8
    layered = WithParameter()
    layered.scale = torch.nn.Parameter(torch.ones(()))
    assert [name for name, _ in (Gap() + layered).named_parameters()] == ["losses.with_parameter.scale"]


def test_the_bibtex_entry_of_every_reference_is_reachable_from_the_class() -> None:
    assert RKD.bibtex.startswith("@inproceedings{park2019relational,\n")
    assert RKD().bibtex == RKD.reference.bibtex
    assert RelationalLoss.bibtex == ""


def test_a_loss_prints_the_arguments_that_it_keeps_under_their_own_names() -> None:
    class Powers(RelationalLoss):
        def __init__(self, student_dim: int | None = None, *, power: float = 2.0, form: str = "a") -> None:
            super().__init__()
            self.power, self.form = power, form

    assert repr(Powers(power=3)) == "Powers(power=3, form='a')"
    assert repr(RKD()) == "RKD(distance_weight=1.0, angle_weight=2.0, reduction='official', sampled_anchors=None)"
