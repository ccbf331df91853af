import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_rkd.data import Augment, AugmentedSubset, Crop, Draw, ImageSet
from lightning_rkd.data.transforms.augment import keyed_uniform

ALL = Augment(rotation=20, scale=0.2, shear=0.2, shift=0.1, flip=True, contrast=0.2, noise=0.1)


def image_set(n: int = 40, channels: int = 3, size: int = 13) -> ImageSet:
    images = torch.randint(0, 256, (n, channels, size, size), dtype=torch.uint8)
    return ImageSet(images, torch.arange(n) // 4, mean=(0.4,) * channels, std=(0.2,) * channels)


def split_mix(state: int) -> int:
    """The finaliser as its authors print it, in whole numbers."""
    mask = 2**64 - 1
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & mask
    return state ^ (state >> 31)


def test_keyed_numbers_are_split_mix() -> None:
    golden, mask = 0x9E3779B97F4A7C15, 2**64 - 1
    state = 0
    for word in (3, 2**40 + 1):
        state = split_mix(((state ^ word) + golden) & mask)
    expected = [(split_mix((state + i * golden) & mask) >> 40) / 2**24 for i in (1, 2, 3)]
    assert keyed_uniform(3, 3, [2**40 + 1])[0].tolist() == expected


def test_keyed_numbers_are_uniform_and_unrelated_between_neighbouring_keys() -> None:
    numbers = keyed_uniform(4, 0, torch.arange(50_000).numpy()).double()
    assert numbers.min() >= 0
    assert numbers.max() < 1
    assert torch.allclose(numbers.mean(0), torch.full((4,), 0.5, dtype=torch.float64), atol=0.01)
    assert torch.allclose(numbers.var(0), torch.full((4,), 1 / 12, dtype=torch.float64), atol=0.002)
    assert abs(torch.corrcoef(torch.stack((numbers[:-1, 0], numbers[1:, 0])))[0, 1]) < 0.02
    assert abs(torch.corrcoef(torch.stack((numbers[:, 0], numbers[:, 1])))[0, 1]) < 0.02


@pytest.mark.parametrize("augment", [ALL, Crop(8, flip=True)])
@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 19), min_size=1, max_size=30, unique=True), st.integers(0, 3))
def test_an_image_is_changed_alike_in_any_batch(augment: Augment | Crop, rows: list[int], epoch: int) -> None:
    torch.manual_seed(0)
    data = AugmentedSubset(image_set(), range(5, 25), augment, seed=1)
    together = data.__getitems__([Draw(i, epoch) for i in rows])
    for row, (x, y) in zip(rows, together, strict=True):
        alone, label = data[Draw(row, epoch)]
        assert torch.equal(x, alone)
        assert y == label == (row + 5) // 4


@pytest.mark.parametrize("augment", [ALL, Crop(8, flip=True)])
def test_epoch_seed_and_occurrence_each_give_another_version(augment: Augment | Crop) -> None:
    root = image_set()
    data, other = (AugmentedSubset(root, range(40), augment, seed) for seed in (1, 2))
    versions = [data[Draw(3, 0)], data[Draw(3, 1)], other[3], data.__getitems__([Draw(3, 0), Draw(3, 0)])[1]]
    for i, (x, _) in enumerate(versions):
        assert all(not torch.equal(x, other) for other, _ in versions[:i])


def test_the_global_random_state_is_neither_read_nor_moved() -> None:
    data = AugmentedSubset(image_set(), range(40), ALL)
    before = torch.get_rng_state()
    first = data[4][0]
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    assert torch.equal(data[4][0], first)


def test_no_strength_changes_nothing() -> None:
    pixels = torch.rand(3, 1, 9, 9)
    assert torch.equal(Augment()(pixels, 0, range(3)), pixels)


def test_a_quarter_turn_is_a_quarter_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    draws = torch.tensor([[1.0, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 1.0]])
    monkeypatch.setattr("lightning_rkd.data.transforms.augment.keyed_uniform", lambda *_: draws)
    pixels = torch.rand(1, 2, 8, 8)
    turned = Augment(rotation=90)(pixels, 0)
    assert any(torch.allclose(turned, pixels.rot90(turns, (2, 3)), atol=1e-5) for turns in (1, -1))


def test_a_shift_moves_by_that_part_of_the_width_and_repeats_the_edge(monkeypatch: pytest.MonkeyPatch) -> None:
    draws = torch.tensor([[0.5, 0.5, 0.5, 1.0, 0.5, 0.5, 0.5, 1.0]])
    monkeypatch.setattr("lightning_rkd.data.transforms.augment.keyed_uniform", lambda *_: draws)
    pixels = torch.rand(1, 1, 8, 8)
    moved = Augment(shift=0.25)(pixels, 0)
    assert torch.allclose(moved[..., :6], pixels[..., 2:], atol=1e-5)
    assert torch.allclose(moved[..., 6:], pixels[..., 7:].expand(-1, -1, -1, 2), atol=1e-5)


def test_half_of_the_images_are_mirrored_exactly() -> None:
    pixels = torch.rand(1, 1, 6, 6).expand(400, -1, -1, -1)
    out = Augment(flip=True)(pixels, 0, range(400))
    mirrored = [torch.allclose(image, pixels[0].flip(-1), atol=1e-6) for image in out]
    same = [torch.allclose(image, pixels[0], atol=1e-6) for image in out]
    assert all(a != b for a, b in zip(mirrored, same, strict=True))
    assert 150 < sum(mirrored) < 250


def test_noise_has_the_given_deviation() -> None:
    noise = Augment(noise=0.05)(torch.full((50, 3, 15, 15), 0.5), 0, range(50)) - 0.5
    assert math.isclose(noise.std(), 0.05, rel_tol=0.03)
    assert abs(noise.mean()) < 1e-3


def test_results_stay_in_range() -> None:
    out = Augment(contrast=0.5, noise=0.5)(torch.rand(20, 1, 9, 9), 0, range(20))
    assert out.min() >= 0
    assert out.max() <= 1


def test_negative_strengths_are_refused() -> None:
    with pytest.raises(ValueError, match="shear must not be negative"):
        Augment(shear=-0.1)


def test_samples_are_normalised_per_channel() -> None:
    data = image_set()
    x, y = data[7]
    assert torch.allclose(x, (data.images[7].float() / 255 - 0.4) / 0.2)
    assert y == 1


def test_images_of_another_kind_are_refused() -> None:
    with pytest.raises(ValueError, match="uint8"):
        ImageSet(torch.zeros(2, 1, 4, 4), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match="one per image"):
        ImageSet(torch.zeros(2, 1, 4, 4, dtype=torch.uint8), torch.zeros(3, dtype=torch.int64))
