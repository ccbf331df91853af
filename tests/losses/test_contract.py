"""Promises of every loss that ``lightning_rkd.losses`` exports; a new loss is covered without a change here."""

import copy
import inspect
import pickle
from functools import cache
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

import lightning_rkd.losses
from lightning_rkd import experimental
from lightning_rkd.losses.base import INVARIANCES, RelationalLoss
from lightning_rkd.losses.mhgd import MHGD
from lightning_rkd.losses.parts.attention_graph import AttentionGraph
from lightning_rkd.losses.parts.state import StepState
from lightning_rkd.utils.distributed import gather_row_counts, gather_rows
from lightning_rkd.utils.types import Mix, Outputs
from tests.harness.ranks import Ranks
from tests.losses.properties import properties

losses = lightning_rkd.losses

CLASSES = 5
SAMPLES = 50  # in the training set


def exported() -> list[type[RelationalLoss]]:
    found = [getattr(package, name) for package in (losses, experimental) for name in package.__all__]
    found = [c for c in found if inspect.isclass(c) and issubclass(c, RelationalLoss) and not inspect.isabstract(c)]
    return [c for c in found if c is not RelationalLoss]


class Form:
    """A loss class with other arguments than its defaults; stands for a class that had them as defaults."""

    def __init__(self, cls: type[RelationalLoss], **arguments: Any) -> None:
        self.cls, self.arguments, self.__name__ = cls, arguments, cls.__name__

    def __call__(self, **more: Any) -> RelationalLoss:
        return self.cls(**self.arguments, **more)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in ("cls", "arguments"):
            raise AttributeError(name)
        return getattr(self.cls(**self.arguments), name)

    def __str__(self) -> str:
        return f"{self.__name__}, {', '.join(f'{k} {v}' for k, v in self.arguments.items())}"


FORMS = [
    Form(losses.AnchoredRKD, angle_weight=2.0),
    Form(losses.ClassSimilarityKD, standardise=True),
    Form(losses.CorrelationCongruence, form="norm"),
    Form(losses.CorrelationCongruence, form="rows"),
    Form(losses.CorrelationCongruence, form="rows", dim=3),
    Form(losses.CSD, bank_size=64),
    Form(losses.CosineTemperatureKD, standardise=True),
    Form(losses.DIST, standardise=True),
    Form(losses.EmbedDistill, distance="cosine"),
    Form(losses.FitNetHint, relu=True, norm=True),
    Form(losses.GramAnchoring, negative_cosines="keep"),
    Form(losses.GraphKD, neighbours=2),
    Form(losses.GraphKD, power=2),
    Form(losses.GraphKD, reads="feature_maps"),
    Form(losses.HolisticKD, negatives_from="other"),
    Form(losses.Matryoshka, loss=losses.CSD(), dims=[3, 2], weights=[1.0, 0.5]),
    Form(losses.Matryoshka, loss=losses.HardDarkRank(), dims=[2]),
    Form(losses.NST, kernel="linear"),
    Form(losses.NST, kernel="gaussian"),
    Form(losses.Regression, distance="smooth_l1"),
    Form(losses.SimilarityPreserving, reads="feature_maps"),
    Form(losses.SoftTarget, standardise=True),
    Form(losses.STKD, form="blended"),
    Form(losses.STKD, form="wrong classes"),
    Form(experimental.Tanimoto, form="sample"),
    Form(losses.RKD, reduction="distinct"),
]
every_class = pytest.mark.parametrize("cls", exported(), ids=lambda c: c.__name__)
every_loss = pytest.mark.parametrize(
    "cls", [*exported(), *FORMS], ids=lambda c: str(c) if isinstance(c, Form) else c.__name__
)


def fields(cls: type[RelationalLoss]) -> tuple[str, ...]:
    return (cls.reads,) if isinstance(cls.reads, str) else cls.reads


def rows(cls: type[RelationalLoss], n: int, width: int, dtype: torch.dtype = torch.float32) -> dict[str, list[Tensor]]:
    """Outputs of one network for n samples, by field; ``classifier`` belongs to the network, not to samples."""
    made = {
        "embedding": lambda: [torch.randn(n, width, dtype=dtype)],
        "logits": lambda: [torch.randn(n, CLASSES, *((3, 2) if properties(cls).dense else ()), dtype=dtype)],
        "feature_maps": lambda: [torch.randn(n, 4, size, size, dtype=dtype) for size in (4, 2, 2)],
        "classifier": lambda: [torch.randn(CLASSES, width, dtype=dtype), torch.randn(CLASSES, dtype=dtype)],
    }
    return {field: made[field]() for field in fields(cls)}


def pack(cls: type[RelationalLoss], outputs: dict[str, list[Tensor]]) -> Any:
    packed: dict[str, Any] = {
        f: v if f == "feature_maps" else tuple(v) if f == "classifier" else v[0] for f, v in outputs.items()
    }
    return packed[cls.reads] if isinstance(cls.reads, str) else Outputs(**packed)


def context(cls: type[RelationalLoss], n: int) -> dict[str, Any]:
    labels = torch.arange(n) // 2 % CLASSES
    every = {
        "labels": labels,
        "indices": torch.arange(n),
        "view": torch.arange(n) // max(1, n // 2) % 2,  # the first half are clean, the second another view of them
        "epoch": 3,
        "mix": Mix(torch.arange(n).roll(1), torch.linspace(0.2, 0.9, n), labels.roll(1)),
    }
    return {name: value for name, value in every.items() if name in cls.needs}


def made(cls: type[RelationalLoss]) -> RelationalLoss:
    if cls is MHGD:  # knows nothing without the graph that its first stage learns
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return MHGD(AttentionGraph((4, 4, 4)))
    if cls is losses.Matryoshka:  # a loss around another one
        return losses.Matryoshka(losses.RKDDistance(), dims=[2, 4])
    arguments: dict[str, int] = {}
    settings = inspect.signature(cls.cls if isinstance(cls, Form) else cls).parameters
    if "num_samples" in inspect.signature(cls.build).parameters:
        arguments["num_samples"] = SAMPLES
    if "negatives" in settings:
        arguments["negatives"] = 32  # thousands by default
    return cls(**arguments)


@cache
def prepared(cls: type[RelationalLoss], n: int, dtype: torch.dtype) -> tuple[RelationalLoss, Any, Any]:
    """A loss with its tensors, and outputs of student and teacher."""
    torch.manual_seed(1)
    loss, widths = made(cls).to(dtype), (5, 5) if properties(cls).equal_widths else (4, 7)
    student, teacher = (rows(cls, n, width, dtype) for width in widths)
    inputs = pack(cls, student), pack(cls, teacher)
    copy.deepcopy(loss)(*inputs, **context(cls, n))  # works without preparation
    loss.materialize(*inputs, like=torch.empty(0, dtype=dtype))
    return loss, student, teacher


class Sample:
    """A loss with inputs of both networks; every call starts from the same state of the loss and of the generator."""

    def __init__(self, cls: type[RelationalLoss], n: int = 6, dtype: torch.dtype = torch.float32) -> None:
        self.cls, self.n = cls, max(n, properties(cls).min_rows)
        self.loss, self.student, self.teacher = copy.deepcopy(prepared(cls, self.n, dtype))
        torch.manual_seed(1)

    def leaves(self) -> list[Tensor]:
        return [x.requires_grad_() for values in self.student.values() for x in values]

    def value(self, loss: RelationalLoss | None = None) -> Tensor:
        torch.manual_seed(0)
        loss = copy.deepcopy(self.loss if loss is None else loss)
        return loss(pack(self.cls, self.student), pack(self.cls, self.teacher), **context(self.cls, self.n))

    def value_and_gradient(self, autocast: bool = False) -> tuple[Tensor, list[Tensor]]:
        leaves = self.leaves()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            value = self.value()
        grads = torch.autograd.grad(value, leaves, allow_unused=True)
        return value.detach(), [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, grads, strict=True)]


@every_loss
def test_the_loss_is_a_finite_scalar_with_a_gradient_to_the_student_only(cls):
    sample = Sample(cls)
    for values in sample.teacher.values():
        for x in values:
            x.requires_grad_()
    leaves, value = sample.leaves(), sample.value()
    value.backward()
    assert value.shape == ()
    assert value.dtype == torch.float32
    assert torch.isfinite(value)
    assert any(x.grad is not None and x.grad.abs().max() > 0 for x in leaves)
    assert all(x.grad is None or torch.isfinite(x.grad).all() for x in leaves)
    assert all(x.grad is None for values in sample.teacher.values() for x in values)


@every_loss
def test_the_gradient_passes_gradcheck_unless_parts_are_held_constant(cls):
    sample = Sample(cls, n=4, dtype=torch.float64)
    leaves = sample.leaves()
    many = sum(x.numel() for x in leaves) > 100  # then along random directions instead of entry by entry
    unit = max(g.abs().max() for g in sample.value_and_gradient()[1])  # or a small gradient is right whatever it is
    passes = torch.autograd.gradcheck(
        lambda *_: sample.value() / unit, leaves, raise_exception=properties(cls).exact_gradient, fast_mode=many
    )
    assert passes is properties(cls).exact_gradient


def reordered(value: Any, order: Tensor) -> Any:
    if isinstance(value, Mix):
        return Mix(order.argsort()[value.partners[order]], value.ratio[order], value.labels[order])
    return value[order] if isinstance(value, Tensor) else value


@every_loss
def test_the_order_of_the_rows_matters_only_where_the_loss_says_so(cls):
    sample = Sample(cls, dtype=torch.float64)
    outputs, expected, values = (sample.student, sample.teacher), sample.value(), []
    for seed in range(1 if not properties(cls).order_matters else 5):
        order = torch.randperm(sample.n, generator=torch.Generator().manual_seed(seed))
        inputs = (
            pack(cls, {f: v if f == "classifier" else [x[order] for x in v] for f, v in one.items()}) for one in outputs
        )
        shuffled = {name: reordered(value, order) for name, value in context(cls, sample.n).items()}
        torch.manual_seed(0)
        values.append(copy.deepcopy(sample.loss)(*inputs, **shuffled))
    assert any(not torch.allclose(value, expected) for value in values) is properties(cls).order_matters


def changed(x: Tensor, how: str) -> Tensor:
    """Outputs of one network after the change that an invariance names, every row taken as a vector."""
    torch.manual_seed(2)
    flat = x.flatten(1)
    n, width = flat.shape
    if how == "rotation":
        flat = flat @ torch.linalg.qr(torch.randn(width, width, dtype=x.dtype))[0]
    else:
        flat = {
            "translation": lambda: flat + torch.randn(width, dtype=x.dtype),
            "scale": lambda: 3 * flat,
            "row scale": lambda: flat * (0.5 + torch.rand(n, 1, dtype=x.dtype)),
            "row shift": lambda: flat + torch.randn(n, 1, dtype=x.dtype),
        }[how]()
    return flat.view_as(x)


@every_loss
def test_the_declared_invariances_hold_and_no_other(cls):
    sample = Sample(cls, dtype=torch.float64)
    before, held = sample.value(), set()
    for how in INVARIANCES:
        values = []
        for name in ("student", "teacher"):
            plain = getattr(sample, name)
            moved = {f: v if f == "classifier" else [changed(x, how) for x in v] for f, v in plain.items()}
            setattr(sample, name, moved)
            values.append(sample.value())
            setattr(sample, name, plain)
        if all(torch.allclose(value, before, rtol=1e-9, atol=1e-13) for value in values):
            held.add(how)
    assert held == set(sample.loss.invariances)


@pytest.mark.parametrize("cls", [cls for cls in every_loss.args[1] if "feature_maps" in fields(cls)], ids=str)
def test_tokens_give_the_loss_of_the_map_with_the_same_numbers(cls):
    sample = Sample(cls)
    expected = sample.value()
    for outputs in (sample.student, sample.teacher):
        outputs["feature_maps"] = [x.flatten(2).mT for x in outputs.get("feature_maps", [])]
    torch.testing.assert_close(sample.value(), expected)


@every_loss
def test_autocast_changes_neither_value_nor_gradient(cls):
    sample = Sample(cls)
    cast, plain = sample.value_and_gradient(autocast=True), sample.value_and_gradient()
    torch.testing.assert_close(cast, plain, rtol=0, atol=0)


@every_loss
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_inputs_give_the_float32_loss_of_the_same_numbers(cls, dtype):
    sample = Sample(cls)
    for outputs in (sample.student, sample.teacher):
        for field, values in outputs.items():
            outputs[field] = [x.to(dtype) for x in values]
    half, grads = sample.value_and_gradient()
    for outputs in (sample.student, sample.teacher):
        for field, values in outputs.items():
            outputs[field] = [x.detach().float() for x in values]
    torch.testing.assert_close(half, sample.value(), rtol=0, atol=0)
    assert all(g.dtype == dtype and torch.isfinite(g).all() for g in grads)


@every_loss
def test_duplicates_and_collapsed_batches_give_finite_gradients(cls):
    for networks, how_many in product((["student"], ["teacher"], ["student", "teacher"]), (2, 6)):
        sample = Sample(cls)
        for outputs in (getattr(sample, name) for name in networks):
            for field in set(outputs) - {"classifier"}:
                for x in outputs[field]:
                    x[:how_many] = x[0].clone()
        value, grads = sample.value_and_gradient()
        assert torch.isfinite(value)
        assert all(torch.isfinite(g).all() for g in grads)


@every_loss
@pytest.mark.parametrize("n", [1, 2])
def test_tiny_batches_give_a_finite_loss_with_a_graph_or_are_refused(cls, n):
    sample = Sample(cls, n=n)
    if n < properties(cls).min_rows:
        few = [
            pack(cls, {f: v if f == "classifier" else [x[:n] for x in v] for f, v in outputs.items()})
            for outputs in (sample.student, sample.teacher)
        ]
        with pytest.raises(ValueError, match=cls.__name__):
            sample.loss(*few, **context(cls, n))
        return
    value, grads = sample.value_and_gradient()
    assert torch.isfinite(value)
    assert all(torch.isfinite(g).all() for g in grads)


@every_loss
def test_copies_pickles_and_loaded_states_compute_the_same(cls):
    sample = Sample(cls)
    fresh = made(cls)
    fresh.load_state_dict(sample.loss.state_dict())
    for twin in (fresh, copy.deepcopy(sample.loss), pickle.loads(pickle.dumps(sample.loss))):
        assert torch.equal(sample.value(twin), sample.value())


@every_loss
def test_own_tensors_stay_in_float32_under_half_precision(cls):
    sample = Sample(cls)
    value = sample.value()
    sample.loss.to(torch.bfloat16)
    assert {x.dtype for x in sample.loss.state_dict().values() if x.is_floating_point()} <= {torch.float32}
    assert torch.equal(sample.value(), value)


@every_loss
def test_only_banks_change_from_step_to_step_and_only_in_training(cls):
    sample = Sample(cls)
    for training in (False, True):
        loss = copy.deepcopy(sample.loss).train(training)
        before = copy.deepcopy(loss.state_dict())
        loss(pack(cls, sample.student), pack(cls, sample.teacher), **context(cls, sample.n))
        moved = {name for name, x in loss.state_dict().items() if not torch.equal(x, before[name])}
        banks = {f"{name}." for name, module in loss.named_modules() if isinstance(module, StepState)}
        assert all(any(name.startswith(bank) for bank in banks) for name in moved)
        assert bool(moved) is (training and bool(banks))


@every_loss
def test_the_random_numbers_of_the_training_are_not_touched(cls):
    sample = Sample(cls)
    state = torch.get_rng_state()
    copy.deepcopy(sample.loss)(pack(cls, sample.student), pack(cls, sample.teacher), **context(cls, sample.n))
    assert torch.equal(torch.get_rng_state(), state)


@every_class
def test_the_docstring_of_a_published_loss_has_reference_and_example(cls):
    if cls.reference is None:
        return
    doc = inspect.getdoc(cls) or ""
    assert "Reference:" in doc
    assert "Example:" in doc
    assert ">>>" in doc
    assert ".. math::" in doc
    assert cls.bibtex.startswith("@"), "its key is in references.bib"
    assert "reconstruction" in doc or cls.reference.provenance != "reconstruction"


def weighted(outputs: dict[str, list[Tensor]], weights: list[Tensor]) -> dict[str, list[Tensor]]:
    """The student's rows as the product with parameters that all ranks share."""
    supply = iter(weights)
    return {field: [x * next(supply) for x in values] for field, values in outputs.items()}


def weights_for(sample: Sample) -> list[Tensor]:
    return [
        torch.ones(x.shape if field == "classifier" else x.shape[1:], dtype=x.dtype, requires_grad=True)
        for field, values in sample.student.items()
        for x in values
    ]


def part_of(value: Any, mine: slice) -> Any:
    if isinstance(value, Mix):
        return Mix(value.partners[mine], value.ratio[mine], value.labels[mine])
    return value[mine] if isinstance(value, Tensor) else value


def on_a_rank(rank: int, sample: Sample, counts: list[int]) -> list[Tensor]:
    """The shared parameters' gradients on a rank that holds its part of the rows."""
    mine, cls, weights = slice(sum(counts[:rank]), sum(counts[: rank + 1])), sample.cls, weights_for(sample)
    part = [
        {field: values if field == "classifier" else [x[mine] for x in values] for field, values in outputs.items()}
        for outputs in (sample.student, sample.teacher)
    ]
    part[0] = weighted(part[0], weights)
    together = {name: part_of(v, mine) for name, v in context(cls, sample.n).items()}
    factor = len(counts) * counts[rank] / sum(counts)
    if cls.gather:
        rows_of = gather_row_counts(counts[rank])
        for outputs in part:
            for field in sorted(set(outputs) - {"classifier"}):  # the same order on every rank
                outputs[field] = [gather_rows(x, rows_of) for x in outputs[field]]
        together = {name: gather_rows(v, rows_of) if isinstance(v, Tensor) else v for name, v in together.items()}
        factor = 1.0
    torch.manual_seed(0)
    (factor * copy.deepcopy(sample.loss)(pack(cls, part[0]), pack(cls, part[1]), **together)).backward()
    return [torch.zeros_like(w) if w.grad is None else w.grad for w in weights]


@every_loss
@pytest.mark.parametrize("counts", [[3, 3], [5, 1]], ids=["even", "uneven"])
def test_two_processes_average_to_the_gradient_of_one_big_batch(cls, counts, ranks: Ranks):
    if str(cls) == "STKD, form blended":
        pytest.skip("needs the teacher's logits of the partners, which are rows of the same process")
    sample = Sample(cls, dtype=torch.float64)
    counts = [sample.n - 1, 1] if counts[0] == 5 else [sample.n - sample.n // 2, sample.n // 2]
    weights = weights_for(sample)
    torch.manual_seed(0)
    loss = copy.deepcopy(sample.loss)
    loss(pack(cls, weighted(sample.student, weights)), pack(cls, sample.teacher), **context(cls, sample.n)).backward()
    for w, *grads in zip(weights, *ranks.run(on_a_rank, sample, counts), strict=True):
        expected = torch.zeros_like(w) if w.grad is None else w.grad
        torch.testing.assert_close(torch.stack(grads).mean(0), expected)
