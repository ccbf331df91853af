"""Losses against their equations in plain loops, and against values of published code."""

import inspect
import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_rkd import losses
from lightning_rkd.experimental import AICSD, Tanimoto
from tests.losses.properties import properties
from tests.oracles import (
    aicsd,
    anchored_rkd,
    attention_transfer,
    correlation_congruence,
    csd,
    cskd,
    d3,
    dark_rank,
    dcd,
    dist,
    ega,
    embed_distill,
    fitnet,
    gram_anchoring,
    graph_kd,
    ickd,
    itrd,
    matryoshka,
    multi_level_logit,
    nst,
    pkt,
    raml,
    regression,
    relative_similarity,
    relaxed_contrastive,
    rkd,
    rop,
    sample_contrastive,
    similarity_preserving,
    skd,
    soft_target,
    srd,
    tanimoto,
    token_similarity,
    ttm,
    vkd,
)
from tests.oracles.differences import check_against_loops, det
from tests.oracles.standardisation import standardised
from tests.oracles.vectors import average_pool

Shape = tuple[int, ...]
Maps = list[np.ndarray]


class Case(NamedTuple):
    """A loss, its loops with the same settings, and shapes of student and teacher, of each map if it reads several."""

    cls: Any
    loops: Callable[..., float]
    shapes: list[Any]
    settings: Sequence[dict[str, Any]] = ({},)
    scale: float = 1.0
    context: dict[str, Tensor] | None = None


def equal(*shapes: Shape) -> list[tuple[Shape, Shape]]:
    return [(shape, shape) for shape in shapes]


def summed(loops: Callable[..., float], students: Maps, teachers: Maps, **settings: Any) -> float:
    """Over pairs of maps, the larger one of each averaged to the smaller."""
    total = 0.0
    for pair in zip(students, teachers, strict=True):
        size = np.minimum(*(x.shape[2:] for x in pair))
        total += loops(*(average_pool(x, *size) for x in pair), **settings)
    return total


def dense(loops: Callable[..., float], *logits: np.ndarray, **settings: Any) -> float:
    """Every pixel is a sample."""
    return loops(*(z.transpose(0, 2, 3, 1).reshape(-1, z.shape[1]) for z in logits), **settings)


def of_classes(student: np.ndarray, teacher: np.ndarray, edges: str, neighbours: int | None) -> float:
    """The edges within the classes of LABELS, or between them."""
    same = (LABELS[:, None] == LABELS).double().numpy()
    return graph_kd.graph_kd([student], [teacher], same if edges == "within" else 1 - same, neighbours)


def through_projection(loops: Callable[..., float], *networks: Any, **settings: Any) -> float:
    """Of rows that a linear layer without bias brings to the teacher's width."""
    student, teacher, parameters = networks
    return loops(student @ parameters["project.weight"].T, teacher, **settings)


def anchored(cls: Any, loops: Callable[..., float], *settings: dict[str, Any]) -> list[Any]:
    equal_rows, other = equal((1, 3), (2, 2), (7, 3)), [((2, 1), (2, 3)), ((7, 4), (7, 3))]
    each = [{}, *settings]
    return [Case(cls, loops, equal_rows, each), Case(cls, partial(through_projection, loops), other, each)]


def one_layer(loops: Callable[..., float], student: np.ndarray, teacher: np.ndarray, **settings: Any) -> float:
    return loops([student], [teacher], **settings)


LABELS = torch.tensor([0, 1, 0, 2, 1, 0, 2])
LOGITS = equal((1, 3), (2, 2), (7, 3), (5, 8))
PIXELS = equal((2, 4, 3, 2))
ROWS = [((1, 3), (1, 4)), ((2, 1), (2, 3)), ((3, 4), (3, 2)), ((7, 4), (7, 3))]
PAIRS = ROWS[1:]
MAPS: list[list[tuple[Shape, Shape]]] = [
    [((1, 1, 2, 2), (1, 1, 2, 2))],
    [((3, 4, 4, 2), (3, 2, 2, 2))],
    [((2, 2, 2, 3), (2, 3, 2, 3)), ((2, 3, 1, 2), (2, 2, 1, 4))],
]
TOKENS = [[((1, 1, 3), (1, 1, 2))], [((2, 5, 2), (2, 5, 3)), ((2, 3, 4), (2, 3, 4))]]
LAYERS = [[((5, 2, 2, 2), (5, 3, 1, 2)), ((5, 3, 1, 1), (5, 2, 4))]]
EXPONENTS = [{"exponent": x} for x in (0.1, 0.5, 1.0)]
STANDARDISED = [{"standardise": True}]
REDUCTIONS = [{"reduction": "official"}, {"reduction": "distinct"}]
MATRYOSHKA: list[dict[str, Any]] = [
    {"loss": losses.PKT(), "dims": [2, 4]},
    {"loss": losses.PKT(), "dims": [3, 4, 2], "weights": [0.5, 2.0, 1.0]},
]
LEVELS = [{}, {"temperatures": (1.0, 4.0), "class_weight": 0.5, "batch_weight": 2.0}]
RANKS = [{}, {"alpha": 0.5, "beta": 1.0, "length": 3}, {"alpha": 12.25, "beta": 1.5, "length": 2}]
CASES = [
    Case(AICSD, aicsd.aicsd, equal((1, 2, 1, 3), (2, 5, 4, 1), (3, 4, 2, 2)), scale=3),
    Case(
        losses.AttentionTransfer,
        partial(summed, attention_transfer.attention_transfer),
        MAPS,
        [{"power": x} for x in (1.0, 2.0, 4.0)],
    ),
    Case(losses.ClassSimilarityKD, cskd.class_similarity, LOGITS, [{}, {"temperature": 1.0, "scale": 0.5}], 3),
    Case(
        losses.CosineTemperatureKD,
        cskd.cosine_temperature,
        LOGITS,
        [{}, {"low": 1.0, "high": 1.0}, {"low": 1.0, "high": 3.0, "scale": 0.5}],
        3,
    ),
    Case(
        losses.CorrelationCongruence,
        correlation_congruence.correlation_congruence,
        PAIRS,
        [
            {"form": form, "gamma": gamma, "order": order}
            for form in ("kernel", "norm")
            for gamma, order in ((0.4, 2), (0.1, 1), (2.0, 5))
        ],
    ),
    Case(
        losses.CorrelationCongruence,
        correlation_congruence.correlation_congruence,
        equal((2, 1), (7, 5)),
        [{"form": "rows"}],
    ),
    Case(
        losses.CorrelationCongruence,
        correlation_congruence.embedded,
        PAIRS,
        [{"form": form, "dim": dim} for form in ("kernel", "norm", "rows") for dim in (1, 3)],
    ),
    Case(losses.DIST, dist.dist, LOGITS[1:], [{}, {"inter_weight": 2.0, "intra_weight": 0.5, "temperature": 4.0}], 3),
    Case(losses.DIST, partial(dense, dist.dist), PIXELS),
    Case(losses.EmbedDistill, embed_distill.embed_distill, LOGITS, [{"distance": d} for d in ("l2", "cosine")]),
    Case(losses.EmbedDistill, embed_distill.projected, ROWS, [{"distance": d} for d in ("l2", "cosine")]),
    Case(
        losses.FitNetHint,
        fitnet.hints,
        [*MAPS[:1], [MAPS[2][0], ((2, 1, 1, 2), (2, 2, 1, 2))]],
        [{"relu": relu, "norm": norm} for relu in (False, True) for norm in (False, True)],
    ),
    Case(
        losses.GramAnchoring,
        gram_anchoring.gram_anchoring,
        TOKENS,
        [{"negative_cosines": x} for x in ("zero", "teacher", "keep")],
    ),
    Case(losses.GraphKD, partial(one_layer, graph_kd.graph_kd), ROWS, [{"power": x} for x in (1, 2, 3)]),
    Case(losses.GraphKD, partial(one_layer, graph_kd.graph_kd), ROWS[3:], [{"neighbours": x} for x in (1, 2, 6)]),
    Case(
        losses.GraphKD,
        of_classes,
        ROWS[3:],
        [{"edges": edges, "neighbours": x} for edges in ("within", "between") for x in (1, 2, 6, None)],
        context={"labels": LABELS},
    ),
    Case(losses.GraphKD, graph_kd.graph_kd, LAYERS, [{"reads": "feature_maps"}]),
    Case(losses.ClassSimilarityKD, partial(standardised, cskd.class_similarity), LOGITS, STANDARDISED, 3),
    Case(losses.CosineTemperatureKD, partial(standardised, cskd.cosine_temperature), LOGITS, STANDARDISED, 3),
    Case(losses.DCD, dcd.dcd, ROWS, [{"dim": 3}, {"dim": 3, "alpha": 0.0}, {"dim": 3, "alpha": 2.0, "max_scale": 0.5}]),
    Case(losses.DIST, partial(standardised, dist.dist), LOGITS[2:], STANDARDISED, 3),
    Case(losses.HardDarkRank, dark_rank.hard, PAIRS, RANKS, 0.5),
    Case(losses.SoftDarkRank, dark_rank.soft, PAIRS, RANKS, 0.5),
    Case(losses.ICKD, ickd.ickd_of_maps, MAPS),
    Case(losses.ITRD, itrd.itrd, [*PAIRS, *LOGITS[2:]], [{}, {"correlation_weight": 0.7, "mutual_weight": 0.3}]),
    Case(losses.ITRD, itrd.itrd, PAIRS[2:], [{"alpha": x} for x in (1.01, 3.0)]),
    Case(losses.Matryoshka, partial(matryoshka.matryoshka, pkt.pkt), PAIRS[2:], MATRYOSHKA),
    Case(
        losses.Matryoshka,
        partial(matryoshka.matryoshka, partial(through_projection, raml.raml)),
        PAIRS[2:],
        [{"loss": losses.RAML(), "dims": [4, 2]}],
    ),
    Case(losses.MultiLevelLogit, multi_level_logit.multi_level_logit, LOGITS, LEVELS, 3),
    Case(losses.NST, partial(summed, nst.nst), MAPS, [{"kernel": k} for k in ("polynomial", "linear", "gaussian")]),
    Case(losses.PKT, pkt.pkt, [ROWS[0], ((2, 4), (2, 2)), *ROWS[2:]], REDUCTIONS),
    Case(losses.RelativeSimilarity, relative_similarity.relative_similarity, ROWS, [{}, {"margin": 0.5}]),
    Case(losses.RelaxedContrastive, relaxed_contrastive.relaxed_contrastive, ROWS),
    Case(
        losses.RelaxedContrastive,
        relaxed_contrastive.relaxed_contrastive,
        ROWS[2:],
        [{"sigma": 0.3, "delta": 1.5}, {"sigma": 4.0, "delta": 0.5}],
    ),
    Case(losses.RKDDistance, rkd.rkd_distance, ROWS, REDUCTIONS),
    Case(losses.RKDAngle, rkd.rkd_angle, ROWS, REDUCTIONS),
    Case(losses.SampleContrastiveKD, sample_contrastive.sample_contrastive, LOGITS, [{}, {"temperature": 0.1}]),
    Case(losses.SimilarityPreserving, partial(one_layer, similarity_preserving.similarity_preserving), ROWS),
    Case(losses.SimilarityPreserving, similarity_preserving.similarity_preserving, LAYERS, [{"reads": "feature_maps"}]),
    Case(losses.SoftTarget, soft_target.soft_target, LOGITS, [{"temperature": x} for x in (1.0, 4.0, 16.0)], 3),
    Case(losses.SKDDirection, skd.direction, ROWS, [{}, {"tikhonov": 2.0}]),
    Case(losses.SoftTarget, partial(standardised, soft_target.soft_target), LOGITS, STANDARDISED, 3),
    Case(losses.SoftTarget, partial(dense, partial(standardised, soft_target.soft_target)), PIXELS, STANDARDISED),
    Case(losses.SoftTarget, partial(dense, soft_target.soft_target), PIXELS, [{"temperature": 2.0}]),
    *anchored(losses.AnchoredRKD, anchored_rkd.anchored_rkd, {"distance_weight": 3.0, "angle_weight": 2.0}),
    *anchored(losses.CSD, csd.csd, {"top_k": 3}, {"student_temperature": 0.2, "teacher_temperature": 0.5}),
    *anchored(losses.D3, d3.d3, {"top_k": 4}, {"alpha": 0.0, "beta": 0.5, "gamma": 3.0}),
    *anchored(losses.EGA, ega.ega, {"node_weight": 0.5, "edge_weight": 2.0}),
    *anchored(losses.RAML, raml.raml, {"lambda1": 0.0, "lambda2": 2.0}),
    *anchored(losses.Regression, regression.regression, {"distance": "smooth_l1"}),
    *anchored(losses.ROP, rop.rop, {"top_k": 3}, {"temperature": 1.0, "rank_weight": 2.0}),
    Case(losses.SRD, srd.srd, PAIRS, [{}, {"power": 2.0, "eps": 0.1}]),
    Case(Tanimoto, tanimoto.tanimoto, ROWS),
    Case(Tanimoto, tanimoto.tanimoto, LOGITS, [{"form": "sample"}]),
    Case(losses.TokenSimilarity, token_similarity.token_similarity, TOKENS, [{}, {"temperature": 1.0}]),
    Case(losses.TTM, ttm.ttm, [*LOGITS, ((1, 1), (1, 1))], EXPONENTS, 3),
    Case(losses.TTM, partial(dense, ttm.ttm), PIXELS),
    Case(losses.WTTM, ttm.wttm, [*LOGITS, ((1, 1), (1, 1))], EXPONENTS, 3),
    Case(losses.WTTM, partial(dense, ttm.wttm), PIXELS),
    Case(losses.VkD, vkd.vkd, [((4, 2), (4, 5)), ((4, 3), (4, 3)), ((4, 5), (4, 2))]),
]
every_case = pytest.mark.parametrize("case", CASES, ids=lambda c: c.cls.__name__)


def networks(case: Case, shapes: Any) -> tuple[Maps, Maps]:
    rng = np.random.default_rng(0)
    pairs = shapes if isinstance(shapes, list) else [shapes]
    student, teacher = ([case.scale * rng.normal(size=shape) for shape in each] for each in zip(*pairs, strict=True))
    return student, teacher


def compare(case: Case, settings: dict[str, Any], *inputs: Maps, gradient: bool = True) -> None:
    loops = partial(case.loops, **{k: v for k, v in settings.items() if k != "reads"})
    check_against_loops(case.cls(**settings), loops, *inputs, gradient=gradient, **(case.context or {}))


@every_case
def test_value_and_gradients_are_those_of_the_loops(case):
    for settings, shapes in product(case.settings, case.shapes):
        exact = properties(case.cls).exact_gradient and settings != {"kernel": "gaussian"}
        compare(case, settings, *networks(case, shapes), gradient=exact)


@every_case
@pytest.mark.parametrize("change", ["zero", "zero channel", "equal"])
def test_zero_and_equal_rows_have_the_value_of_the_loops(case, change):
    clear = [s for s in case.settings if change != "equal" or "neighbours" not in s]  # equal rows are equally near
    for settings, changed in product(clear, ([0], [1], [0, 1])):
        inputs = networks(case, case.shapes[-1])
        for x in (x for network in changed for x in inputs[network]):
            x[(-1, 0) if change == "zero channel" else -1] = 0 if "zero" in change else x[0]
        compare(case, settings, *inputs, gradient=False)


@every_case
def test_a_collapsed_student_has_the_value_of_the_loops(case):
    student, teacher = networks(case, case.shapes[-1])
    compare(case, case.settings[0], [x[:1].repeat(len(x), 0) for x in student], teacher, gradient=False)


MAP_LOSSES = [
    losses.AttentionTransfer,
    losses.FitNetHint,
    losses.GramAnchoring,
    partial(losses.GraphKD, reads="feature_maps"),
    losses.ICKD,
    losses.NST,
    partial(losses.SimilarityPreserving, reads="feature_maps"),
    losses.TokenSimilarity,
]
each_of_maps = pytest.mark.parametrize("cls", MAP_LOSSES, ids=lambda c: getattr(c, "func", c).__name__)


@each_of_maps
def test_a_loss_with_named_maps_is_the_loss_of_these_maps_alone(cls):
    torch.manual_seed(0)
    student, teacher = ([torch.rand(4, c + k, 4, 4) for c in (2, 3, 5)] for k in (0, 1))
    for x in student:
        x.requires_grad_()
    named = cls(feature_maps=[-1, 0])
    value = named(student, [*teacher[:1], torch.rand(4, 2, 3, 3), *teacher[1:]])  # four maps, of which it reads two
    alone = cls()
    alone.materialize([student[-1], student[0]], [teacher[-1], teacher[0]], like=torch.empty(0))
    alone.load_state_dict(named.state_dict())
    assert torch.equal(value, alone([student[-1], student[0]], [teacher[-1], teacher[0]]))
    assert not torch.equal(value, cls()(student, teacher))  # which every loss was
    value.backward()
    assert [x.grad is not None for x in student] == [True, False, True]


@each_of_maps
def test_a_named_map_that_is_not_there_is_refused_with_the_count(cls):
    with pytest.raises(ValueError, match=r"student: there is no map 2 among the 2 that are read; feature_maps counts"):
        cls(feature_maps=[2])([torch.rand(4, 2, 3, 3)] * 2, [torch.rand(4, 2, 3, 3)] * 2)


@pytest.mark.parametrize("cls", [losses.GraphKD, losses.SimilarityPreserving])
def test_named_maps_of_a_loss_on_embeddings_are_refused(cls):
    with pytest.raises(ValueError, match=f"{cls.__name__}: .* reads 'embedding'; pass reads='feature_maps' as well"):
        cls(feature_maps=[-1])


EMBEDDINGS = det(6, 4, 0.7, 1.1), det(6, 8, 1.3, 0.5)
SCORES = 3 * det(6, 5, 0.9, 0.4), 3 * det(6, 5, 0.2, 1.7)


@pytest.mark.parametrize(
    ("loss", "inputs", "value"),
    [
        (losses.DIST(intra_weight=0), SCORES, 1.1095336949342),
        (losses.DIST(inter_weight=0), SCORES, 0.9892270493859574),
        (losses.DIST(2, 3), SCORES, 2 * 1.1095336949342 + 3 * 0.9892270493859574),
        (losses.GraphKD(), tuple(x.abs() for x in EMBEDDINGS), 0.03740563312827122),
        (losses.HardDarkRank(), EMBEDDINGS, 71.57415386419008),  # of Park et al.
        (losses.PKT(), EMBEDDINGS, 0.03384769277351432),
        (losses.SampleContrastiveKD(), SCORES, 1.8028825278286948),
        (losses.SimilarityPreserving(), EMBEDDINGS, 0.20920699241366073),
    ],
    ids=str,
)
def test_values_are_those_of_published_code(loss, inputs, value):
    assert float(loss(*inputs)) == pytest.approx(value, rel=1e-10)


ROWS_12, ROWS_100 = ((det(n, 6, 0.7, 1.1), det(n, 6, 1.3, 0.5)) for n in (12, 100))
TIED = ROWS_12[0], ROWS_12[1][[0, 1, 2, 3, 4, 2, 6, 7, 8, 2, 10, 11]]
SCORES_12 = 3 * det(12, 5, 0.9, 0.4), 3 * det(12, 5, 0.2, 1.7)
TOKENS_18 = det(18, 5, 0.7, 1.1).view(2, 9, 5), det(18, 7, 1.3, 0.5).view(2, 9, 7)
ORDERS = losses.Matryoshka(losses.RelativeSimilarity(), [2, 4, 6])
PUBLISHED = [  # by SCY-X/D3still
    (losses.CSD(None, 1.0, 0.01), ROWS_12, 2.563522022764162, 0.15563885190878812),
    (losses.CSD(5), ROWS_12, 1.6756919696407142, 0.10539186483840401),
    (losses.D3(top_k=10, alpha=50.0, beta=2.0, gamma=1.0), ROWS_12, 20.299698383016274, 2.1512983404488355),
    (losses.D3(5, 100, 5, 1), ROWS_12, 43.486371753309626, 4.921208211383868),
    (losses.RAML(lambda1=0.7482, lambda2=0.6778), ROWS_12, 1.6187184470319687, 0.33363555904051867),
    (losses.ROP(5), ROWS_12, 1.0238324068746185, 0.18103784503677034),
    (losses.ROP(12), ROWS_12, 1.6017100116659888, 0.20966546994665558),
    (losses.ROP(top_k=96, temperature=0.1, rank_weight=0.2), ROWS_100, 11.965365614384263, 0.6090259427192112),
    # yccm/EGA
    (losses.EGA(), ROWS_12, 8.273137477631948, 0.4727779887510618),
    (losses.EGA(0.8, 2.0), ROWS_12, 16.846465004754187, 2.1764920820658658),
    # NLPJCL/RAG-Retrieval, with and without ties
    (losses.RelativeSimilarity(margin=0.015), ROWS_12, 0.20094995185692782, 0.0682260639023421),
    (losses.RelativeSimilarity(), TIED, 0.2533107981384618, 0.05774712169078434),
    (ORDERS, ROWS_12, 0.34966552448626825, 0.08316805683849018),
    (losses.SKDDirection(tikhonov=0.1), SCORES_12, 2.7969289673852953, 0.13311819526135082),  # torchdistill
    (
        losses.SKDDirection(0.1 * 5**2),
        SCORES_12,
        1.0747795059239493,
        0.05440575595838751,
    ),  # HyunJunSik/StreamLined, 0.1
    (losses.MultiLevelLogit(), SCORES_12, 0.7303326791083217, 0.22348920671861375),  # Multi-Level-Logit-Distillation
    # logit-standardization-KD
    (losses.SoftTarget(2.0, standardise=True), SCORES_12, 0.7424505179591702, 0.05312182050353253),
    (losses.GramAnchoring(), TOKENS_18, 0.03974091884057791, 0.017929615367915534),  # facebookresearch/dinov3
    (losses.GramAnchoring("keep"), TOKENS_18, 0.2229329638518263, 0.061443626893206385),
    (losses.TokenSimilarity(), TOKENS_18, 0.04501089995993927, 0.15584509835513408),  # lightly-ai/lightly-train
]


@pytest.mark.parametrize(("loss", "inputs", "value", "gradient"), PUBLISHED, ids=lambda x: type(x).__name__)
def test_values_and_norms_of_gradients_are_those_of_published_code(loss, inputs, value, gradient):
    student, teacher = inputs[0].clone().requires_grad_(), inputs[1]
    ours = loss([student], [teacher]) if loss.reads == "feature_maps" else loss(student, teacher)
    ours.backward()
    assert (ours.item(), student.grad.norm().item()) == pytest.approx((value, gradient), rel=1e-10)


@pytest.mark.parametrize(
    ("cls", "published"),
    [
        (losses.CSD, {"top_k": None, "student_temperature": 1.0, "teacher_temperature": 0.01}),
        (losses.D3, {"top_k": 10, "alpha": 50.0, "beta": 2.0, "gamma": 1.0}),
        (losses.RAML, {"lambda1": 0.7482, "lambda2": 0.6778}),
        (losses.RelativeSimilarity, {"margin": 0.015}),
        (losses.ROP, {"top_k": 96, "temperature": 0.1, "rank_weight": 0.2}),
        (losses.SKDDirection, {"tikhonov": 0.1}),
    ],
)
def test_defaults_are_those_of_published_code(cls, published):
    parameters = inspect.signature(cls).parameters
    assert {name: parameters[name].default for name in published} == published


def test_dcd_has_value_and_gradients_of_published_code():
    loss = losses.DCD(6, 6, dim=4).double()
    for projector, (a, b), (c, d) in (
        (loss.student_projector, (0.3, 0.8), (0.2, 0.5)),
        (loss.teacher_projector, (0.6, 0.1), (0.7, 0.9)),
    ):
        projector.linear.weight.data, projector.linear.bias.data = det(4, 6, a, b), det(1, 4, c, d)[0]
    student = det(12, 6, 0.7, 1.1).requires_grad_()
    value = loss(student, det(12, 6, 1.3, 0.5))
    value.backward()
    found = value.item(), student.grad.norm().item(), loss.log_scale.grad.item()
    assert found == pytest.approx((2.860504757634212, 0.8470105909234008, 0.8686741242924707), rel=1e-10)


@pytest.mark.parametrize(
    ("loss", "shape", "value"),
    [
        (AICSD(), (2, 3, 4, 4), 1 / 3),  # of each of the teacher's three rows of unit norm
        (losses.AttentionTransfer(), (2, 3, 2, 2), 1 / 4),  # the teacher's attention has unit norm, over four places
        (losses.EmbedDistill(distance="cosine"), (2, 3), 1),
        (losses.ICKD(), (4, 3, 3, 3), 1),
        (losses.SampleContrastiveKD(), (3, 4), math.log(3)),
    ],
    ids=str,
)
def test_directions_of_zeros_are_zero_and_pass_no_gradient(loss, shape, value):
    student, teacher = torch.zeros(shape, requires_grad=True), torch.randn(shape)
    ours = loss(*(([student], [teacher]) if loss.reads == "feature_maps" else (student, teacher)))
    ours.backward()
    assert ours.item() == pytest.approx(value)
    assert torch.equal(student.grad, torch.zeros(shape))


@pytest.mark.parametrize("loss", [losses.SoftTarget(1.0), losses.TTM(), losses.WTTM()], ids=str)
def test_probabilities_that_underflow_leave_loss_and_gradient_finite(loss):
    student, teacher = torch.tensor([[-1e4, 1e4, 0.0]], requires_grad=True), torch.tensor([[1e4, -1e4, 0.0]])
    value = loss(student, teacher)
    value.backward()
    assert value.item() == pytest.approx(2e4) if isinstance(loss, losses.SoftTarget) else torch.isfinite(value)
    assert torch.isfinite(student.grad).all()


@pytest.mark.parametrize(
    "loss", [losses.ClassSimilarityKD(), losses.CosineTemperatureKD(), losses.SoftTarget()], ids=str
)
def test_the_same_logits_have_loss_zero(loss):
    logits = torch.randn(4, 5, dtype=torch.float64)
    assert abs(loss(logits, logits).item()) < 1e-12
