import itertools

import pytest
import torch

from lightning_rkd.functional.ranks import log_probability_of_order, nearest_samples, permutations


def test_the_nearest_are_sorted_and_never_the_sample_itself():
    x = torch.randn(8, 3, dtype=torch.float64)
    x[5] = x[1]
    d = (x[:, None] - x).norm(dim=2)
    near = nearest_samples(d, 3)
    assert near.shape == (8, 3)
    for i, row in enumerate(d.tolist()):
        expected = sorted((j for j in range(8) if j != i), key=lambda j, row=row: row[j])[:3]
        assert near[i].tolist() == expected


def test_of_equally_near_samples_the_first_comes_first():
    assert nearest_samples(torch.zeros(4, 4), 2).tolist() == [[1, 2], [0, 2], [0, 1], [0, 1]]
    assert nearest_samples(torch.zeros(2, 2), 4).tolist() == [[1], [0]], "as many as there are"


def test_the_probabilities_of_all_orders_sum_to_one():
    scores = torch.randn(3, 5, dtype=torch.float64)
    log_p = log_probability_of_order(scores[:, permutations(5)])
    assert log_p.shape == (3, 120)
    torch.testing.assert_close(log_p.exp().sum(1), torch.ones(3, dtype=torch.float64))


@pytest.mark.parametrize("length", [0, 1])
def test_a_list_without_a_choice_is_certain(length):
    assert log_probability_of_order(torch.randn(2, length)).tolist() == [0, 0]


@pytest.mark.parametrize("length", range(6))
def test_permutations_are_all_orders_once(length):
    rows = [tuple(row) for row in permutations(length).tolist()]
    assert sorted(rows) == sorted(itertools.permutations(range(length)))
