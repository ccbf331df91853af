"""Settings of all losses: values out of range are refused by the name of loss and setting, all others are printed."""

import inspect
import re
from typing import Any

import pytest
import torch

from lightning_rkd import experimental, losses
from lightning_rkd.losses.lazy import SIZES
from tests.losses.properties import properties
from tests.losses.test_contract import every_class, exported

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
    (losses.NST, {"kernel": "cubic"}, "'polynomial', 'linear' or 'gaussian'"),
    *((losses.PCKD, {name: 0}, POSITIVE) for name in ("temperature", "kl_temperature", "growth")),
    *((cls, {"reduction": "mean"}, REDUCTION) for cls in (losses.PKT, losses.RKD, losses.RKDAngle, losses.RKDDistance)),
    *((losses.RelaxedContrastive, {name: 0}, POSITIVE) for name in ("sigma", "delta")),
    *((losses.RRD, {name: 0}, POSITIVE) for name in ("student_temperature", "teacher_temperature")),
    (losses.SampleContrastiveKD, {"temperature": 0}, POSITIVE),
    (losses.SimilarityPreserving, {"reads": "logits"}, "'embedding' or 'feature_maps'"),
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


@every_class
def test_all_settings_are_printed(cls):
    printed = str(cls())
    for name, parameter in inspect.signature(cls).parameters.items():
        if name not in SIZES | {"estimator", "args", "kwargs"}:
            assert f"{name}={parameter.default!r}" in printed


ON_LOGITS = [c for c in exported() if c.reads == "logits" and not c.required and not properties(c).dense]


@pytest.mark.parametrize("cls", ON_LOGITS)
def test_different_class_counts_are_refused_with_the_cure(cls):
    with pytest.raises(ValueError, match=f"{cls.__name__}: the student has 5 classes, the teacher 7, .*embeddings"):
        cls()(torch.randn(3, 5), torch.randn(3, 7))


@pytest.mark.parametrize("cls", [losses.ClassSimilarityKD, losses.CosineTemperatureKD, losses.SampleContrastiveKD])
def test_dense_logits_are_refused_by_losses_on_whole_images(cls):
    with pytest.raises(ValueError, match=rf"{cls.__name__}: .* must be \(N, K\), got \(2, 5, 3, 3\); pool"):
        cls()(torch.randn(2, 5, 3, 3), torch.randn(2, 5, 3, 3))
