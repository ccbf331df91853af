"""Multi-head distillation: its equation, its heads, and what it refuses."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_rkd.modules.multihead import MiddleHead, MultiHeadDistillation, soft_and_hard
from lightning_rkd.utils.types import Outputs
from tests.harness import toys
from tests.harness.scheme_toys import CASES, MIDDLE, fit, images, net, teacher
from tests.oracles import classifiers as oracle
from tests.oracles.differences import check_gradients

CASE = CASES["MultiHeadDistillation"]


def terms(module: MultiHeadDistillation, student: Outputs, teacher: Outputs, labels: Tensor) -> tuple[Tensor, Tensor]:
    final, heads = (module.distiller.losses[name].loss for name in ("final", "heads"))
    return final(student, teacher, labels=labels), heads(student, teacher, labels=labels)


OTHER = {"temperature": 2.0, "alpha": 0.7, "beta": 2.0}


@pytest.mark.parametrize(("rows", "count", "settings"), [(4, 2, {}), (1, 1, OTHER)])
def test_both_parts_are_those_of_the_equation(rows: int, count: int, settings: dict[str, Any]) -> None:
    module = MultiHeadDistillation(net(), teacher(), MIDDLE[:count], MIDDLE[:count], head_width=4, **settings).double()
    labels = torch.arange(rows) % 3
    both = [
        Outputs(
            logits=torch.randn(rows, 3, dtype=torch.float64),
            feature_maps=[torch.randn(rows, c, 6, 6, dtype=torch.float64) for c in (2, 5)[:count]],
        )
        for _ in range(2)
    ]
    module.distiller.losses["heads"].loss.materialize(*both, like=torch.empty(0, dtype=torch.float64))
    module.eval()
    final, heads = terms(module, *both, labels)
    inside = module.distiller.losses["heads"].loss
    with torch.no_grad():
        middle = [
            (s(a).tolist(), t(b).tolist())
            for s, t, a, b in zip(
                inside.heads, inside.teacher_heads, both[0].feature_maps, both[1].feature_maps, strict=True
            )
        ]
    numbers = {"temperature": 4.0, "alpha": 0.1, "beta": 0.5} | settings
    expected = oracle.multi_head(tuple(s.logits.tolist() for s in both), middle, labels.tolist(), **numbers)
    assert final.item() == pytest.approx(expected[0], rel=1e-12)
    assert heads.item() == pytest.approx(expected[1], rel=1e-12)


def test_the_gradients_of_both_parts_are_those_of_the_equation() -> None:
    module, labels = MultiHeadDistillation(net(), teacher(), MIDDLE, MIDDLE).double(), torch.arange(4) % 3
    z = torch.randn(6, 4, 3, dtype=torch.float64)
    student = Outputs(logits=z[0].requires_grad_(), feature_maps=[x.requires_grad_() for x in z[1:3].unbind()])
    taught = Outputs(logits=z[3], feature_maps=[*z[4:]])
    inside = module.distiller.losses["heads"].loss
    inside.materialize(student, taught, like=torch.empty(0, dtype=torch.float64))
    inside.heads = inside.teacher_heads = nn.ModuleList(nn.Identity() for _ in MIDDLE)  # the maps are logits already
    leaves = {"final": student.logits, **{str(i): x for i, x in enumerate(student.feature_maps)}}
    t = [x.tolist() for x in (taught.logits, *taught.feature_maps)]
    for part, value in enumerate(terms(module, student, taught, labels)):

        def loops(given: dict[str, Any], part: int = part) -> float:
            pairs = [*zip(given.values(), t, strict=True)]
            return oracle.multi_head(pairs[0], pairs[1:], labels.tolist(), 4.0, 0.1, 0.5)[part]

        check_gradients(value, leaves, loops)


def test_soft_labels_are_taken_as_they_are() -> None:
    zs, zt, labels = torch.randn(4, 3), torch.randn(4, 3), torch.tensor([0, 2, 1, 1])
    hard = soft_and_hard(zs, zt, labels, temperature=4.0, alpha=0.1)
    soft = soft_and_hard(zs, zt, nn.functional.one_hot(labels, 3).float(), temperature=4.0, alpha=0.1)
    torch.testing.assert_close(hard, soft)


def test_teachers_heads_learn_from_the_labels_alone() -> None:
    """Their gradient is that of their cross-entropy, for any weight of the student's term."""
    grads = []
    for beta in (0.0, 5.0):
        module = CASE.made(beta=beta)
        fit(module, batches=list(images())[:1])
        inside = module.distiller.losses["heads"].loss
        grads.append([p.grad.clone() for p in inside.teacher_heads.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    assert any(float(g.abs().max()) > 0 for g in grads[0])


def test_heads_are_made_before_optimizers_trained_and_not_deployed() -> None:
    module = CASE.made()
    trainer = fit(module)
    inside = module.distiller.losses["heads"].loss
    held = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
    assert {id(p) for p in inside.parameters()} <= held
    assert [head[0].in_channels for head in (*inside.heads, *inside.teacher_heads)] == [4, 8]
    x, _ = next(iter(images()))
    assert torch.equal(module.eval()(x), module.student(x))


def test_small_maps_need_padding_and_the_message_says_so() -> None:
    with pytest.raises(ValueError, match=r"at least 5 x 5, got \(2, 3, 4, 4\).*head_padding=1"):
        MiddleHead(3, 2, width=4)(torch.ones(2, 3, 4, 4))
    assert MiddleHead(3, 2, width=4, padding=1)(torch.ones(2, 3, 3, 3)).shape == (2, 2)
    with pytest.raises(ValueError, match=r"takes maps \(N, C, H, W\)"):
        MiddleHead(3, 2, width=4)(torch.ones(2, 3))


def test_a_teacher_of_other_classes_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^MultiHeadDistillation: the student has 3 classes, the teacher 5"):
        fit(CASE.made(teacher=teacher(out=5)))


def test_a_step_is_that_of_the_loss_written_by_hand() -> None:
    x, y = next(iter(images()))
    ours, still = CASE.made(optimizer=toys.sgd), CASE.made(optimizer=lambda p: torch.optim.SGD(p, 0.0))
    for module in (ours, still):
        torch.manual_seed(5)  # of the heads
        fit(module, batches=[(x, y)])
    student, network = net(), teacher().eval()
    with torch.no_grad():
        t = Outputs(feature_maps=[network.backbone.stage1(x)], logits=network(x))
    maps = student.backbone.stage1(x)
    s = Outputs(feature_maps=[maps], logits=student.head(student.backbone[1:](maps)))
    optimizer = toys.sgd(student.parameters())
    torch.stack(terms(still.train(), s, t, y)).sum().backward()
    optimizer.step()
    assert toys.gap(ours.student, student) <= 1e-6
    assert toys.gap(still.student, student) > 1e-3
