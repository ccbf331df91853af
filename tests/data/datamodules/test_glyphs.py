import logging
import os
import unicodedata
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from lightning_rkd.data import GlyphDataModule
from lightning_rkd.data.datamodules import glyphs as g


def _clear() -> bool:
    g._load_glyphs.cache_clear()
    return True


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    _clear()
    yield
    _clear()


@pytest.fixture(scope="module")
def rendered() -> tuple[np.ndarray, str]:
    return g.render_glyphs(56)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory, rendered: tuple[np.ndarray, str]) -> Path:
    folder = tmp_path_factory.mktemp("glyphs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(g, "render_glyphs", lambda size: rendered if size == 56 else pytest.fail("another size"))
        GlyphDataModule(cache_dir=folder).prepare_data()
    return folder


def test_no_two_glyphs_look_alike_in_any_face(rendered: tuple[np.ndarray, str]) -> None:
    images, glyphs = rendered
    assert len(images) == len(glyphs) == len(set(glyphs))
    for face in range(len(g.FACES)):
        assert len({image.tobytes() for image in images[:, face]}) == len(glyphs)
        assert images[:, face].any(axis=(1, 2)).all()


def test_classes_are_some_500_plain_glyphs_and_latin_a_is_alpha(
    rendered: tuple[np.ndarray, str],
) -> None:
    glyphs = rendered[1]
    assert 480 <= len(glyphs) <= 560
    assert all(unicodedata.category(c).startswith("L") and not unicodedata.decomposition(c) for c in glyphs)
    assert "A" in glyphs
    assert not set("\N{GREEK CAPITAL LETTER ALPHA}\N{CYRILLIC CAPITAL LETTER A}À") & set(glyphs)
    assert {unicodedata.name(c).split()[0] for c in glyphs} >= {"LATIN", "GREEK", "CYRILLIC", "ARMENIAN", "GEORGIAN"}


def test_glyphs_fit_on_their_canvas(rendered: tuple[np.ndarray, str]) -> None:
    images = rendered[0]
    edge = np.concatenate([images[:, :, 0], images[:, :, -1], images[..., 0], images[..., -1]], axis=-1)
    assert (edge.max(axis=(1, 2)) > 0).mean() < 0.1


def test_rendering_is_deterministic_and_the_cache_holds_it(cache: Path, tmp_path: Path) -> None:
    rendered, kept, fresh = (
        GlyphDataModule(cache_dir=tmp_path / folder, image_size=12).load() for folder in ("a", "a", "b") if _clear()
    )
    for again in (kept, fresh):
        assert torch.equal(again.images, rendered.images)
        assert again.class_names == rendered.class_names
    assert [p.suffix for p in (tmp_path / "a").iterdir()] == [".npz"]
    usual = GlyphDataModule(cache_dir=cache).load()
    assert usual.images.shape == (12 * len(usual.class_names), 1, 28, 28)


def test_a_sound_cache_is_read_and_nothing_rendered(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(g, "render_glyphs", lambda size: pytest.fail("rendered"))
    assert len(GlyphDataModule(cache_dir=cache).load().class_names) > 480


def six_glyphs(size: int) -> tuple[np.ndarray, str]:
    return np.full((6, 12, size, size), 9, dtype=np.uint8), "abcdef"


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "foreign", "other shape"])
def test_a_damaged_cache_is_rendered_again(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(g, "render_glyphs", six_glyphs)
    sound = GlyphDataModule(cache_dir=tmp_path).load()
    (path,) = tmp_path.iterdir()
    content = bytearray(path.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 1
    path.write_bytes({"cut": content[:1000], "empty": b"", "foreign": b"not a cache"}.get(damage, bytes(content)))
    if damage == "other shape":
        np.savez(path, images=np.zeros((2, 12, 28, 28), dtype=np.uint8), glyphs=np.array("abc"))
    g._load_glyphs.cache_clear()
    with caplog.at_level(logging.WARNING, logger=g.__name__):
        again = GlyphDataModule(cache_dir=tmp_path).load()
    assert "drawing the glyphs again" in caplog.text
    assert torch.equal(again.images, sound.images)
    g._load_glyphs.cache_clear()
    monkeypatch.setattr(g, "render_glyphs", lambda size: pytest.fail("the cache was not mended"))
    assert torch.equal(GlyphDataModule(cache_dir=tmp_path).load().images, sound.images)


def test_a_cache_that_cannot_be_written_is_only_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(g, "render_glyphs", six_glyphs)
    (tmp_path / "file").write_text("in the way")
    with caplog.at_level(logging.WARNING, logger=g.__name__):
        assert len(GlyphDataModule(cache_dir=tmp_path / "file").load().images) == 72
    assert "could not be kept" in caplog.text


def test_a_killed_writer_leaves_nothing_under_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def die(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", die)
    with pytest.raises(KeyboardInterrupt):
        g._write(tmp_path / "a.npz", images=np.zeros(3))
    assert list(tmp_path.iterdir()) == []


def test_the_cache_lives_where_the_desktop_convention_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert g._default_cache() == tmp_path / "lightning_rkd"


def test_another_size_or_distortion_is_another_file(monkeypatch: pytest.MonkeyPatch) -> None:
    names = {g._fingerprint(28), g._fingerprint(32)}
    monkeypatch.setattr(g, "DISTORTION", g.Augment())
    assert len(names | {g._fingerprint(28)}) == 3


def test_training_validation_and_test_glyphs_are_disjoint(cache: Path) -> None:
    module = GlyphDataModule(cache_dir=cache)
    module.setup()
    assert len(set(module.class_names)) == len(module.class_names)
    sets = (module.train_set, module.val_set, module.test_set)
    parts = [set(module.root.labels[part.indices].tolist()) for part in sets]
    assert sum(len(part) for part in parts) == len(set.union(*parts)) == len(module.class_names)
    shares = [len(part) / len(module.class_names) for part in parts]
    assert shares == pytest.approx([0.6, 0.15, 0.25], abs=0.01)
    x, y = next(iter(module.train_dataloader()))
    assert x.shape == (120, 1, 28, 28)
    assert torch.bincount(y).max() == 5


def test_samples_of_a_glyph_differ(cache: Path) -> None:
    images = GlyphDataModule(cache_dir=cache).load().images[:12].flatten(1)
    assert len({image.numpy().tobytes() for image in images}) == 12


def test_fewer_glyphs_are_spread_over_the_scripts(cache: Path) -> None:
    data = GlyphDataModule(cache_dir=cache, max_classes=40).load()
    assert len(data.class_names) == 40
    assert data.images.shape == (480, 1, 28, 28)
    assert len({unicodedata.name(c).split()[0] for c in data.class_names}) >= 4


@pytest.mark.parametrize("arguments", [{"image_size": 7}, {"max_classes": 5}])
def test_impossible_sizes_are_refused(arguments: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(arguments))):
        GlyphDataModule(**arguments)  # type: ignore[arg-type]
