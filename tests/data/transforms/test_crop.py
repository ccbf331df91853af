import pytest
import torch
from torchvision.transforms import functional as tv

from lightning_rkd.data import AugmentedSubset, CentreCrop, Crop, ImageSet
from lightning_rkd.data.transforms.augment import keyed_uniform


def test_a_crop_is_torchvisions_at_the_drawn_place() -> None:
    images, rows = torch.rand(40, 3, 12, 15), list(range(40))
    for crop, mode in ((Crop(8, 2, flip=True), "constant"), (Crop(8, 2, "reflect"), "reflect"), (Crop(12), None)):
        padded = images if mode is None else tv.pad(images, [2] * 4, padding_mode=mode)
        u = keyed_uniform(3, 5, rows)
        seen = crop(images, 5, rows)
        for i in rows:
            top, left = (int(u[i, j] * (n - crop.size + 1)) for j, n in enumerate((padded.shape[-2], padded.shape[-1])))
            expected = tv.crop(padded[i], top, left, crop.size, crop.size)
            assert torch.equal(seen[i], tv.hflip(expected) if crop.flip and u[i, 2] < 0.5 else expected)


def test_every_place_is_as_likely_and_half_are_mirrored() -> None:
    place = torch.arange(36.0).view(1, 1, 6, 6).expand(9000, 1, 6, 6)
    seen = Crop(4, flip=True)(place, 0, list(range(9000)))
    mirrored = seen[:, 0, 0, 0] > seen[:, 0, 0, 1]
    corner = torch.where(mirrored, seen[:, 0, 0, 3], seen[:, 0, 0, 0]).long()
    counts = torch.bincount(corner)
    assert sorted(corner.unique().tolist()) == [0, 1, 2, 6, 7, 8, 12, 13, 14]
    assert ((counts[counts > 0] - 1000).abs() < 150).all()
    assert abs(int(mirrored.sum()) - 4500) < 250


@pytest.mark.parametrize("size", [8, 11, 12])
def test_the_middle_is_torchvisions(size: int) -> None:
    images = torch.rand(2, 3, 13, 16)
    assert torch.equal(CentreCrop(size)(images), tv.center_crop(images, size))
    assert CentreCrop(20)(images).shape == images.shape


def test_evaluation_crops_the_middle_and_training_the_same_size() -> None:
    images = torch.randint(0, 256, (4, 1, 10, 10), dtype=torch.uint8)
    data = ImageSet(images, torch.arange(4), transform=CentreCrop(6))
    assert torch.equal(data[2][0], images[2, :, 2:8, 2:8].float() / 255)
    assert AugmentedSubset(data, range(4), Crop(6))[0][0].shape == (1, 6, 6)


def test_sizes_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match="size must be at least 1"):
        Crop(0)
    with pytest.raises(ValueError, match="'zero' or 'reflect'"):
        Crop(4, fill="edge")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"Crop\(size=9\) needs images at least that large, and these are 8 x 8"):
        Crop(9)(torch.zeros(1, 1, 8, 8), 0, [0])
