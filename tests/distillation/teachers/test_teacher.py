"""The teacher teaches, stays frozen, and comes back as it was."""

import copy
import pickle

import pytest
import torch
from torch import nn

from lightning_rkd.distillation.layers import Tap
from lightning_rkd.distillation.teachers import Teacher
from lightning_rkd.utils.types import Batch
from tests.harness import nets

X = torch.randn(4, nets.WIDTH, generator=torch.Generator().manual_seed(0))


def half(network: nn.Module) -> nn.Module:
    return network.to(torch.bfloat16)


def test_it_is_restored_with_its_tensors_values_dtype_and_modes() -> None:
    network = nets.teacher(dropout=0.5, norm=True).train()
    network.norm.eval()
    before = nets.snapshot(network)
    teacher = Teacher(network)
    for _ in range(2):
        teacher.attach(None)
        assert teacher.to("cpu", half)
        assert not teacher.to("cpu", half), "it is there already"
        assert network.first.weight.dtype == network.norm.running_mean.dtype == torch.bfloat16
        teacher(Batch(X.bfloat16()))
        teacher.detach()
        assert nets.same(before, network)
        assert nets.attachments(network) == []


def test_parts_that_leave_evaluation_mode_are_set_back_in_the_next_step() -> None:
    network = nets.teacher(dropout=0.5, norm=True)
    teacher = Teacher(network)
    teacher.attach(None)
    teacher.to("cpu")
    expected = teacher(X)
    for part in (network, network.norm):
        part.train()
        assert torch.equal(teacher(X), expected)
        assert not any(module.training for module in network.modules())
    teacher.detach()


def test_it_comes_back_from_another_device() -> None:
    network = nets.teacher(norm=True)
    before, teacher = nets.snapshot(network), Teacher(network)
    teacher.attach(None)
    teacher.to("meta")
    assert {t.device.type for t in (*network.parameters(), *network.buffers())} == {"meta"}
    teacher.detach()
    assert nets.same(before, network)


def test_moved_in_inference_mode_it_comes_back_trainable() -> None:
    network = nets.teacher(norm=True)
    before, teacher = nets.snapshot(network), Teacher(network)
    teacher.attach(None)
    with torch.inference_mode():
        teacher.to("cpu", half)
        teacher(Batch(X.bfloat16()))
    teacher.detach()
    assert nets.same(before, network)
    network(X).sum().backward()


@pytest.mark.parametrize("last", [0, 1])
def test_two_teachers_of_one_network_may_leave_in_any_order(last: int) -> None:
    network = nets.teacher(dropout=0.5, norm=True).train()
    before, teachers = nets.snapshot(network), [Teacher(network), Teacher(network)]
    for teacher in teachers:  # the second finds a network that is moved and in evaluation mode
        teacher.attach("act")
        teacher.to("cpu", half)
        teacher(Batch(X.bfloat16()))
    teachers[1 - last].detach()
    assert network.first.weight.dtype == torch.bfloat16
    assert not network.training
    teachers[last](Batch(X.bfloat16()))
    teachers[last].detach()
    assert nets.same(before, network)
    assert nets.attachments(network) == []


def test_one_that_must_not_be_moved_is_not() -> None:
    teacher = Teacher(nets.teacher(), move=False)
    teacher.attach(None)
    assert teacher.to("cpu", half), "there still is something to compare over ranks"
    assert not teacher.to("cpu", half)
    assert teacher.network.first.weight.dtype == torch.float32


def test_copies_share_the_network_and_pickles_work_while_attached() -> None:
    teacher = Teacher(nets.teacher())
    teacher.attach("act")
    deep = copy.deepcopy({"module": teacher})["module"]
    assert deep.network is teacher.network
    teacher.to("cpu", half)
    for twin in (pickle.loads(pickle.dumps(teacher)), copy.copy(teacher), deep):
        twin.attach(None)
        twin.detach()
        assert teacher.outputs(Batch(X.bfloat16()))[0].features[""].embedding.dtype == torch.bfloat16, (
            "still hooked, and still away"
        )


def test_it_must_be_a_network_and_attached() -> None:
    with pytest.raises(TypeError, match=r"a teacher is an nn\.Module, a network and not its class, got 'resnet50'"):
        Teacher("resnet50")
    with pytest.raises(RuntimeError, match="attach the teacher to a layer before its features are read"):
        Teacher(nets.teacher()).outputs(Batch(X))
    with pytest.raises(RuntimeError, match="attach the teacher to a layer before moving it"):
        Teacher(nets.teacher()).to("cpu")
    with pytest.raises(ValueError, match="no layer 'x'"):
        Teacher(nets.teacher()).attach(Tap("x"))


def test_channels_last_it_gives_the_same_and_is_restored() -> None:
    seen: list[tuple[bool, bool]] = []
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())

    def look(module: nn.Module, inputs: tuple[torch.Tensor]) -> None:
        stored = (inputs[0], module.weight)
        seen.append(tuple(x.is_contiguous(memory_format=torch.channels_last) for x in stored))

    network[2].register_forward_pre_hook(look)
    images = torch.randn(2, 3, 9, 9)
    expected = network(images)
    before, teacher = network[2].weight.stride(), Teacher(network, channels_last=True)
    teacher.attach(None)
    teacher.to("cpu")
    torch.testing.assert_close(teacher.outputs(Batch(images))[0].features[""].embedding, expected)
    teacher.detach()
    assert seen == [(False, False), (True, True)]
    assert network[2].weight.stride() == before
    with pytest.raises(ValueError, match="channels_last=True changes how the network is stored: leave out move=False"):
        Teacher(network, move=False, channels_last=True)
