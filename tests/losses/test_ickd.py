import numpy as np
import pytest
import torch

from lightning_rkd.losses import ICKD
from lightning_rkd.losses.ickd import inter_channel_correlation
from tests.oracles import ickd as oracle


@pytest.mark.parametrize(("n", "channels", "ps", "pt"), [(3, 4, 6, 6), (2, 3, 4, 9), (1, 2, 1, 2), (4, 1, 3, 3)])
def test_the_correlation_is_that_of_the_loops_for_all_sizes_of_maps(n, channels, ps, pt):
    rng = np.random.default_rng(0)
    s, t = rng.normal(size=(n, channels, ps)), rng.normal(size=(n, channels, pt))
    s[0, 0] = 0
    ours = inter_channel_correlation(torch.from_numpy(s), torch.from_numpy(t))
    assert float(ours) == pytest.approx(oracle.ickd(s, t), rel=1e-9, abs=1e-14)


@pytest.mark.parametrize("training", [True, False])
def test_the_loss_is_that_of_the_loops_in_training_and_evaluation(training):
    rng = np.random.default_rng(1)
    s = [rng.normal(size=(3, 2, 2, 3)), rng.normal(size=(3, 4, 2, 2))]
    t = [rng.normal(size=(3, 3, 4, 2)), rng.normal(size=(3, 2, 2, 2))]
    loss = ICKD([2, 4], [3, 2]).double().train(training)
    expected = 0.0
    for (conv, _), a, b in zip(loss.embed, s, t, strict=True):
        embedded = oracle.embed(a.reshape(*a.shape[:2], -1), conv.weight.detach().numpy()[:, :, 0])
        expected += oracle.ickd(embedded, b.reshape(*b.shape[:2], -1))
    ours = loss([torch.from_numpy(x) for x in s], [torch.from_numpy(x) for x in t])
    assert ours.item() == pytest.approx(expected, rel=1e-9)


def test_a_map_with_the_teachers_correlations_gives_zero():
    t = torch.randn(2, 3, 5, dtype=torch.float64)
    turn, _ = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64))
    assert float(inter_channel_correlation(7 * t @ turn, t)) == pytest.approx(0, abs=1e-12)


def test_the_learnt_map_learns():
    loss = ICKD()
    s, t = torch.randn(4, 2, 3, 3), torch.randn(4, 3, 3, 3)
    loss([s], [t]).backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in loss.parameters())
    assert loss.embed[0][0].weight.grad.abs().max() > 0


def test_a_student_whose_map_is_dead_gets_no_gradient():
    s = torch.zeros(4, 2, 3, 3, requires_grad=True)
    ICKD()([s], [torch.randn(4, 3, 3, 3)]).backward()
    assert s.grad is not None
    assert s.grad.abs().max() == 0


def test_what_does_not_fit_is_refused_with_the_cure():
    with pytest.raises(ValueError, match=r"needs more than one position, got a map .*drop_last=True"):
        ICKD()([torch.ones(1, 2, 1, 1)], [torch.ones(1, 2, 1, 1)])
    with pytest.raises(TypeError, match=r"student_dim lists the channels of every map, got 64; pass \[64\]"):
        ICKD(64, [64])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="2 maps of the student do not go with 1"):
        ICKD([1, 2], [1])
    with pytest.raises(ValueError, match="ICKD compares equally many channels"):
        inter_channel_correlation(torch.ones(1, 2, 3), torch.ones(1, 3, 3))
    with pytest.raises(ValueError, match=r"made for student_dim=\(2,\), but received student_dim=\(3,\)"):
        ICKD([2], [2])([torch.ones(2, 3, 2, 2)], [torch.ones(2, 2, 2, 2)])


@pytest.mark.parametrize(("student", "teacher"), [((4, 2), (4, 3, 2, 2)), ((4, 2, 2, 2), (4, 3)), ((4, 2), (4, 3))])
def test_vectors_are_refused_with_the_cure(student, teacher):
    with pytest.raises(ValueError, match=r"ICKD: .*maps \(N, C, H, W\) or tokens .*\(4, .*; tap layers before pooling"):
        ICKD()([torch.ones(student)], [torch.ones(teacher)])
