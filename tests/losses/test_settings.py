"""Settings and inputs that losses refuse, by name and with the cure, and settings that they print."""

import inspect
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

from lightning_rkd import experimental, losses
from lightning_rkd.losses.ickd import inter_channel_correlation
from lightning_rkd.losses.lazy import SIZES
from lightning_rkd.losses.rkd import rkd_angle, rkd_distance
from lightning_rkd.losses.soft_target import soft_target
from tests.losses.properties import properties
from tests.losses.test_contract import every_class, exported, made

POSITIVE = "a positive number"
REDUCTION = "'official' or 'distinct'"
WRONG: list[tuple[type[Any], dict[str, Any], str]] = [
    (losses.AttentionTransfer, {"power": 0.5}, "at least 1"),
    (losses.AttentionTransfer, {"power": float("nan")}, "at least 1"),
    (losses.ClassSimilarityKD, {"temperature": 0}, POSITIVE),
    (losses.ClassSimilarityKD, {"scale": -1}, POSITIVE),
    (losses.CorrelationCongruence, {"form": "gaussian"}, "'kernel', 'norm' or 'rows'"),
    (losses.CorrelationCongruence, {"gamma": 0.0}, POSITIVE),
    (losses.CorrelationCongruence, {"order": 0}, "at least 1"),
    (losses.CosineTemperatureKD, {"low": 0}, POSITIVE),
    *((cls, {"dim": 1}, "at least 2") for cls in (losses.CRD, losses.CRCD)),
    *((cls, {"negatives": 0}, "at least 1") for cls in (losses.CRD, losses.CRCD)),
    *((cls, {"temperature": 0.0}, POSITIVE) for cls in (losses.CRD, losses.CRCD)),
    *((cls, {"momentum": x}, "between 0 and 1") for cls in (losses.CRD, losses.CRCD) for x in (1.5, -1)),
    (losses.CSD, {"top_k": 0}, "at least 1"),
    *((losses.CSD, {f"{who}_temperature": 0}, POSITIVE) for who in ("student", "teacher")),
    (losses.D3, {"top_k": 1}, "at least 2"),
    (losses.DCD, {"dim": 0}, "at least 1"),
    (losses.DCD, {"alpha": -1.0}, "at least 0"),
    (losses.DCD, {"max_scale": 0.0}, POSITIVE),
    (losses.DIST, {"temperature": 0}, POSITIVE),
    (losses.EmbedDistill, {"distance": "mse"}, "'l2' or 'cosine'"),
    (losses.GraphKD, {"neighbours": 0}, "at least 1"),
    (losses.GraphKD, {"power": 0}, "at least 1"),
    (losses.GraphKD, {"edges": "intra"}, "'all', 'within' or 'between'"),
    (losses.GraphKD, {"reads": "logits"}, "'embedding' or 'feature_maps'"),
    *((cls, {"alpha": 0.0}, POSITIVE) for cls in (losses.HardDarkRank, losses.SoftDarkRank)),
    *((cls, {"beta": 0.5}, "at least 1") for cls in (losses.HardDarkRank, losses.SoftDarkRank)),
    *((cls, {"length": 0}, "at least 1") for cls in (losses.HardDarkRank, losses.SoftDarkRank)),
    *((losses.HolisticKD, {name: 0}, "at least 1") for name in ("dim", "neighbours", "negatives")),
    (losses.HolisticKD, {"temperature": 0.0}, POSITIVE),
    (losses.HolisticKD, {"momentum": 1.5}, "between 0 and 1"),
    (losses.HolisticKD, {"smoothing": -0.1}, "between 0 and 1"),
    (losses.HolisticKD, {"negatives_from": "teacher"}, "'own' or 'other'"),
    (losses.ITRD, {"alpha": 0}, POSITIVE),
    (losses.MHGD, {"reduction": "sum"}, "'official' or 'mean'"),
    *((losses.MultiLevelLogit, {name: -1.0}, "at least 0") for name in ("class_weight", "batch_weight")),
    (losses.NST, {"kernel": "cubic"}, "'polynomial', 'linear' or 'gaussian'"),
    *((losses.PCKD, {name: 0}, POSITIVE) for name in ("temperature", "kl_temperature", "growth")),
    *((cls, {"reduction": "mean"}, REDUCTION) for cls in (losses.PKT, losses.RKD, losses.RKDAngle, losses.RKDDistance)),
    (losses.RelativeSimilarity, {"margin": -0.1}, "at least 0"),
    *((losses.RelaxedContrastive, {name: 0}, POSITIVE) for name in ("sigma", "delta")),
    (losses.ROP, {"top_k": 0}, "at least 1"),
    (losses.ROP, {"temperature": 0}, POSITIVE),
    *((losses.RRD, {name: 0}, POSITIVE) for name in ("student_temperature", "teacher_temperature")),
    (losses.SampleContrastiveKD, {"temperature": 0}, POSITIVE),
    (losses.SimilarityPreserving, {"reads": "logits"}, "'embedding' or 'feature_maps'"),
    (losses.SKDDirection, {"tikhonov": 0.0}, POSITIVE),
    *((losses.SoftTarget, {"temperature": x}, POSITIVE) for x in (0.0, -1.0, float("nan"), float("inf"))),
    (losses.SRD, {"eps": 0.0}, POSITIVE),
    *((losses.SRD, {"power": x}, "at least 1") for x in (-4.0, 0.5)),
    (losses.STKD, {"form": "x"}, "'virtual', 'blended' or 'wrong classes'"),
    (losses.STKD, {"share": 1.5}, "between 0 and 1"),
    (losses.STKD, {"temperature": 0}, POSITIVE),
    *((cls, {"exponent": 0}, POSITIVE) for cls in (losses.TTM, losses.WTTM)),
    (experimental.Tanimoto, {"form": "pairs"}, "'matrix' or 'sample'"),
]


@pytest.mark.parametrize(("cls", "setting", "expected"), WRONG, ids=lambda x: getattr(x, "__name__", str(x)))
def test_a_setting_out_of_range_is_refused_by_name(cls, setting, expected):
    ((name, value),) = setting.items()
    with pytest.raises(ValueError, match=f"{name} must be {expected}, got {re.escape(repr(value))}"):
        cls(**setting)


_UNPRINTED = SIZES | {"estimator", "args", "kwargs"}


@every_class
def test_all_settings_are_printed(cls):
    parameters = {name: p for name, p in inspect.signature(cls).parameters.items() if name not in _UNPRINTED}
    printed = str(cls() if cls is not losses.Matryoshka else made(cls))
    for name, parameter in parameters.items():
        if parameter.default is not parameter.empty:
            assert f"{name}={parameter.default!r}" in printed


IMPOSSIBLE: list[tuple[type[Any], dict[str, Any], str]] = [
    (losses.CosineTemperatureKD, {"low": 6, "high": 2}, "low must not exceed high, got low=6 and high=2"),
    (losses.FitNetHint, {"student_dim": 3, "teacher_dim": 4}, r"lists the channels of every map, got 3; pass \[3\]"),
    (losses.FitNetHint, {"student_dim": (3, 5), "teacher_dim": (4,)}, r"compared in pairs, got channels \(3, 5\)"),
    (losses.ICKD, {"student_dim": 64, "teacher_dim": [64]}, r"lists the channels of every map, got 64; pass \[64\]"),
    (losses.ICKD, {"student_dim": [1, 2], "teacher_dim": [1]}, "2 maps of the student do not go with 1"),
    (losses.Matryoshka, {"loss": 2 * losses.RKD(), "dims": [2]}, r"such as RKD\(\), got LossSum; of a sum, wrap each"),
    (losses.Matryoshka, {"loss": losses.TTM(), "dims": [2]}, "must read the embedding, but TTM reads 'logits'"),
    (
        losses.Matryoshka,
        {"loss": losses.RKD(), "dims": []},
        r"dims must be a list of different numbers of columns, got \[\]",
    ),
    (
        losses.Matryoshka,
        {"loss": losses.RKD(), "dims": 5},
        "dims must be a list of different numbers of columns, got 5",
    ),
    (losses.Matryoshka, {"loss": losses.RKD(), "dims": [2, 2]}, r"dims must be a list of different .*, got \[2, 2\]"),
    (losses.Matryoshka, {"loss": losses.RKD(), "dims": [4, 0]}, "dims must be at least 1, got 0"),
    (losses.Matryoshka, {"loss": losses.RKD(), "dims": [4], "weights": [1, 2]}, "one for each of 1 dims, got 2"),
    (losses.Matryoshka, {"loss": losses.RKD(), "dims": [4], "weights": [0]}, "weights must be a positive number"),
    (losses.MHGD, {"student_dim": [4], "teacher_dim": 5}, r"lists the channels of every map, got 5; pass \[5\]"),
    (losses.MultiLevelLogit, {"temperatures": ()}, r"temperatures must be a list of at least one, got \(\)"),
    (losses.MultiLevelLogit, {"temperatures": 4.0}, "temperatures must be a list of at least one, got 4.0"),
    (losses.MultiLevelLogit, {"temperatures": (2.0, 0.0)}, "temperatures must be a positive number, got 0"),
    (losses.SoftDarkRank, {"length": 8}, r"length must be at most 7, .* got 8; HardDarkRank"),
]


@pytest.mark.parametrize(("cls", "settings", "message"), IMPOSSIBLE, ids=lambda x: getattr(x, "__name__", str(x)))
def test_settings_that_do_not_go_together_are_refused(cls, settings, message):
    with pytest.raises((TypeError, ValueError), match=f"{cls.__name__}: .*{message}|{message}"):
        cls(**settings)


LOGITS = [
    c
    for c in exported()
    if c.reads == "logits" and properties(c).equal_widths and not c.required and not properties(c).dense
]
WHOLE_IMAGES = [
    losses.ClassSimilarityKD,
    losses.CosineTemperatureKD,
    losses.MultiLevelLogit,
    losses.SampleContrastiveKD,
]
VECTORS = r"maps \(N, C, H, W\) or tokens .*\(4, .*; tap layers before pooling"
AT, NST = losses.AttentionTransfer(), losses.NST()
MISFITS: list[tuple[Callable[..., Any], Any, Any, str]] = [
    *((c(), (3, 5), (3, 7), f"{c.__name__}: the student has 5 classes, the teacher 7, .*embeddings") for c in LOGITS),
    *((c(), (2, 5, 3, 3), (2, 5, 3, 3), rf"{c.__name__}: .* must be \(N, K\), got .*; pool") for c in WHOLE_IMAGES),
    (experimental.AICSD(), (3, 5), (3, 5), r"AICSD: the student's logits must be \(N, K, H, W\), got \(3, 5\); read"),
    (experimental.AICSD(), (3, 5, 2, 2), (3, 7, 2, 2), "AICSD: the student has 5 classes, the teacher 7"),
    (experimental.AICSD(), (3, 5, 2, 2), (3, 5, 4, 4), r"AICSD: .*\(3, 5, 2, 2\).*\(3, 5, 4, 4\).*resize one of them"),
    (AT, [(2, 9, 3)], [(2, 16, 3)], "AttentionTransfer, map 0: the layers must give .*tap layers"),
    (AT, [(2, 3, 4, 4)], [(2, 16, 3)], "AttentionTransfer, map 0: the layers must give .*tap layers"),
    (AT, [(2, 3)], [(2, 3)], "AttentionTransfer, map 0: the layers must give .*tap layers"),
    (losses.CorrelationCongruence("rows"), (4, 3), (4, 5), r"form='rows' .* got 3 .* and 5 .*form='kernel'"),
    (losses.EmbedDistill(projection=False), (2, 3), (2, 4), "3 wide, the teacher's 4; leave projection=False out"),
    (
        losses.FitNetHint(),
        [(2, 3, 4, 4)],
        [(2, 4, 2, 2)],
        r"FitNetHint: maps\[0\] .*\(2, 3, 4, 4\) and \(2, 4, 2, 2\); tap layers",
    ),
    (losses.FitNetHint(), [(2, 3, 4, 4, 4)], [(2, 3, 4, 4, 4)], r"FitNetHint: maps\[0\] must be \(N, C, H, W\) or"),
    (losses.FitNetHint(), [(2, 3, 4, 4)], [(2, 16, 4)], r"FitNetHint: maps\[0\]"),
    (
        losses.FitNetHint(),
        [(2, 3, 4, 4)] * 2,
        [(2, 4, 4, 4)],
        "FitNetHint: 2 feature maps of the student and 1 of the teacher",
    ),
    (losses.GraphKD(edges="within"), (4, 2), (4, 2), r"GraphKD: edges='within' needs labels: pass labels=\.\.\."),
    (losses.GraphKD(neighbours=4), (4, 2), (4, 2), "neighbours=4.* at least 5 samples, got a batch of 4; lower"),
    (losses.ICKD(), [(1, 2, 1, 1)], [(1, 2, 1, 1)], "needs more than one position, got a map .*drop_last=True"),
    (
        losses.ICKD([2], [2]),
        [(2, 3, 2, 2)],
        [(2, 2, 2, 2)],
        r"made for student_dim=\(2,\), but received student_dim=\(3,",
    ),
    *(
        (losses.ICKD(), [s], [t], VECTORS)
        for s, t in (((4, 2), (4, 3, 2, 2)), ((4, 2, 2, 2), (4, 3)), ((4, 2), (4, 3)))
    ),
    (inter_channel_correlation, (1, 2, 3), (1, 3, 3), "ICKD compares equally many channels"),
    (losses.Matryoshka(losses.RKD(), [2, 8]), (3, 4), (3, 9), "dims go up to 8, but .* has 4 columns: name smaller"),
    (NST, [(2, 5, 3)], [(2, 4, 3)], "equally many tokens .* drop class tokens"),
    (NST, [(2, 4, 3)], [(2, 3, 2, 2)], r"must give maps .* got \(2, 4, 3\) and \(2, 3, 2, 2\)"),
    (NST, [(2, 4)], [(2, 4)], "must give maps .* tap layers before pooling"),
    (rkd_distance, (3, 2), (4, 2), "3"),
    (rkd_angle, (3, 2), (4, 2), "3"),
    (losses.SRD(3, 2), (5, 4), (5, 2), "SRD was made for student_dim=3, but received student_dim=4"),
    (soft_target, (3, 5, 4), (3, 5, 4), r"must be \(N, K\) or \(N, K, H, W\), got \(3, 5, 4\)"),
    (soft_target, (3, 5, 4, 4), (3, 5, 2, 2), "same shape.*resize one"),
    (soft_target, (3, 5), (3, 5, 2, 2), "same shape"),
    (soft_target, (3, 5), (4, 5), "same shape"),
    (experimental.Tanimoto("sample"), (3, 4), (3, 7), "form='sample' .* got 4 .* and 7 .*form='matrix'"),
]


@pytest.mark.parametrize(
    ("loss", "student", "teacher", "message"), MISFITS, ids=lambda x: getattr(x, "__name__", str(x))
)
def test_inputs_that_do_not_fit_are_refused_with_the_cure(loss, student, teacher, message):
    inputs = ([*map(torch.randn, x)] if isinstance(x, list) else torch.randn(x) for x in (student, teacher))
    with pytest.raises(ValueError, match=message):
        loss(*inputs)
