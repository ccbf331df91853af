import numpy as np
import pytest
import torch

from lightning_rkd.losses.attention_transfer import AttentionTransfer, attention_map, attention_transfer
from tests.oracles import attention_transfer as oracle
from tests.oracles.differences import central_differences


@pytest.mark.parametrize("power", [1.0, 2.0, 4.0])
@pytest.mark.parametrize(("n", "channels", "size"), [(1, (1, 1), (2, 2)), (2, (3, 4), (2, 3)), (5, (4, 2), (3, 1))])
def test_the_loss_is_that_of_the_loops(n, channels, size, power):
    rng = np.random.default_rng(n)
    student, teacher = (rng.normal(size=(n, c, *size)) for c in channels)
    ours = AttentionTransfer(power)([torch.from_numpy(student)], [torch.from_numpy(teacher)])
    assert ours.item() == pytest.approx(oracle.attention_transfer(student, teacher, power), rel=1e-10)


def test_several_pairs_add_up():
    student = [torch.randn(2, 3, 4, 4, dtype=torch.float64), torch.randn(2, 5, 2, 2, dtype=torch.float64)]
    teacher = [torch.randn(2, 4, 4, 4, dtype=torch.float64), torch.randn(2, 6, 2, 2, dtype=torch.float64)]
    expected = sum(oracle.attention_transfer(s.numpy(), t.numpy()) for s, t in zip(student, teacher, strict=True))
    assert float(AttentionTransfer()(student, teacher)) == pytest.approx(expected, rel=1e-10)


def test_the_gradient_is_that_of_central_differences_of_the_loops():
    rng = np.random.default_rng(0)
    student, teacher = rng.normal(size=(2, 2, 2, 2)), rng.normal(size=(2, 3, 2, 2))
    x = torch.from_numpy(student).requires_grad_()
    AttentionTransfer()([x], [torch.from_numpy(teacher)]).backward()
    expected = central_differences(lambda s: oracle.attention_transfer(s, teacher), student)
    np.testing.assert_allclose(x.grad, expected, rtol=1e-6, atol=1e-10)


@pytest.mark.parametrize("larger", ["student", "teacher"])
def test_the_larger_map_is_pooled_to_the_smaller(larger):
    student, teacher = torch.randn(2, 3, 2, 4, dtype=torch.float64), torch.randn(2, 5, 2, 4, dtype=torch.float64)
    big = torch.randn(2, 3, 4, 8, dtype=torch.float64)
    inputs = (big, teacher) if larger == "student" else (student, big)
    pooled = [oracle.half(x.numpy()) if x is big else x.numpy() for x in inputs]
    ours = AttentionTransfer()([inputs[0]], [inputs[1]])
    assert ours.item() == pytest.approx(oracle.attention_transfer(*pooled), rel=1e-10)


def test_tokens_give_the_loss_of_the_map_they_are():
    student, teacher = torch.randn(2, 3, 2, 5), torch.randn(2, 4, 2, 5)
    tokens = [x.flatten(2).mT for x in (student, teacher)]
    loss = AttentionTransfer()
    torch.testing.assert_close(loss([tokens[0]], [tokens[1]]), loss([student], [teacher]))


def test_maps_of_zeros_have_no_attention_and_pass_no_gradient():
    student = torch.zeros(2, 3, 2, 2, requires_grad=True)
    loss = AttentionTransfer()([student], [torch.randn(2, 3, 2, 2)])
    loss.backward()
    assert loss.item() == pytest.approx(1 / 4)  # the teacher's attention has length 1, over four places
    assert torch.equal(student.grad, torch.zeros_like(student))
    assert torch.equal(attention_map(student.detach()), torch.zeros(2, 4))


@pytest.mark.parametrize(
    ("student", "teacher"), [((2, 9, 3), (2, 16, 3)), ((2, 3, 4, 4), (2, 16, 3)), ((2, 3), (2, 3))]
)
def test_maps_that_do_not_show_the_same_places_are_refused(student, teacher):
    with pytest.raises(ValueError, match=r"AttentionTransfer, map 0: the layers must give .*tap layers"):
        AttentionTransfer()([torch.randn(student)], [torch.randn(teacher)])


def test_lists_of_different_length_are_refused():
    with pytest.raises(ValueError, match="AttentionTransfer: 2 maps of the student, but 1"):
        attention_transfer([torch.randn(2, 3, 4, 4)] * 2, [torch.randn(2, 3, 4, 4)])
