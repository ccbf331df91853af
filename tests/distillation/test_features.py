"""Every form of layer is read, nothing after the layer changes what was read, and nothing stays behind."""

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from lightning_rkd.distillation.distiller import Distiller
from lightning_rkd.distillation.features import FeatureReader, InputReader, read
from lightning_rkd.distillation.layers import CaptureError, Layer, LayerNotFoundError, Tap, find_layer
from lightning_rkd.distillation.pooling import cls_token, global_pool, mean_pool
from lightning_rkd.distillation.row_check import STEPS
from lightning_rkd.losses.rkd import RKD
from lightning_rkd.losses.similarity_preserving import SimilarityPreserving
from lightning_rkd.utils.types import Batch, Outputs
from tests.harness import nets

X = torch.randn(4, nets.WIDTH, generator=torch.Generator().manual_seed(0))


def start_reader(net: nn.Module, layer: Layer | None) -> FeatureReader:
    reader = FeatureReader(layer, "student")
    reader.attach(net)
    reader.start()
    return reader


def by_steps(net: nets.Backbone, x: Tensor) -> dict[str, Tensor]:
    """The output of each layer, computed without hooks."""
    first = net.first(x)
    hidden = torch.relu(first)
    return {"first": first, "act": hidden, "last": net.last(hidden)}


@pytest.mark.parametrize("tap", ["first", Tap("act", at="input")])
@pytest.mark.parametrize("mode", [nullcontext, torch.no_grad, torch.inference_mode])
def test_features_are_read_although_the_next_layer_overwrites_them(mode: Any, tap: Tap) -> None:
    net = nets.Backbone()
    with mode():  # inference mode does not count writes
        assert torch.equal(read(net, tap, X).embedding, by_steps(net, X)["first"])


def test_a_classifier_gives_input_output_and_weights() -> None:
    net, at = nets.Backbone(), "classifier"
    steps = by_steps(net, X)
    for outputs in (read(net, Tap("last", at), X), read(_Keywords(net.last), Tap("inner", at), steps["act"])):
        assert torch.equal(outputs.embedding, steps["act"])
        assert torch.equal(outputs.logits, steps["last"])
        assert outputs.classifier == (net.last.weight, net.last.bias)


class _Keywords(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(input=x)


@pytest.mark.parametrize(
    "layer",
    [
        "act",
        lambda net: net.act,
        Tap("act"),
        Tap(lambda net: net.act),
        Tap("act", at="output"),
        Tap("act", read=lambda o, a: o),
    ],
)
def test_a_layer_may_be_a_path_a_function_or_a_tap(layer: Layer) -> None:
    net = nets.Backbone()
    assert torch.equal(read(net, layer, X).embedding, by_steps(net, X)["act"])
    assert torch.equal(read(net, None, X).embedding, by_steps(net, X)["last"]), "the network's own output"


def test_a_list_gives_maps_and_a_dict_gives_named_taps() -> None:
    net = nets.Backbone()
    steps = by_steps(net, X)
    maps = read(net, ["first", "act"], X).feature_maps
    assert [m.shape for m in maps] == [steps["first"].shape, steps["act"].shape], "of a Linear the output"
    reader = start_reader(net, {"logits": "last", "hidden": Tap("act"), "levels": ["act"]})
    net(X)
    outputs, calls = reader.collect()
    assert calls == 1
    assert torch.equal(outputs["logits"].logits, steps["last"])
    assert torch.equal(outputs["hidden"].embedding, steps["act"])
    assert len(outputs["levels"].feature_maps) == 1


def test_maps_of_one_position_are_flattened_and_wider_ones_kept() -> None:
    net = nn.Sequential(nn.Conv2d(1, 3, 1), nn.AdaptiveAvgPool2d(1))
    x = torch.ones(2, 1, 4, 4)
    assert read(net, "1", x).embedding.shape == (2, 3)
    assert read(net, "0", x).embedding.shape == (2, 3, 4, 4)
    assert read(net, Tap("0", read=global_pool), x).embedding.shape == (2, 3)


def test_read_may_return_outputs_which_later_writes_do_not_change() -> None:
    def both(output: Tensor, arguments: Any) -> Outputs:
        return Outputs(embedding=output, feature_maps=[output[:, :, None]])

    net = nets.Backbone()
    outputs, expected = read(net, Tap("first", read=both), X), by_steps(net, X)["first"]
    assert torch.equal(outputs.embedding, expected)
    assert torch.equal(outputs.feature_maps[0][:, :, 0], expected)


@pytest.mark.parametrize(("pool", "shape"), [(global_pool, (2, 3, 4)), (mean_pool, (2, 3)), (cls_token, (2, 3, 4, 4))])
def test_pools_refuse_other_shapes(pool: Any, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=rf"{pool.__name__} takes .*got \("):
        pool(torch.ones(shape), {})
    with pytest.raises(ValueError, match=r"\(N, T\) = \(2, 3\), but the attention_mask is \(2, 4\): name a layer"):
        mean_pool(torch.ones(2, 3, 5), {"attention_mask": torch.ones(2, 4)})


# Errors


def test_an_unknown_layer_is_answered_with_the_near_ones() -> None:
    with pytest.raises(LayerNotFoundError, match="Backbone has no layer 'frist'; near it: 'first'"):
        read(nets.Backbone(), "frist", X)
    with pytest.raises(LayerNotFoundError, match="near it: 'first', 'norm', 'act', 'drop', 'last'"):
        find_layer(nets.Backbone(), "zzz")


def test_a_module_under_two_names_is_found_by_both() -> None:
    net = nets.Backbone()
    net.alias = net.last
    assert find_layer(net, "last") is find_layer(net, "alias")


@pytest.mark.parametrize(
    ("layer", "error", "message"),
    [
        ({}, ValueError, "student_layer is an empty dict"),
        ({"a": 3}, TypeError, "a layer is a dotted path, a function, a Tap, a list or a dict of them, got 3"),
        ([None, 3], TypeError, "got 3"),
    ],
)
def test_what_is_no_layer_is_refused(layer: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        FeatureReader(layer, "student")


def test_a_tap_is_at_output_input_or_classifier() -> None:
    with pytest.raises(ValueError, match=r"Tap\.at must be 'output', 'input' or 'classifier', got 'in'"):
        Tap("a", at="in")
    with pytest.raises(ValueError, match="leave read out"):
        Tap("a", at="classifier", read=mean_pool)


def test_layers_that_run_unequally_often_are_refused() -> None:
    net = nets.Backbone()
    reader = start_reader(net, ["first", "last"])
    net(X)
    net.first(X)
    with pytest.raises(CaptureError, match=r"ran unequally often in one step: \{\"'first'\": 2, \"'last'\": 1\}"):
        reader.collect()


# Traces


def test_features_without_a_start_are_refused() -> None:
    reader = FeatureReader("first", "student")
    with pytest.raises(CaptureError, match=r"nothing was recorded of the student: attach it, and call start\(\)"):
        reader.collect()


def test_inputs_are_read_per_call_as_they_were() -> None:
    class Takes(nn.Module):
        def forward(self, x: Any, scale: Tensor | None = None) -> Tensor:
            first = x if isinstance(x, Tensor) else x[0]
            return first.mul_(0)

    net, reader = Takes(), InputReader("")
    reader.attach(net)
    reader.start()
    net(torch.ones(2, 1))
    net([torch.ones(2, 1)])
    net(x=torch.ones(2, 1), scale=torch.ones(1))
    net(torch.ones(2, 1), scale=torch.ones(1))
    tensor, listed, mapped, mixed = reader.collect()
    assert float(tensor.sum()) == float(listed[0].sum()) == float(mapped["x"].sum()) == float(mixed[0].sum()) == 2.0
    assert list(mixed) == [0, "scale"]


@pytest.fixture
def compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_what_was_compiled_keeps_the_names_it_had() -> None:
    inner = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    outer = nn.Sequential(torch.compile(inner, backend="eager"))
    assert find_layer(outer, "0.1") is find_layer(outer, "0._orig_mod.1") is inner[1]
    assert find_layer(outer, "0") is outer[0], "as it is called"
    assert find_layer(torch.compile(outer, backend="eager"), "0.1") is inner[1]
    with pytest.raises(LayerNotFoundError, match=r"has no layer '0\.2'; near it: '0\.1', '0\.0', '0'"):
        find_layer(outer, "0.2")


@pytest.mark.parametrize("layer", ["last", ["first", "last"]], ids=str)
@pytest.mark.usefixtures("compiler")
def test_a_compiled_network_is_one_graph_that_is_compiled_once(layer: Any) -> None:
    student = nets.Backbone()
    loss = RKD() if layer == "last" else SimilarityPreserving(reads="feature_maps")
    distiller = Distiller(nets.teacher(), loss, student_layer=layer, teacher_layer=layer)
    compiled: Any = torch.compile(student, backend="eager")
    counters.clear()
    with distiller.attached(student, "cpu"):
        for _ in range(STEPS + 2):  # the check of rows ends in between
            distiller.start()
            compiled(X)
            distiller.compute_terms(Batch(X))
    assert counters["stats"]["unique_graphs"] == 1, "6: its layers one by one, and anew in every step"
    assert not counters["graph_break"]
