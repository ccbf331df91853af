import torch

from lightning_rkd.losses import GraphKD


def test_soft_labels_that_are_certain_act_like_hard_ones():
    student, teacher, labels = torch.randn(7, 5), torch.randn(7, 4), torch.tensor([0, 1, 0, 2, 1, 0, 2])
    soft, loss = torch.nn.functional.one_hot(labels).float(), GraphKD(edges="between")
    torch.testing.assert_close(loss(student, teacher, labels=soft), loss(student, teacher, labels=labels))


def test_a_single_sample_has_no_edges_and_no_loss():
    student = torch.randn(1, 2, requires_grad=True)
    value = GraphKD()(student, torch.randn(1, 3))
    value.backward()
    assert value == 0
    assert torch.equal(student.grad, torch.zeros(1, 2))
