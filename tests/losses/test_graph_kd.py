import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_rkd.losses import GraphKD
from tests.oracles import graph_kd as oracle

LABELS = torch.tensor([0, 1, 0, 2, 1, 0, 2])


def det(n: int, d: int, a: float, b: float) -> Tensor:
    i, j = torch.arange(n, dtype=torch.float64)[:, None], torch.arange(d, dtype=torch.float64)
    return torch.sin(a * i + b * j + 0.3 * i * j)


def random_inputs(n: int = 7, positive: bool = True) -> tuple[np.ndarray, np.ndarray]:
    student, teacher = np.random.default_rng(n).normal(size=(2, n, 5))
    return (abs(student), abs(teacher[:, :4])) if positive else (student, teacher[:, :4])


def test_the_value_is_that_of_the_authors_code():
    value = GraphKD()(det(6, 4, 0.7, 1.1).abs(), det(6, 8, 1.3, 0.5).abs())
    assert float(value) == pytest.approx(0.03740563312827122, rel=1e-12)


@pytest.mark.parametrize("positive", [True, False])
@pytest.mark.parametrize("power", [1, 2, 3])
@pytest.mark.parametrize("n", [2, 3, 7])
def test_the_loss_is_that_of_the_loops(n, power, positive):
    student, teacher = random_inputs(n, positive)
    value = GraphKD(power=power)(torch.from_numpy(student), torch.from_numpy(teacher))
    assert float(value) == pytest.approx(oracle.graph_kd([student], [teacher], power=power), rel=1e-10, abs=1e-15)


@pytest.mark.parametrize("edges", ["all", "within", "between"])
@pytest.mark.parametrize("neighbours", [1, 2, 6, None])
def test_thinned_out_graphs_are_those_of_the_loops(neighbours, edges):
    student, teacher = random_inputs()
    same = (LABELS[:, None] == LABELS).double().numpy()
    mask = {"all": None, "within": same, "between": 1 - same}[edges]
    value = GraphKD(neighbours=neighbours, power=2, edges=edges)(
        torch.from_numpy(student), torch.from_numpy(teacher), labels=LABELS
    )
    assert float(value) == pytest.approx(oracle.graph_kd([student], [teacher], mask, neighbours, 2), rel=1e-10)


def test_soft_labels_that_are_certain_act_like_hard_ones():
    student, teacher = map(torch.from_numpy, random_inputs())
    soft, loss = torch.nn.functional.one_hot(LABELS).float(), GraphKD(edges="between")
    torch.testing.assert_close(loss(student, teacher, labels=soft), loss(student, teacher, labels=LABELS))


def test_layers_of_any_sizes_are_averaged():
    student = [torch.rand(5, *shape, dtype=torch.float64) for shape in ((3, 4, 4), (6, 2, 2))]
    teacher = [torch.rand(5, *shape, dtype=torch.float64) for shape in ((8, 2, 2), (9, 7))]
    value = GraphKD(reads="feature_maps")(student, teacher)
    expected = oracle.graph_kd([s.numpy() for s in student], [t.numpy() for t in teacher])
    assert float(value) == pytest.approx(expected, rel=1e-11)


@pytest.mark.parametrize(
    "settings", [{}, {"neighbours": 2}, {"power": 3}, {"edges": "within"}, {"edges": "between", "neighbours": 1}]
)
def test_the_gradient_passes_gradcheck(settings):
    student, teacher = torch.randn(5, 3, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)
    loss = GraphKD(**settings)
    assert torch.autograd.gradcheck(lambda x: loss(x, teacher, labels=LABELS[:5]), student.requires_grad_())


@pytest.mark.parametrize("rows", [[[1.0, 2.0]], [[1.0, 0.0], [-1.0, 0.0]], [[0.0, 0.0]] * 3, [[1.0, 1.0]] * 4])
def test_isolated_zero_and_equal_samples_give_finite_gradients(rows):
    student = torch.tensor(rows, requires_grad=True)
    value = GraphKD()(student, torch.randn(len(rows), 3))
    value.backward()
    assert torch.isfinite(value)
    assert torch.isfinite(student.grad).all()
    if len(rows) == 1:
        assert value == 0


def test_edges_that_depend_on_classes_need_labels():
    with pytest.raises(ValueError, match=r"GraphKD: edges='within' needs labels: pass labels=\.\.\."):
        GraphKD(edges="within")(torch.rand(4, 2), torch.rand(4, 2))
    assert torch.isfinite(GraphKD()(torch.rand(4, 2), torch.rand(4, 2)))


def test_a_batch_no_larger_than_neighbours_is_refused_with_the_cure():
    with pytest.raises(
        ValueError, match=r"GraphKD: .*neighbours=4.* at least 5 samples, got a batch of 4; lower neighbours"
    ):
        GraphKD(neighbours=4)(torch.rand(4, 2), torch.rand(4, 2))
