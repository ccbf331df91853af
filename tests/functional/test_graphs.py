import pytest
import torch

from lightning_rkd.functional.graphs import knn_graph, normalised_adjacency, same_class


def distances(n: int) -> torch.Tensor:
    x = torch.randn(n, 3, dtype=torch.float64)
    return (x[:, None] - x).norm(dim=2)


@pytest.mark.parametrize("include_self", [True, False])
@pytest.mark.parametrize("k", [1, 3, 6])
def test_each_row_marks_its_k_nearest(k, include_self):
    d = distances(7)
    graph = knn_graph(d, k, include_self=include_self)
    assert graph.dtype == torch.bool
    for i, row in enumerate(d.tolist()):
        others = sorted((j for j in range(7) if j != i), key=lambda j, row=row: row[j])
        expected = {i, *others[: k - 1]} if include_self else set(others[:k])
        assert {j for j in range(7) if graph[i, j]} == expected


def test_a_sample_is_its_own_neighbour_then_of_equally_near_the_first():
    assert knn_graph(torch.zeros(4, 4), 1).equal(torch.eye(4, dtype=torch.bool))
    assert knn_graph(torch.zeros(4, 4), 2).int().tolist() == [[1, 1, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 0, 1]]
    assert not knn_graph(torch.zeros(4, 4), 3, include_self=False).diagonal().any()


def test_the_graph_leaves_its_input_alone_and_passes_no_gradient():
    d = distances(5).requires_grad_()
    before = d.detach().clone()
    assert not knn_graph(d, 2).requires_grad
    assert torch.equal(d.detach(), before)


@pytest.mark.parametrize(("include_self", "needed"), [(True, 8), (False, 9)])
def test_a_batch_with_too_few_samples_is_refused_with_the_cure(include_self, needed):
    assert knn_graph(distances(needed), 8, include_self=include_self).sum() == 8 * needed
    with pytest.raises(
        ValueError, match=f"HolisticKD: .*k=8.* at least {needed} samples, got a batch of {needed - 1}.*drop_last"
    ):
        knn_graph(distances(needed - 1), 8, include_self=include_self, who="HolisticKD")


def test_what_is_no_graph_is_refused():
    with pytest.raises(ValueError, match=r"\(N, N\) matrix, got \(3, 4\)"):
        knn_graph(torch.zeros(3, 4), 1)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        knn_graph(torch.zeros(3, 3), 0)


def test_soft_labels_share_a_class_by_their_inner_product():
    soft = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.5, 0.5]])
    assert same_class(soft).tolist() == [[1.0, 0.0, 0.5], [0.0, 1.0, 0.5], [0.5, 0.5, 0.5]]
    hard = torch.tensor([0, 1, 0, 2])
    assert same_class(torch.nn.functional.one_hot(hard).float()).equal(same_class(hard).float())


def test_the_normalised_adjacency_is_that_of_the_loops():
    edges = torch.rand(6, 6, dtype=torch.float64)
    edges = (edges + edges.T).fill_diagonal_(0)
    expected = [
        [float(edges[i, j]) / float(edges[i].sum() * edges[j].sum()) ** 0.5 for j in range(6)] for i in range(6)
    ]
    torch.testing.assert_close(normalised_adjacency(edges), torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("noise", [0.0, 1e-9])
def test_an_isolated_sample_has_no_edges_and_a_finite_gradient(noise):
    edges = torch.ones(3, 3).fill_diagonal_(0)
    edges[2] = edges[:, 2] = noise
    edges.requires_grad_()
    normalised = normalised_adjacency(edges)
    normalised.sum().backward()
    assert normalised.tolist() == [[0, 1, 0], [1, 0, 0], [0, 0, 0]]
    assert torch.isfinite(edges.grad).all()
