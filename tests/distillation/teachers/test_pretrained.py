"""Teachers of timm, torchvision and transformers, with random weights, see the images they have been trained on."""

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision import models
from torchvision.transforms import v2

from lightning_rkd.distillation.layers import Tap
from lightning_rkd.distillation.pooling import cls_token
from lightning_rkd.distillation.teachers import Teacher
from lightning_rkd.losses.rkd import RKD
from lightning_rkd.utils.imports import MissingExtraError
from tests.distillation.teachers.test_inputs import IMAGENET, STUDENT, learn
from tests.harness.faces import FACES, User, gradients, largest, taught

HALF = ([0.5] * 3, [0.5] * 3)
CLIP = ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711])
X = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def images(x: Tensor, size: int, statistics: Any, interpolation: str = "bicubic") -> Tensor:
    """Result of torchvision's transforms for the student's images."""
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in STUDENT)
    mode = v2.InterpolationMode(interpolation)
    return v2.functional.normalize(v2.functional.resize(x * std + mean, [size, size], mode), *statistics)


def tiny(config: str, **settings: Any) -> Any:
    """A configuration of transformers for a network of 16 features."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    return getattr(transformers, config)(**sizes, **settings)


VIT = {"image_size": 32, "patch_size": 8}


def timm_resnet(**settings: Any) -> tuple[Teacher, Tensor]:
    pytest.importorskip("timm")
    return Teacher.from_timm("resnet10t", STUDENT, pretrained=False, **settings), images(X, 176, IMAGENET)


def timm_vit() -> tuple[Teacher, Tensor]:
    pytest.importorskip("timm")
    small = {"img_size": 32, "depth": 1, "embed_dim": 16, "num_heads": 2}
    return Teacher.from_timm("vit_tiny_patch16_224", STUDENT, pretrained=False, **small), images(X, 32, HALF)


def torchvision_resnet(**settings: Any) -> tuple[Teacher, Tensor]:
    teacher = Teacher.from_torchvision("resnet18", STUDENT, pretrained=False, **settings)
    return teacher, images(X, 224, IMAGENET, "bilinear")


def transformers_vit() -> tuple[Teacher, Tensor]:
    transformers = pytest.importorskip("transformers")
    processor = transformers.ViTImageProcessor(size={"height": 32, "width": 32})
    teacher = Teacher.from_pretrained(tiny("ViTConfig", **VIT), STUDENT, processor=processor)
    return teacher, images(X, 32, HALF, "bilinear")


def transformers_clip() -> tuple[Teacher, Tensor]:
    transformers = pytest.importorskip("transformers")
    processor = transformers.CLIPImageProcessor(crop_size={"height": 32, "width": 32})
    kind = {"model_class": "CLIPVisionModelWithProjection", "processor": processor}
    return Teacher.from_pretrained(tiny("CLIPVisionConfig", **VIT), STUDENT, **kind), images(X, 32, CLIP)


def output(value: Any) -> Tensor:
    return value if isinstance(value, Tensor) else value[0]


BUILDERS = [timm_resnet, timm_vit, torchvision_resnet, transformers_vit, transformers_clip]


@pytest.mark.scenario("teachers", "size and normalisation from the configuration")
@pytest.mark.parametrize("build", BUILDERS)
def test_the_network_is_given_its_own_size_and_normalisation(build: Any) -> None:
    teacher, expected = build()
    seen: list[Tensor] = []
    teacher.network.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    given = output(teacher(X))
    assert float((seen[0] - expected).abs().max()) <= 1e-5
    with torch.no_grad():
        assert float((given - output(teacher.network.eval()(expected))).abs().max()) <= 1e-4
    assert float((seen[0] - F.interpolate(X, expected.shape[2:])).abs().max()) > 0.1, "without a transform"


@pytest.mark.scenario("teachers", "pretrained")
@pytest.mark.parametrize("face", FACES)
@pytest.mark.parametrize("build", [timm_vit, transformers_clip])
def test_a_pretrained_teacher_teaches_as_its_network_by_hand(build: Any, face: str) -> None:
    teacher, _ = build()
    network = teacher.network.eval()
    size, statistics = (32, HALF) if build is timm_vit else (32, CLIP)

    @torch.no_grad()
    def by_hand(x: Tensor) -> Tensor:
        return output(network(images(x, size, statistics)))

    layer = {} if build is timm_vit else {"teacher_layer": Tap(read=lambda output, arguments: output.image_embeds)}
    assert largest(learn(face, teacher, **layer), learn("by hand", by_hand)) <= 1e-5


def test_classifiers_are_dropped_or_kept() -> None:
    for build in (torchvision_resnet, timm_resnet):
        assert [build(classifier=kept)[0](X).shape for kept in (False, True)] == [(2, 512), (2, 1000)]


def test_weights_come_from_a_local_file_or_folder(tmp_path: Path) -> None:
    source = models.resnet18(weights=None)
    torch.save({"model": source.state_dict(), "epoch": 3}, tmp_path / "net.pt")
    source.fc = nn.Identity()
    teacher = Teacher.from_torchvision("resnet18", image_size=64, weights=tmp_path / "net.pt")
    with torch.no_grad():
        assert torch.equal(teacher(X), source.eval()(X))
    transformers = pytest.importorskip("transformers")
    network = transformers.AutoModel.from_config(tiny("ViTConfig", **VIT))
    network.save_pretrained(tmp_path / "vit")
    transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "vit")
    teacher = Teacher.from_pretrained(tmp_path / "vit", STUDENT)
    with torch.no_grad():
        expected = network.eval()(images(X, 32, HALF, "bilinear")).last_hidden_state
    torch.testing.assert_close(teacher({"pixel_values": X}).last_hidden_state, expected)


def test_a_text_teacher_has_no_transform() -> None:
    teacher = Teacher.from_pretrained(tiny("BertConfig", vocab_size=30))
    teacher.network.bfloat16()
    assert teacher.transforms == []
    teacher.attach(Tap(read=cls_token))
    tokens = torch.randint(30, (2, 5))
    output = teacher({"input_ids": tokens, "attention_mask": torch.ones(2, 5)})
    assert output.last_hidden_state.dtype == torch.bfloat16
    teacher.detach()
    with pytest.raises(ValueError, match=r"needs the teacher's statistics, and its source has none: pass processor="):
        Teacher.from_pretrained(tiny("ViTConfig", **VIT), STUDENT)


class Other(User):
    """Its step reads the first and the last entry of a batch; the one between is the teacher's."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, of_teacher, y = batch
        embedding = self.backbone(x)
        return self.plus(self.task(embedding, y), embedding, of_teacher)


def two_tokenizers() -> tuple[nn.Module, Any, Tensor, Tensor]:
    network = pytest.importorskip("transformers").BertModel(tiny("BertConfig", vocab_size=30))
    return nn.EmbeddingBag(50, 5), network, torch.randint(50, (12, 7)), torch.randint(30, (12, 5))


def depth_and_colour() -> tuple[nn.Module, Any, Tensor, Tensor]:
    network = nn.Sequential(nn.Conv2d(3, 6, 4, stride=4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    student = nn.Sequential(nn.Conv2d(1, 5, 4, stride=4), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return student, network, torch.randn(12, 1, 16, 16), torch.randn(12, 3, 32, 32)


@pytest.mark.scenario("teachers", "other inputs than the student")
@pytest.mark.parametrize("face", FACES)
@pytest.mark.parametrize("build", [two_tokenizers, depth_and_colour])
def test_student_and_teacher_of_other_tokens_or_senses(build: Any, face: str) -> None:
    torch.manual_seed(0)
    student, network, x, of_teacher = build()
    batches = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, of_teacher, torch.arange(12) % 3), 4)
    state, layer = (
        copy.deepcopy(student.state_dict()),
        {"teacher_layer": Tap(read=cls_token)} if build is two_tokenizers else {},
    )

    @torch.no_grad()
    def embed(x: Tensor) -> Tensor:
        value = network.eval()(x)
        return value if isinstance(value, Tensor) else value.last_hidden_state[:, 0]

    def fit(module: Any, callbacks: Any = ()) -> list[list[Tensor]]:
        student.load_state_dict(state)
        getattr(module, "student", module).backbone = student
        return gradients(module, *callbacks, batches=batches)

    expected = fit(Other(lambda embedding, x: RKD()(embedding, embed(x))))
    module, callbacks = taught(face, network, RKD(), inputs=0, teacher_inputs=1, labels=2, **layer)
    assert largest(fit(Other() if callbacks else module, callbacks), expected) == 0.0
    assert largest(fit(Other()), expected) > 1e-4


def test_a_teachers_own_normalisation_is_logged_if_it_is_assumed(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "lightning_rkd"):
        teacher = Teacher.from_torchvision("resnet18", pretrained=False)
    assert [repr(f) for f in teacher.transforms] == ["Resize((224, 224), 'bilinear')"]
    assert [r.message for r in caplog.records] == [
        "from_torchvision: images are taken as normalised with the teacher's mean [0.485, 0.456, 0.406] and std "
        "[0.229, 0.224, 0.225]; if they are not, pass student_normalization=(mean, std)"
    ]


@pytest.mark.parametrize("package", ["timm", "transformers"])
def test_a_missing_package_is_named_with_its_extra(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_rkd.utils.imports.find_spec", lambda name: None)
    build = Teacher.from_timm if package == "timm" else Teacher.from_pretrained
    with pytest.raises(
        MissingExtraError, match=rf"{package} is not installed: pip install 'lightning-rkd\[{package}\]'"
    ):
        build("resnet18")
