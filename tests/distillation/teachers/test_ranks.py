"""Teachers over two processes: all ranks learn from the same ones, and two devices learn what one does."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from lightning_rkd.distillation.teachers import CachedTeacher, EnsembleTeacher, Teacher
from lightning_rkd.losses.rkd import RKD
from tests.callbacks.test_ddp import batches
from tests.distillation.teachers.test_training import wide
from tests.harness import toys
from tests.harness.faces import FACES, taught
from tests.harness.ranks import Ranks


def fitted(rank: int | None, face: str, teacher: Any, loss: Any, counts: tuple[int, int] = (8, 8)) -> dict[str, Tensor]:
    module, callbacks = taught(face, teacher, loss)
    with toys.devices(rank) as where:
        toys.fit(module, *callbacks, batches=batches(rank, counts), **where)
    return {name: x.clone() for name, x in getattr(module, "student", module).state_dict().items()}


# Several teachers


def by_an_ensemble(rank: int | None, face: str, combine: Any, counts: tuple[int, int] = (8, 8)) -> dict[str, Tensor]:
    loss: Any = RKD() + toys.Hint() + toys.Gram()
    if combine == "relations":
        loss = loss + toys.Projected(5, 16)
    standardised = combine.endswith("standardised")
    if standardised:  # Gram at full weight would diverge
        loss = RKD() + 0.1 * toys.Hint()
    teachers, how = [toys.teacher(), wide()], combine.partition(",")[0]
    teacher = EnsembleTeacher(teachers, [1, 3], how, standardise_rows=30 if standardised else 0)
    return fitted(rank, face, teacher, loss, counts)


@pytest.mark.parametrize("face", FACES)
@pytest.mark.parametrize("combine", ["relations", "losses", "losses, standardised"])
def test_two_devices_learn_from_an_ensemble_what_one_does(ranks: Ranks, combine: str, face: str) -> None:
    # DDP averages a user's own loss over ranks alike; the module's weighs them by their rows
    counts = (11, 5) if face == "module" else (8, 8)
    first, second = ranks.run(by_an_ensemble, face, combine, counts)
    alone = by_an_ensemble(None, face, combine)
    assert toys.largest_gap(first, second) == 0.0
    assert toys.largest_gap(first, alone) <= 1e-6
    assert toys.largest_gap(fitted(None, face, wide(), 0.0 * RKD()), alone) > 1e-3


def by_a_cache(rank: int | None, face: str, folder: str) -> dict[str, Tensor]:
    """Both ranks would write the cache, were it not there."""
    return fitted(rank, face, CachedTeacher(folder, teacher=toys.teacher()), RKD())


@pytest.mark.parametrize("face", FACES)
def test_two_devices_learn_from_a_cache_as_one_from_the_live_teacher(ranks: Ranks, face: str, tmp_path: Path) -> None:
    (first, second), (again, _) = (ranks.run(by_a_cache, face, str(tmp_path)) for _ in range(2))
    assert toys.largest_gap(first, second) == toys.largest_gap(first, again) == 0.0
    assert toys.largest_gap(first, fitted(None, face, toys.teacher(), RKD())) <= 1e-6


def differing(rank: int, face: str, kind: str) -> str:
    """A fit with a teacher of other weights on every rank."""
    network = toys.teacher(seed=rank)
    teacher: Any = Teacher(network, move=False) if kind == "left alone" else EnsembleTeacher([wide(), network])
    module, callbacks = taught(face, teacher, RKD())
    with toys.devices(rank) as where:
        try:
            toys.fit(module, *callbacks, batches=batches(rank), **where)
        except RuntimeError as error:
            return str(error)
    return "taught"


@pytest.mark.parametrize("face", FACES)
@pytest.mark.parametrize("kind", ["left alone", "ensemble"])
def test_a_fit_with_teachers_that_differ_between_ranks_is_refused(ranks: Ranks, kind: str, face: str) -> None:
    for message in ranks.run(differing, face, kind):
        assert message.startswith("teacher '1': " * (kind == "ensemble") + "the teacher's weights differ between ranks")


# Sharded


def sharded(network: nn.Module) -> nn.Module:
    mesh = init_device_mesh("cpu", (2,))
    for part in (network.first, network):
        fully_shard(part, mesh=mesh, reshard_after_forward=True)
    return network


def by_a_sharded_teacher(rank: int | None, face: str, kind: str) -> tuple[dict[str, Tensor], list[bool]]:
    network = wide() if rank is None else sharded(wide())
    before = [hasattr(p, "full_tensor") for p in network.parameters()]
    teacher: Any = Teacher(network, move=False)
    if kind == "ensemble":
        teacher = EnsembleTeacher([teacher, toys.teacher()])
    state = fitted(rank, face, teacher, RKD())
    assert [hasattr(p, "full_tensor") for p in network.parameters()] == before
    assert toys.attachments(network) == [] or rank is not None  # those of the sharding itself
    return state, before


@pytest.mark.parametrize("face", FACES)
@pytest.mark.parametrize("kind", ["alone", "ensemble"])
def test_a_sharded_teacher_teaches_as_the_whole_one(ranks: Ranks, kind: str, face: str) -> None:
    (first, parts), (second, _) = ranks.run(by_a_sharded_teacher, face, kind)
    assert all(parts)
    alone, _ = by_a_sharded_teacher(None, face, kind)
    assert toys.largest_gap(first, second) == 0.0
    assert toys.largest_gap(first, alone) <= 1e-6
    assert toys.largest_gap(fitted(None, face, wide(), 0.0 * RKD()), alone) > 1e-3


def moved_although_sharded(rank: int, face: str) -> str:
    network = sharded(wide())
    try:
        fitted(rank, face, network, RKD())
    except ValueError as error:
        assert {p.dtype for p in network.parameters()} == {torch.float32}
        return str(error)
    return "taught"


@pytest.mark.parametrize("face", FACES)
def test_a_sharded_teacher_that_is_to_be_moved_is_refused_with_the_cure(ranks: Ranks, face: str) -> None:
    for message in ranks.run(moved_although_sharded, face):
        assert message.endswith("leave it where it is, Teacher(network, move=False)")
