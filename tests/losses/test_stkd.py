import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from lightning_rkd.data.transforms.mixup import MixUp
from lightning_rkd.losses import STKD
from lightning_rkd.utils.types import Batch, Mix
from tests.oracles import stkd as oracle
from tests.oracles.differences import check_gradients

FORMS = ["virtual", "blended", "wrong classes"]
every_form = pytest.mark.parametrize("form", FORMS)


def example(n: int = 6, k: int = 5, seed: int = 0) -> tuple[Tensor, Tensor, Mix, Tensor]:
    g = torch.Generator().manual_seed(seed)
    student, teacher = (3 * torch.randn(n, k, dtype=torch.float64, generator=g) for _ in range(2))
    labels, partners = torch.randint(k, (n,), generator=g), torch.randperm(n, generator=g)
    ratio = torch.rand(n, dtype=torch.float64, generator=g)
    return student, teacher, Mix(partners, ratio, labels[partners]), labels


@every_form
@given(
    n=st.integers(1, 6), k=st.integers(3, 7), seed=st.integers(0, 10_000), share=st.floats(0, 1), t=st.floats(0.5, 20)
)
@settings(deadline=None, max_examples=25)
def test_the_loss_is_that_of_the_loops(form, n, k, seed, share, t):
    student, teacher, mix, labels = example(n, k, seed)
    ours = STKD(form, share, t)(student, teacher, mix=mix, labels=labels)
    expected = oracle.stkd(
        student.numpy(), teacher.numpy(), mix.ratio.tolist(), mix.partners.tolist(), labels.tolist(), form, share, t
    )
    assert float(ours) == pytest.approx(expected, rel=1e-9, abs=1e-12)


@every_form
@pytest.mark.parametrize("share", [0.0, 0.9, 1.0])
def test_the_gradient_is_that_of_the_loops(form, share):
    student, teacher, mix, labels = example(4)
    rest = mix.ratio.tolist(), mix.partners.tolist(), labels.tolist(), form, share
    value = STKD(form, share)(student.requires_grad_(), teacher, mix=mix, labels=labels)
    check_gradients(value, {"z": student}, lambda given: oracle.stkd(given["z"], teacher.numpy(), *rest))


@every_form
def test_soft_labels_that_were_mixed_give_the_same_loss(form):
    student, teacher, mix, labels = example()
    ratio = mix.ratio[:, None]
    soft = ratio * F.one_hot(labels, 5) + (1 - ratio) * F.one_hot(labels[mix.partners], 5)
    loss = STKD(form)
    torch.testing.assert_close(
        loss(student, teacher, mix=mix, labels=soft), loss(student, teacher, mix=mix, labels=labels)
    )


def test_unmixed_samples_make_it_ordinary_distillation():
    student, teacher, _, labels = example()
    alone = Mix(torch.arange(6), torch.ones(6, dtype=torch.float64), labels)
    kl = F.kl_div((student / 4).log_softmax(1), (teacher / 4).softmax(1), reduction="batchmean")
    expected = 0.1 * F.cross_entropy(student, labels) + 0.9 * 16 * kl
    for form in ("virtual", "blended"):
        torch.testing.assert_close(STKD(form)(student, teacher, mix=alone, labels=labels), expected)


def test_where_no_class_is_wrong_there_is_nothing_to_imitate():
    student = torch.randn(2, 2, requires_grad=True)
    mix = Mix(torch.tensor([1, 0]), torch.tensor([0.4, 0.4]), torch.tensor([1, 0]))
    value = STKD("wrong classes", share=1.0)(student, torch.randn(2, 2), mix=mix, labels=torch.tensor([0, 1]))
    value.backward()
    assert value == 0
    assert torch.equal(student.grad, torch.zeros(2, 2))


def test_it_takes_what_mixup_makes():
    x, y = torch.randn(8, 3), torch.arange(8) % 4
    student, teacher = torch.nn.Linear(3, 4), torch.nn.Linear(3, 4)
    for form, clean in (("virtual", False), ("blended", True), ("wrong classes", False)):
        batch = MixUp(clean_teacher=clean)(Batch(x, y))
        seen = batch.inputs if batch.teacher_inputs is None else batch.teacher_inputs
        outputs = student(batch.inputs), teacher(seen)
        value = STKD(form)(*outputs, mix=batch.mix, labels=batch.labels)
        arrays = [v.detach().double().numpy() for v in outputs]
        expected = oracle.stkd(*arrays, batch.mix.ratio.tolist(), batch.mix.partners.tolist(), y.tolist(), form)
        assert float(value.detach()) == pytest.approx(expected, rel=1e-5)
        assert np.array_equal(seen.numpy(), x.numpy()) is clean


def test_without_the_cross_entropy_it_needs_no_labels():
    student, teacher, mix, _ = example()
    mix.labels = None
    for form in ("virtual", "blended"):
        assert STKD(form, share=1.0)(student, teacher, mix=mix) > 0


def test_samples_that_were_not_mixed_are_refused():
    student, teacher, _, labels = example()
    with pytest.raises(ValueError, match=r"STKD needs \['mix'\]: pass mix=\.\.\."):
        STKD()(student, teacher, labels=labels)


def test_missing_labels_are_refused_with_the_cure():
    student, teacher, mix, labels = example()
    for loss in (STKD(), STKD("wrong classes", share=1.0)):
        with pytest.raises(ValueError, match=r"STKD needs labels.*labels=\.\.\."):
            loss(student, teacher, mix=mix)
    with pytest.raises(ValueError, match="no labels of the partners"):
        STKD()(student, teacher, mix=Mix(mix.partners, mix.ratio), labels=labels)


def test_labels_and_logits_that_do_not_fit_are_refused():
    student, teacher, mix, labels = example()
    with pytest.raises(ValueError, match="STKD: labels go from 0 to 9, but the logits have 5 classes"):
        STKD()(student, teacher, mix=mix, labels=torch.tensor([0, 1, 2, 3, 4, 9]))
    with pytest.raises(ValueError, match=r"STKD: soft labels must be \(6, 5\)"):
        STKD()(student, teacher, mix=mix, labels=torch.ones(6, 4))
    with pytest.raises(ValueError, match="STKD: labels go from -1 to 3, but the logits have 5 classes"):
        STKD()(student, teacher, mix=mix, labels=torch.tensor([0, 1, 2, 3, -1, 2]))
    with pytest.raises(ValueError, match=r"STKD: the student has 5 classes, the teacher 4.*embeddings"):
        STKD()(student, teacher[:, :4], mix=mix, labels=labels)
    with pytest.raises(ValueError, match="STKD: mix has 6 rows"):
        STKD()(student[:3], teacher[:3], mix=mix, labels=labels[:3])


def test_a_teacher_that_sees_the_wrong_samples_is_refused():
    mix = Mix(torch.tensor([1, 0]), torch.tensor([0.4, 0.4]), torch.tensor([1, 0]), teacher_mixed=True)
    labels = torch.tensor([0, 1])
    with pytest.raises(ValueError, match=r"must see the samples themselves: MixUp\(clean_teacher=True\)"):
        STKD("blended")(torch.eye(2), torch.eye(2), mix=mix, labels=labels)
    mix.teacher_mixed = False
    with pytest.raises(ValueError, match=r"must see mixed samples: MixUp\(clean_teacher=False\)"):
        STKD()(torch.eye(2), torch.eye(2), mix=mix, labels=labels)
