import torch

from lightning_rkd.losses import RelaxedContrastive


def test_only_the_teachers_directions_count():
    student, teacher = torch.randn(6, 4, dtype=torch.float64), torch.randn(6, 3, dtype=torch.float64)
    lengths = torch.rand(6, 1, dtype=torch.float64) + 0.1
    value = RelaxedContrastive()(student, teacher)
    torch.testing.assert_close(RelaxedContrastive()(student, teacher * lengths), value)
    torch.testing.assert_close(RelaxedContrastive()(3 * student + 7, teacher), value)
    assert not torch.allclose(RelaxedContrastive()(student * lengths, teacher), value)


def test_pairs_the_teacher_finds_alike_are_pulled_and_others_pushed():
    teacher = torch.tensor([[1.0, 0.0], [1.0, 0.0], [-1.0, 0.0], [-1.0, 0.0]], dtype=torch.float64)
    good = torch.tensor([[0.0], [0.1], [5.0], [5.1]], dtype=torch.float64)
    assert float(RelaxedContrastive()(good, teacher)) < 0.2
    assert float(RelaxedContrastive()(good[[0, 2, 1, 3]], teacher)) > 1
