import numpy as np
import pytest
import torch

from lightning_rkd.losses import IRG
from lightning_rkd.losses.irg import edges, transformation
from lightning_rkd.utils.types import Outputs
from tests.oracles import irg as oracle
from tests.oracles.differences import central_differences, check_gradients


def outputs(maps: list[np.ndarray], logits: np.ndarray | None = None) -> Outputs:
    return Outputs(
        logits=None if logits is None else torch.from_numpy(logits), feature_maps=[torch.from_numpy(m) for m in maps]
    )


def networks(n: int = 5, channels: tuple[int, int] = (2, 3)) -> tuple[Outputs, Outputs, dict[str, float]]:
    """Two networks with four maps, and the parts of the loss by loops."""
    rng = np.random.default_rng(0)
    s, t = ([rng.normal(size=(n, c, 3, 2)), rng.normal(size=(n, c, 3, 2)), rng.normal(size=(n, 2 * c, 2, 2)),
             rng.normal(size=(n, 2 * c, 1, 1))] for c in channels)  # fmt: skip
    zs, zt = rng.normal(size=(2, n, 4))
    ps, pt = ([oracle.pooled(m) for m in maps] for maps in (s, t))
    parts = {
        "vertices": oracle.vertices(zs, zt),
        "last": oracle.edges(ps[3], pt[3]),
        "third": oracle.edges(ps[2], pt[3]),
        "first stage": oracle.transformation((ps[0], ps[1]), (pt[0], pt[1])),
        "second stage": oracle.transformation((ps[2], ps[3]), (pt[2], pt[3])),
    }
    return outputs(s, zs), outputs(t, zt), parts


STAGES = [(0, 1), (2, 3)]


@pytest.mark.parametrize("n", [1, 2, 5])
def test_the_loss_is_the_weighted_sum_of_the_loops(n):
    s, t, parts = networks(n)
    loss = IRG(0.3, 2.0, 5.0, edge_layers=(-1, 2), transform_layers=STAGES)
    expected = (
        0.3 * parts["vertices"]
        + 2 * (parts["last"] + parts["third"])
        + 5 * (parts["first stage"] + parts["second stage"])
    )
    assert float(loss(s, t)) == pytest.approx(expected, rel=1e-9)


def test_the_defaults_are_the_authors_weights_on_the_last_edges():
    s, t, parts = networks()
    loss = IRG(transform_layers=STAGES)
    keys = ("vertices", "last", "first stage", "second stage")
    assert float(loss(s, t)) == pytest.approx(0.005 * sum(parts[k] for k in keys), rel=1e-9)


def test_without_a_list_every_map_goes_with_its_next():
    s, t, parts = networks()
    s, t = (Outputs(feature_maps=x.feature_maps[:2]) for x in (s, t))  # type: ignore[index]
    assert float(IRG(0, 0, 1)(s, t)) == pytest.approx(parts["first stage"], rel=1e-9)
    assert float(IRG(0, 0, 1)(Outputs(feature_maps=s.feature_maps[:1]), Outputs(feature_maps=t.feature_maps[:1]))) == 0  # type: ignore[index]


def test_without_a_weight_for_vertices_no_logits_are_needed():
    assert IRG(vertex_weight=0).reads == ("feature_maps",)
    s, t, _ = networks()
    with pytest.raises(ValueError, match="logits"):
        IRG(transform_layers=STAGES)(Outputs(feature_maps=s.feature_maps), Outputs(feature_maps=t.feature_maps))


@pytest.mark.parametrize("n", [2, 5, 32])
def test_the_gradients_are_those_of_the_authors_backward_passes(n):
    rng = np.random.default_rng(1)
    s, t = rng.normal(size=(2, 2, n, 4))
    x = [torch.from_numpy(row).requires_grad_() for row in s]
    target = outputs(list(t))
    (edge,) = torch.autograd.grad(IRG(0, 1, 0)(Outputs(feature_maps=x[1:]), outputs([t[1]])), x[1:])
    np.testing.assert_allclose(edge, 2 * oracle.edges_backward(s[1], t[1]), rtol=1e-9, atol=1e-12)
    moves = torch.autograd.grad(IRG(0, 0, 1)(Outputs(feature_maps=x), target), x)
    for ours, theirs in zip(moves, oracle.transformation_backward((s[0], s[1]), (t[0], t[1])), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-12)


def test_the_gradient_of_the_vertices_is_that_of_the_loops():
    s, t = np.random.default_rng(0).normal(size=(2, 5, 4))
    z = torch.from_numpy(s).requires_grad_()
    maps = [torch.zeros(5, 2)]
    value = IRG(1, 0, 0)(Outputs(logits=z, feature_maps=maps), Outputs(logits=torch.from_numpy(t), feature_maps=maps))
    check_gradients(value, {"z": z}, lambda given: oracle.vertices(given["z"], t))


def test_the_largest_is_a_constant_or_two_samples_get_the_gradient():
    s, t = np.random.default_rng(4).normal(size=(2, 16, 4))
    x = torch.from_numpy(s).requires_grad_()
    ours = torch.autograd.grad(IRG(0, 1, 0)(Outputs(feature_maps=[x]), outputs([t])), x)[0].numpy()
    through = central_differences(lambda rows: oracle.edges(rows, t), s)
    assert (ours * through).sum() / np.linalg.norm(ours) / np.linalg.norm(through) < 0.08  # which was 1
    share = [np.sort((g**2).sum(1))[-2:].sum() / (g**2).sum() for g in (ours, through)]
    assert share[0] < 0.45
    assert share[1] > 0.7  # of the gradient's square, in 2 of 16 samples


def test_a_batch_that_does_not_spread_or_move_gives_zeros_and_no_gradient():
    x = torch.ones(3, 2, requires_grad=True)
    (edges(x).sum() + transformation(x, x).sum()).backward()
    assert edges(x).abs().max() == 0
    assert x.grad is not None
    assert x.grad.abs().max() == 0


def test_what_does_not_fit_is_refused_with_the_cure():
    s, t, _ = networks()
    with pytest.raises(ValueError, match=r"student's maps 1 and 2 have 2 and 4; .* transform_layers=\[\(0, 1\)"):
        IRG()(s, t)
    with pytest.raises(ValueError, match="IRG: there is no map 7 among the 4 that are read"):
        IRG(edge_layers=(7,))(s, t)
    with pytest.raises(ValueError, match="IRG: there is no map -5"):
        IRG(transform_layers=[(0, -5)])(s, t)
    with pytest.raises(ValueError, match=r"logits over the same classes, got \(5, 3\) and \(5, 4\)"):
        IRG(transform_layers=STAGES)(Outputs(logits=torch.ones(5, 3), feature_maps=s.feature_maps), t)
