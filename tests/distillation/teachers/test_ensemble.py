"""Several teachers: what they show together, what may be asked of them, and that each comes back as it was."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_rkd.data.indexing import with_indices
from lightning_rkd.distillation.distiller import Distiller
from lightning_rkd.distillation.layers import CaptureError, LayerNotFoundError
from lightning_rkd.distillation.teachers import CachedTeacher, EnsembleTeacher, Teacher, joint_embedding
from lightning_rkd.losses.base import NonFiniteError, RelationalLoss
from lightning_rkd.losses.crd import CRD
from lightning_rkd.losses.nst import NST
from lightning_rkd.losses.parts.state import StepState
from lightning_rkd.losses.rkd import RKD
from lightning_rkd.losses.soft_target import SoftTarget
from lightning_rkd.losses.ttm import TTM
from lightning_rkd.utils.types import Batch, Outputs, unpack
from tests.harness import nets

X = nets.Rows(8).x
COMBINE = ("relations", "losses")


def wide() -> nn.Module:
    """A teacher of width 9; that of ``nets`` has 7."""
    return nets.teacher(norm=True, seed=1, width=12, out=9)


def half(network: nn.Module) -> nn.Module:
    return network.to(torch.bfloat16)


def terms(teacher: Any, loss: Any, x: Tensor = X, student: nn.Module | None = None, **settings: Any) -> Any:
    student = student or nets.Backbone()
    distiller = Distiller(teacher, loss, **settings)
    distiller.attach(student)
    try:
        distiller.prepare("cpu")
        distiller.start()
        student(x)
        return distiller.compute_terms(distiller.collect(Batch(x, indices=torch.arange(len(x)))))
    finally:
        distiller.detach()


# What they show together


def test_half_precision_is_joined_in_float32_and_double_in_float64() -> None:
    x = torch.randn(4, 3)
    assert torch.equal(joint_embedding([x.bfloat16()] * 2, [0.5, 0.5])[:, :3], math.sqrt(0.5) * x.bfloat16().float())
    assert joint_embedding([x.half(), x.double()], [0.5, 0.5]).dtype == torch.float64


def test_each_teacher_is_read_at_its_own_layer_or_at_the_common_one() -> None:
    a, b = nets.teacher(), wide()
    hidden, last, once = "first", "last", Teacher(b)
    expected = {
        "by name": ({"teachers": {"a": a, "b": b}, "layers": {"b": hidden}}, last, (a(X), b.first(X))),
        "in order": ({"teachers": [a, b], "layers": [hidden, None]}, None, (a.first(X), b.eval()(X))),
        "all alike": ({"teachers": [Teacher(a), b]}, hidden, (a.first(X), b.first(X))),
        "one teacher twice": ({"teachers": [once, once], "layers": [hidden, last]}, None, (b.first(X), b(X))),
        "one network twice": ({"teachers": [b, b], "layers": [hidden, last]}, None, (b.first(X), b(X))),
    }
    for arguments, common, embeddings in expected.values():
        teacher = EnsembleTeacher(**arguments, combine="losses")
        teacher.attach(common)
        outputs = teacher.outputs(Batch(X))
        teacher.detach()
        assert [one.weight for one in outputs] == [0.5, 0.5]
        for one, embedding in zip(outputs, embeddings, strict=True):
            torch.testing.assert_close(one.features[""].embedding, embedding)


def test_each_tap_is_joined_by_itself() -> None:
    at = {"low": "first", "feature_maps": ["first", "last"], "high": "last"}
    teacher = EnsembleTeacher([nets.teacher(), wide()], [1, 3])
    teacher.attach(at)
    (output,) = teacher.outputs(Batch(None), calls=[X, -X])
    shapes = {tap: None if o.embedding is None else tuple(o.embedding.shape) for tap, o in output.features.items()}
    assert shapes == {"low": (16, 22), "feature_maps": None, "high": (16, 16)}


def test_ensembles_of_ensembles_multiply_their_shares() -> None:
    inner = EnsembleTeacher({"x": nets.teacher(), "y": wide()}, combine="losses")
    outer = EnsembleTeacher({"in": inner, "out": nets.teacher(seed=3)}, [3, 1], "losses")
    outer.attach(None)
    outputs = outer.outputs(Batch(X))
    assert {one.name: one.weight for one in outputs} == {"in.x": 0.375, "in.y": 0.375, "out": 0.25}
    outer.detach()


def test_the_loss_is_averaged_over_teachers_in_whatever_it_reads() -> None:
    student, teachers = nets.Backbone(out=7), [nets.teacher(seed=s) for s in (1, 2)]
    losses, ensemble = {"soft": 2 * SoftTarget(), "ttm": TTM()}, EnsembleTeacher(teachers, [1, 4], "losses")
    ours = terms(ensemble, losses, student=student, weight=0.5)
    soft, ttm = ([loss(student(X), t(X)) for t in teachers] for loss in (SoftTarget(), TTM()))
    expected = {"soft": 0.2 * soft[0] + 0.8 * soft[1], "ttm": 0.1 * ttm[0] + 0.4 * ttm[1]}
    torch.testing.assert_close(ours, expected)


# What is refused


class Late(RelationalLoss):
    """Makes a memory that does not depend on a teacher's width, when it is asked to."""

    def __init__(self, num_samples: int | None = None) -> None:
        super().__init__()
        self.set_sizes(num_samples=num_samples)

    def build(self, num_samples: int) -> None:
        self.memory = StepState()

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        return student.sum()


class Both(RelationalLoss):
    reads = ("embedding", "classifier")

    def forward(self, student: Outputs, teacher: Outputs) -> Tensor: ...


BELONGS = r"has tensors that belong to one teacher, but EnsembleTeacher\(combine='losses'\) has several: pass co"
JOINS = r"but EnsembleTeacher\(combine='relations'\) joins embeddings only: pass combine='losses'"
REFUSED: dict[str, tuple[Any, Any, str]] = {
    "logits": (SoftTarget(), "relations", f"soft_target: SoftTarget reads 'logits', {JOINS}"),
    "feature_maps": (0.5 * NST(), "relations", f"nst: NST reads 'feature_maps', {JOINS}"),
    "several": (Both(), "relations", rf"Both reads \('embedding', 'classifier'\), {JOINS}"),
    "one of a sum": (RKD() + SoftTarget(), "relations", "soft_target: SoftTarget reads"),
    "projector": (nets.Projected(5, 7), "losses", f"projected: Projected {BELONGS}"),
    "unsized projector": (nets.Projected(), "losses", f"projected: Projected {BELONGS}"),
    "bank": (2 * CRD(), "losses", f"crd: CRD {BELONGS}"),
    "memory": (Late(8), "losses", f"late: Late {BELONGS}"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_loss_that_does_not_fit_the_combination_is_refused_at_once(case: str) -> None:
    loss, combine, message = REFUSED[case]
    teachers = [nets.teacher(), nets.teacher(seed=2)]
    with pytest.raises(ValueError, match=message):
        Distiller(EnsembleTeacher(teachers, combine=combine), loss)
    with pytest.raises(ValueError, match=message):
        Distiller(EnsembleTeacher([EnsembleTeacher(teachers, combine=combine), wide()], combine="losses"), loss)
    other = "losses" if combine == "relations" else "relations"
    Distiller(EnsembleTeacher(teachers, combine=other), loss)


def test_a_memory_that_is_made_later_is_refused_before_the_first_step() -> None:
    loss = Late()
    distiller = Distiller(EnsembleTeacher([nets.teacher(), wide()], combine="losses"), loss)
    distiller.attach(nets.Backbone())
    distiller.materialize(num_samples=8)
    with pytest.raises(ValueError, match=f"late: Late {BELONGS}"):
        distiller.prepare("cpu")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"teachers": [nets.teacher()]}, "needs at least two teachers, got 1"),
        ({"teachers": {}}, "needs at least two teachers, got 0"),
        ({"standardise_rows": -1}, "standardise_rows must be at least 0, got -1"),
        ({"combine": "logits"}, "combine must be 'relations' or 'losses', got 'logits'"),
        ({"weights": [1.0]}, "weights must be one for each of 2 teachers, got 1"),
        ({"weights": {"1": 1.0, "c": 1.0}}, r"weights name \['c'\], but the teachers are \['0', '1'\]"),
        ({"weights": [1.0, 0.0]}, "weight of '1' must be positive, got 0.0; leave it out"),
        ({"weights": [math.inf, 1.0]}, "weight of '0' must be positive, got inf"),
        ({"weights": {"1": math.nan}}, "weight of '1' must be positive, got nan"),
        ({"layers": ["first"]}, "layers must be one for each of 2 teachers, got 1"),
        ({"layers": {"b": "first"}}, r"layers name \['b'\], but the teachers are"),
    ],
)
def test_what_does_not_make_an_ensemble_is_refused(settings: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EnsembleTeacher(**{"teachers": [nets.teacher(), nets.teacher()], **settings})
    with pytest.raises(TypeError, match=r"a teacher is an nn\.Module, a network and not its class, got 'resnet18'"):
        EnsembleTeacher(["resnet18", nets.teacher()])


def test_teachers_with_different_taps_are_refused() -> None:
    teacher = EnsembleTeacher({"a": nets.teacher(), "b": wide()}, layers={"a": {"low": "first", "high": "last"}})
    with pytest.raises(ValueError, match=r"must have the same taps, got \{'a': \['high', 'low'\], 'b': \[''\]\}"):
        Distiller(teacher, RKD().at("low"))
    Distiller(teacher, RKD().at("low"), teacher_layer={"low": "first", "high": "last"})
    with pytest.raises(ValueError, match=r"the taps are \['high', 'low'\]"):
        Distiller(teacher, RKD().at("lwo"), teacher_layer={"low": "first", "high": "last"})


def test_maps_alone_cannot_be_joined() -> None:
    with pytest.raises(ValueError, match=r"the teachers give \{'0': \[\(8, 10\), \(8, 7\)\], '1': \[\(8, "):
        terms(EnsembleTeacher([nets.teacher(), wide()]), RKD(), teacher_layer=["first", "last"])


@pytest.mark.parametrize(
    ("combine", "error", "message"),
    [
        ("relations", ValueError, r"must give features of the same samples, got embeddings \[\(8, 7\), \(4, 7\)\]"),
        ("losses", CaptureError, r"gives 8 rows in 1 call\(s\), the teacher 'half' 4"),
    ],
)
def test_teachers_that_show_unequal_numbers_of_rows_are_refused(combine: Any, error: Any, message: str) -> None:
    class Half(nets.Backbone):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x[:4])

    with pytest.raises(error, match=message):
        terms(EnsembleTeacher({"whole": nets.teacher(), "half": Half(out=7)}, combine=combine), RKD())


@pytest.mark.parametrize("combine", COMBINE)
def test_standardised_embeddings_have_variance_one_in_every_column(combine: Any) -> None:
    data = nets.Rows(64)
    ensemble = EnsembleTeacher(
        [nets.teacher(out=4), nets.teacher(seed=1, out=12)], combine=combine, standardise_rows=64
    )
    distiller = Distiller(ensemble, nets.Gram())
    distiller.attach(nets.Backbone())
    teacher: Any = distiller.teacher
    assert teacher.outputs(Batch(X))[0].features[""].embedding.std(0).max() < 1  # for sizes, as they are
    distiller.prepare("cpu")
    with pytest.raises(CaptureError, match=r"has no statistics .* call distiller.prepare_data\(loader, unpack\)"):
        teacher.outputs(Batch(X))
    distiller.prepare_data(DataLoader(data, batch_size=16, shuffle=True), unpack)
    weight = 0.5 if combine == "relations" else 1
    for one in teacher.outputs(Batch(data.x)):
        x = one.features[""].embedding
        torch.testing.assert_close(x.var(0), torch.full_like(x[0], weight))
        torch.testing.assert_close(x.mean(0), torch.zeros_like(x[0]))
    distiller.detach()


def test_an_evaluation_keeps_the_statistics_of_the_training() -> None:
    teacher = EnsembleTeacher({"array": CachedTeacher.from_array(torch.randn(64, 4)), "live": nets.teacher(out=4)})
    teacher.standardise_rows, found = 64, []
    train, evaluation = (with_indices(DataLoader(nets.Rows(64, seed=seed), batch_size=8)) for seed in (0, 1))
    batch = Batch(X, indices=torch.arange(len(X)))
    for loaders, training in (([evaluation] * 2, False), (train, True), ([evaluation] * 2, False)):
        teacher.attach(None)
        teacher.to("cpu")
        teacher.prepare_data(loaders, unpack, train=training)
        found.append(teacher.outputs(batch)[0].features[""].embedding)
        teacher.detach()
    assert not torch.allclose(found[0], found[1])
    assert torch.equal(found[1], found[2])
    teacher.attach("last")
    assert not teacher._statistics, "of another layer"
    teacher.detach()


def test_statistics_of_several_loaders_are_refused_with_the_cure() -> None:
    teacher = EnsembleTeacher([nets.teacher(), wide()], standardise_rows=8)
    teacher.attach(None)
    with pytest.raises(ValueError, match=r"one loader over a map-style data set, got 2 over Rows, Rows"):
        teacher.prepare_data([DataLoader(nets.Rows(8))] * 2, unpack)
    teacher.detach()


def test_the_teacher_with_equal_embeddings_is_named() -> None:
    dead = nets.teacher()
    nn.init.zeros_(dead.last.weight)
    teacher = EnsembleTeacher({"good": nets.teacher(), "dead": dead}, standardise_rows=8)
    teacher.attach(None)
    with pytest.raises(ValueError, match="the teacher 'dead' gives equal embeddings for 8 samples: take more rows"):
        teacher.prepare_data(DataLoader(nets.Rows(8)), unpack)
    teacher.detach()


def test_the_teacher_that_gives_nan_is_named() -> None:
    broken = wide()
    with torch.no_grad():
        broken.last.bias[0] = torch.nan
    with pytest.raises(NonFiniteError, match=r"step 0 \(teacher 'broken'\): RKD: the teacher's output holds NaN"):
        terms(EnsembleTeacher({"fine": nets.teacher(), "broken": broken}, combine="losses"), RKD())


def test_a_layer_that_one_of_them_lacks_is_named_and_nothing_stays() -> None:
    a, b = nets.teacher(), nn.Linear(nets.WIDTH, 3)
    before = nets.snapshot(a)
    distiller = Distiller(EnsembleTeacher([a, b]), RKD(), teacher_layer="first")
    with pytest.raises(LayerNotFoundError, match="Linear has no layer 'first'"):
        distiller.attach(nets.Backbone())
    distiller.detach()
    assert nets.attachments(a, b) == []
    assert nets.same(before, a)


def test_a_student_among_the_teachers_is_refused() -> None:
    student = nets.Backbone()
    with pytest.raises(ValueError, match="the teacher shares parameters with the student"):
        terms(EnsembleTeacher([wide(), student]), RKD(), student=student)


# Each comes back as it was


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("combine", COMBINE)
def test_all_teachers_are_restored(combine: Any, shared: bool) -> None:
    a = nets.teacher(dropout=0.5, norm=True).train()
    b = a if shared else wide().train()
    quantised = nets.teacher(seed=3)
    networks = [a, b, quantised]
    before = [nets.snapshot(network) for network in networks]
    teacher = EnsembleTeacher([a, b, Teacher(quantised, move=False)], combine=combine)
    for _ in range(2):
        teacher.attach("drop")
        assert teacher.to("cpu", half)
        assert not teacher.to("cpu", half), "they are there already"
        assert [network.first.weight.dtype for network in networks] == [torch.bfloat16, torch.bfloat16, torch.float32]
        teacher.teachers["0"].outputs(Batch(X.bfloat16()))
        assert not a.training
        teacher.detach()
        assert all(nets.same(*pair) for pair in zip(before, networks, strict=True))
        assert nets.attachments(*networks) == []
