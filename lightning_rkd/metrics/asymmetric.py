"""Retrieval with queries of one network in the gallery of another, as student queries in the teacher's gallery."""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_rkd.metrics._rows import Samples, check_rows, find_keys
from lightning_rkd.metrics._stored import StoredGallery
from lightning_rkd.metrics.retrieval import Candidates, EmbeddingRetrieval
from lightning_rkd.utils.distributed import Shard, run_on_all_ranks

_PREFIX = "asymmetric/"
Searched = Literal["student", "teacher", "both"]
"""Gallery of an evaluation: rows of the student, of the teacher, or one after the other."""


class AsymmetricRetrieval(EmbeddingRetrieval):
    r"""Retrieval with queries of one network, the student, in a gallery of another, the teacher.

    The values are those of :class:`EmbeddingRetrieval` under names with ``asymmetric/`` before them. Each sample has
    two rows, its query and its gallery row, of equal width. A query does not find the gallery row of its own sample, as
    in published evaluations where queries and gallery are the same images. With ``is_query`` the queries are those of
    the marked samples, and the gallery rows those of the others.

    A student's rows lie in the teacher's space only if a loss has aligned the two, see
    :attr:`RelationalLoss.aligns <lightning_rkd.losses.RelationalLoss>`; relations alone leave any rotation free. Where
    the loss has a projection, ``loss.project(rows)`` are the queries; ``DistillationModule`` and
    ``RetrievalEvaluation`` apply it.

    Args:
        distance: ``"cosine"``, or ``"euclidean"``, which depends on the lengths of gallery rows.
        gallery: Gallery that was embedded before; ``None`` takes the gallery rows that come with the updates. Queries
            then need ``indices``, unless ``self_match``.
        self_match: Whether a query may find the row of its own sample.
        kwargs: Further arguments of :class:`EmbeddingRetrieval`.

    Shapes:
        queries (N, D), labels (N,) integer, gallery (N, D), indices (N,) integer, is_query (N,) bool; results are
        float32 scalars.

    Raises:
        ValueError: As :class:`EmbeddingRetrieval`; for queries and gallery rows of different widths; and for a stored
            gallery whose labels are not those of the batches, or an index of inner products without ``"cosine"``.

    Reference:
        Xie et al. 2024, D3still: Decoupled Differential Distillation for Asymmetric Image Retrieval (its evaluation,
        with ``distance="cosine"``, leaves out the query's own image).

    Example:
        >>> metric, labels = AsymmetricRetrieval(), torch.tensor([0, 0, 1, 1])
        >>> teacher = torch.tensor([[4.0, 0.0], [3.0, 1.0], [0.0, 2.0], [1.0, 2.0]])
        >>> metric.update(teacher.sign(), labels, teacher)
        >>> float(metric.compute()["asymmetric/recall_at_1"])
        0.5
    """

    queries: list[Tensor]
    gallery: list[Tensor]

    def __init__(
        self,
        distance: Literal["euclidean", "cosine"] = "cosine",
        *,
        gallery: StoredGallery | None = None,
        self_match: bool = False,
        **kwargs: Any,
    ) -> None:
        self.stored, self.self_match = gallery, self_match
        self._floats = ("queries", "gallery")[: 2 if gallery is None else 1]
        super().__init__(distance=distance, **kwargs)
        if gallery is not None and gallery.compares_products and distance != "cosine":
            raise ValueError("the index compares inner products: pass distance='cosine', the same for unit rows")

    def update(  # type: ignore[override] # queries and gallery are rows of two networks
        self,
        queries: Tensor,
        labels: Tensor,
        gallery: Tensor | None = None,
        indices: Tensor | None = None,
        is_query: Tensor | None = None,
    ) -> None:
        """Add N samples.

        Args:
            queries: (N, D), floating point, rows of the student.
            labels: (N,) class of each sample.
            gallery: (N, D), rows of the teacher for the same samples; not with a stored gallery.
            indices: (N,) row of each sample in its data set.
            is_query: (N,) bool, true for queries; the other samples are the gallery.
        """
        if self.engine:
            self.engine.check_ranks(self.process_group)
        if (gallery is None) == (self.stored is None):
            raise ValueError(
                "the gallery is missing: pass the teacher's rows of the same samples, update(queries, labels, gallery)"
                if gallery is None
                else "the gallery is given twice, here and as a StoredGallery: leave it out of update"
            )
        if self.stored is not None and indices is None and not self.self_match and bool((self.stored.ids >= 0).any()):
            raise ValueError(
                "the stored gallery may hold the queries' own samples: pass indices=..., rows of the data set, or "
                "allow a query to find itself, self_match=True"
            )
        rows = {"queries": queries} if gallery is None else {"queries": queries, "gallery": gallery}
        self._check_widths(queries, gallery)
        self._add(rows, labels=labels, indices=indices, is_query=is_query)

    @property
    def unused(self) -> frozenset[str]:
        """Parameters of ``update`` that an evaluation does not pass."""
        return frozenset() if self.stored is None else frozenset({"gallery"})

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the values."""
        return tuple(_PREFIX + name for name in super().names)

    def _check_widths(self, queries: Any, gallery: Any) -> None:
        wide = self.stored.dim if self.stored is not None else _width(gallery)
        if (narrow := _width(queries)) != wide and None not in (narrow, wide):
            raise ValueError(
                f"queries have width {narrow} and gallery rows width {wide}: train with a loss that aligns the spaces "
                "and projects the student's rows where widths differ, such as CSD() or Regression(), and pass "
                "loss.project(queries) (DistillationModule and RetrievalEvaluation do)"
            )

    def _find_candidates(self, samples: Samples) -> Candidates:
        found = super()._find_candidates(samples) if self.stored is None else self._find_stored(self.stored, samples)
        if not self.self_match:
            return found
        return Candidates(found.rows, found.labels, found.keys, torch.full_like(found.position, -1))

    def _find_stored(self, stored: StoredGallery, samples: Samples) -> Candidates:
        """The stored gallery, of which each rank reads its share."""
        device, seen = samples.keys.device, samples.columns["labels"]
        ids, known = stored.ids.to(device), torch.arange(len(stored), device=device)
        sample = find_keys(samples.keys, ids) if "indices" in samples.columns else torch.full_like(ids, -1)
        if stored.labels is None:
            known = torch.nonzero(sample >= 0)[:, 0]
            labels = seen[sample[known]]
        else:
            labels = stored.labels.to(device)
            clash = torch.nonzero((sample >= 0) & (labels != seen[sample]))
            if len(clash):
                at = int(clash[0])
                raise ValueError(
                    f"the sample {int(ids[at])} has label {int(seen[sample[at]])} in the batches and {int(labels[at])} "
                    "in the stored gallery: ids must be rows of the data set, and negative for other samples"
                )
        start, stop = Shard(self.process_group).range(len(known))
        rows = run_on_all_ranks(
            lambda: check_rows(stored.read(known[start:stop].cpu()), self.store_dtype, [], "the stored gallery"),
            self.process_group,
        )
        keys = ids[known]
        position = find_keys(keys, samples.keys) if "indices" in samples.columns else torch.full_like(seen, -1)
        return Candidates(rows.to(device), labels, keys, position)


def _width(rows: Any) -> int | None:
    return rows.shape[1] if isinstance(rows, Tensor) and rows.ndim == 2 else None


def choose_gallery(metrics: Mapping[str, Metric], gallery: Searched | StoredGallery) -> dict[str, Metric]:
    """Metrics in which every :class:`EmbeddingRetrieval` searches the given gallery, or one of each with ``"both"``."""
    if not (isinstance(gallery, StoredGallery) or gallery in ("student", "teacher", "both")):
        raise ValueError(f"gallery must be 'student', 'teacher', 'both' or StoredGallery(rows), got {gallery!r:.80}")
    chosen, searches = {}, False
    for name, metric in metrics.items():
        retrieval = type(metric) is EmbeddingRetrieval
        if not retrieval or gallery in ("student", "both"):
            chosen[name] = metric
        if retrieval and gallery != "student":
            given = {key: getattr(metric, key) for key in ("k", "distance", "working_memory", "store_dtype", "engine")}
            value = None if metric.value is None else _PREFIX + str(metric.value)
            stored = gallery if isinstance(gallery, StoredGallery) else None
            chosen[_PREFIX + name] = AsymmetricRetrieval(**given, value=value, gallery=stored)
        searches = searches or retrieval or isinstance(metric, AsymmetricRetrieval)
    if gallery != "student" and not searches:
        what = repr(gallery) if isinstance(gallery, str) else "StoredGallery(...)"
        raise ValueError(
            f"gallery={what} applies to every EmbeddingRetrieval (no subclass), but the metrics are "
            f"{[type(metric).__name__ for metric in metrics.values()]}: add EmbeddingRetrieval(distance='cosine')"
        )
    return chosen
