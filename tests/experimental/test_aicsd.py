import pickle

import pytest
import torch

from lightning_rkd.experimental.aicsd import AICSD, AdaptiveWeight, inter_class_divergences
from lightning_rkd.losses.soft_target import SoftTarget


def test_divergences_are_directed_and_zero_on_the_diagonal():
    logits = torch.randn(2, 3, 4, 4)
    divergences = inter_class_divergences(logits)
    q = logits.flatten(2).softmax(2)
    assert float(divergences[1, 0, 2]) == pytest.approx(float((q[1, 0] * (q[1, 0] / q[1, 2]).log()).sum()), rel=1e-4)
    assert not torch.allclose(divergences, divergences.mT)
    assert torch.equal(divergences.diagonal(dim1=1, dim2=2), torch.zeros(2, 3))


def test_classes_that_are_much_alike_keep_their_divergences_in_float32():
    base, noise = torch.randn(1, 1, 8, 8, dtype=torch.float64), torch.randn(1, 5, 8, 8, dtype=torch.float64)
    logits = (3 * base + 0.1 * noise).float()
    torch.testing.assert_close(
        inter_class_divergences(logits), inter_class_divergences(logits.double()).float(), rtol=1e-3, atol=0
    )


def test_adaptive_weights_rise_and_fall_with_the_epoch_and_add_up_to_one():
    rising, falling = AdaptiveWeight(10), AdaptiveWeight(10, falling=True)
    assert [rising(e) for e in (0, 5, 10, 20)] == [0, 0.5, 1, 1]
    assert all(rising(e) + falling(e) == pytest.approx(1) for e in range(15))


def test_adaptive_weights_stand_where_a_weight_may_and_pickle():
    student, teacher = torch.randn(2, 2, 3, 4, 4)
    total = AICSD() * AdaptiveWeight(10, weight=5) + SoftTarget(1.0) * AdaptiveWeight(10, falling=True)
    total = pickle.loads(pickle.dumps(total))
    expected = 5 * 0.3 * AICSD()(student, teacher) + 0.7 * SoftTarget(1.0)(student, teacher)
    torch.testing.assert_close(total(student, teacher, epoch=3), expected)


def test_an_adaptive_weight_without_epochs_is_refused():
    with pytest.raises(ValueError, match="epochs must be at least 1, got 0"):
        AdaptiveWeight(0)
