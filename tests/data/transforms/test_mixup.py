from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_rkd.data.transforms.mixup import MixUp
from lightning_rkd.utils.types import Batch


def batch(n: int = 8, classes: int = 4) -> Batch:
    return Batch(torch.randn(n, 3, 5, 5), torch.arange(n) % classes, indices=torch.arange(n) + 100)


def by_hand(x: Tensor, ratio: Tensor, partners: Tensor) -> Tensor:
    return torch.stack([ratio[i] * x[i] + (1 - ratio[i]) * x[partners[i]] for i in range(len(x))])


@pytest.mark.parametrize("per_row", [False, True])
def test_every_row_is_mixed_with_its_partner(per_row):
    given = batch()
    mixed = MixUp(per_row=per_row)(given)
    torch.testing.assert_close(mixed.inputs, by_hand(given.inputs, mixed.mix.ratio, mixed.mix.partners))
    assert sorted(mixed.mix.partners.tolist()) == list(range(8))
    assert mixed.mix.ratio.shape == (8,)
    assert (len(mixed.mix.ratio.unique()) > 1) is per_row
    assert torch.equal(mixed.mix.labels, given.labels[mixed.mix.partners])
    assert torch.equal(mixed.labels, given.labels)
    assert torch.equal(mixed.indices, given.indices)


def test_soft_labels_are_those_of_the_mixture():
    given = batch()
    mixed = MixUp(num_classes=4, per_row=True)(given)
    expected = by_hand(F.one_hot(given.labels, 4).float(), mixed.mix.ratio, mixed.mix.partners)
    torch.testing.assert_close(mixed.labels, expected)
    logits = torch.randn(8, 4)
    own, other = (F.cross_entropy(logits, y, reduction="none") for y in (given.labels, mixed.mix.labels))
    both = (mixed.mix.ratio * own + (1 - mixed.mix.ratio) * other).mean()
    torch.testing.assert_close(F.cross_entropy(logits, mixed.labels), both)


def test_labels_that_are_soft_already_are_mixed():
    given = batch()
    given.labels = torch.rand(8, 4).softmax(1)
    for mixup in (MixUp(), MixUp(num_classes=4)):
        mixed = mixup(given)
        torch.testing.assert_close(mixed.labels, by_hand(given.labels, mixed.mix.ratio, mixed.mix.partners))


def test_ratios_are_beta_distributed_and_partners_uniform():
    stats = pytest.importorskip("scipy.stats")
    for alpha in (0.2, 1.0, 3.0):
        ratios = MixUp(alpha, per_row=True)(Batch(torch.zeros(2000, 1))).mix.ratio
        assert stats.kstest(ratios.double().numpy(), stats.beta(alpha, alpha).cdf).pvalue > 0.01
    mixup = MixUp()
    rounds = torch.stack([mixup(Batch(torch.zeros(4, 1))).mix.partners for _ in range(500)])
    counts = torch.stack([(rounds == k).float().mean(0) for k in range(4)])
    assert (counts - 0.25).abs().max() < 0.08


def test_draws_are_those_of_a_generator_seeded_by_seed_rank_and_step():
    mixup = MixUp(alpha=0.5, seed=7)
    for step in range(3):
        rng = np.random.default_rng([7, 0, step])
        mix = mixup(batch()).mix
        assert mix.ratio[0] == np.float32(rng.beta(0.5, 0.5))
        assert mix.partners.tolist() == rng.permutation(8).tolist()


def test_the_teacher_sees_the_same_mixture():
    given = batch()
    assert MixUp()(given).teacher_inputs is None  # the inputs, then
    given.teacher_inputs = torch.randn(8, 2)
    mixed = MixUp()(given)
    torch.testing.assert_close(mixed.teacher_inputs, by_hand(given.teacher_inputs, mixed.mix.ratio, mixed.mix.partners))


def test_a_clean_teacher_sees_the_rows_unmixed():
    given = batch()
    assert MixUp(clean_teacher=True)(given).teacher_inputs is given.inputs
    given.teacher_inputs = torch.randn(8, 2)
    assert MixUp(clean_teacher=True)(given).teacher_inputs is given.teacher_inputs


def test_all_tensors_of_mappings_and_sequences_are_mixed_alike():
    x, y = torch.randn(4, 2), torch.randn(4, 3, 3)
    inputs: Any
    for inputs in ({"x": x, "y": y, "flag": True}, [x, (y, None)]):
        mixed = MixUp()(Batch(inputs))
        got = list(mixed.inputs.values()) if isinstance(inputs, dict) else [mixed.inputs[0], *mixed.inputs[1]]
        assert got[2] in (True, None)
        for one, given in zip(got, (x, y), strict=False):
            torch.testing.assert_close(one, by_hand(given, mixed.mix.ratio, mixed.mix.partners))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_inputs_keep_their_precision_and_the_ratio_is_never_half(dtype):
    x = torch.randn(6, 3).to(dtype)
    mixed = MixUp()(Batch(x))
    assert mixed.inputs.dtype == dtype
    assert mixed.mix.ratio.dtype == torch.promote_types(dtype, torch.float32)
    exact = by_hand(x.double(), mixed.mix.ratio.double(), mixed.mix.partners)
    torch.testing.assert_close(mixed.inputs, exact.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-7)


ZEROS, WORDS = torch.zeros(4, 2), torch.zeros(4, 2, dtype=torch.int64)


@pytest.mark.parametrize(
    ("mixup", "given", "error", "message"),
    [
        (MixUp(), Batch(torch.zeros(4, 3, 2, 2, dtype=torch.uint8)), TypeError, r"to mix, but torch\.uint8"),
        (MixUp(), Batch({"x": ZEROS, "ids": WORDS}), TypeError, r"inputs\['ids'\] is torch\.int64, and only floating"),
        (MixUp(), Batch("text"), TypeError, "the inputs hold no floating-point tensor to mix, but str"),
        (MixUp(), Batch([ZEROS, ZEROS[:3]]), ValueError, r"inputs\[1\] must have 4 rows like the rest, got \(3, 2\)"),
        (MixUp(), MixUp()(batch()), ValueError, "mixed already"),
        (MixUp(num_classes=4), Batch(ZEROS), ValueError, r"the batch has no labels: labels=\.\.\."),
        (MixUp(num_classes=3), batch(), ValueError, "labels go from 0 to 3, but num_classes=3"),
        (MixUp(num_classes=3), Batch(ZEROS, WORDS), ValueError, r"labels must be \(N,\) class numbers"),
        (MixUp(num_classes=3), Batch(ZEROS, ZEROS), ValueError, r"\(N, 3\) .* got \(4, 2\)"),
    ],
)
def test_what_cannot_be_mixed_is_refused_with_the_cure(mixup, given, error, message):
    with pytest.raises(error, match=f"MixUp: .*{message}"):
        mixup(given)


@pytest.mark.parametrize(("name", "value"), [("alpha", 0), ("num_classes", 0), ("seed", -1)])
def test_settings_out_of_range_are_refused(name, value):
    with pytest.raises(ValueError, match=f"MixUp: {name} must .*, got {value}"):
        MixUp(**{name: value})
