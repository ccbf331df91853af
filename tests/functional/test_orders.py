"""Hinges over all pairs, against the pairs."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_rkd.functional import order_hinge


def over_pairs(student: Tensor, teacher: Tensor, margin: float) -> Tensor:
    """The sum as the equation has it."""
    hinges = [
        (student[b] - student[a] if teacher[b] < teacher[a] else student[a] - student[b]) + margin
        for a, b in itertools.combinations(range(len(student)), 2)
    ]
    return torch.stack(hinges).relu().mean()


entries = st.lists(st.tuples(st.integers(-3, 3), st.integers(-2, 2)), min_size=2, max_size=18)


@settings(deadline=None, max_examples=150)
@given(entries, st.sampled_from([0.0, 0.5, 1.5, 9.0]))
def test_value_and_slopes_are_those_of_the_pairs_with_many_ties(pairs, margin):
    student, teacher = torch.tensor(pairs, dtype=torch.float64).T
    student = student.clone().requires_grad_()
    ours, expected = order_hinge(student, teacher, margin=margin), over_pairs(student, teacher, margin)
    assert ours.item() == pytest.approx(expected.item(), abs=1e-14)
    torch.testing.assert_close(*(torch.autograd.grad(x, student)[0] for x in (ours, expected)))


@pytest.mark.parametrize("m", [127, 128, 129])  # about a power of two, where a level of the tree begins
def test_lists_about_a_power_of_two_have_the_value_of_the_pairs(m):
    torch.manual_seed(0)
    student, teacher = torch.randn(m, dtype=torch.float64), torch.randn(m, dtype=torch.float64)
    torch.testing.assert_close(order_hinge(student, teacher, margin=0.1), over_pairs(student, teacher, 0.1))


@pytest.mark.parametrize("m", [0, 1])
def test_fewer_than_two_entries_give_zero_with_a_graph(m):
    student = torch.ones(m, requires_grad=True)
    value = order_hinge(student, torch.ones(m), margin=1.0)
    assert value.item() == 0
    assert value.requires_grad
