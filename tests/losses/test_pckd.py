import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_rkd.data.transforms.views import Rotations
from lightning_rkd.losses import PCKD
from lightning_rkd.losses.pckd import preview_weights
from lightning_rkd.utils.types import Batch, Outputs
from tests.oracles import pckd as oracle
from tests.oracles.differences import check_gradients

CLASSES = 4
SHIPPED = (0.05, 1.0, 20.0, 0.0)


def weighted(*weights: float) -> dict[str, float]:
    return dict(zip(("contrast_weight", "correlation_weight", "align_weight", "kl_weight"), weights, strict=True))


def random_outputs(rows: int, width: int, bias: bool = True) -> Outputs:
    x, z = torch.randn(rows, width, dtype=torch.float64), 2 * torch.randn(rows, CLASSES, dtype=torch.float64)
    weight = torch.randn(CLASSES, width, dtype=torch.float64)
    return Outputs(x, z, classifier=(weight, torch.randn(CLASSES, dtype=torch.float64) if bias else None))


def arrays(outputs: Outputs) -> tuple[np.ndarray, ...]:
    return tuple(x.numpy() for x in (outputs.embedding, outputs.logits, *outputs.classifier))


def views(samples: int, count: int) -> tuple[Tensor, Tensor, list[int]]:
    """Labels and view of every row in the layout of Rotations, and the row of each row's sample in view 0."""
    labels = torch.randint(CLASSES, (samples,)).repeat(count)
    return labels, torch.arange(count).repeat_interleave(samples), list(range(samples)) * count


@pytest.mark.parametrize("weights", [SHIPPED, (0.3, 0.5, 1.0, 2.0)], ids=["shipped", "all"])
@pytest.mark.parametrize(("samples", "count"), [(1, 1), (2, 1), (5, 1), (1, 4), (3, 4), (4, 2)])
@pytest.mark.parametrize("widths", [(3, 5), (4, 4)], ids=["other widths", "same widths"])
@pytest.mark.parametrize("epoch", [0, 200])
def test_the_loss_is_that_of_the_loops(samples, count, widths, weights, epoch):
    student, teacher = (random_outputs(samples * count, width) for width in widths)
    labels, view, sample = views(samples, count)
    loss = PCKD(*widths, **weighted(*weights)).double()
    parameters = {name: p.detach().numpy() for name, p in loss.named_parameters()}
    ours = loss(student, teacher, labels=labels, epoch=epoch, view=None if count == 1 else view)
    expected = oracle.pckd(arrays(student), arrays(teacher), labels.tolist(), sample, epoch, parameters, weights)
    assert float(ours.detach()) == pytest.approx(expected, rel=1e-9)


def test_the_authors_small_number_in_the_logarithm_changes_next_to_nothing():
    student, teacher = random_outputs(8, 4), random_outputs(8, 6)
    labels, _, sample = views(8, 1)
    loss = PCKD(student_dim=4, teacher_dim=6).double()
    parameters = {name: p.detach().numpy() for name, p in loss.named_parameters()}
    ours = loss(student, teacher, labels=labels, epoch=0)
    theirs = oracle.pckd(arrays(student), arrays(teacher), labels.tolist(), sample, 0, parameters, eps=1e-7)
    assert float(ours.detach()) == pytest.approx(theirs, rel=1e-6)


@pytest.mark.parametrize("weights", [SHIPPED, (0.3, 0.5, 1.0, 2.0)], ids=["shipped", "all"])
def test_gradients_are_those_of_the_loops_with_preview_weights_constant(weights):
    student, teacher = random_outputs(4, 2), random_outputs(4, 2)
    loss, labels, sample = PCKD(2, 2, **weighted(*weights)).double(), torch.tensor([0, 1, 1, 3]), [0, 1, 2, 3]
    fixed = oracle.preview(student.logits.numpy(), labels.tolist(), sample, 0)
    assert 0 < min(fixed) < 1
    inputs = dict(zip(("embedding", "logits", "weight", "bias"), arrays(student), strict=True))
    leaves = {name: torch.from_numpy(x).requires_grad_() for name, x in inputs.items()} | dict(loss.named_parameters())

    def loops(given: dict[str, np.ndarray]) -> float:
        ours = tuple(given.pop(name) for name in inputs)
        return oracle.pckd(ours, arrays(teacher), labels.tolist(), sample, 0, given, weights, fixed=fixed)

    embedding, logits, *classifier = (leaves[name] for name in inputs)
    value = loss(Outputs(embedding, logits, classifier=tuple(classifier)), teacher, labels=labels, epoch=0)
    check_gradients(value, leaves, lambda given: loops(dict(given)))


def test_the_threshold_of_hardness_grows_with_every_epoch():
    hardness = torch.tensor([1.1, 0.9], dtype=torch.float64)  # cross-entropies, of mean 1
    logits = torch.stack([-hardness.expm1().log(), torch.zeros(2)], dim=1)
    labels = torch.zeros(2, dtype=torch.int64)
    for epoch, full in ((0, [False, True]), (1, [True, True])):  # 1.05 and 1.1025
        assert (preview_weights(logits, labels, epoch=epoch, growth=1.05) == 1).tolist() == full


def test_rotated_rows_take_the_weight_of_their_sample_in_any_layout():
    logits, labels = torch.randn(3, 5), torch.tensor([0, 1, 2])
    own = preview_weights(logits, labels)
    assert len(own.unique()) > 1
    first = torch.cat([logits, torch.randn(9, 5)])  # as Rotations lays out
    view = torch.arange(4).repeat_interleave(3)
    torch.testing.assert_close(preview_weights(first, labels.repeat(4), view), own.repeat(4))
    woven = first.view(4, 3, 5).transpose(0, 1).reshape(12, 5)  # sample by sample
    torch.testing.assert_close(
        preview_weights(woven, labels.repeat_interleave(4), torch.arange(4).repeat(3)), own.repeat_interleave(4)
    )
    ranks = torch.tensor([0, 1, 3, 4, 6, 7, 9, 10, 2, 5, 8, 11])  # two ranks with two samples and one
    torch.testing.assert_close(
        preview_weights(first[ranks], labels.repeat(4)[ranks], view[ranks]), own.repeat(4)[ranks]
    )


def test_classifiers_are_compared_only_where_their_shapes_are_the_same():
    labels = torch.tensor([0, 1, 2, 3])
    for widths, bias, compared in (((3, 3), True, True), ((3, 3), False, True), ((3, 4), True, False)):
        student, teacher = (random_outputs(4, width, bias) for width in widths)
        value = PCKD(**weighted(0.0, 1.0, 0.0, 0.0))(student, teacher, labels=labels, epoch=0)
        expected = torch.zeros((), dtype=torch.float64)
        if compared:
            joined = [
                torch.cat([w, *([] if b is None else [b[:, None]])], 1)
                for w, b in (student.classifier, teacher.classifier)
            ]
            expected = (joined[0] - joined[1]).square().mean()
        torch.testing.assert_close(value.detach(), expected)


def test_it_takes_what_rotations_make():
    images, labels = torch.randn(3, 1, 4, 4), torch.tensor([0, 1, 2])
    batch = Rotations()(Batch(images, labels))

    def outputs(width: int) -> Outputs:
        backbone, head = torch.nn.Linear(16, width), torch.nn.Linear(width, 3)
        x = backbone(batch.inputs.flatten(1))
        return Outputs(x, head(x), classifier=(head.weight, head.bias))

    student = outputs(4)
    value = PCKD(kl_weight=1.0)(student, outputs(6), labels=batch.labels, view=batch.view, epoch=0)
    value.backward()
    assert torch.isfinite(value.detach())
    assert all(p.grad is not None for p in student.classifier)


def test_labels_that_are_no_class_numbers_are_refused():
    with pytest.raises(ValueError, match=r"PCKD: labels must be \(N,\) class numbers"):
        PCKD()(random_outputs(4, 3), random_outputs(4, 3), labels=torch.rand(4, CLASSES), epoch=0)
    with pytest.raises(TypeError, match="PCKD: labels are whole numbers, one per row"):
        PCKD()(random_outputs(4, 3), random_outputs(4, 3), labels=torch.rand(4), epoch=0)


def test_networks_of_other_classes_are_refused():
    teacher = random_outputs(4, 3)
    teacher.classifier = (torch.randn(7, 3), torch.randn(7))
    with pytest.raises(ValueError, match="PCKD: student and teacher must have the same classes, got 4 and 7"):
        PCKD()(random_outputs(4, 3), teacher, labels=torch.arange(4), epoch=0)


def test_logits_and_labels_of_other_classes_and_of_pixels_are_refused():
    student, other, dense = random_outputs(4, 3), random_outputs(4, 3), random_outputs(4, 3)
    other.logits, dense.logits = torch.randn(4, 7), torch.randn(4, CLASSES, 2, 2)
    with pytest.raises(ValueError, match=r"PCKD: the student has 4 classes, the teacher 7.*embeddings"):
        PCKD()(student, other, labels=torch.arange(4), epoch=0)
    with pytest.raises(ValueError, match=r"PCKD: the student's logits must be \(N, K\)"):
        PCKD()(dense, dense, labels=torch.arange(4), epoch=0)
    with pytest.raises(ValueError, match="PCKD: labels go from 0 to 6, but the logits have 4 classes; number"):
        PCKD()(student, student, labels=torch.tensor([0, 6, 1, 2]), epoch=0)


def test_views_without_their_sample_are_refused():
    with pytest.raises(ValueError, match="PCKD: row 3 is view 1 of a sample whose view 0 is not in the batch"):
        PCKD()(
            random_outputs(4, 3), random_outputs(4, 3), labels=torch.arange(4), view=torch.tensor([0, 1, 2, 1]), epoch=0
        )
