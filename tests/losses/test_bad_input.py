"""Bad input at volume: every exported loss gives the value of float64 with its gradient, or says what is wrong."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_rkd.experimental import AICSD
from lightning_rkd.functional import distances
from lightning_rkd.losses import HardDarkRank, NonFiniteError
from lightning_rkd.losses.base import RelationalLoss
from lightning_rkd.utils.types import Mix
from tests.harness.real_networks import MISFITS, Wild, wild
from tests.losses.properties import properties
from tests.losses.test_contract import CLASSES, Sample, context, every_loss, fields, made, pack, rows

FieldValues = dict[str, list[Tensor]]
HALF = (torch.float16, torch.bfloat16)
LARGEST = torch.finfo(torch.float32).max


def shapes(cls: type[RelationalLoss], n: int, width: int) -> dict[str, list[tuple[int, ...]]]:
    torch.manual_seed(0)
    return {field: [tuple(x.shape) for x in values] for field, values in rows(cls, n, width).items()}


def outputs(cls: type[RelationalLoss], how: Wild, n: int, width: int) -> FieldValues:
    """Outputs of a network that suffers from all this; its classifier is an ordinary one."""
    healthy = Wild(dtype=how.dtype)
    return {
        field: [(healthy if field == "classifier" else how).another(i).of(*shape) for i, shape in enumerate(each)]
        for field, each in shapes(cls, n, width).items()
    }


@cache
def loss_for(cls: type[RelationalLoss], widths: tuple[int, int], exact: bool = False) -> RelationalLoss:
    """In evaluation, so that memories stay as they are and one loss serves all examples."""
    torch.manual_seed(1)
    loss = made(cls)
    inputs = (pack(cls, outputs(cls, Wild(), 8, width)) for width in widths)
    loss.materialize(*inputs, like=torch.empty(0))
    return (loss.double() if exact else loss).eval()


def value_and_gradient(
    cls: type[RelationalLoss],
    widths: tuple[int, int],
    student: FieldValues,
    teacher: FieldValues,
    n: int,
    exact: bool = False,
) -> tuple[float, list[Tensor]]:
    """The loss and its gradient to the student, or in float64 what they are of the same numbers."""
    loss = loss_for(cls, widths, exact)
    if exact:
        student, teacher = ({f: [x.double() for x in v] for f, v in s.items()} for s in (student, teacher))
    student = {f: [x.detach().requires_grad_() for x in v] for f, v in student.items()}
    leaves = [x for values in student.values() for x in values]
    torch.manual_seed(0)
    value = loss(pack(cls, student), pack(cls, teacher), **context(cls, n))
    grads = torch.autograd.grad(value, leaves, allow_unused=True)
    return value.item(), [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, grads, strict=True)]


def norm(tensors: list[Tensor]) -> float:
    return float(torch.stack([x.double().abs().max() for x in tensors]).max())


class Noise:
    """Allowed distance of float32: the effect of changing the input by a few units in the last place.

    Where the loss has a unit of its own (logits, the bias of a layer), digits are counted from it.
    """

    def __init__(
        self, cls: type[RelationalLoss], widths: tuple[int, int], inputs: tuple[FieldValues, FieldValues], n: int
    ) -> None:
        loss = loss_for(cls, widths)
        value, grads = value_and_gradient(cls, widths, *inputs, n, exact=True)
        has_unit = "row shift" in loss.invariances or any("bias" in name for name, _ in loss.named_parameters())
        magnitudes = tuple(norm([x for f, v in s.items() if f != "classifier" for x in v]) or 1.0 for s in inputs)
        ordinary = 1.0 if "row shift" in loss.invariances else 1e-2
        for scales in {magnitudes} if "scale" in loss.invariances else {magnitudes, (1.0, 1.0)}:
            plain = (outputs(cls, Wild(x, dtype=torch.float64, seed=i), n, widths[i]) for i, x in enumerate(scales))
            ordinary = max(ordinary, abs(value_and_gradient(cls, widths, *plain, n, exact=True)[0]))
        ordinary = max(ordinary, abs(value))
        shortest = min(_shortest(inputs[0]), 1.0 if has_unit else torch.inf)
        if "row shift" in loss.invariances:  # beside large logits nothing is left of small differences
            shortest /= max(1.0, magnitudes[0])
        self.value = 1e-3 * abs(value) + 1e-5 * ordinary
        self.gradient = 1e-2 * norm(grads) + 1e-4 * ordinary / (shortest if shortest < torch.inf else 1.0)
        for seed in range(3):
            near = (_changed(s, 2.0**-20, 1.0 if has_unit else 0.0, seed + 10 * i) for i, s in enumerate(inputs))
            v, g = value_and_gradient(cls, widths, *near, n, exact=True)
            self.value += 8 * abs(v - value)
            self.gradient += 8 * norm([a - b for a, b in zip(g, grads, strict=True)])


def _changed(one: FieldValues, by: float, unit: float, seed: int) -> FieldValues:
    """Equal numbers change alike, so that duplicates stay duplicates."""
    generator = torch.Generator().manual_seed(seed)

    def changed(x: Tensor) -> Tensor:
        values, where = x.double().unique(return_inverse=True)
        noise = 2 * torch.rand(len(values), generator=generator, dtype=torch.float64) - 1
        return (values + by * noise * values.abs().clamp(min=unit))[where]

    return {field: [changed(x) for x in values] for field, values in one.items()}


def _shortest(one: FieldValues) -> float:
    """The shortest row or difference of rows: gradients of directions grow with its inverse."""
    found = torch.inf
    for field, values in one.items():
        for x in values if field != "classifier" else ():
            flat = x.double().flatten(1)
            lengths = torch.cat([flat.abs().amax(1), (flat[:, None] - flat).abs().amax(2).flatten()])
            found = min(found, float(lengths[lengths > 0].min())) if lengths.any() else found
    return found


def check_against_float64(cls: type[RelationalLoss], student: Wild, teacher: Wild, n: int, widths: tuple[int, int]):
    needed = properties(cls)
    widths = max(widths[0], needed.min_width), widths[1]
    n, loss = max(n, needed.min_rows), loss_for(cls, widths)
    inputs = outputs(cls, student, n, widths[0]), outputs(cls, teacher, n, widths[1])
    expected, exact = value_and_gradient(cls, widths, *inputs, n, exact=True)
    if abs(expected) > LARGEST / 1e3:  # where it begins depends on what is summed before
        with suppress_refusal(": overflow: the inputs are finite"):
            value_and_gradient(cls, widths, *inputs, n)
        return
    value, grads = value_and_gradient(cls, widths, *inputs, n)
    if student.dtype in HALF:
        # what the student gets is this gradient, rounded to a range that may end at 65,504
        wide = {f: [x.float() for x in v] for f, v in inputs[0].items()}, inputs[1]
        rounded, (_, grads) = grads, value_and_gradient(cls, widths, *wide, n)
        assert all(torch.equal(a, b.to(a.dtype)) for a, b in zip(rounded, grads, strict=True))
    assert abs(value) < torch.inf
    if norm(exact) > LARGEST / 1e3:  # float32 has no such gradient
        return
    assert all(torch.isfinite(g).all() for g in grads)
    if cls is AICSD and min(x.double().flatten(1).abs().amax(1).min() for s in inputs for x in s["logits"]) < 1:
        return  # its docstring says that such logits leave nothing but rounding
    gaps = [a.double() - b for a, b in zip(grads, exact, strict=True)]
    if abs(value - expected) <= 1e-5 * abs(expected) and norm(gaps) <= 1e-3 * norm(exact):
        return
    noise = Noise(cls, widths, inputs, n)
    assert value == pytest.approx(expected, rel=0, abs=noise.value)
    kinks = any(isinstance(module, nn.ReLU) for module in loss.modules()) or getattr(loss, "relu", False)
    if not kinks:  # at one rounding takes either direction
        assert norm(gaps) <= noise.gradient


@contextmanager
def suppress_refusal(message: str) -> Iterator[None]:
    """The block passes, or is refused with these words."""
    try:
        yield
    except (TypeError, ValueError) as error:
        if message not in str(error):
            raise AssertionError(f"refused, but not with {message!r}: {error!r}") from error


def pairs_of_sides(test: Callable[..., None]) -> Callable[..., None]:
    drawn = given(student=wild(), teacher=wild(), n=st.sampled_from((1, 2, 3, 6, 8)), widths=st.sampled_from(WIDTHS))
    return drawn(test)


WIDTHS = ((3, 5), (1, 4), (4, 1), (2, 2), (1, 1))
derandomised = settings(
    max_examples=10,
    deadline=None,
    derandomize=True,
    database=None,
    phases=(Phase.generate, Phase.shrink),  # explaining a failure takes minutes
    suppress_health_check=[HealthCheck.too_slow],
)


@every_loss
@derandomised
@pairs_of_sides
def test_any_numbers_give_what_float64_gives_or_a_named_overflow(cls, student, teacher, n, widths):
    check_against_float64(cls, student, teacher, n, widths if not properties(cls).equal_widths else (widths[0],) * 2)


@pytest.mark.slow
@every_loss
@settings(derandomised, max_examples=20)
@pairs_of_sides
def test_many_more_numbers_do_too(cls, student, teacher, n, widths):
    check_against_float64(cls, student, teacher, n, widths if not properties(cls).equal_widths else (widths[0],) * 2)


# what leaves a loss unchanged does so at every magnitude


def declares(what: str) -> Any:
    those = [cls for cls in every_loss.args[1] if what in cls.invariances]
    return pytest.mark.parametrize("cls", those, ids=lambda cls: cls.__name__)


@declares("scale")
@pytest.mark.parametrize("power", [-96, -40, 40, 96])
@pytest.mark.parametrize("which", [0, 1], ids=["student", "teacher"])
def test_losses_that_know_no_scale_know_none_at_any_magnitude(cls, power, which):
    sample = Sample(cls)
    plain, grads = sample.value_and_gradient()
    moved = [sample.student, sample.teacher][which]
    for field, values in moved.items():
        moved[field] = [x.detach() * 2.0**power for x in values]
    value, scaled = sample.value_and_gradient()
    torch.testing.assert_close(value, plain, rtol=1e-6, atol=1e-9)
    factor = 2.0**power if which == 0 else 1.0
    torch.testing.assert_close([g * factor for g in scaled], grads, rtol=1e-4, atol=1e-6 * norm(grads))


@declares("row scale")
def test_losses_that_know_no_length_of_a_row_know_none_at_any_magnitude(cls):
    sample = Sample(cls)
    plain = sample.value()
    for one in (sample.student, sample.teacher):
        for field, values in one.items():
            powers = 2.0 ** torch.linspace(-96, 96, sample.n).round()
            one[field] = [(x.flatten(1) * powers[:, None]).view_as(x) for x in values]
    torch.testing.assert_close(sample.value(), plain, rtol=1e-6, atol=1e-7)


@declares("translation")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("found", [distances.native, lambda name: None], ids=["kernel", "pytorch"])
def test_losses_that_know_no_origin_know_none_far_away(cls, found, dtype, monkeypatch):
    """At 1e6 and 1e8, where the squares of rows that were not centred would leave nothing of their differences."""
    monkeypatch.setattr(distances, "native", found)
    sample, offset = Sample(cls, dtype=dtype), 2.0 ** (20 if dtype == torch.float32 else 27)
    for one in (sample.student, sample.teacher):  # numbers that the dtype still tells apart beside the offset
        one["embedding"] = [(x * 8).round() / 8 for x in one["embedding"]]
    plain, grads = sample.value_and_gradient()
    for one in (sample.student, sample.teacher):
        one["embedding"] = [x.detach() + offset for x in one["embedding"]]
    value, far = sample.value_and_gradient()
    torch.testing.assert_close(value, plain, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(far, grads, rtol=1e-3, atol=1e-4 * norm(grads))


@declares("row shift")
def test_losses_that_know_no_shift_of_logits_know_none_far_away(cls):
    sample = Sample(cls)
    for one in (sample.student, sample.teacher):
        one["logits"] = [(x * 8).round() / 8 for x in one["logits"]]
    plain = sample.value()
    for one in (sample.student, sample.teacher):
        one["logits"] = [x + 2.0**16 * (torch.arange(len(x)) - 3).view(-1, *[1] * (x.ndim - 1)) for x in one["logits"]]
    torch.testing.assert_close(sample.value(), plain, rtol=1e-2, atol=1e-3)


@every_loss
def test_devices_that_are_not_waited_for_give_the_same(cls, monkeypatch):
    sample = Sample(cls)
    plain, grads = sample.value_and_gradient()
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)  # which skips the questions that a CPU is asked
    value, same = sample.value_and_gradient()
    torch.testing.assert_close(value, plain, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(same, grads, rtol=1e-3, atol=1e-5 * norm(grads))


# what is refused, and in which words


def of_field(cls: type[RelationalLoss], change: Callable[[Tensor], Any], which: int, field: str) -> tuple[Any, Any]:
    sample = Sample(cls)
    one = [sample.student, sample.teacher][which]
    one[field] = [change(one[field][0]), *one[field][1:]]
    return pack(cls, sample.student), pack(cls, sample.teacher)


@every_loss
def test_a_number_that_is_none_is_refused_with_network_and_row(cls):
    for which, who in enumerate(("student", "teacher")):
        for field in fields(cls):
            bad = (torch.nan, torch.inf, -torch.inf)[(which + len(field)) % 3]

            def spoilt(x: Tensor, bad: float = bad) -> Tensor:
                x = x.clone()
                x[1].view(-1)[-1] = bad
                return x

            where = "first in row 1 of" if field != "classifier" else "classifier"
            sample = Sample(cls)
            with pytest.raises(NonFiniteError, match=f"{cls.__name__}: the {who}'s .* holds NaN or infinity") as error:
                sample.loss(*of_field(cls, spoilt, which, field), **context(cls, sample.n))
            assert where in str(error.value)


WRONG: dict[str, Callable[[Tensor], Any]] = {
    **MISFITS,
    "no rows": lambda x: x[:0],
    "a row too few": lambda x: x[:-1],
}


@every_loss
def test_an_input_that_cannot_be_is_refused_by_the_name_of_the_loss(cls):
    sample = Sample(cls)
    for wrong, field, which in product(WRONG, set(fields(cls)) - {"classifier"}, (0, 1)):
        inputs = of_field(cls, WRONG[wrong], which, field)
        with pytest.raises((TypeError, ValueError), match=cls.__name__):
            sample.loss(*inputs, **context(cls, sample.n))


@every_loss
def test_too_many_dimensions_are_refused_by_name_or_give_a_finite_value(cls):
    for field in set(fields(cls)) - {"classifier"}:
        for which, more in ((0, 1), (1, 1), (0, 2), (1, 3)):
            inputs, sample = of_field(cls, lambda x, more=more: x[(..., *[None] * more)], which, field), Sample(cls)
            with suppress_refusal(cls.__name__):
                assert torch.isfinite(sample.loss(*inputs, **context(cls, sample.n)))


@every_loss
def test_a_tensor_where_another_thing_belongs_is_refused(cls):
    sample = Sample(cls)
    good = pack(cls, sample.student)
    for wrong in (None, 3.0, "rows", torch.zeros(()), {"student": 1}, object()):
        with pytest.raises((TypeError, ValueError), match=cls.__name__):
            sample.loss(good, wrong, **context(cls, sample.n))
        with pytest.raises((TypeError, ValueError), match=cls.__name__):
            sample.loss(wrong, good, **context(cls, sample.n))


def with_context(cls: type[RelationalLoss], name: str, change: Callable[[Any], Any]) -> tuple[Sample, dict[str, Any]]:
    sample = Sample(cls)
    given = context(cls, sample.n)
    return sample, given | {name: change(given[name])}


def asks_for(*names: str) -> Any:
    asked = [(cls, name) for cls in every_loss.args[1] for name in names if name in cls.needs]
    return pytest.mark.parametrize(("cls", "name"), asked, ids=lambda x: x if isinstance(x, str) else x.__name__)


@asks_for("labels", "indices", "view")
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_whole_numbers_of_any_type_are_taken_for_what_they_are(cls, name, dtype):
    sample, given = with_context(cls, name, lambda x: x.to(dtype))
    inputs = pack(cls, sample.student), pack(cls, sample.teacher)
    value = copy.deepcopy(sample.loss)(*inputs, **given)
    assert torch.equal(value, copy.deepcopy(sample.loss)(*inputs, **context(cls, sample.n)))


WRONG_COLUMNS: dict[str, Callable[[Tensor], Any]] = {
    "a row too few": lambda x: x[:-1],
    "no dimension": lambda x: x[0],
    "a list": lambda x: x.tolist(),
    "broken numbers": lambda x: x.float(),
    "complex numbers": lambda x: x.to(torch.complex64),
    "numbers elsewhere": lambda x: x.to("meta"),
    "soft labels that are none": lambda x: torch.full((len(x), CLASSES), torch.nan),
}


@asks_for("labels", "view")
@pytest.mark.parametrize("wrong", WRONG_COLUMNS)
def test_context_that_cannot_be_is_refused_by_the_name_of_the_loss(cls, name, wrong):
    sample, given = with_context(cls, name, WRONG_COLUMNS[wrong])
    with pytest.raises((TypeError, ValueError), match=f"{cls.__name__}: .*{name}"):
        sample.loss(pack(cls, sample.student), pack(cls, sample.teacher), **given)


@asks_for("labels")
@pytest.mark.parametrize("number", [0, 4, -100, 10**12])
def test_one_class_or_ignored_labels_give_a_finite_loss_or_a_refusal(cls, name, number):
    sample, given = with_context(cls, name, lambda x: torch.full_like(x, number))
    leaves = sample.leaves()
    with suppress_refusal(f"{cls.__name__}: labels go from {number} to {number}"):
        value = sample.loss(pack(cls, sample.student), pack(cls, sample.teacher), **given)
        assert torch.isfinite(value)
        grads = torch.autograd.grad(value, leaves, allow_unused=True)
        assert all(torch.isfinite(g).all() for g in grads if g is not None)


@asks_for("mix")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: Mix(m.partners, m.ratio * torch.nan, m.labels), "mix.ratio is each row's own share"),
        (lambda m: Mix(m.partners, m.ratio + 1, m.labels), "between 0 and 1"),
        (lambda m: Mix(m.partners[:-1], m.ratio, m.labels), "mix.partners has 5 rows, but the logits has 6"),
        (lambda m: Mix(m.partners, m.ratio, m.labels[:-1]), "mix.labels has 5 rows"),
    ],
)
def test_a_mix_that_cannot_be_is_refused_by_the_name_of_the_loss(cls, name, change, message):
    sample, given = with_context(cls, name, change)
    with pytest.raises(ValueError, match=f"{cls.__name__}: .*{message}"):
        sample.loss(pack(cls, sample.student), pack(cls, sample.teacher), **given)


with_parameters = pytest.mark.parametrize(
    "cls", [cls for cls in every_loss.args[1] if [*Sample(cls).loss.parameters()]], ids=lambda cls: cls.__name__
)


def test_an_overflow_is_refused_with_loss_and_magnitudes():
    student, teacher = torch.tensor([[0.0], [1e20], [3e20]]), torch.tensor([[0.0], [2.0], [3.0]])
    with pytest.raises(NonFiniteError, match=r"HardDarkRank: overflow: the inputs are finite, .* embedding 3\.0e\+20"):
        HardDarkRank()(student, teacher)
    assert torch.isfinite(HardDarkRank()(student.double(), teacher))


@with_parameters
def test_broken_parameters_are_named(cls):
    sample = Sample(cls)
    names = [name for name, p in sample.loss.named_parameters() if p.ndim > 1]
    sample.loss.get_parameter(names[0]).data[:] = torch.nan
    own = names[0].removeprefix("losses.0.")  # of a loss within a loss
    with pytest.raises(NonFiniteError, match=rf"^{'' if own != names[0] else cls.__name__}.*: its own {own} holds NaN"):
        sample.value()


# how numbers lie in memory, and where they come from


@every_loss
def test_what_a_loss_is_given_is_left_as_it_was(cls):
    sample = Sample(cls)
    given = context(cls, sample.n)
    everything = [sample.student, sample.teacher, given]
    before = copy.deepcopy(everything)
    sample.loss(pack(cls, sample.student), pack(cls, sample.teacher), **given)
    for one, same in zip(everything[:2], before[:2], strict=True):
        assert all(torch.equal(x, y) for f in one for x, y in zip(one[f], same[f], strict=True))
    assert all(torch.equal(v, before[2][k]) for k, v in given.items() if isinstance(v, Tensor))


@every_loss
def test_rows_that_are_one_row_expanded_give_what_copies_give(cls):
    sample = Sample(cls)
    sample.student = {f: [x[:1].clone() if f != "classifier" else x for x in v] for f, v in sample.student.items()}
    one = sample.leaves()
    values, grads = [], []
    for spread in (lambda x: x.expand(sample.n, *x.shape[1:]), lambda x: x.repeat(sample.n, *[1] * (x.ndim - 1))):
        many = {f: [spread(x) if f != "classifier" else x for x in v] for f, v in sample.student.items()}
        torch.manual_seed(0)
        value = copy.deepcopy(sample.loss)(pack(cls, many), pack(cls, sample.teacher), **context(cls, sample.n))
        values.append(value)
        grads.append(torch.autograd.grad(value, one, allow_unused=True))
    torch.testing.assert_close(values[0], values[1])
    for a, b in zip(*grads, strict=True):
        assert (a is None and b is None) or torch.isfinite(a).all() == torch.isfinite(b).all() == True  # noqa: E712


@every_loss
def test_a_teacher_that_ran_in_inference_mode_teaches_like_any_other(cls):
    sample = Sample(cls)
    plain, grads = sample.value_and_gradient()
    with torch.inference_mode():
        sample.teacher = {f: [x.clone() for x in v] for f, v in sample.teacher.items()}
    value, same = sample.value_and_gradient()
    torch.testing.assert_close((value, same), (plain, grads), rtol=0, atol=0)
