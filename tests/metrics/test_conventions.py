"""Metrics as torchmetrics and Lightning users write them: logged, called, collected, tracked, plotted."""

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import matplotlib.pyplot as plt
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics import MetricCollection, MetricTracker

from lightning_rkd.metrics import AsymmetricRetrieval, EmbeddingRetrieval, FewShotAccuracy, RelationalAgreement
from tests.harness import toys
from tests.harness.ranks import Ranks

ROWS = 64
FEW = {"ways": 2, "queries": 3, "episodes": 20}
MADE: list[Callable[..., Any]] = [
    EmbeddingRetrieval,
    lambda **kwargs: FewShotAccuracy(**FEW, **kwargs),
    lambda **kwargs: RelationalAgreement(k=3, **kwargs),
    AsymmetricRetrieval,
]
NAMES = ["map_at_r", "few_shot_accuracy_2_way_1_shot", "distance_correlation", "asymmetric/map_at_r"]
each = pytest.mark.parametrize(("made", "value"), list(zip(MADE, NAMES, strict=True)), ids=NAMES)


def rows(count: int = ROWS, seed: int = 0) -> dict[str, Tensor]:
    """Arguments of the updates of all metrics."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(count) % 4
    x = torch.randn(count, 5, generator=generator) + y[:, None]
    t = x + torch.randn(count, 5, generator=generator)
    return {"embeddings": x, "labels": y, "student": x, "teacher": t, "queries": x, "gallery": t}


def own(metric: Any, columns: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x for name, x in columns.items() if name in metric._update_signature.parameters}


def at_once(metric: Any, columns: dict[str, Tensor] | None = None) -> Any:
    metric.update(**own(metric, rows() if columns is None else columns))
    return metric.compute()


def part(start: int, stop: int) -> dict[str, Tensor]:
    return {name: x[start:stop] for name, x in rows().items()}


# Lightning


class Logs(pl.LightningModule):
    """Validates with a metric or a collection in one of the usual ways."""

    def __init__(self, metrics: Any, objects: bool) -> None:
        super().__init__()
        self.metrics, self.objects, self.net = metrics, objects, nn.Linear(1, 1)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.metrics.update(**batch)
        if self.objects:
            self.log_dict(self.metrics, on_step=False, on_epoch=True)

    def on_validation_epoch_end(self) -> None:
        if not self.objects:
            self.log_dict(self.metrics.compute())
            self.metrics.reset()


def validated(metrics: Any, objects: bool) -> dict[str, float]:
    trainer = toys.trainer()
    batches = DataLoader([part(n, n + 16) for n in range(0, ROWS, 16)], batch_size=None)  # type: ignore[arg-type]
    trainer.validate(Logs(metrics, objects), batches, verbose=False)
    assert all(metric.update_count == 0 for metric in metrics.values()), "they were reset"
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


def test_log_dict_of_computed_values_is_the_epochs() -> None:
    expected = {f"val/{name}": float(value) for made in MADE for name, value in at_once(made()).items()}
    metrics = MetricCollection({name: made() for made, name in zip(MADE, NAMES, strict=True)}, prefix="val/")
    assert validated(metrics, objects=False) == expected


def test_log_dict_of_a_collection_logs_metrics_of_one_value() -> None:
    metrics = MetricCollection({name: made(value=name) for made, name in zip(MADE, NAMES, strict=True)}, prefix="val/")
    expected = {f"val/{name}": float(at_once(made())[name]) for made, name in zip(MADE, NAMES, strict=True)}
    assert validated(metrics, True) == expected  # Lightning refused the dicts: must be a tensor


# torchmetrics


@each
def test_a_call_returns_the_value_of_its_rows_alone(made: Any, value: str) -> None:
    metric, single = made(), made(value=value)
    for start in range(0, ROWS, 16):
        batch = own(metric, part(start, start + 16))
        expected = at_once(made(), batch)
        assert metric(**batch) == expected  # was None
        assert single(**batch) == expected[value]
    assert metric.compute() == at_once(made())
    assert single.compute() == at_once(made())[value]


@each
def test_too_few_rows_for_a_value_are_nan_in_a_call_and_count_in_the_end(made: Any, value: str) -> None:
    metric = made()
    for n in range(ROWS):
        assert all(x.isnan() for x in metric(**own(metric, part(n, n + 1))).values())
    assert metric.compute() == at_once(made())


def called_on_one_rank(rank: int) -> tuple[float, float]:
    metric, columns = EmbeddingRetrieval(value="map_at_r"), own(EmbeddingRetrieval(), part(32 * rank, 32 * rank + 32))
    batch = float(metric(**columns)) if rank == 0 else float("nan")
    if rank == 1:
        metric.update(**columns)
    return batch, float(metric.compute())


def test_a_call_is_of_one_rank_and_compute_of_all(ranks: Ranks) -> None:
    (batch, first), (_, second) = ranks.run(called_on_one_rank)
    alone = EmbeddingRetrieval(value="map_at_r")
    assert batch == float(at_once(alone, part(0, 32)))
    assert first == second == float(at_once(EmbeddingRetrieval(value="map_at_r")))


def test_a_collection_shares_rows_between_metrics_that_store_the_same() -> None:
    metrics = {"l2": EmbeddingRetrieval(), "cosine": EmbeddingRetrieval(distance="cosine"), "few": MADE[1]()}
    once = {name: at_once(metric.clone()) for name, metric in metrics.items()}
    collection = MetricCollection(metrics)
    collection.update(**part(0, 32))
    assert sorted(map(sorted, collection.compute_groups.values())) == [["cosine", "l2"], ["few"]]
    collection.update(**part(32, 48))
    collection(**part(48, ROWS))  # a call of each would append to the rows that they share
    apart = {f"{name}_{key}": x for name, values in once.items() for key, x in values.items()}
    assert collection.compute() == apart


def test_clones_of_a_collection_have_prefixes_and_rows_of_their_own() -> None:
    train = MetricCollection([EmbeddingRetrieval(), FewShotAccuracy(**FEW)], prefix="train/")
    val = train.clone(prefix="val/")
    val.update(**rows())
    assert sorted(val.compute()) == sorted(f"val/{name}" for m in MADE[:2] for name in m().names)
    assert train["EmbeddingRetrieval"].update_count == 0


@pytest.mark.parametrize(("made", "value"), [*zip(MADE, NAMES, strict=True), (MADE[2], "angle_gap")])
def test_a_tracker_finds_the_best_epoch_of_one_value(made: Any, value: str) -> None:
    tracker, found = MetricTracker(made(value=value)), []
    for seed in range(4):
        tracker.increment()
        columns = own(made(), rows(seed=seed))
        tracker.update(**columns)
        found.append(float(at_once(made(), columns)[value]))
    best = min(found) if value == "angle_gap" else max(found)
    assert tracker.best_metric(return_step=True) == (pytest.approx(best), found.index(best))


@each
def test_values_of_one_or_several_epochs_are_plotted(made: Any, value: str) -> None:
    metric = made(value=value)
    at_once(metric)
    _, axes = metric.plot()
    epochs = list(torch.tensor([0.25, 0.5, 0.75]))
    metric.plot(epochs, ax=axes)  # was NotImplementedError
    assert [0.25, 0.5, 0.75] in [list(line.get_ydata()) for line in axes.lines]
    _, axes = made().plot([at_once(made()), at_once(made())])
    assert axes.get_legend_handles_labels()[1] == list(made().names)
    plt.close("all")


@each
def test_a_value_that_there_is_not_is_refused_by_name(made: Any, value: str) -> None:
    with pytest.raises(ValueError, match=f"value must be one of .*{value}.*, got 'map'"):
        made(value="map")
