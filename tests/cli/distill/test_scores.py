"""Recall of student queries in the teacher's gallery, by a plain loop."""

import pytest
import torch
from torch import nn

from lightning_rkd.cli.distill import scores
from lightning_rkd.cli.distill.losses import choose_loss, describe_loss, find_projection, parse_loss
from lightning_rkd.losses import CSD, RKD, RKDDistance


def test_asymmetric_recall_equals_a_plain_loop() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.tensor([0, 0, 1, 1, 1, 2, 3, 3] * 5 + [9])
    teacher = torch.randn(41, 5, generator=generator) + labels[:, None]
    student = teacher + torch.randn(41, 5, generator=generator)
    hits = []
    for i in range(41):
        others = [j for j in range(41) if j != i]
        if not any(labels[j] == labels[i] for j in others):
            continue
        near = max(others, key=lambda j: float(nn.functional.cosine_similarity(student[i], teacher[j], dim=0)))
        hits.append(bool(labels[near] == labels[i]))
    found = scores.score_asymmetric_recall(student, teacher, labels)
    assert found == pytest.approx(sum(hits) / 40)
    assert 0.2 < found < 1
    assert found != pytest.approx(scores.score_recall(student, labels))


def test_a_rotated_student_agrees_but_cannot_search_the_teachers_gallery() -> None:
    """Relations alone do not align spaces."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(20).repeat_interleave(5)
    teacher = torch.randn(20, 8, generator=generator)[labels] + 0.1 * torch.randn(100, 8, generator=generator)
    rotation = torch.linalg.qr(torch.randn(8, 8, generator=generator)).Q
    student = 3 * teacher @ rotation
    kept = scores.score_agreement(student, teacher)
    assert kept == {"common neighbours": pytest.approx(1), "rank correlation": pytest.approx(1)}
    assert scores.score_recall(student, labels) == 1
    assert scores.score_asymmetric_recall(teacher, teacher, labels) == 1
    assert scores.score_asymmetric_recall(student, teacher, labels) < 0.3


def test_the_default_loss_is_three_rkd_and_csd() -> None:
    text = describe_loss(choose_loss("image"))
    assert text.startswith("3 * RKD(")
    assert "student_temperature=0.05, teacher_temperature=0.05" in text
    assert "student_temperature=0.1" in describe_loss(choose_loss("text"))
    s, t = torch.randn(2, 9, 4)
    expected = 3 * RKD()(s, t) + CSD(student_temperature=0.05, teacher_temperature=0.05)(s, t)
    torch.testing.assert_close(choose_loss("image")(s, t), expected)


def test_a_loss_is_read_from_an_expression() -> None:
    s, t = torch.randn(2, 9, 4)
    for text, expected in {
        "CSD": CSD()(s, t),
        "2 * RKDDistance() + 0.5 * CSD(top_k=3)": 2 * RKDDistance()(s, t) + 0.5 * CSD(top_k=3)(s, t),
        "lightning_rkd.losses.csd.CSD(student_temperature=0.1)": CSD(student_temperature=0.1)(s, t),
    }.items():
        torch.testing.assert_close(parse_loss(text)(s, t), expected)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "cannot be read"),
        ("Nothing", "there is no loss 'Nothing'"),
        ("3", "holds no loss"),
        ("RKD - CSD", "expected losses"),
        ("CSD(top=3)", "CSD has no argument 'top', it takes top_k, student_temperature.*student_dim"),
        ("Regresion", "there is no loss 'Regresion': did you mean Regression"),
        ("RKDD", "did you mean RKD"),
        ("__import__('os')", "expected losses"),
    ],
)
def test_a_loss_that_cannot_be_read_is_an_error(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_loss(text)


def test_only_anchored_losses_align_spaces() -> None:
    assert parse_loss("3 * RKD + CSD").aligns
    assert not parse_loss("RKD").aligns
    loss = CSD(student_dim=3, teacher_dim=5)
    assert find_projection(2 * RKD() + loss) is loss.project
