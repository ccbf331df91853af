"""What all ranks showed in one step, for losses that relate samples to one another."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from lightning_rkd.losses.base import Term, at_tap
from lightning_rkd.utils.distributed import Group, gather_rows, rank_and_size
from lightning_rkd.utils.types import Mix, Outputs


class Gathered:
    """Rows of all ranks; every tensor is gathered once, however many taps show it and losses read it.

    Args:
        local: Labels, indices and views of the local rows.
        mix: With whom the local rows were mixed.
        counts: Rows of every rank.
        group: Process group.
    """

    def __init__(self, local: dict[str, Tensor | None], mix: Mix | None, counts: list[int], group: Group) -> None:
        self._local, self._mix, self._counts, self._group = local, mix, counts, group
        self._whole: dict[int, tuple[Tensor, Tensor]] = {}  # by the id of the local tensor, which stays alive in it

    def side(self, shown: Mapping[str, Outputs], term: Term, name: str) -> Outputs:
        """What a term reads of what a network showed of the local rows, per tap."""
        fields = (term.reads,) if isinstance(term.reads, str) else term.reads
        return self._outputs(at_tap(shown, term.tap, term.reads, who=name), fields)

    def rows(self, key: str) -> Tensor | None:
        """Labels, indices or views."""
        value = self._local[key]
        return None if value is None else self._gather(value)

    def mix(self) -> Mix | None:
        """With whom the rows were mixed, counted among all of them."""
        mix = self._mix
        if mix is None:
            return None
        first = sum(self._counts[: rank_and_size(self._group)[0]])  # of the rows of this rank
        partners = gather_rows(mix.partners + first, self._counts, self._group)
        labels = None if mix.labels is None else self._gather(mix.labels)
        return replace(mix, partners=partners, ratio=self._gather(mix.ratio), labels=labels)

    def _outputs(self, local: Outputs, fields: tuple[str, ...]) -> Outputs:
        whole = Outputs(classifier=local.classifier)
        for field in fields:
            value = getattr(local, field)
            if field != "classifier" and value is not None:
                several = isinstance(value, list)
                setattr(whole, field, [self._gather(v) for v in value] if several else self._gather(value))
        return whole

    def _gather(self, x: Tensor) -> Tensor:
        if id(x) not in self._whole:
            half = x.dtype in (torch.float16, torch.bfloat16)
            self._whole[id(x)] = x, gather_rows(x.float() if half else x, self._counts, self._group)
        return self._whole[id(x)][1]
