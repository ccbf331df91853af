"""A layer gives the same however it is wrapped and called; and what it gives is logged."""

import copy
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_rkd import (
    RKD,
    Batch,
    DistillationModule,
    Distiller,
    Tap,
    last_token_pool,
    mean_pool,
)
from lightning_rkd.distillation.features import Layer, read
from lightning_rkd.distillation.layers import CaptureError, LayerNotFoundError
from lightning_rkd.losses import RKDDistance
from lightning_rkd.utils.types import call_network
from tests.harness import nets, toys
from tests.harness.faces import User, gradients, largest, taught

X = nets.Rows(8).x
IDS = torch.randint(1, 30, (8, 7), generator=torch.Generator().manual_seed(0))
MASK = (torch.arange(7) < torch.tensor([4, 2, 7, 1, 7, 3, 5, 6])[:, None]).long()


# Wrapped


def compiled(net: Any) -> Any:
    net.last = torch.compile(net.last, backend="eager")
    return net


def subclassed(net: Any) -> Any:
    class Own(nn.Linear):
        pass

    own = Own(8, 5)
    own.load_state_dict(net.last.state_dict())
    net.last = own
    return net


def with_lora(net: Any) -> Any:
    peft = pytest.importorskip("peft")
    wrapped = peft.get_peft_model(net, peft.LoraConfig(target_modules=["last"], r=2))
    return wrapped.base_model.model


WRAPPED: dict[str, Callable[[Any], Any]] = {
    "compiled": compiled,
    "subclassed": subclassed,
    "LoRA": with_lora,
    "quantised": nets.quantised,
}


@pytest.mark.scenario("networks", "a layer that is")
@pytest.mark.parametrize("how", WRAPPED)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:The .grad attribute:UserWarning")
def test_a_wrapped_layer_gives_what_the_plain_one_gives(how: str) -> None:
    plain = nets.Backbone()
    wrapped = WRAPPED[how](copy.deepcopy(plain))
    target = nets.teacher()(X).detach()
    with torch.no_grad():
        expected, found = (RKDDistance()(read(net, "last", X).embedding, target) for net in (plain, wrapped))
        before = RKDDistance()(plain.act(plain.first(X)), target)  # the input, which a plain nn.Linear gave
    assert abs(found - expected) < 0.1 * abs(before - expected)


@pytest.mark.scenario("networks", "a classifier that is")
@pytest.mark.parametrize("how", WRAPPED)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:The .grad attribute:UserWarning")
def test_a_wrapped_classifier_gives_embedding_and_logits(how: str) -> None:
    plain = nets.Backbone()
    with torch.no_grad():
        outputs = read(WRAPPED[how](copy.deepcopy(plain)), Tap("last", at="classifier"), X)
    torch.testing.assert_close(outputs.embedding, plain.act(plain.first(X)), atol=0.05, rtol=0)
    torch.testing.assert_close(outputs.logits, plain(X), atol=0.05, rtol=0)
    if how in ("LoRA", "quantised"):  # whose weight is not all of it, or packed
        assert outputs.classifier is None
    else:
        assert torch.equal(outputs.classifier[0], plain.last.weight)


def test_a_loss_that_needs_a_classifier_says_how_to_read_one() -> None:
    class Weights(nets.Gram):
        reads = ("logits", "classifier")  # type: ignore[assignment]

    one = read(nets.Backbone(), "last", X)
    with pytest.raises(ValueError, match=r"no classifier: read the layer that makes .*Tap\(layer, at='classifier'\)"):
        Weights()(one, one)
    with pytest.raises(CaptureError, match="a classifier gives a tensor of logits"):
        read(Pair(), Tap("", at="classifier"), X)


class Pair(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x


@pytest.mark.scenario("networks", "a projection head as layer")
def test_a_projection_head_as_layer_is_part_of_the_relation() -> None:
    student, loss = nn.Sequential(nets.Backbone(), nn.Linear(5, 4)), RKD()
    distiller = Distiller(nets.teacher(), loss, student_layer="1")
    with distiller.attached(student, "cpu"):
        distiller.start()
        student(X)
        (term,) = distiller.compute_terms(distiller.collect(Batch(X))).values()
    term.backward()
    assert student[1].weight.grad is not None, "before, the input of the head was read"
    torch.testing.assert_close(term, loss(student(X), nets.teacher()(X)))


# Called


class Encoder(nn.Module):
    """Tokens and a mask, as a Hugging Face encoder takes them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.words = nn.Embedding(30, 6)

    def forward(self, ids: Tensor, attention_mask: Tensor | None = None, scale: float = 1.0) -> Tensor:
        return scale * self.words(ids)


class Passes(nn.Module):
    """A wrapper that passes all arguments on."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner(*args, **kwargs)


@pytest.mark.scenario("networks", "mean over tokens, mask by position")
@pytest.mark.parametrize(
    "net", [Encoder(), Passes(Encoder()), Passes(Passes(Encoder()))], ids=["", "in a wrapper", "in two"]
)
def test_mean_pool_finds_a_mask_passed_by_position(net: nn.Module) -> None:
    by_name = read(net, Tap(read=mean_pool), IDS, attention_mask=MASK).embedding
    by_position = read(net, Tap(read=mean_pool), IDS, MASK).embedding
    assert torch.equal(by_name, by_position)
    assert float((net(IDS).mean(1) - by_position).detach().abs().max()) > 0.5, "before, padding was averaged in"


def test_read_sees_all_arguments_by_name_with_defaults() -> None:
    seen: list[Any] = []

    def keep(output: Tensor, arguments: Any) -> Tensor:
        seen.append(dict(arguments))
        return output.mean(1)

    read(Encoder(), Tap(read=keep), IDS, attention_mask=MASK)
    read(nn.Sequential(Encoder()), Tap("0", read=keep), IDS)
    assert [list(one) for one in seen] == [["ids", "attention_mask", "scale"]] * 2
    assert seen[0]["attention_mask"] is MASK
    assert seen[1]["attention_mask"] is None


class Calls(User):
    """Calls its backbone by position and by keyword, on inputs that it scales."""

    by_keyword = True

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.backbone = Scaled()

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        embedding = self.backbone(2 * x, shift=torch.ones(1))
        return self.plus(self.task(embedding, y), embedding, 2 * x)


class Scaled(nets.Backbone):
    def forward(self, x: Tensor, shift: Tensor) -> Tensor:
        return super().forward(x) + shift


@pytest.mark.scenario("networks", "an input layer with positional and keyword inputs")
def test_input_layer_takes_positional_and_keyword_inputs_together() -> None:
    teacher = Scaled(width=10, out=7)
    expected = gradients(Calls(lambda s, x: RKD()(s, teacher(x, torch.ones(1)).detach())))
    _, callbacks = taught("callback", teacher, RKD(), input_layer="backbone")
    assert largest(gradients(Calls(), *callbacks), expected) == 0.0
    assert largest(gradients(Calls()), expected) > 1e-3


# Pooled


@pytest.mark.scenario("networks", "last token, padding on either end")
def test_the_last_token_is_found_with_padding_on_either_end() -> None:
    x = torch.arange(12.0).view(2, 3, 2)
    right, left = torch.tensor([[1, 1, 0], [1, 0, 0]]), torch.tensor([[0, 1, 1], [0, 0, 1]])
    assert last_token_pool(x, {"attention_mask": right}).tolist() == [[2.0, 3.0], [6.0, 7.0]]
    assert last_token_pool(x, {"attention_mask": left.bool()}).tolist() == [[4.0, 5.0], [10.0, 11.0]]
    assert torch.equal(last_token_pool(x, {}), x[:, -1])
    with pytest.raises(
        ValueError, match=r"last_token_pool takes tokens \(N, T, D\), got \(2, 3\); an output \(N, D\) needs"
    ):
        last_token_pool(x[:, :, 0], {})


def additive(mask: Tensor) -> Tensor:
    return (1.0 - mask.float())[:, None, None] * torch.finfo(torch.float32).min


def causal(mask: Tensor) -> Tensor:
    return torch.ones(7, 7).tril().bool() & mask.bool()[:, None, None]


FORMS: dict[str, Callable[[Tensor], dict[str, Tensor]]] = {
    "2-D": lambda m: {"attention_mask": m},
    "2-D in floating point": lambda m: {"attention_mask": m.float()},
    "4-D additive": lambda m: {"attention_mask": additive(m)},
    "4-D boolean": lambda m: {"attention_mask": m.bool()[:, None, None]},
    "4-D causal": lambda m: {"attention_mask": causal(m)},
    "padding mask": lambda m: {"src_key_padding_mask": ~m.bool()},
    "additive padding mask": lambda m: {"key_padding_mask": additive(m)[:, 0, 0]},
}


@pytest.mark.scenario("networks", "masks")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("pool", [mean_pool, last_token_pool])
def test_pools_read_every_form_of_mask(pool: Any, form: str) -> None:
    x, lengths = torch.randn(8, 7, 3), MASK.sum(1)
    rows = [x[n, :length] for n, length in enumerate(lengths)]
    expected = torch.stack([row.mean(0) if pool is mean_pool else row[-1] for row in rows])
    torch.testing.assert_close(pool(x, FORMS[form](MASK)), expected)
    torch.testing.assert_close(pool(x, {"features": FORMS[form](MASK)}), expected)


@pytest.mark.scenario("networks", "BERT of transformers")
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("layer", ["", "encoder", "encoder.layer.1"])
def test_a_bert_is_pooled_alike_at_every_depth(layer: str, attention: str) -> None:
    net = bert()
    net.set_attn_implementation(attention)
    hidden = net(IDS, MASK).last_hidden_state
    expected = (hidden * MASK[:, :, None]).sum(1) / MASK.sum(1, keepdim=True)
    torch.testing.assert_close(read(net, Tap(layer, read=mean_pool), IDS, MASK).embedding, expected)
    assert float((hidden.mean(1) - expected).detach().abs().max()) > 0.5


def bert() -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=30, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
    )
    return transformers.BertModel(config).eval()


@pytest.mark.scenario("networks", "a field of an output")
def test_a_field_of_an_output_is_read_by_name() -> None:
    net = bert()
    pooled = read(net, Tap(read="pooler_output"), IDS, MASK).embedding
    assert torch.equal(pooled, net(IDS, MASK).pooler_output)
    with pytest.raises(CaptureError, match=r"Tap\(read='pooled'\).* 'pooler_output'\]; name one of them"):
        read(net, Tap(read="pooled"), IDS, MASK)
    with pytest.raises(CaptureError, match=r"pass the function itself, lightning_rkd\.mean_pool"):
        read(net, Tap(read="mean_pool"), IDS, MASK)
    with pytest.raises(CaptureError, match="gives a Tensor, which has no fields; leave read out"):
        read(net, Tap("embeddings", read="pooler_output"), IDS, MASK)
    with pytest.raises(CaptureError, match=r"gives a .*not a tensor; say how to read it: Tap\(layer, read='field'\)"):
        read(net, "", IDS, MASK)


class Words(nn.Module):
    """First module of a sentence embedder, which takes and returns a dict of features."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.words = nn.Embedding(30, 6)

    def forward(self, features: dict[str, Tensor], **kwargs: Any) -> dict[str, Tensor]:
        assert "token_embeddings" not in features, "features of another network"
        features["token_embeddings"] = self.words(features["input_ids"])
        return features


def sentences(seed: int) -> Any:
    library = pytest.importorskip("sentence_transformers")
    from sentence_transformers.sentence_transformer.modules import Pooling

    return library.SentenceTransformer(modules=[Words(seed), Pooling(6)], device="cpu")


@pytest.mark.scenario("networks", "sentence-transformers")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_sentence_transformer_teaches_another() -> None:
    student, teacher = sentences(0), sentences(7)
    features = {"input_ids": IDS, "attention_mask": MASK}
    at = Tap(read="sentence_embedding")
    distiller = Distiller(teacher, RKD(), student_layer=at, teacher_layer=at)
    with distiller.attached(student, "cpu"):
        distiller.start()
        call_network(student, {0: features})
        (term,) = distiller.compute_terms(distiller.collect(Batch({"input": features}))).values()
    weights = MASK[:, :, None] / MASK.sum(1)[:, None, None]
    own, target = ((net[0].words(IDS) * weights).sum(1) for net in (student, teacher))
    torch.testing.assert_close(term, RKD()(own, target))
    at_tokens = read(student, Tap("0", read=mean_pool), dict(features)).embedding
    torch.testing.assert_close(at_tokens, own)


# Logged


@pytest.mark.parametrize("face", ["callback", "module"])
def test_every_tap_is_logged_once_in_the_first_step(face: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="lightning_rkd")
    layers = {"a": Tap("head", at="classifier"), "b": ["backbone"], "c": Tap("backbone", read=scaled)}
    settings: dict[str, Any] = {"student_layer": layers, "teacher_layer": dict.fromkeys("abc", "")}
    module, callbacks = taught(face, nets.teacher(), {"x": RKD().at("c")}, **settings)
    toys.fit(module, *callbacks)
    lines = [r.getMessage() for r in caplog.records if r.name == "lightning_rkd.distillation.features"]
    assert lines == [
        "student layer 'head' (Linear) as 'a': classifier, embedding (8, 5), float32, logits (8, 3), float32",
        "student layer 'backbone' (Backbone) as 'b': output (8, 5), float32",
        "student layer 'backbone' (Backbone) as 'c': output read by scaled (8, 5), float32",
        *(f"teacher (Backbone) as {name!r}: output (8, 7), float32" for name in "abc"),
    ]


def scaled(output: Tensor, arguments: Any) -> Tensor:
    return 2 * output


# Mistaken


def test_a_module_as_layer_is_answered_with_its_path() -> None:
    net = nets.Backbone()
    for layer in (net.last, Tap(net.last)):
        with pytest.raises(TypeError, match=r"a layer is a dotted path, which is 'last' for this one, got the module"):
            read(net, layer, X)
    with pytest.raises(TypeError, match=r"such as 'backbone', got a module \(ReLU\) that is no part of"):
        read(net, nn.ReLU(), X)


def test_a_layer_of_the_other_network_is_answered_with_its_argument() -> None:
    student, teacher = nn.Sequential(nets.Backbone()), nets.teacher()
    with pytest.raises(LayerNotFoundError, match=r"no layer 'last'.*; the teacher has it: teacher_layer="):
        Distiller(teacher, RKD(), student_layer="last").attach(student)
    with pytest.raises(LayerNotFoundError, match=r"no layer '0\.last'.*; the student has it: student_layer="):
        Distiller(teacher, RKD(), teacher_layer="0.last").attach(student)


def test_swapped_networks_are_answered_with_a_warning_once() -> None:
    loss, student, teacher = RKD(), X.clone().requires_grad_(), torch.randn(8, 3)
    with pytest.warns(UserWarning, match=r"RKD: the second argument needs a gradient.*loss\(student, teacher\)"):
        value = loss(teacher, student)
    assert not value.requires_grad, "before, this was silent and trained nothing"
    loss(teacher, student)
    RKD()(student, teacher)
    RKD()(student, teacher.clone().requires_grad_())


# Configured


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_module_passes_one_dict_to_a_sentence_transformer() -> None:
    class Texts(torch.utils.data.Dataset[Any]):
        def __len__(self) -> int:
            return len(IDS)

        def __getitem__(self, row: int) -> Any:
            return {"features": {"input_ids": IDS[row], "attention_mask": MASK[row]}}

    at = Tap(read="sentence_embedding")
    student, twin = sentences(0), sentences(0)
    settings: dict[str, Any] = {"student_layer": at, "teacher_layer": at, "inputs": {"input": "features"}}
    module = DistillationModule(student, sentences(7), RKD(), optimizer=toys.sgd, **settings)
    trainer = toys.fit(module, batches=torch.utils.data.DataLoader(Texts(), 8))
    own, target = (
        net({"input_ids": IDS, "attention_mask": MASK})["sentence_embedding"] for net in (twin, sentences(7))
    )
    expected = float(RKD()(own, target.detach()).detach())
    assert float(trainer.callback_metrics["train/loss"]) == pytest.approx(expected)


def test_every_argument_of_a_tap_comes_through_yaml() -> None:
    jsonargparse = pytest.importorskip("jsonargparse")
    parser = jsonargparse.ArgumentParser()
    parser.add_argument("--layer", type=Layer)
    taps = (
        "{a: {class_path: lightning_rkd.Tap, init_args: {layer: encoder, read: pooler_output}}, "
        "b: {class_path: lightning_rkd.Tap, init_args: {layer: encoder, read: lightning_rkd.last_token_pool}}, "
        "c: {class_path: lightning_rkd.Tap, init_args: {layer: fc, at: classifier}}}"
    )
    layers = parser.instantiate(parser.parse_args([f"--layer={taps}"])).layer
    assert [(tap.layer, tap.at) for tap in layers.values()] == [("encoder", "output")] * 2 + [("fc", "classifier")]
    assert [tap.read for tap in layers.values()] == ["pooler_output", last_token_pool, None]
