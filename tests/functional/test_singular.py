import pytest
import torch
from torch import Tensor

from lightning_rkd.functional.singular import align_vectors, right_singular_vectors

SHAPES = [(7, 4), (4, 7), (5, 5), (1, 4), (6, 1), (1, 1)]  # positions, channels
shaped = pytest.mark.parametrize("shape", SHAPES, ids=str)


def oracle(x: Tensor, k: int) -> Tensor:
    """torch's own SVD, with the sign along the mean of the rows."""
    vectors = torch.linalg.svd(x, full_matrices=False).Vh.mT[..., :k]
    along = (x.sum(1, keepdim=True) @ vectors).detach()
    return vectors * torch.where(along < 0, -1, 1)


@shaped
@pytest.mark.parametrize("k", [1, 3])
def test_the_vectors_are_those_of_the_svd(shape, k):
    x = torch.randn(5, *shape, dtype=torch.float64)
    torch.testing.assert_close(right_singular_vectors(x, k), oracle(x, k), rtol=0, atol=1e-10)
    single = right_singular_vectors(x.float(), k)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), oracle(x, k), rtol=0, atol=1e-4)


@shaped
def test_the_gradient_passes_gradcheck_null_space_included(shape):
    x = torch.randn(3, *shape, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: right_singular_vectors(x, 3), x)


def test_the_gradient_in_float32_is_near_that_in_float64():
    x = torch.rand(6, 16, 12)  # like a map behind a ReLU: the first singular value stands out
    weights = torch.randn(6, 12, 1)
    grads = []
    for dtype in (torch.float32, torch.float64):
        y = x.to(dtype).requires_grad_()
        grads.append(torch.autograd.grad((right_singular_vectors(y) * weights.to(dtype)).sum(), y)[0].double())
    assert (grads[0] - grads[1]).norm() < 1e-4 * grads[1].norm()


DEGENERATE = {
    "zeros": torch.zeros(2, 6, 4),
    "one": torch.ones(2, 6, 4),
    "equal rows": torch.randn(2, 1, 4).expand(2, 6, 4),
    "equal singular values": torch.eye(4).expand(2, 4, 4),
    "equal singular values, wide": torch.eye(6)[:4].expand(2, 4, 6),
    "nearly equal": torch.diag(torch.tensor([1.0, 1 + 1e-6, 1 - 1e-6, 1.0])).expand(2, 4, 4),
    "one zero sample": torch.cat([torch.zeros(1, 6, 4), torch.randn(1, 6, 4)]),
    "tiny": 1e-17 * torch.randn(2, 6, 4),
    "denormal": 1e-40 * torch.randn(2, 6, 4),
    "huge": 1e30 * torch.randn(2, 6, 4),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("case", DEGENERATE)
def test_degenerate_maps_give_unit_or_zero_vectors_and_finite_gradients(case, dtype):
    x = DEGENERATE[case].to(dtype).clone().requires_grad_()
    vectors = right_singular_vectors(x, 4)
    (grad,) = torch.autograd.grad((vectors * torch.randn_like(vectors)).sum(), x)
    lengths = vectors.norm(dim=1)
    assert torch.isfinite(grad).all()
    assert ((lengths - 1).abs() < 1e-4).logical_or(lengths == 0).all()


def test_vectors_without_a_singular_value_are_zero_and_pass_no_gradient():
    x = torch.outer(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.6, 0.8]))[None].requires_grad_()
    vectors = right_singular_vectors(x, 2)
    torch.testing.assert_close(vectors.detach(), torch.tensor([[[0.6, 0.0], [0.8, 0.0]]]))
    (grad,) = torch.autograd.grad(vectors[..., 1].sum(), x)
    assert torch.equal(grad, torch.zeros_like(x))


def test_within_equal_singular_values_no_direction_is_pulled():
    x = torch.diag(torch.tensor([2.0, 2.0, 1.0], dtype=torch.float64))[None].requires_grad_()
    first = right_singular_vectors(x)[0, :, 0]
    other = torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64)
    inside = torch.linalg.cross(first.detach(), other)  # the direction of the equal one
    (along,) = torch.autograd.grad(first @ inside, x, retain_graph=True)
    (across,) = torch.autograd.grad(first @ other, x)
    assert torch.allclose(along, torch.zeros_like(x))
    assert across.norm() > 0.1


def test_alignment_takes_the_nearest_line_and_turns_it():
    vectors = torch.linalg.qr(torch.randn(8, 5, 4, dtype=torch.float64)).Q
    target = torch.nn.functional.normalize(torch.randn(8, 5, dtype=torch.float64), dim=1)
    chosen = align_vectors(vectors, target)
    for i in range(8):
        cosines = [float(vectors[i, :, j] @ target[i]) for j in range(4)]
        best = max(range(4), key=lambda j: abs(cosines[j]))
        assert torch.equal(chosen[i], vectors[i, :, best] * (1 if cosines[best] > 0 else -1))


def test_alignment_of_zeros_is_zero_and_only_the_choice_gets_a_gradient():
    vectors = torch.eye(3)[None].clone().requires_grad_()
    assert torch.equal(align_vectors(vectors, torch.zeros(1, 3)), torch.zeros(1, 3))
    assert torch.equal(align_vectors(torch.zeros(1, 3, 2), torch.ones(1, 3)), torch.zeros(1, 3))
    (grad,) = torch.autograd.grad(align_vectors(vectors, torch.tensor([[0.0, -1.0, 0.5]])).sum(), vectors)
    assert torch.equal(grad[0], torch.tensor([[0.0, -1, 0]] * 3))
