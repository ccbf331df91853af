import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_rkd.functional import _kernels as kernels
from lightning_rkd.functional import rkd
from lightning_rkd.functional.rkd import rkd_loss
from lightning_rkd.losses import CSD, PKT, RKD, RelationalLoss, RelaxedContrastive, RKDAngle, RKDDistance
from tests.harness.launches import fake_gpu, list_nodes, needs_fake_gpu, run_backward


def launches(loss: RelationalLoss, n: int = 64, with_gradient: bool = True) -> list[str]:
    """Names of the kernels of a forward and a backward pass."""
    loss = copy.deepcopy(loss)
    with fake_gpu() as launched:
        student = torch.empty(n, 128, device="cuda", requires_grad=with_gradient)
        teacher = torch.empty(n, 512, device="cuda")
        ones = torch.empty((), device="cuda")
        launched.clear()
        value = loss(student, teacher)
        if with_gradient:
            run_backward(value, ones)
        return list(launched)


MEASURE, ANGLES = ["_means", "_distances", "_prepare"], ["_across", "_at_vertices"]
GRADIENT = ["pull_rows", "aten.mul.Tensor"]


@needs_fake_gpu
@pytest.mark.parametrize("n", [1, 64, 1024, 2048])
def test_rkd_launches_nine_kernels_on_a_gpu_in_both_passes(n):
    assert launches(RKD(), n) == [*MEASURE, *ANGLES, *ANGLES, *GRADIENT]
    assert launches(RKDAngle(), n) == [*MEASURE, *ANGLES, *ANGLES, *GRADIENT]
    assert launches(RKD(), n, with_gradient=False) == [*MEASURE, "_across", "_across", "pull_rows"]


@needs_fake_gpu
def test_the_distance_loss_launches_five_kernels_on_a_gpu():
    assert launches(RKDDistance()) == [*MEASURE, *GRADIENT]
    assert launches(RKD(angle_weight=0)) == [*MEASURE, *GRADIENT]


@needs_fake_gpu
@pytest.mark.parametrize(
    ("loss", "most"), [(PKT(), 143), (CSD(student_dim=128, teacher_dim=512), 99), (RelaxedContrastive(), 73)]
)
def test_launches_of_other_losses_are_no_more_than_documented(loss, most):
    assert len(launches(loss)) <= most


def test_a_loss_is_one_node_of_the_graph():
    student, teacher = torch.randn(6, 4, requires_grad=True), torch.randn(6, 5)
    for loss in (RKD(), RKDDistance(), RKDAngle(), RKD(25, 50, "distinct")):
        assert len(list_nodes(loss(student, teacher))) == 1


def test_a_second_derivative_is_refused():
    student = torch.randn(4, 3, requires_grad=True)
    with pytest.raises(RuntimeError, match="RKD has a first derivative only"):
        torch.autograd.grad(rkd_loss(student, torch.randn(4, 3)), student, create_graph=True)


def test_where_the_kernel_cannot_run_the_parts_do_its_work(monkeypatch, caplog):
    student, teacher = torch.randn(6, 4), torch.randn(6, 5)
    expected = rkd_loss(student, teacher)

    class Kernel:
        @staticmethod
        def loss_and_gradient(*args: Any, **settings: Any) -> Any:
            raise RuntimeError("no C compiler")

    monkeypatch.setattr(rkd, "native", lambda name: Kernel if name == "rkd_cuda" else None)
    monkeypatch.setattr(kernels, "_failed", set())
    monkeypatch.setitem(rkd._KERNELS, "cpu", "rkd_cuda")
    assert torch.equal(rkd_loss(student, teacher), expected)
    assert "The kernel rkd_cuda does not run here" in caplog.text


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_the_gradient_of_half_precision_is_scaled_before_it_is_rounded(dtype):
    student, teacher = torch.randn(64, 8).to(dtype).requires_grad_(), torch.randn(64, 8)
    (grad,) = torch.autograd.grad(rkd_loss(student, teacher) * 2.0**14, student)
    own = student.detach().double().requires_grad_()
    (expected,) = torch.autograd.grad(rkd_loss(own, teacher), own)
    torch.testing.assert_close(grad.double() / 2**14, expected, rtol=2e-3, atol=1e-9)


# One node of a compiled graph


@pytest.mark.slow
@pytest.mark.parametrize("sample", [None, 4])
def test_torch_compile_sees_one_node(sample):
    student, teacher = torch.randn(9, 4, requires_grad=True), torch.randn(9, 5)
    nodes: list[str] = []

    def backend(graph, inputs):  # type: ignore[no-untyped-def]
        nodes.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph

    @torch.compile(backend=backend, fullgraph=True)
    def compiled(student: Tensor) -> Tensor:
        return rkd_loss(student, teacher, sampled_anchors=sample)

    torch.manual_seed(0)
    value = compiled(student)
    (grad,) = torch.autograd.grad(value, student)
    torch.manual_seed(0)
    expected = rkd_loss(student, teacher, sampled_anchors=sample)
    (expected_grad,) = torch.autograd.grad(expected, student)
    nodes = [node.removesuffix(".default") for node in nodes if "getitem" not in node]
    assert [node for node in nodes if "detach" not in node] == ["lightning_rkd.rkd_loss"]
    assert torch.equal(value, expected)
    assert torch.equal(grad, expected_grad)


def test_the_operator_keeps_to_its_declaration():
    student, teacher = torch.randn(9, 4, requires_grad=True), torch.randn(9, 5)
    for with_gradient in (True, False):
        arguments = (student if with_gradient else student.detach(), teacher, 1.0, 2.0, "official", 0, with_gradient)
        torch.library.opcheck(rkd._operator, arguments, test_utils=("test_schema", "test_faketensor"))
