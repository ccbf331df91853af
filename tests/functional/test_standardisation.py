"""PHI standardisation of embeddings, and Hadamard matrices."""

import pytest
import torch

from lightning_rkd.functional import hadamard_matrix, phi_standardisation

WIDTHS = [1, 2, 4, 8, 12, 20, 28, 36, 64, 76, 192, 320, 384, 512, 768]


@pytest.mark.parametrize("n", WIDTHS)
def test_entries_of_a_hadamard_matrix_are_equal_but_for_signs(n):
    found = hadamard_matrix(n)
    torch.testing.assert_close(found @ found.T, torch.eye(n, dtype=torch.float64))
    torch.testing.assert_close(found.abs(), torch.full_like(found, n**-0.5))


@pytest.mark.parametrize("n", [3, 5, 92, 100])
def test_other_widths_have_one_fixed_rotation(n):
    found = hadamard_matrix(n)
    torch.testing.assert_close(found @ found.T, torch.eye(n, dtype=torch.float64))
    assert torch.equal(found, hadamard_matrix(n))


@pytest.mark.parametrize("width", [2, 12, 64])
def test_every_column_has_variance_one_and_all_distances_one_scale(width):
    torch.manual_seed(0)
    x = torch.randn(200, width, dtype=torch.float64) @ torch.randn(width, width, dtype=torch.float64) + 7
    mean, matrix = phi_standardisation(x)
    y = (x - mean) @ matrix.T
    torch.testing.assert_close(y.mean(0), torch.zeros(width, dtype=torch.float64))
    torch.testing.assert_close(y.var(0), torch.ones(width, dtype=torch.float64))
    ratio = torch.pdist(x) / torch.pdist(y)
    torch.testing.assert_close(ratio, (x.var(0).mean().sqrt()).expand_as(ratio))


def test_fewer_rows_than_columns_still_give_equal_variances():
    torch.manual_seed(0)
    x = torch.randn(5, 16)
    mean, matrix = phi_standardisation(x)
    torch.testing.assert_close(((x - mean) @ matrix.T).var(0), torch.ones(16, dtype=torch.float64))


@pytest.mark.parametrize("rows", [1, 4])
def test_rows_without_variance_are_refused(rows):
    with pytest.raises(ValueError, match=f"at least two rows that differ, got {rows} equal"):
        phi_standardisation(torch.full((rows, 3), 0.1))
