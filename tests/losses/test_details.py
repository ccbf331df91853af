"""What single losses promise beyond their loops (``test_oracles``) and the contract."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_rkd.losses import (
    DIST,
    ICKD,
    PKT,
    SRD,
    TTM,
    WTTM,
    CorrelationCongruence,
    CosineTemperatureKD,
    EmbedDistill,
    FitNetHint,
    GraphKD,
    HardDarkRank,
    SimilarityPreserving,
    SoftDarkRank,
    SoftTarget,
    VkD,
)
from lightning_rkd.losses.correlation_congruence import gaussian_taylor
from lightning_rkd.losses.cskd import class_similarity, cosine_temperatures
from lightning_rkd.losses.ickd import inter_channel_correlation
from lightning_rkd.losses.itrd import correlation_loss
from lightning_rkd.losses.nst import neuron_selectivity
from lightning_rkd.losses.pkt import pkt
from lightning_rkd.losses.srd import log_sum
from lightning_rkd.losses.vkd import orthonormal
from lightning_rkd.utils.types import Outputs
from tests.oracles import cskd, dist, nst
from tests.oracles.differences import central_differences


@pytest.mark.parametrize(("loss", "shape"), [(SRD(2, 3), (5,)), (ICKD([2], [3]), (4, 3, 3))], ids=["SRD", "ICKD"])
def test_evaluation_takes_the_statistics_of_the_batch_as_training_does(loss, shape):
    student, teacher = (torch.randn(shape[0], width, *shape[1:]) for width in (2, 3))
    inputs = (student, teacher) if loss.reads == "embedding" else ([student], [teacher])
    assert torch.equal(loss.eval()(*inputs), loss.train()(*inputs))


def test_the_expansion_comes_down_to_the_gaussian_kernel_of_unit_vectors():
    a, b = torch.nn.functional.normalize(torch.randn(2, 10, 4, dtype=torch.float64), dim=2)
    exact = torch.exp(-0.4 * (a - b).square().sum(1))
    inner = (a * b).sum(1)
    torch.testing.assert_close(gaussian_taylor(inner, 0.4, 20), exact, rtol=1e-14, atol=0)
    assert (gaussian_taylor(inner, 0.4, 2) - exact).abs().max() < 0.8**3 / math.factorial(3)


@pytest.mark.parametrize("form", ["kernel", "norm", "rows"])
@pytest.mark.parametrize("n", [1, 5])
def test_a_copy_of_the_teacher_has_no_loss_and_a_finite_gradient(form, n):
    teacher = torch.randn(n, 3)
    student = teacher.clone().requires_grad_()
    value = CorrelationCongruence(form)(student, teacher)
    value.backward()
    assert value == 0
    assert torch.isfinite(student.grad).all()


def test_the_gradient_takes_the_temperatures_for_constants():
    student, teacher = np.random.default_rng(0).normal(size=(2, 4, 3))
    x = torch.from_numpy(student).requires_grad_()
    CosineTemperatureKD()(x, torch.from_numpy(teacher)).backward()
    fixed = cskd.temperatures(student, teacher)
    expected = central_differences(lambda s: cskd.cosine_temperature(s, teacher, fixed=fixed), student)
    np.testing.assert_allclose(x.grad, expected, rtol=1e-6, atol=1e-8)


def test_samples_on_which_the_networks_agree_are_cold_and_the_others_hot():
    student, teacher = torch.randn(2, 8, 5, dtype=torch.float64)
    temperatures = cosine_temperatures(student, teacher)
    assert temperatures.shape == (8, 1)
    assert float(temperatures.min()) == 2
    assert float(temperatures.max()) == pytest.approx(6)
    np.testing.assert_allclose(temperatures.flatten(), cskd.temperatures(student.numpy(), teacher.numpy()))


def test_where_all_samples_agree_alike_all_are_cold():
    logits = torch.randn(1, 5).expand(4, 5)
    assert torch.equal(cosine_temperatures(logits, logits), torch.full((4, 1), 2.0))
    assert torch.equal(cosine_temperatures(logits[:1], torch.randn(1, 5)), torch.full((1, 1), 2.0))


def test_a_class_whose_probabilities_underflow_keeps_its_direction():
    student, teacher = torch.randn(2, 6, 4)
    student[:, 0] -= 120  # below the smallest number of float32, at temperature 1
    expected = class_similarity(student.double(), teacher.double(), temperature=1.0)
    torch.testing.assert_close(class_similarity(student, teacher, temperature=1.0).double(), expected)


def test_the_soft_loss_of_a_moved_teacher_is_zero_and_the_hard_one_is_not():
    teacher = torch.randn(8, 3, dtype=torch.float64)
    assert abs(float(SoftDarkRank()(teacher + 5, teacher))) < 1e-9
    assert float(HardDarkRank()(teacher + 5, teacher)) > 0.01


def test_the_hard_loss_needs_the_teachers_order_only():
    teacher = torch.tensor([[0.0], [1.0], [3.0], [7.0]], dtype=torch.float64)
    confident = 10 * teacher  # the same order, far apart
    assert float(HardDarkRank()(confident, teacher)) < 1e-12
    assert float(HardDarkRank()(confident[[1, 0, 2, 3]], teacher)) > 100


@pytest.mark.parametrize("cls", [HardDarkRank, SoftDarkRank])
@pytest.mark.parametrize("n", [1, 2])
def test_a_batch_without_two_others_to_rank_is_an_exact_zero_with_a_graph(cls, n):
    student = torch.randn(n, 3, requires_grad=True)
    value = cls()(student, torch.randn(n, 5))
    value.backward()
    assert value == 0
    assert torch.equal(student.grad, torch.zeros(n, 3))


def test_a_teacher_that_only_exaggerates_costs_next_to_nothing():
    probabilities = torch.tensor([[0.4, 0.3, 0.3], [0.2, 0.5, 0.3], [0.3, 0.3, 0.4]], dtype=torch.float64)
    sharper = 2 * (probabilities - 1 / 3) + 1 / 3
    assert abs(float(DIST()(probabilities.log(), sharper.log()))) < 1e-5
    assert float(DIST()(probabilities.log(), sharper.flip(1).log())) > 0.1


def test_of_one_sample_only_the_row_counts():
    student, teacher = np.random.default_rng(0).normal(size=(2, 1, 5))
    value = DIST()(torch.from_numpy(student), torch.from_numpy(teacher))
    assert value.item() == pytest.approx(dist.dist(student, teacher, intra_weight=0) + 1, rel=1e-9)


def test_distances_are_not_squared_so_every_sample_pulls_alike():
    student = torch.tensor([[1.0, 0.0], [100.0, 0.0]], requires_grad=True)
    EmbedDistill()(student, torch.zeros(2, 2)).backward()
    torch.testing.assert_close(student.grad, torch.tensor([[0.5, 0.0], [0.5, 0.0]]))


def test_a_sample_that_matches_exactly_passes_no_gradient():
    student = torch.tensor([[1.0, 2.0], [3.0, 4.0]], requires_grad=True)
    EmbedDistill()(student, torch.tensor([[1.0, 2.0], [0.0, 0.0]])).backward()
    assert torch.equal(student.grad[0], torch.zeros(2))
    assert torch.isfinite(student.grad).all()


@pytest.mark.parametrize(
    ("projection", "widths", "kind"),
    [
        (None, (4, 4), nn.Identity),
        (None, (3, 4), nn.Linear),
        (True, (4, 4), nn.Linear),
        (False, (4, 4), nn.Identity),
    ],
)
def test_there_is_a_projection_where_widths_differ_or_one_is_wanted(projection, widths, kind):
    loss = EmbedDistill(projection=projection)
    loss(torch.randn(2, widths[0]), torch.randn(2, widths[1]))
    assert isinstance(loss.project, kind)


def test_channels_are_taken_from_the_first_batch():
    loss = FitNetHint()
    loss([torch.randn(2, 3, 4, 4), torch.randn(2, 5, 2, 2)], [torch.randn(2, 4, 4, 4), torch.randn(2, 6, 2, 2)])
    assert [tuple(r.weight.shape) for r in loss.regressors] == [(4, 3), (6, 5)]
    with pytest.raises(ValueError, match=r"FitNetHint was made for student_dim=\(3, 5\), but received"):
        loss([torch.randn(2, 7, 4, 4), torch.randn(2, 5, 2, 2)], [torch.randn(2, 4, 4, 4), torch.randn(2, 6, 2, 2)])


def test_soft_labels_that_are_certain_act_like_hard_ones():
    student, teacher, labels = torch.randn(7, 5), torch.randn(7, 4), torch.tensor([0, 1, 0, 2, 1, 0, 2])
    soft, loss = torch.nn.functional.one_hot(labels).float(), GraphKD(edges="between")
    torch.testing.assert_close(loss(student, teacher, labels=soft), loss(student, teacher, labels=labels))


def test_a_single_sample_has_no_edges_and_no_loss():
    student = torch.randn(1, 2, requires_grad=True)
    value = GraphKD()(student, torch.randn(1, 3))
    value.backward()
    assert value == 0
    assert torch.equal(student.grad, torch.zeros(1, 2))


def test_a_map_with_the_teachers_correlations_gives_zero():
    t = torch.randn(2, 3, 5, dtype=torch.float64)
    turn, _ = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64))
    assert float(inter_channel_correlation(7 * t @ turn, t)) == pytest.approx(0, abs=1e-12)


def test_a_match_is_finite_because_the_deviations_are_unbiased():
    x = torch.randn(4, 3, dtype=torch.float64)
    assert float(correlation_loss(x, x, alpha=1.5)) == pytest.approx(math.log2(3 * 0.25**3), rel=1e-9)


@pytest.mark.parametrize("kernel", ["polynomial", "linear", "gaussian"])
def test_channels_that_are_never_active_pass_no_gradient(kernel):
    s = torch.randn(2, 3, 2, 2)
    s[:, 1] = 0
    s.requires_grad_()
    neuron_selectivity(s, torch.randn(2, 4, 2, 2), kernel=kernel).backward()
    assert s.grad is not None
    assert s.grad[:, 1].abs().max() == 0
    assert s.grad.abs().max() < 10


def test_the_gradient_takes_the_bandwidth_for_a_constant():
    student, teacher = np.random.default_rng(0).normal(size=(2, 2, 3, 2, 2))
    x = torch.from_numpy(student).requires_grad_()
    neuron_selectivity(x, torch.from_numpy(teacher), kernel="gaussian").backward()
    fixed = nst.variances(student, teacher)
    expected = central_differences(lambda s: nst.nst(s, teacher, "gaussian", fixed), student)
    np.testing.assert_allclose(x.grad, expected, rtol=1e-6, atol=1e-9)


REDUCTION = pytest.mark.parametrize("reduction", ["official", "distinct"])


@REDUCTION
def test_zero_rows_pass_no_gradient(reduction):
    student = torch.cat([torch.randn(4, 4), torch.zeros(2, 4)]).requires_grad_()
    PKT(reduction)(student, torch.randn(6, 3)).backward()
    assert not student.grad[4:].any()
    assert student.grad[:4].any()


@REDUCTION
@pytest.mark.parametrize("rows", [[[1.0, 0.0]], [[1.0, 0.0], [-1.0, 0.0]], [[1.0, 0.0], [1.0, 0.0]]])
def test_a_sample_alone_or_opposite_to_all_others_gives_a_finite_gradient(reduction, rows):
    student, teacher = torch.tensor(rows, requires_grad=True), torch.randn(len(rows), 3)
    value = pkt(student, teacher, reduction=reduction)
    value.backward()
    assert torch.isfinite(value)
    assert torch.isfinite(student.grad).all()
    if len(rows) == 1:
        assert value == 0


@REDUCTION
def test_cosines_that_round_below_minus_one_give_finite_losses(reduction):
    row = torch.randn(1, 2048, generator=torch.Generator().manual_seed(0))
    student = torch.cat([factor * row for factor in (1, -1.37, -0.73, -3.3)]).requires_grad_()
    teacher = torch.randn(4, 5)
    values = [PKT(reduction)(student, teacher), PKT(reduction)(teacher.requires_grad_(), student)]
    torch.stack(values).sum().backward()
    assert all(torch.isfinite(value) for value in values)
    assert torch.isfinite(student.grad).all()
    assert torch.isfinite(teacher.grad).all()


def maps(n: int, *shapes: tuple[int, ...]) -> list[Tensor]:
    return [torch.randn(n, *shape, dtype=torch.float64) for shape in shapes]


def test_what_is_read_is_a_matter_of_the_instance():
    student, teacher = maps(4, (3, 2, 2)), maps(4, (5, 2, 2))
    loss = SimilarityPreserving(reads="feature_maps")
    expected = loss(student, teacher)
    inputs = (
        Outputs(embedding=torch.randn(4, 2), feature_maps=student),
        Outputs(embedding=torch.randn(4, 2), feature_maps=teacher),
    )
    for term in (loss, copy.deepcopy(loss), 1.0 * loss):
        torch.testing.assert_close(term(*inputs), expected)
    assert SimilarityPreserving().reads == "embedding"
    torch.testing.assert_close(SimilarityPreserving()(*(x[0].flatten(1) for x in (student, teacher))), expected)


@pytest.mark.parametrize("scale", [1e-25, 1e25])
def test_extreme_scales_keep_the_directions_of_the_gram_matrix(scale):
    student, teacher = torch.randn(5, 3), torch.randn(5, 4)
    torch.testing.assert_close(
        SimilarityPreserving()(scale * student, teacher), SimilarityPreserving()(student, teacher)
    )


def test_a_perfect_match_has_the_logarithm_of_eps_and_a_gradient_of_zero():
    teacher = torch.randn(6, 4)
    student = teacher.clone().requires_grad_()
    loss = log_sum(student, teacher)
    loss.backward()
    assert loss.item() == pytest.approx(math.log(1e-5))
    assert torch.equal(student.grad, torch.zeros_like(student))


def test_one_row_gives_exactly_zero_and_reaches_the_projector():
    loss = SRD(3, 2)
    value = loss(torch.randn(1, 3, requires_grad=True), torch.randn(1, 2))
    value.backward()
    assert value.item() == 0
    assert torch.equal(loss.project.weight.grad, torch.zeros(2, 3))


def test_the_projector_is_float32_whatever_the_default():
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert SRD(3, 2).project.weight.dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("cls", [TTM, WTTM])
def test_exponent_one_is_hintons_loss_at_temperature_one(cls):
    student, teacher = torch.randn(2, 6, 5, dtype=torch.float64)
    torch.testing.assert_close(cls(1.0)(student, teacher), SoftTarget(1.0)(student, teacher))


def test_a_one_hot_teacher_weighs_one_and_a_uniform_one_a_power():
    student = torch.randn(1, 5, dtype=torch.float64)
    for teacher, weight in ((torch.tensor([[1e3, 0, 0, 0, 0]]), 1), (torch.zeros(1, 5), 5**0.75)):
        ratio = WTTM(0.25)(student, teacher) / TTM(0.25)(student, teacher)
        assert float(ratio) == pytest.approx(weight, rel=1e-10)


@pytest.mark.parametrize(("ds", "dt"), [(2, 5), (3, 3), (5, 2)])
def test_the_projection_is_orthogonal_at_the_start_and_after_steps(ds, dt):
    torch.manual_seed(0)
    loss = VkD(ds, dt)
    optimizer = torch.optim.SGD(loss.parameters(), lr=1.0)
    for _ in range(3):
        p = orthonormal(loss.matrix.detach())
        square = p.T @ p if ds <= dt else p @ p.T
        torch.testing.assert_close(square, torch.eye(min(ds, dt)), atol=1e-5, rtol=0)
        optimizer.zero_grad()
        loss(torch.randn(6, ds), torch.randn(6, dt)).backward()
        assert loss.matrix.grad is not None
        assert loss.matrix.grad.abs().max() > 0
        optimizer.step()
