from collections import Counter

import pytest
import torch

from lightning_rkd.data import PKBatchSampler, episode_sampler
from lightning_rkd.models import PrototypicalLoss

LABELS = torch.arange(12).repeat_interleave(8)


def test_an_episode_is_ways_classes_of_shots_and_queries_without_repeats() -> None:
    for episode in episode_sampler(LABELS, ways=5, shots=3, queries=4, episodes=20, seed=4):
        assert Counter(Counter(LABELS[episode].tolist()).values()) == {7: 5}
        assert len(set(episode)) == 35


def test_episodes_are_what_a_data_module_of_the_same_sizes_draws() -> None:
    batches = PKBatchSampler(LABELS, classes_per_batch=5, samples_per_class=7, batches_per_epoch=3, seed=2)
    assert list(episode_sampler(LABELS, 5, 3, 4, episodes=3, seed=2)) == list(batches)


def test_the_first_shots_of_each_class_make_its_prototype() -> None:
    (episode,) = episode_sampler(LABELS, ways=4, shots=2, queries=3, episodes=1)
    rows = torch.randn(len(LABELS), 3, dtype=torch.float64)
    x = rows[episode].view(4, 5, 3)
    prototypes = x[:, :2].mean(1)
    expected = [-torch.log_softmax(-(q - prototypes).square().sum(1), 0)[c] for c in range(4) for q in x[c, 2:]]
    assert torch.allclose(PrototypicalLoss(2)(rows[episode], LABELS[episode]), torch.stack(expected).mean())


def test_classes_with_too_few_samples_and_impossible_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"shots \+ queries = 3 samples .* fewer: 1 \(2\); lower queries"):
        episode_sampler([0, 0, 0, 1, 1], ways=2, shots=1, queries=2)
    with pytest.raises(ValueError, match="at least 13 classes"):
        episode_sampler(LABELS, ways=13, queries=2)
    with pytest.raises(ValueError, match="queries must be at least 1, got 0"):
        episode_sampler(LABELS, queries=0)
    with pytest.raises(ValueError, match="shots must be at least 1, got 0"):
        episode_sampler(LABELS, shots=0)
