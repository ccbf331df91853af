"""The prototypical loss against plain loops."""

import math

import pytest
import torch

from lightning_rkd.models import PrototypicalLoss


def by_loops(rows: list[list[float]], labels: list[int], shots: int) -> float:
    seen: dict[int, list[list[float]]] = {}
    queries = []
    for row, label in zip(rows, labels, strict=True):
        if len(seen.setdefault(label, [])) < shots:
            seen[label].append(row)
        else:
            queries.append((row, label))
    prototypes = {k: [sum(c) / len(group) for c in zip(*group, strict=True)] for k, group in seen.items()}
    total = 0.0
    for row, label in queries:
        near = {k: math.exp(-sum((a - b) ** 2 for a, b in zip(row, c, strict=True))) for k, c in prototypes.items()}
        total -= math.log(near[label] / sum(near.values()))
    return total / len(queries)


@pytest.mark.parametrize("shots", [1, 2, 3])
def test_it_equals_plain_loops_whatever_the_order_of_the_rows(shots: int) -> None:
    generator = torch.Generator().manual_seed(shots)
    rows = torch.randn(20, 3, generator=generator, dtype=torch.float64)
    labels = torch.tensor([7, 2, 5, 7, 7] * 4)[torch.randperm(20, generator=generator)]
    expected = by_loops(rows.tolist(), labels.tolist(), shots)
    assert PrototypicalLoss(shots)(rows, labels).item() == pytest.approx(expected, rel=1e-12)


def test_its_gradient_passes_gradcheck() -> None:
    labels = torch.tensor([0, 1, 0, 1, 0])
    rows = torch.randn(5, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: PrototypicalLoss(1)(x, labels), rows)


def test_a_batch_without_queries_is_refused() -> None:
    with pytest.raises(ValueError, match="no class has more than shots=2 rows"):
        PrototypicalLoss(2)(torch.zeros(4, 2), torch.tensor([0, 0, 1, 1]))
    with pytest.raises(ValueError, match="shots must be at least 1"):
        PrototypicalLoss(0)
