"""Few-shot accuracy: equal to plain loops, drawn by index and label alone, and clear about classes that are small."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_rkd.metrics import EmbeddingRetrieval, FewShotAccuracy
from lightning_rkd.metrics.fewshot import draw_episodes
from tests.oracles.fewshot import few_shot

FEW = {"ways": 3, "shots": 2, "queries": 4, "episodes": 40}


def samples(classes: int = 6, each: int = 9, width: int = 5) -> tuple[Tensor, Tensor]:
    """Rows that are hard to tell apart, in an order that mixes classes."""
    labels = torch.arange(classes).repeat(each) * 10 - 20
    return torch.randn(classes, width)[(labels + 20) // 10] + torch.randn(len(labels), width), labels


def evaluate(*columns: Any, **options: Any) -> dict[str, float]:
    metric = FewShotAccuracy(**(FEW | options))
    metric.update(*columns)
    return {name: float(value) for name, value in metric.compute().items()}


@pytest.mark.parametrize("cosine", [False, True])
@pytest.mark.parametrize("shots", [1, 2, 5])
def test_equals_plain_loops(shots: int, cosine: bool) -> None:
    x, labels = samples()
    distance = "cosine" if cosine else "euclidean"
    found = evaluate(x, labels, shots=shots, distance=distance, seed=3)
    drawn = draw_episodes(labels, 3, shots + 4, 40, seed=3).tolist()
    mean, half = few_shot(x.double().tolist(), drawn, shots, cosine)
    assert 0.4 < mean < 0.95, "neither chance nor certainty"
    name = f"few_shot_accuracy_3_way_{shots}_shot"
    assert found == pytest.approx({name: mean, f"{name}_ci95": half}, abs=1e-6)


def test_episodes_draw_classes_and_samples_evenly_and_none_twice() -> None:
    labels = torch.tensor([4] * 5 + [-1] * 3 + [9] * 4 + [0] * 3)[torch.randperm(15)]
    drawn = draw_episodes(labels, ways=2, samples=3, episodes=4000, seed=1)
    assert drawn.shape == (4000, 2, 3)
    way = labels[drawn]
    assert bool((way == way[..., :1]).all()), "a way shows one class"
    assert bool((way[:, 0, 0] != way[:, 1, 0]).all())
    assert all(len(set(episode)) == 6 for episode in drawn.flatten(1).tolist())
    counts = torch.bincount(drawn.flatten(), minlength=15).double()
    expected = 4000 * 2 / 4 * 3 / (labels[:, None] == labels).sum(1)
    assert bool(((counts - expected).abs() < 5 * expected.sqrt()).all())


def test_another_seed_draws_other_episodes_and_the_same_seed_the_same() -> None:
    x, labels = samples()
    assert evaluate(x, labels, seed=0) == evaluate(x, labels, seed=0) != evaluate(x, labels, seed=1)


def test_order_and_grouping_of_updates_and_padding_change_nothing() -> None:
    x, labels = samples()
    indices = torch.randperm(len(x)) * 7
    whole = evaluate(x, labels, indices)
    metric = FewShotAccuracy(**FEW)
    for rows in torch.cat([torch.randperm(len(x)), torch.arange(3)]).split(10):
        metric.update(x[rows], labels[rows], indices[rows])
    assert {name: float(value) for name, value in metric.compute().items()} == whole


@pytest.mark.parametrize("memory", [1, 5000, 2**27])
def test_working_memory_changes_nothing(memory: int) -> None:
    x, labels = samples()
    assert evaluate(x, labels, working_memory=memory) == evaluate(x, labels)


def test_a_constant_embedding_scores_one_of_the_ways() -> None:
    _, labels = samples()
    found = evaluate(torch.ones(len(labels), 4), labels)
    assert list(found.values()) == pytest.approx([1 / 3, 0.0])


def test_the_interval_covers_the_accuracy_of_all_episodes_in_95_percent() -> None:
    x, labels = samples()
    name = "few_shot_accuracy_3_way_2_shot"
    truth = evaluate(x, labels, episodes=6000, seed=99)[name]
    each = [evaluate(x, labels, episodes=60, seed=seed) for seed in range(100)]
    inside = sum(abs(found[name] - truth) < found[f"{name}_ci95"] for found in each)
    assert 88 <= inside <= 99


def test_classes_with_too_few_samples_are_named_with_their_numbers() -> None:
    x, labels = samples()
    labels[:2], labels[2:4] = -7, 99
    with pytest.raises(ValueError, match=r"shots \+ queries = 6 samples .* have fewer: -7 \(2\), 99 \(2\); lower"):
        evaluate(x, labels)
    with pytest.raises(ValueError, match=r"9 \(1\) and 20 more"):
        evaluate(torch.randn(30, 2), torch.arange(30))
    with pytest.raises(ValueError, match="episodes of 3 ways need at least 3 classes, and there are 1"):
        evaluate(x[:1], labels[:1])


@pytest.mark.parametrize("name", ["ways", "shots", "queries", "episodes", "working_memory"])
def test_impossible_numbers_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be a whole number of at least"):
        FewShotAccuracy(**{name: 0})


@pytest.mark.parametrize("cls", [EmbeddingRetrieval, FewShotAccuracy])
def test_trackers_of_the_best_epoch_take_the_highest_score(cls: type[Metric]) -> None:
    assert cls.higher_is_better is True
    assert cls.is_differentiable is cls.full_state_update is False
