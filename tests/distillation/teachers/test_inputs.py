"""Inputs of a teacher: its own resolution, normalisation and precision, and a network that it shares."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_rkd.callbacks.distillation import RelationalDistillation
from lightning_rkd.data import Renormalize, Resize
from lightning_rkd.data.indexing import with_indices
from lightning_rkd.distillation.distiller import Distiller
from lightning_rkd.distillation.teachers import CachedTeacher, CacheError, Teacher
from lightning_rkd.distillation.teachers import teacher as teacher_module
from lightning_rkd.distillation.teachers.cache_writer import describe_teacher
from lightning_rkd.distillation.teachers.saved_state import plain_tensors
from lightning_rkd.losses.rkd import RKD, RKDAngle, RKDDistance
from lightning_rkd.modules.distillation import DistillationModule
from lightning_rkd.utils.types import Batch
from tests.distillation.teachers.test_ranks import fitted
from tests.harness import nets, toys
from tests.harness.faces import FACES, Net, User, gradients, largest, taught
from tests.harness.ranks import Ranks

IMAGENET = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
STUDENT = ([0.5, 0.4, 0.3], [0.2, 0.3, 0.25])


# Transforms


def small(net: Any) -> Any:
    """The student's backbone for images of 64 pixels."""
    torch.manual_seed(1)
    net.backbone = nn.Sequential(nn.Conv2d(3, 5, 8, stride=8), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return net


class Large(nn.Sequential):
    """A teacher that takes images of 224 pixels only."""

    def __init__(self) -> None:
        torch.manual_seed(2)
        super().__init__(nn.Conv2d(3, 2, 16, stride=16), nn.BatchNorm2d(2), nn.Tanh(), nn.Flatten(), nn.Linear(392, 7))


class Pictures(torch.utils.data.Dataset[Any]):
    """Images of 64 pixels, normalised with the student's statistics."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        mean, std = (torch.tensor(x).view(3, 1, 1) for x in STUDENT)
        self.x = (torch.rand(12, 3, 64, 64, generator=generator) - mean) / std
        self.y = torch.arange(12) % toys.CLASSES

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.x[index], self.y[index]


def pictures() -> Any:
    return torch.utils.data.DataLoader(Pictures(), batch_size=4)


def learn(face: str, teacher: Any, **settings: Any) -> list[list[Tensor]]:
    """The student's gradients of every step."""
    batches = settings.pop("batches", None) or pictures()
    if face == "by hand":
        return gradients(small(User(lambda embedding, x: RKD()(embedding, teacher(x)))), batches=batches)
    if face == "callback":
        callback = RelationalDistillation(teacher, RKD(), student_layer="backbone", **settings)
        return gradients(small(User()), callback, batches=batches)
    task: Any = {"task_loss": nn.CrossEntropyLoss(), "task_reads": "logits", "optimizer": toys.sgd}
    module = DistillationModule(small(Net()), teacher, RKD(), student_layer="backbone", **task, **settings)
    return gradients(module, batches=batches)


def transformed() -> Teacher:
    return Teacher(Large(), transform=[Resize(224), Renormalize(STUDENT, IMAGENET)])


@pytest.mark.scenario("teachers", "224 pixels over a student of 64, other statistics")
@pytest.mark.parametrize("face", FACES)
def test_a_teacher_at_224_pixels_teaches_a_student_at_64(face: str) -> None:
    network = Large().eval()
    wrapped = nn.Sequential(Resize(224), Renormalize(STUDENT, IMAGENET), network)
    (mean, std), (of_teacher, over) = ([torch.tensor(x).view(3, 1, 1) for x in pair] for pair in (STUDENT, IMAGENET))

    @torch.no_grad()
    def by_hand(x: Tensor) -> Tensor:
        pixels = F.interpolate(x * std + mean, (224, 224), mode="bicubic", antialias=True, align_corners=False)
        return network((pixels - of_teacher) / over)

    ours = learn(face, transformed())
    assert largest(ours, learn("by hand", lambda x: wrapped(x).detach())) == 0.0
    assert largest(ours, learn("by hand", by_hand)) <= 1e-5
    resized = learn("by hand", lambda x: network(Resize(224)(x)).detach())
    assert largest(ours, resized) > 1e-3, "normalised with the student's statistics"
    with pytest.raises(
        RuntimeError, match=r"the teacher, Large, received \(4, 3, 64, 64\) float32: .*transform=\.\.\."
    ):
        learn(face, Large())


@pytest.mark.scenario("teachers", "transformed inputs, through the cache")
@pytest.mark.parametrize("face", FACES)
def test_a_cache_holds_the_outputs_for_transformed_inputs(face: str, tmp_path: Path) -> None:
    cached = CachedTeacher(tmp_path, teacher=transformed())
    live = learn(face, transformed())
    assert largest(learn(face, cached, batches=with_indices(pictures())), live) <= 1e-5
    assert largest(learn(face, CachedTeacher(tmp_path), batches=with_indices(pictures())), live) <= 1e-5
    for transform in ([Resize(224)], [Resize(224, "bilinear"), Renormalize(STUDENT, IMAGENET)]):
        other = CachedTeacher(tmp_path, teacher=Teacher(Large(), transform=transform))
        with pytest.raises(CacheError, match=r"made for something else: teacher transform: cached 'Resize, Renorm"):
            learn(face, other, batches=with_indices(pictures()))


@pytest.mark.scenario("teachers", "inputs of its own, through the cache")
@pytest.mark.parametrize("face", FACES)
def test_a_cache_holds_the_outputs_for_inputs_of_the_teachers_own(face: str, tmp_path: Path) -> None:
    network, rows = toys.teacher(), toys.Rows(8 * toys.STEPS)
    data = torch.utils.data.TensorDataset(rows.x, rows.x.flip(0), rows.y)
    keys = {"inputs": 0, "teacher_inputs": 1, "labels": 2}

    class Triples(User):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.loss(batch[0], batch[2])

    def fit(teacher: Any) -> list[list[Tensor]]:
        module, callbacks = taught(face, teacher, RKD(), **keys)
        batches = with_indices(torch.utils.data.DataLoader(data, 8))
        return gradients(module if face == "module" else Triples(), *callbacks, batches=batches)

    live = fit(network)
    assert largest(fit(CachedTeacher(tmp_path, teacher=network)), live) <= 1e-5
    module, callbacks = taught(face, network, RKD())
    assert largest(gradients(module, *callbacks), live) > 1e-3


class Scale(nn.Module):
    """Its buffer has to be where the inputs are."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.register_buffer("factor", torch.tensor(factor))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


def test_a_transform_applies_to_whatever_the_teacher_receives() -> None:
    x, network = torch.randn(4, toys.WIDTH), toys.teacher().eval()
    teacher = Teacher(network, transform=lambda x: 2 * x)
    teacher.attach(None)
    expected = network(2 * x)
    calls: dict[str, Any] = {"inputs": (Batch(x), None), "teacher_inputs": (Batch(-x, teacher_inputs=x), None)}
    for batch, fed in [*calls.values(), (Batch(None), [x])]:
        assert torch.equal(teacher.outputs(batch, fed)[0].features[""].embedding, expected)


def test_modules_of_a_transform_are_moved_and_not_cast_and_restored() -> None:
    scale = Scale(2.0).train()
    before, teacher = nets.snapshot(scale), Teacher(toys.teacher(), transform=nn.Sequential(scale))
    teacher.attach(None)
    teacher.to("meta", lambda network: network.bfloat16())
    assert (scale.factor.device.type, scale.factor.dtype) == ("meta", torch.float32)
    teacher.detach()
    assert nets.same(before, scale)


def test_a_teacher_is_called_like_its_network() -> None:
    x, network = torch.randn(4, toys.WIDTH), toys.teacher(dropout=0.5, norm=True).train()
    expected, before = copy.deepcopy(network).eval()(2 * x), nets.snapshot(network)
    teacher = Teacher(network, transform=lambda x: 2 * x)
    for given in (x, Batch(x), Batch(None, teacher_inputs=x)):
        assert torch.equal(teacher(given), expected)
        assert not teacher(given).requires_grad
    assert nets.same(before, network), "modes are restored after a call without attach"
    teacher.attach("act")
    assert torch.equal(teacher(x), expected)
    teacher.detach()
    assert nets.same(before, network)


def test_a_call_reads_the_weights_file(tmp_path: Path) -> None:
    network = toys.teacher(seed=1)
    torch.save({"model": network.state_dict()}, tmp_path / "net.pt")
    x = torch.randn(4, toys.WIDTH)
    assert torch.equal(Teacher(toys.teacher(seed=2), tmp_path / "net.pt")(x), network(x))


def test_what_is_no_function_is_refused() -> None:
    with pytest.raises(TypeError, match="transform must be a function, or a list of functions, got int"):
        Teacher(toys.teacher(), transform=[Resize(2), 3])
    with pytest.raises(TypeError, match="context must be a function, got nullcontext"):
        Teacher(toys.teacher(), context=nullcontext())
    with pytest.raises(TypeError, match="got no_grad; pass it uncalled"):  # it can be called, as disable_adapter() can
        Teacher(toys.teacher(), context=torch.no_grad())


# Precision


@pytest.mark.scenario("teachers", "precision of its own")
@pytest.mark.parametrize("face", FACES)
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_a_teacher_keeps_its_precision_under_another_trainer(face: str, precision: str, dtype: torch.dtype) -> None:
    network = toys.teacher(norm=True).to(dtype).eval()

    @torch.no_grad()
    def by_hand(embedding: Tensor, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            output = network(x.to(dtype))
        assert output.dtype == dtype
        with torch.enable_grad():
            return RKD()(embedding, output)

    expected = gradients(User(by_hand), precision=precision)
    module, callbacks = taught(face, network, RKD())
    assert largest(gradients(module, *callbacks, precision=precision), expected) == 0.0
    assert {p.dtype for p in network.parameters()} == {dtype}
    assert largest(gradients(User(), precision=precision), expected) > 1e-3


@pytest.mark.parametrize("face", FACES)
@pytest.mark.parametrize("precision", ["bf16-true", "64-true"])
def test_a_teacher_left_alone_in_float32_is_given_float32(face: str, precision: str) -> None:
    network = toys.teacher(norm=True).eval()

    def by_hand(embedding: Tensor, x: Tensor) -> Tensor:
        return RKD()(embedding, network(x.float()).detach())

    expected = gradients(User(by_hand), precision=precision)
    module, callbacks = taught(face, Teacher(network, move=False), RKD())
    assert largest(gradients(module, *callbacks, precision=precision), expected) == 0.0
    assert {p.dtype for p in network.parameters()} == {torch.float32}


# A network that is shared with the student


class Adapted(nn.Module):
    """A frozen network with dropout, and an adapter beside it."""

    def __init__(self, freezes: bool = True) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.base = toys.Backbone(dropout=0.5).requires_grad_(False)
        self.adapter = nn.Sequential(nn.Linear(toys.WIDTH, 2), nn.Linear(2, 5))
        self.on, self.freezes = True, freezes

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.adapter(x) if self.on else self.base(x)

    @contextmanager
    def off(self) -> Iterator[None]:
        self.on = False
        self.adapter.requires_grad_(not self.freezes)
        yield
        self.on = True
        self.adapter.requires_grad_(True)


class Modes(pl.Callback):
    """Keeps modes, and which parameters are trained, after every step."""

    def __init__(self) -> None:
        self.seen: list[tuple[Any, ...]] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        net = getattr(pl_module, "student", pl_module).backbone
        self.seen.append(([m.training for m in net.modules()], [p.requires_grad for p in net.parameters()]))


def trained(face: str, backbone: Any, teacher: Any) -> tuple[nn.Module, Modes]:
    """The student's backbone after training, with its modes after every step."""
    modes = Modes()
    module, callbacks = taught(face, teacher, RKD())
    getattr(module, "student", module).backbone = backbone
    torch.manual_seed(0)
    toys.fit(module, *callbacks, modes)
    return backbone, modes


def lora() -> Any:
    peft = pytest.importorskip("peft")
    torch.manual_seed(3)
    net = peft.get_peft_model(toys.Backbone(dropout=0.5), peft.LoraConfig(r=2, target_modules=["first", "last"]))
    for name, parameter in net.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)  # which is 0 at the start: student and teacher would be one
    net.base_model.model.first.lora_A.default.weight.requires_grad_(False)  # and stays so
    return net


MODELS: dict[str, tuple[Callable[[], Any], str]] = {"an adapter": (Adapted, "off"), "peft": (lora, "disable_adapter")}


@pytest.mark.scenario("teachers", "the base of the student, adapters off")
@pytest.mark.parametrize("face", FACES)
@pytest.mark.parametrize("kind", MODELS)
def test_a_student_with_adapters_is_taught_by_its_own_base(kind: str, face: str) -> None:
    build, context = MODELS[kind]
    net, alone = build(), build()
    base = build().base if kind == "an adapter" else build().unload()  # a network of its own
    own, modes = trained(face, net, Teacher(net, context=getattr(net, context)))
    other, expected = trained(face, alone, Teacher(base))
    assert toys.gap(own, other) == 0.0
    assert modes.seen == expected.seen
    assert toys.attachments(own) == toys.attachments(other)
    assert toys.gap(own, build()) > 1e-3
    untaught = build()
    module = User()
    module.backbone = untaught
    toys.fit(module)
    assert toys.gap(own, untaught) > 1e-4


def test_arguments_that_a_teacher_does_not_take_are_named() -> None:
    network = nn.TransformerEncoderLayer(8, 2)
    with pytest.raises(
        TypeError, match=r"received 'src' \(2, 3, 8\) float32, 'tokens' \(2, 3\) int64: if it takes other"
    ):
        Teacher(network)(Batch({"src": torch.ones(2, 3, 8), "tokens": torch.ones(2, 3, dtype=torch.int64)}))


@pytest.mark.scenario("teachers", "the base of the student in two callbacks")
@pytest.mark.parametrize("input_layer", [None, "backbone"])
def test_two_callbacks_whose_teachers_are_the_students_base(input_layer: str | None) -> None:
    def train(*losses: Any) -> nn.Module:
        torch.manual_seed(0)
        module = User()
        module.backbone = net = Adapted()
        where = {"student_layer": "backbone", "input_layer": input_layer}
        toys.fit(module, *(RelationalDistillation(Teacher(net, context=net.off), loss, **where) for loss in losses))
        return module

    two, one = train(RKDDistance(), RKDAngle()), train({"distance": RKDDistance(), "angle": RKDAngle()})
    assert toys.gap(two, one) == 0.0, "WRONG: the second one took the first one's teacher for the student"


def test_a_shared_network_is_refused_unless_it_is_frozen_in_a_context() -> None:
    net = Adapted()
    message = r"shares parameters .*copy\.deepcopy.* .* with Teacher\(model, context=model\.disable_adapter\)"
    trains = Adapted(freezes=False)
    for student, teacher in (
        (net, Teacher(net)),
        (net, Teacher(net.base)),
        (trains, Teacher(trains, context=trains.off)),
    ):
        with pytest.raises(ValueError, match=message):
            Distiller(teacher, RKD()).attach(student)
    Distiller(Teacher(net, context=net.off), RKD()).attach(net)
    assert all(p.requires_grad for p in net.adapter.parameters())


def test_shared_statistics_that_training_changes_are_a_warning() -> None:
    net = Adapted()
    net.base.norm = nn.BatchNorm1d(8).requires_grad_(False)
    teacher, x = Teacher(net, context=net.off), torch.randn(4, toys.WIDTH)
    net.eval()
    teacher(x)
    net.train()
    with pytest.warns(UserWarning, match="shares with the teacher, whose running statistics"):
        teacher(x)


def test_a_cache_is_not_keyed_by_adapters() -> None:
    first, second = Adapted(), Adapted()
    nn.init.normal_(second.adapter[0].weight)
    described = [describe_teacher(Teacher(net, context=net.off), None)["teacher weights"] for net in (first, second)]
    assert described[0] == described[1] != describe_teacher(Teacher(first), None)["teacher weights"]


def pretend_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every checksum is gathered with those before it, as if each came from another rank."""
    checksums: list[Tensor] = []

    def gather(x: Tensor, group: Any = None) -> Tensor:
        checksums.append(x)
        return torch.cat(checksums)

    monkeypatch.setattr(teacher_module, "rank_and_size", lambda group=None: (len(checksums), 2))
    monkeypatch.setattr(teacher_module, "gather_rows", gather)


def test_adapters_that_differ_between_ranks_are_no_other_teacher(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_ranks(monkeypatch)
    first, second = Adapted(), Adapted()
    nn.init.normal_(second.adapter[0].weight)
    for net in (first, second):
        Teacher(net, context=net.off).check_same_on_ranks()
    nn.init.normal_(second.base.first.weight)
    with pytest.raises(RuntimeError, match="the teacher's weights differ between ranks"):
        Teacher(second, context=second.off).check_same_on_ranks()


def test_ranks_whose_layers_are_swapped_hold_different_teachers(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_ranks(monkeypatch)
    network = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    for same in (network, copy.deepcopy(network)):
        Teacher(same).check_same_on_ranks()
    with pytest.raises(RuntimeError, match="the teacher's weights differ between ranks"):
        Teacher(nn.Sequential(network[1], network[0])).check_same_on_ranks()


# Tensor subclasses


class Halves(Tensor):
    """A tensor of two parts, which refuses to be viewed."""

    top: Tensor
    bottom: Tensor

    @staticmethod
    def __new__(cls, top: Tensor, bottom: Tensor) -> Any:
        size = (len(top) + len(bottom), *top.shape[1:])
        return torch.Tensor._make_wrapper_subclass(cls, size, dtype=torch.float32, device=top.device)

    def __init__(self, top: Tensor, bottom: Tensor) -> None:
        self.top, self.bottom = top, bottom

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return ["top", "bottom"], None

    @staticmethod
    def __tensor_unflatten__(parts: dict[str, Tensor], meta: Any, size: Any, stride: Any) -> Tensor:
        return Halves(parts["top"], parts["bottom"])

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        if name in ("detach", "_to_copy", "clone"):
            return cls(*(function(x, *args[1:], **(kwargs or {})) for x in (args[0].top, args[0].bottom)))
        if name == "t":
            return function(torch.cat([args[0].top, args[0].bottom]), *args[1:])
        raise NotImplementedError(f"Halves has no {name}")


def halved() -> nn.Module:
    """A teacher with weights of two parts."""
    network = toys.teacher(norm=True).eval()
    network.first.weight = nn.Parameter(Halves(*network.first.weight.detach().split([4, 6])), requires_grad=False)
    return network


def eight_bits() -> nn.Module:
    """A teacher with weights in eight bits."""
    quantization = pytest.importorskip("torchao.quantization")
    network: nn.Module = toys.teacher(norm=True).eval()
    quantization.quantize_(network, quantization.Int8WeightOnlyConfig())
    return network


@pytest.mark.parametrize("build", [halved, eight_bits])
def test_tensor_subclasses_are_compared_over_ranks(build: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """``aten.view`` failed here."""
    pretend_ranks(monkeypatch)
    other = build()
    for network in (build(), other):
        Teacher(network).check_same_on_ranks()
    next(plain_tensors(other.first.weight)).add_(1)
    with pytest.raises(RuntimeError, match="the teacher's weights differ between ranks"):
        Teacher(other).check_same_on_ranks()


@pytest.mark.scenario("teachers", "tensor subclasses")
@pytest.mark.parametrize("face", FACES)
@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
@pytest.mark.parametrize("build", [halved, eight_bits])
def test_a_teacher_of_tensor_subclasses_teaches_and_is_restored(build: Any, precision: str, face: str) -> None:
    network = build()

    def by_hand(embedding: Tensor, x: Tensor) -> Tensor:
        return RKD()(embedding, network(x.float()).detach())

    expected = gradients(User(by_hand), precision=precision)
    before = network.first.weight, [x.clone() for x in plain_tensors(network.first.weight)]
    module, callbacks = taught(face, network, RKD())
    assert largest(gradients(module, *callbacks, precision=precision), expected) == 0.0
    assert network.first.weight is before[0]
    assert all(map(torch.equal, plain_tensors(network.first.weight), before[1]))


@pytest.mark.parametrize("build", [halved, eight_bits])
def test_a_teacher_of_tensor_subclasses_comes_back_from_another_device(build: Any) -> None:
    network, x = build(), torch.randn(4, toys.WIDTH)
    expected, teacher = network(x), Teacher(network)
    teacher.attach(None)
    teacher.to("meta")
    assert {part.device.type for part in plain_tensors(network.first.weight)} == {"meta"}
    teacher.detach()
    assert {part.device.type for part in plain_tensors(network.first.weight)} == {"cpu"}
    assert torch.equal(network(x), expected)


def test_a_cache_is_keyed_by_the_parts_of_a_tensor_subclass() -> None:
    first, other = (describe_teacher(Teacher(halved()), None)["teacher weights"] for _ in range(2))
    changed = halved()
    changed.first.weight.bottom.add_(1)
    assert first == other != describe_teacher(Teacher(changed), None)["teacher weights"]


def by_eight_bits(rank: int | None, face: str) -> dict[str, Tensor]:
    return fitted(rank, face, eight_bits(), RKD())


@pytest.mark.scenario("teachers", "eight bits of torchao on two ranks")
@pytest.mark.slow
@pytest.mark.parametrize("face", FACES)
def test_two_devices_learn_from_torchaos_eight_bits_what_one_does(ranks: Ranks, face: str) -> None:
    pytest.importorskip("torchao")
    first, second = ranks.run(by_eight_bits, face)
    assert toys.largest_gap(first, second) == 0.0
    assert toys.largest_gap(first, by_eight_bits(None, face)) <= 1e-6
