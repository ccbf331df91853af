import copy
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_rkd.losses.mhgd import MHGD, graph_divergence
from lightning_rkd.losses.parts.attention_graph import AttentionGraph, load_attention
from lightning_rkd.losses.parts.memory import generator
from tests.oracles import mhgd as oracle
from tests.oracles.differences import check_gradients, det


def graph(channels: tuple[int, ...], heads: int = 8) -> AttentionGraph:
    """As after some training: no weight, statistic or norm is what it began with."""
    made = AttentionGraph(channels, heads)
    with torch.no_grad():
        for name, x in made.state_dict().items():
            if x.is_floating_point():
                x.copy_(torch.rand_like(x) + 0.5 if "var" in name else torch.randn_like(x) * 0.7)
    return made


def maps(n: int, channels: tuple[int, ...], sizes: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [torch.randn(n, c, size, size, dtype=dtype).relu() + 0.01 for c, size in zip(channels, sizes, strict=True)]


def ready(loss: MHGD, student: list[Tensor], teacher: list[Tensor]) -> MHGD:
    loss.materialize(student, teacher, like=student[0].new_empty(0))
    return loss


def exact(trained: AttentionGraph, student: list[Tensor], teacher: list[Tensor]) -> MHGD:
    """In float64 from the start: heads are frozen in the precision of the loss."""
    widths = [tuple(m.shape[1] for m in x) for x in (student, teacher)]
    return ready(MHGD(trained, *widths, heads=trained.heads).double(), student, teacher)


def projection(linear: nn.Sequential) -> dict[str, Any]:
    (layer, norm) = linear[:2]
    return {
        "weight": layer.weight.detach().double().numpy(),
        "mean": norm.running_mean.double().numpy(),
        "var": norm.running_var.double().numpy(),
        "gamma": norm.weight.detach().double().numpy(),
        "beta": norm.bias.detach().double().numpy(),
    }


def pairs_of(attention: nn.ModuleList) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    return [(projection(head.sender), projection(head.receiver)) for head in attention]


# The value


def test_the_divergence_of_fixed_graphs_is_the_known_value():
    student, teacher = 2 * det(12, 6, 0.3, 0.8).view(2, 6, 6), 2 * det(12, 6, 0.6, 0.2).view(2, 6, 6)
    value = float(graph_divergence(student, teacher))
    assert value == pytest.approx(3.670719877244967, rel=1e-12)
    assert oracle.divergence(student.numpy(), teacher.numpy()) == pytest.approx(value, rel=1e-12)
    mean = float(graph_divergence(student, teacher, reduction="mean"))
    assert mean == pytest.approx(value / 12, rel=1e-12), "per head and row"


CASES = [
    (5, (3, 4), (3, 4), (4, 2), (3, 3), 2),  # rows, student's channels, teacher's, sizes, sizes, heads
    (4, (6, 4, 5), (6, 4, 5), (3, 2, 1), (3, 2, 1), 3),
    (3, (2, 8), (2, 8), (4, 2), (4, 2), 1),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_loss_is_that_of_the_loops(case):
    n, widths, channels, sides_s, sides_t, heads = case
    student, teacher = maps(n, widths, sides_s), maps(n, channels, sides_t)
    trained = graph(channels, heads)
    loss = exact(trained, student, teacher)
    expected = oracle.mhgd(
        [m.numpy() for m in student], [m.numpy() for m in teacher], pairs_of(trained.attention), heads
    )
    assert float(loss(student, teacher)) == pytest.approx(expected, rel=1e-9)
    loss.reduction = "mean"
    assert float(loss(student, teacher)) == pytest.approx(expected / (n * heads * (len(channels) - 1)), rel=1e-9)


def test_other_channels_are_adapted_by_a_trained_convolution():
    student, teacher = maps(4, (3, 5), (4, 2)), maps(4, (3, 6), (4, 2))
    trained = graph((3, 6), 2)
    loss = exact(trained, student, teacher)
    convolution = loss.adapters[1].weight[:, :, None, None]
    brought = [student[0], torch.nn.functional.conv2d(student[1], convolution)]
    expected = oracle.mhgd(
        [m.detach().numpy() for m in brought], [m.numpy() for m in teacher], pairs_of(trained.attention), 2
    )
    value = loss(student, teacher)
    assert float(value.detach()) == pytest.approx(expected, rel=1e-9)
    value.backward()
    assert [name for name, p in loss.named_parameters() if p.requires_grad] == ["adapters.1.weight"]
    assert loss.adapters[1].weight.grad.abs().max() > 0


@pytest.mark.parametrize("widths", [(3, 4), (3, 2)], ids=["equal channels", "an adapter"])
def test_the_gradients_are_those_of_the_loops(widths):
    student, teacher = maps(3, widths, (3, 2)), maps(3, (3, 4), (3, 2))
    trained = graph((3, 4), 2)
    loss = exact(trained, student, teacher)
    pairs, t = pairs_of(trained.attention), [m.numpy() for m in teacher]
    leaves = {str(i): m.requires_grad_() for i, m in enumerate(student)} | dict(
        loss.adapters.named_parameters("adapter")
    )

    def loops(given: dict[str, np.ndarray]) -> float:
        first, second = given["0"], given["1"]
        if "adapter.1.weight" in given:
            second = np.einsum("dc,nchw->ndhw", given["adapter.1.weight"], second)
        return oracle.mhgd([first, second], t, pairs, 2)

    check_gradients(loss(student, teacher), leaves, loops)


def test_vectors_and_maps_of_videos_are_read_as_maps_are():
    networks = [[torch.randn(4, 3, 2, 2), torch.randn(4, 5, 1, 1)] for _ in range(2)]
    loss = ready(MHGD(graph((3, 5))), *networks)
    for other in ([[a, b.flatten(1)] for a, b in networks], [[a[:, :, None], b[..., None]] for a, b in networks]):
        torch.testing.assert_close(loss(*other), loss(*networks))


# The heads


def test_heads_stay_as_they_are_whatever_train_says():
    student, teacher = maps(4, (3, 4), (4, 2)), maps(4, (3, 4), (4, 2))
    loss = ready(MHGD(graph((3, 4))), student, teacher)
    before, value = copy.deepcopy(loss.state_dict()), loss(student, teacher)
    assert not any(p.requires_grad for p in loss.parameters())
    for mode in (True, False, True):
        nn.Sequential(loss).train(mode)
        assert torch.equal(loss(student, teacher), value)
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(loss))[0]
    assert torch.equal(converted(student, teacher), value)
    assert all(torch.equal(x, before[name]) for name, x in loss.state_dict().items())


def test_the_estimator_is_no_part_of_the_loss_and_is_left_alone():
    given = graph((3, 4))
    before = copy.deepcopy(given.state_dict())
    student, teacher = maps(4, (3, 4), (4, 2)), maps(4, (3, 4), (4, 2))
    loss = MHGD(given)
    assert loss.state_dict() == {}
    ready(loss, student, teacher)(student, teacher)
    assert {name.split(".")[0] for name in loss.state_dict()} == {"attention", "sizes"}
    assert not {id(p) for p in loss.parameters()} & {id(p) for p in given.parameters()}
    assert all(torch.equal(x, before[name]) for name, x in given.state_dict().items())
    assert given.training


def test_the_file_is_read_when_training_begins_and_not_before(tmp_path: Path):
    path, student, teacher = tmp_path / "estimator.ckpt", maps(4, (3, 4), (4, 2)), maps(4, (3, 4), (4, 2))
    unknown, known = MHGD(path), MHGD(str(path), student_dim=[3, 4], teacher_dim=[3, 4])
    trained = graph((3, 4))
    torch.save({"state_dict": {f"graph.{k}": v for k, v in trained.state_dict().items()}, "epoch": 3}, path)
    expected = ready(MHGD(trained), student, teacher)(student, teacher)
    for loss in (unknown, known, pickle.loads(pickle.dumps(unknown)), copy.deepcopy(known)):
        torch.testing.assert_close(ready(loss.double(), student, teacher)(student, teacher), expected)
    path.unlink()
    assert torch.equal(copy.deepcopy(unknown)(student, teacher), expected)


def test_a_saved_loss_needs_no_estimator():
    student, teacher = maps(4, (3, 5), (4, 2), torch.float32), maps(4, (3, 4), (4, 2), torch.float32)
    loss = ready(MHGD(graph((3, 4))), student, teacher)
    for fresh in (MHGD(), MHGD(student_dim=(3, 5), teacher_dim=(3, 4)), MHGD("gone.ckpt")):
        fresh.load_state_dict(loss.state_dict())
        assert torch.equal(fresh(student, teacher), loss(student, teacher))


# What is refused


def test_without_an_estimator_the_message_says_how_to_get_one():
    outputs = maps(4, (3, 4), (4, 2))
    with pytest.raises(ValueError, match=r"MHGD needs the attention graph .* fit --config .* MHGD\(estimator="):
        MHGD()(outputs, outputs)


def test_a_missing_a_damaged_and_a_wrong_file_are_refused_by_name(tmp_path: Path):
    outputs, path = maps(4, (3, 4), (4, 2)), tmp_path / "some.ckpt"
    with pytest.raises(FileNotFoundError, match=r"MHGD: .*some\.ckpt.*train the estimator first"):
        MHGD(path)(outputs, outputs)
    torch.save({"state_dict": {"weight": torch.ones(2)}}, path)
    with pytest.raises(ValueError, match=r"some\.ckpt' holds no attention graphs.*AttentionGraphEstimator"):
        MHGD(path)(outputs, outputs)
    torch.save(graph((3, 4)).state_dict(), path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"MHGD: .*some\.ckpt' is damaged"):
        MHGD(path)(outputs, outputs)


@pytest.mark.parametrize("loss", [MHGD(AttentionGraph((3, 5))), MHGD(AttentionGraph((3, 4)), heads=4)], ids=str)
def test_an_estimator_of_other_maps_or_heads_is_refused(loss):
    outputs = maps(4, (3, 4), (4, 2))
    with pytest.raises(ValueError, match=r"MHGD: the estimator was trained on maps of \(3, \d\) channels with 8 heads"):
        loss(outputs, outputs)


def test_a_single_map_is_refused():
    outputs = maps(4, (3,), (4,))
    with pytest.raises(ValueError, match=r"MHGD relates consecutive stages.*name lists of layers"):
        MHGD(AttentionGraph((3, 4)))(outputs, outputs)


# The network of stage 1


def test_the_estimate_and_its_gradients_are_those_of_the_loops():
    made = graph((3, 4), heads=2).double()
    made.train()
    front, back = (nn.functional.normalize(torch.rand(5, c, dtype=torch.float64), dim=1) for c in (3, 4))
    noise = torch.randn(2, 5, 1, generator=generator(0, 0))
    kept = (noise > noise.mean(0))[..., 0].double().numpy()
    pulls = torch.randn(5, 4, dtype=torch.float64)
    assert 0 < kept.mean() < 1

    def linear(given: dict[str, np.ndarray], name: str, x: Tensor) -> dict[str, np.ndarray]:
        layer = {
            "weight": given[f"{name}.0.weight"],
            "gamma": given[f"{name}.1.weight"],
            "beta": given[f"{name}.1.bias"],
        }
        y = x.numpy() @ layer["weight"].T  # training: the batch's own statistics
        return layer | {"mean": y.mean(0), "var": y.var(0)}

    def loops(given: dict[str, np.ndarray]) -> float:
        heads = (linear(given, f"attention.0.{name}", x) for name, x in (("sender", back), ("receiver", front)))
        logits = oracle.head(*heads, back.numpy(), front.numpy(), 2)
        out = {name: given[f"estimators.0.out.{name}"] for name in ("weight", "bias")}
        features = linear(given, "estimators.0.features", front)
        return float((oracle.estimate(front.numpy(), logits, kept, features, out) * pulls.numpy()).sum())

    (estimate,) = made([front, back])
    check_gradients((estimate * pulls).sum(), dict(made.named_parameters()), loops)


def test_noise_depends_on_seed_and_step_alone_and_is_off_in_evaluation():
    vectors = [torch.rand(6, 3), torch.rand(6, 4)]
    first, state = graph((3, 4)), torch.get_rng_state()
    resumed, other = copy.deepcopy(first), copy.deepcopy(first)
    other.seed = 1
    steps = [first(vectors)[0] for _ in range(3)]
    assert not torch.equal(steps[0], steps[1])
    assert not torch.equal(other(vectors)[0], steps[0])
    resumed.load_state_dict({**resumed.state_dict(), "updates": torch.tensor(2)})
    assert torch.equal(resumed(vectors)[0], steps[2])
    assert torch.equal(torch.get_rng_state(), state)
    first.eval()
    assert torch.equal(first(vectors)[0], first(vectors)[0])
    assert int(first.updates) == 3


def test_two_graphs_in_one_file_are_refused():
    both = nn.ModuleDict({"a": AttentionGraph((2, 3)), "b": AttentionGraph((2, 3))})
    with pytest.raises(ValueError, match="this ModuleDict holds 2 attention graphs"):
        load_attention(both)


@pytest.mark.parametrize(("channels", "heads"), [((4,), 8), ((4, 4), 0)])
def test_fewer_than_two_stages_or_no_heads_are_refused(channels, heads):
    with pytest.raises(ValueError, match="at least two, and at least one head"):
        AttentionGraph(channels, heads)
