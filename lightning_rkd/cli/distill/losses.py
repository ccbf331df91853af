"""Loss of a distillation: the default, or one read from an expression."""

import ast
import inspect
from collections.abc import Iterator
from difflib import get_close_matches
from importlib import import_module
from operator import attrgetter
from typing import Any

from torch import Tensor, nn

from lightning_rkd.cli.distill.samples import Kind
from lightning_rkd.cli.trainer import load_registered_losses
from lightning_rkd.distillation.evaluation import find_aligning_loss
from lightning_rkd.losses.base import RelationalLoss
from lightning_rkd.losses.csd import CSD
from lightning_rkd.losses.rkd import RKD
from lightning_rkd.losses.weighting import LossSum, Weighable, terms_of

_PLACES = ("lightning_rkd.losses", "lightning_rkd.experimental")
TEMPERATURES: dict[Kind, float] = {"image": 0.05, "text": 0.1, "vector": 0.1}


def choose_loss(kind: Kind) -> LossSum:
    """RKD-DA, three times, and CSD: relations of the student alone, and between its rows and the teacher's.

    The weights and temperatures stem from probes with two teachers, one of images and one of texts.
    """
    t = TEMPERATURES[kind]
    return 3 * RKD() + CSD(student_temperature=t, teacher_temperature=t)


class Projection(nn.Module):
    """Projection of a loss that computes it in a method."""

    def __init__(self, loss: RelationalLoss) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, rows: Tensor) -> Tensor:
        """Rows of the student in the teacher's space."""
        found: Tensor = getattr(self.loss, "project")(rows)  # noqa: B009 - not every loss has one
        return found


def find_projection(loss: Weighable) -> nn.Module | None:
    """Module from the student's space to the teacher's, ``None`` if no term of the loss aligns the two."""
    aligning = find_aligning_loss([term.loss for term in terms_of(loss).values()])
    if aligning is None:
        return None
    project = getattr(aligning, "project", nn.Identity())
    return project if isinstance(project, nn.Module) else Projection(aligning)


def with_projection(network: nn.Module, loss: Weighable) -> nn.Module:
    """The network with the projection to the teacher's space behind it, where the loss has trained one."""
    project = find_projection(loss)
    return network if project is None or isinstance(project, nn.Identity) else nn.Sequential(network, project)


def describe_loss(loss: Weighable) -> str:
    """The loss as an expression."""
    terms = terms_of(loss).values()
    return " + ".join(
        ("" if term.weight == 1 else f"{term.weight:g} * " if isinstance(term.weight, int | float) else "w(epoch) * ")
        + f"{type(term.loss).__name__}({term.loss.extra_repr()})"
        for term in terms
    )


def parse_loss(text: str) -> Weighable:
    """Read a loss such as ``CSD``, ``RKD(angle_weight=0)`` or ``3 * RKD + CSD(student_temperature=0.1)``.

    Names are those of ``lightning_rkd.losses``, of ``lightning_rkd.experimental``, of registered losses, or paths.

    Raises:
        ValueError: The text is no such expression, or there is no such loss.

    Example:
        >>> describe_loss(parse_loss("2 * RKDDistance"))
        "2 * RKDDistance(reduction='official')"
    """
    try:
        found = _read(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, TypeError) as error:
        raise ValueError(f"the loss {text!r} cannot be read: {error}") from error
    if not isinstance(found, Weighable):
        raise ValueError(f"the loss {text!r} holds no loss")
    return found


def check_reads(loss: Weighable) -> None:
    """Refuse losses of logits or feature maps: there are embeddings alone."""
    for term in terms_of(loss).values():
        if term.loss.reads != "embedding":
            raise ValueError(
                f"the loss {type(term.loss).__name__} reads {term.loss.reads}, and distill compares embeddings: take a "
                "loss of embeddings, such as CSD"
            )


def _read(node: ast.expr) -> Any:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _read(node.left) + _read(node.right)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
        return _read(node.left) * _read(node.right)
    if isinstance(node, ast.Call) and not node.args:
        arguments = {str(word.arg): _read_value(word.value) for word in node.keywords}
        loss = _find_class(ast.unparse(node.func))
        known = list(dict.fromkeys(_list_arguments(loss)))
        if unknown := [name for name in arguments if name not in known]:
            raise TypeError(f"{loss.__name__} has no argument {unknown[0]!r}, it takes {', '.join(known) or 'none'}")
        return loss(**arguments)
    if isinstance(node, ast.Name | ast.Attribute):
        return _find_class(ast.unparse(node))()
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        return node.value
    raise SyntaxError(f"expected losses, + and numbers times losses, got {ast.unparse(node)!r}")


def _list_arguments(loss: type[RelationalLoss]) -> Iterator[str]:
    """Names of a loss's arguments, with those that it hands on to its parents."""
    for parent in loss.__mro__:
        if own := vars(parent).get("__init__"):
            parameters = list(inspect.signature(own).parameters.values())[1:]
            yield from (x.name for x in parameters if x.kind not in (x.VAR_POSITIONAL, x.VAR_KEYWORD))
            if all(x.kind != x.VAR_KEYWORD for x in parameters):
                return


def _read_value(node: ast.expr) -> Any:
    try:
        return ast.literal_eval(node)
    except ValueError:
        text = ast.unparse(node)
        raise SyntaxError(f"expected a number, a text in quotes or a list as an argument, got {text}") from None


def _find_class(name: str) -> type[RelationalLoss]:
    module, _, last = name.rpartition(".")
    for place in [module] if module else _PLACES:
        try:
            found = getattr(import_module(place), last)
        except (ImportError, AttributeError):
            continue
        if isinstance(found, type) and issubclass(found, RelationalLoss):
            return found
    if name in (registered := load_registered_losses()):
        return registered[name]
    known = {one.lower(): one for one in (*registered, *map(attrgetter("__name__"), _list_classes()))}
    near = [known[one] for one in get_close_matches(last.lower(), known, n=2)]
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    raise ValueError(f"there is no loss {name!r}: {hint}the gallery of losses, docs/losses.md, lists their names")


def _list_classes() -> list[type[RelationalLoss]]:
    found = [getattr(module, name) for module in map(import_module, _PLACES) for name in module.__all__]
    return [one for one in found if isinstance(one, type) and issubclass(one, RelationalLoss)]
