"""Students by specification: width and inputs, what a loaded export gives, and one error for each mistake."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_rkd.cli.distill.students import build_student
from lightning_rkd.export import export, load
from lightning_rkd.export.preprocess import VectorPreprocess
from lightning_rkd.utils.types import call_network
from tests.cli.distill.test_teachers import images
from tests.cli.distill.toys import TEXTS, save_bert, save_sentence_transformer, save_vit

ITEMS: dict[str, Any] = {"image": images(), "text": TEXTS, "vector": torch.ones(3, 7)}


def check(spec: Any, kind: Any, folder: Path, **options: Any) -> None:
    """The network gives embeddings of the width, and its export, loaded, the same for the samples themselves."""
    torch.manual_seed(0)
    student = build_student(spec, kind, embedding_dim=12, vector_dim=7, **options)
    network, inputs = student.network.eval(), student.preprocess(ITEMS[kind])
    with torch.no_grad():
        expected = call_network(network, inputs)
    assert expected.shape == (len(ITEMS[kind]), 12)
    formats = ["torch" if student.build is None else "safetensors"]
    logging.disable(logging.WARNING)
    export(network, inputs, folder, formats=formats, build=student.build, preprocess=student.preprocess)
    logging.disable(logging.NOTSET)
    torch.testing.assert_close(load(folder)(ITEMS[kind]), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("spec", "kind", "options"),
    [
        ("auto", "image", {"image_size": 32}),
        ("auto", "image", {"image_size": 24}),
        ("resnet8x4", "image", {"image_size": 64}),
        ("convnet", "image", {"image_size": 16}),
        ("torchvision:resnet18@none", "image", {"image_size": 32}),
        ("auto", "text", {}),
        ("vocabulary", "text", {"texts": TEXTS}),
        ("auto", "vector", {}),
    ],
)
def test_a_student_survives_its_export(spec: str, kind: str, options: dict[str, Any], tmp_path: Path) -> None:
    check(spec, kind, tmp_path / "student", **options)


def test_a_timm_student_survives_its_export(tmp_path: Path) -> None:
    pytest.importorskip("timm")
    check("timm:resnet10t@none", "image", tmp_path / "student", image_size=32)


def test_a_text_student_of_transformers_survives_its_export(tmp_path: Path) -> None:
    save_bert(tmp_path)
    check(f"hf:{tmp_path}", "text", tmp_path / "student")


def test_a_network_of_ones_own_brings_its_preprocessing(tmp_path: Path) -> None:
    network = nn.Linear(7, 12)
    network.preprocess = VectorPreprocess(7)  # type: ignore[assignment]
    check(network, "vector", tmp_path / "student")


@pytest.mark.parametrize(
    ("spec", "kind", "options", "message"),
    [
        ("resnet", "image", {}, "has none of the forms auto, resnet8"),
        ("hashed", "image", {}, "is for samples of kind text, not image"),
        ("torchvision:resnet0@none", "image", {}, "could not be loaded"),
        ("resnet8", "vector", {}, "not vector: take one of auto, mlp, python:MODULE:FUNCTION$"),
        ("auto", "text", {"parameters": 10}, "the budget is 10"),
        ("vocabulary", "text", {}, "needs texts"),
    ],
)
def test_a_student_that_cannot_be_built_is_an_error(
    spec: str, kind: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        build_student(spec, kind, embedding_dim=4, **options)


def test_an_image_student_of_transformers_takes_its_processors_images(tmp_path: Path) -> None:
    processor, network = save_vit(tmp_path, image_mean=[0.3] * 3)
    check(f"hf:{tmp_path}", "image", tmp_path / "student")
    student = build_student(f"hf:{tmp_path}", "image", embedding_dim=12)
    square = [image.resize((40, 40)) for image in images()]
    with torch.no_grad():
        by_hand = network(**processor(square, return_tensors="pt")).last_hidden_state[:, 0]
        found = student.network.get_submodule("backbone").eval()(student.preprocess(square))
    torch.testing.assert_close(found, by_hand, atol=0.02, rtol=0)  # the processor resizes with another rounding


def test_a_sentence_transformer_is_a_student_with_its_own_pooling(tmp_path: Path) -> None:
    model = save_sentence_transformer(tmp_path, "max")
    check(f"sentence-transformers:{tmp_path}", "text", tmp_path / "student")
    student = build_student(f"sentence-transformers:{tmp_path}", "text", embedding_dim=12)
    with torch.no_grad():
        found = call_network(student.network.get_submodule("backbone").eval(), student.preprocess(TEXTS))
    torch.testing.assert_close(found, model.encode(TEXTS, convert_to_tensor=True), atol=1e-5, rtol=1e-4)


def test_a_budget_takes_the_largest_network_that_fits() -> None:
    chosen = {n: build_student("auto", "image", embedding_dim=8, parameters=n).network for n in (90_000, 300_000)}
    counts = {n: sum(p.numel() for p in network.parameters()) for n, network in chosen.items()}
    assert counts[90_000] < 90_000 < counts[300_000] < 300_000
    vectors = build_student("auto", "vector", embedding_dim=8, vector_dim=5, parameters=1000).network
    assert 986 < sum(p.numel() for p in vectors.parameters()) <= 1000, "a hidden unit more costs 14"
