import numpy as np
import pytest
import torch

from lightning_rkd.losses.fitnet import FitNetHint
from tests.oracles import fitnet as oracle
from tests.oracles.differences import central_differences


def parameters(loss: FitNetHint, i: int = 0) -> tuple[np.ndarray, np.ndarray]:
    regressor = loss.regressors[i]
    return regressor.weight.detach().double().numpy(), regressor.bias.detach().double().numpy()


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize(("n", "channels", "size"), [(1, (1, 1), (1, 1)), (2, (3, 4), (2, 3)), (3, (4, 2), (3, 1))])
def test_the_loss_is_that_of_the_loops(n, channels, size, relu):
    rng = np.random.default_rng(n)
    student, teacher = (rng.normal(size=(n, c, *size)) for c in channels)
    loss = FitNetHint(channels[:1], channels[1:], relu=relu).double()
    ours = loss([torch.from_numpy(student)], [torch.from_numpy(teacher)])
    assert ours.item() == pytest.approx(oracle.hint(student, teacher, *parameters(loss), relu), rel=1e-10)


def test_several_pairs_add_up():
    student = [torch.randn(2, 3, 4, 4, dtype=torch.float64), torch.randn(2, 5, 2, 2, dtype=torch.float64)]
    teacher = [torch.randn(2, 4, 4, 4, dtype=torch.float64), torch.randn(2, 6, 2, 2, dtype=torch.float64)]
    loss = FitNetHint((3, 5), (4, 6)).double()
    expected = sum(
        oracle.hint(s.numpy(), t.numpy(), *parameters(loss, i))
        for i, (s, t) in enumerate(zip(student, teacher, strict=True))
    )
    assert loss(student, teacher).item() == pytest.approx(expected, rel=1e-10)


def test_the_gradient_is_that_of_central_differences_of_the_loops():
    rng = np.random.default_rng(0)
    student, teacher = rng.normal(size=(2, 2, 2, 2)), rng.normal(size=(2, 3, 2, 2))
    loss = FitNetHint((2,), (3,)).double()
    x = torch.from_numpy(student).requires_grad_()
    loss([x], [torch.from_numpy(teacher)]).backward()
    weight, bias = parameters(loss)
    np.testing.assert_allclose(
        x.grad, central_differences(lambda s: oracle.hint(s, teacher, weight, bias), student), rtol=1e-6, atol=1e-9
    )
    np.testing.assert_allclose(
        loss.regressors[0].weight.grad,
        central_differences(lambda w: oracle.hint(student, teacher, w, bias), weight),
        rtol=1e-6,
        atol=1e-9,
    )


def test_the_regressor_is_a_convolution_of_kernel_one():
    loss = FitNetHint((3,), (4,))
    student, teacher = torch.randn(2, 3, 5, 5), torch.randn(2, 4, 5, 5)
    weight, bias = loss.regressors[0].weight[:, :, None, None], loss.regressors[0].bias
    expected = torch.nn.functional.mse_loss(torch.conv2d(student, weight, bias), teacher)
    torch.testing.assert_close(loss([student], [teacher]), expected)


def test_tokens_give_the_loss_of_the_map_they_are():
    loss = FitNetHint((3,), (4,))
    student, teacher = torch.randn(2, 3, 2, 5), torch.randn(2, 4, 2, 5)
    tokens = [x.flatten(2).mT for x in (student, teacher)]
    torch.testing.assert_close(loss([tokens[0]], [tokens[1]]), loss([student], [teacher]))


def test_channels_are_taken_from_the_first_batch():
    loss = FitNetHint()
    loss([torch.randn(2, 3, 4, 4), torch.randn(2, 5, 2, 2)], [torch.randn(2, 4, 4, 4), torch.randn(2, 6, 2, 2)])
    assert [tuple(r.weight.shape) for r in loss.regressors] == [(4, 3), (6, 5)]
    with pytest.raises(ValueError, match=r"FitNetHint was made for student_dim=\(3, 5\), but received"):
        loss([torch.randn(2, 7, 4, 4), torch.randn(2, 5, 2, 2)], [torch.randn(2, 4, 4, 4), torch.randn(2, 6, 2, 2)])


def test_different_spatial_sizes_are_refused_with_the_cure():
    with pytest.raises(ValueError, match=r"FitNetHint: maps\[0\] .*\(2, 3, 4, 4\) and \(2, 4, 2, 2\); tap layers"):
        FitNetHint()([torch.randn(2, 3, 4, 4)], [torch.randn(2, 4, 2, 2)])


def test_volumes_and_channels_that_are_no_list_are_refused():
    with pytest.raises(ValueError, match=r"FitNetHint: maps\[0\] must be \(N, C, H, W\) or"):
        FitNetHint()([torch.randn(2, 3, 4, 4, 4)], [torch.randn(2, 3, 4, 4, 4)])
    with pytest.raises(TypeError, match=r"FitNetHint: student_dim lists the channels of every map, got 3; pass \[3\]"):
        FitNetHint(3, 4)


def test_maps_paired_with_tokens_are_refused():
    with pytest.raises(ValueError, match=r"FitNetHint: maps\[0\]"):
        FitNetHint()([torch.randn(2, 3, 4, 4)], [torch.randn(2, 16, 4)])


def test_lists_of_different_length_are_refused():
    with pytest.raises(ValueError, match="FitNetHint: 2 feature maps of the student and 1 of the teacher"):
        FitNetHint()([torch.randn(2, 3, 4, 4)] * 2, [torch.randn(2, 4, 4, 4)])
    with pytest.raises(ValueError, match=r"FitNetHint: maps are compared in pairs, got channels \(3, 5\)"):
        FitNetHint((3, 5), (4,))
