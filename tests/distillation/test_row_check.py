"""Networks that receive other rows than the batch are reported, those that receive changed ones in order are not."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_rkd import RKD, Batch, Distiller
from lightning_rkd.callbacks.distillation import RelationalDistillation
from lightning_rkd.distillation.row_check import find_moved_rows
from tests.harness import toys

ROWS, PIXELS = 16, 8
ORDER = torch.randperm(ROWS, generator=torch.Generator().manual_seed(1))


def images(seed: int = 0) -> Tensor:
    """Smooth random images with a common background, (16, 3, 8, 8)."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(ROWS, 3, 3, 3, generator=generator) + torch.randn(1, 3, 3, 3, generator=generator)
    return F.interpolate(coarse, PIXELS, mode="bilinear") + 0.1 * torch.randn(
        ROWS, 3, PIXELS, PIXELS, generator=generator
    )


class Net(toys.Student):
    """Its step changes the images before the network runs."""

    def __init__(self, change: Callable[[Tensor], Tensor], *by_hand: Any) -> None:
        super().__init__(*by_hand)
        self.backbone: Any = nn.Sequential(nn.Flatten(), nn.Linear(3 * PIXELS**2, 5))
        self.change = change

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        changed = self.change(x)
        embedding = self.backbone(changed)
        return self.plus(self.task(embedding, y), embedding, changed)


def batches() -> DataLoader[Any]:
    return DataLoader(TensorDataset(torch.cat([images(0), images(1)]), torch.arange(2 * ROWS) % 3), ROWS)


def fit(change: Callable[[Tensor], Tensor], teacher: Any, **settings: Any) -> list[str]:
    """Warnings of a fit of two steps."""
    torch.manual_seed(0)
    callback = RelationalDistillation(teacher, RKD(), student_layer="backbone", **settings)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        toys.fit(Net(change), callback, batches=batches())
    return [str(w.message) for w in caught if "rows of the batch" in str(w.message)]


def teacher() -> nn.Module:
    torch.manual_seed(7)
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * PIXELS**2, 7))


MEAN, STD = torch.tensor([0.5, 0.1, -0.4])[:, None, None], torch.tensor([0.3, 2.0, 0.7])[:, None, None]
MOVED: dict[str, Callable[[Tensor], Tensor]] = {
    "permuted": lambda x: x[ORDER],
    "permuted and normalised": lambda x: (x[ORDER] - MEAN) / STD,
    "resampled": lambda x: x[torch.arange(ROWS) // 2],
    "rolled": lambda x: x.roll(1, 0),
    "mixed evenly": lambda x: 0.5 * x + 0.5 * x[ORDER.roll(3)],
    "mixed a little": lambda x: 0.8 * x + 0.2 * x.roll(1, 0),
    "mixed mostly": lambda x: 0.2 * x + 0.8 * x.roll(1, 0),
}
IN_PLACE: dict[str, Callable[[Tensor], Tensor]] = {
    "untouched": lambda x: x,
    "copied": lambda x: x.clone(),
    "normalised": lambda x: (x - MEAN) / STD,
    "noisy": lambda x: x + 0.5 * torch.randn_like(x),
    "flipped": lambda x: x.flip(3),
    "shifted": lambda x: x.roll((2, 1), (2, 3)),
    "inverted": lambda x: 1 - x,
    "erased": lambda x: x * (torch.rand(ROWS, 1, PIXELS, PIXELS) > 0.5),
    "jittered": lambda x: x * (0.5 + torch.rand(ROWS, 1, 1, 1)) + torch.rand(ROWS, 1, 1, 1),
    "other images": lambda x: images(5),
}


@pytest.mark.parametrize("how", MOVED)
def test_rows_that_are_moved_or_mixed_are_reported_once(how: str) -> None:
    (message,) = fit(MOVED[how], teacher())
    assert "mixtures of two samples" in message if how in ("mixed evenly", "mixed a little") else "other samples"
    assert "input_layer=" in message


@pytest.mark.parametrize("how", IN_PLACE)
def test_rows_that_stay_in_place_are_not_reported(how: str) -> None:
    assert fit(IN_PLACE[how], teacher()) == []


def test_input_layer_cures_what_the_warning_reports() -> None:
    net, expected, wrong = Net(MOVED["permuted"]), Net(MOVED["permuted"], by_hand), Net(MOVED["permuted"])
    for module in (net, expected, wrong):
        torch.manual_seed(0)
        module.backbone = nn.Sequential(nn.Flatten(), nn.Linear(3 * PIXELS**2, 5))
    at: Any = {"student_layer": "backbone"}
    toys.fit(net, RelationalDistillation(teacher(), RKD(), **at, input_layer="backbone"), batches=batches())
    toys.fit(expected, batches=batches())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        toys.fit(wrong, RelationalDistillation(teacher(), RKD(), **at), batches=batches())
    assert toys.gap(net, expected) == 0.0
    assert toys.gap(wrong, expected) > 1e-4, "before, without a word"


def by_hand(embedding: Tensor, x: Tensor) -> Tensor:
    with torch.no_grad():
        target = teacher()(x)
    return RKD()(embedding, target)


def test_nothing_is_hooked_after_two_steps() -> None:
    net, big = nn.Sequential(toys.Backbone(), nn.Tanh()), toys.teacher()
    distiller = Distiller(big, RKD(), student_layer="1")
    x = torch.randn(8, toys.WIDTH)
    counts = []
    with distiller.attached(net, "cpu"):
        for _ in range(3):
            counts.append(len(toys.attachments(net)))
            distiller.start()
            net(x)
            distiller.collect(Batch(x))
    assert counts[0] > counts[2] == 2, "the hook of the layer, and its mark"
    assert toys.attachments(net) == []


def test_few_columns_and_whole_numbers_are_compared_exactly() -> None:
    few, words = torch.randn(8, 3), torch.randint(100, (8, 7), generator=torch.Generator().manual_seed(0))
    for x in (few, words):
        assert find_moved_rows(x.flip(0), x) == "8 of 8 rows are those of other samples"
    assert find_moved_rows(few + 0.5 * torch.randn(8, 3), few) is None
    assert find_moved_rows(words * (torch.rand(8, 7) > 0.2), words) is None
    assert find_moved_rows(torch.ones(8, 1).long(), torch.arange(8)[:, None]) is None, "too few to tell"
    assert find_moved_rows(few[:2].flip(0), few[:2]) is None


def test_of_several_inputs_each_may_be_the_networks() -> None:
    class Two(nn.Module):
        def __init__(self, order: Any) -> None:
            super().__init__()
            self.inner, self.order = toys.Backbone(), order

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return self.inner((a if b is None else b)[self.order])

    a, b = torch.randn(8, toys.WIDTH), torch.randn(8, toys.WIDTH)
    for order, moved in ((slice(None), False), (torch.arange(8).flip(0), True)):
        net = Two(order)
        distiller = Distiller(Two(slice(None)), RKD(), student_layer="inner")
        with distiller.attached(net, "cpu"), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            distiller.start()
            net(a, b)
            distiller.collect(Batch({"a": a, "b": b}))
        assert any("8 of 8 rows" in str(w.message) for w in caught) is moved
