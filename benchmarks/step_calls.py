"""Counts the package functions that one training step of the callback calls, and the host time the callback adds.

A step is all that the Trainer does between two batches, with a linear student, RKD, N = 64, on one CPU device.
Calls are counted with ``sys.setprofile`` (Python functions whose file lies in the package). Host time is the
difference to plain steps, measured by turns in one run; teacher and student are linear, so that it is the cost of
everything around the networks. The steps: the teacher is called; a loss of one operation is added; the loss of this
package is added by hand in ``training_step``; the callback does it all.

    python benchmarks/step_calls.py                      # this checkout
    python benchmarks/step_calls.py --against ../other   # by turns with another checkout
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
ROWS, INPUTS, STEPS, WARMUP = 64, 32, 300, 50
WAYS = ("plain", "teacher", "any loss", "by hand", "callback")


def measure(loss_name: str) -> dict[str, Any]:
    """Calls by file of one step of the callback, and median milliseconds of each kind of step beyond a plain one."""
    import lightning.pytorch as pl
    import torch
    from torch import nn
    from torch.utils.data import DataLoader, TensorDataset

    import lightning_rkd
    from lightning_rkd import RelationalDistillation

    package = str(Path(lightning_rkd.__file__).parent)

    relational = getattr(lightning_rkd, loss_name)()
    teacher = nn.Linear(INPUTS, 64).eval().requires_grad_(False)

    class Student(pl.LightningModule):
        def __init__(self, way: str) -> None:
            super().__init__()
            self.embed = nn.Sequential(nn.Linear(INPUTS, 16))
            self.head = nn.Linear(16, 4)
            self.way = way

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            x, y = batch
            embedding = self.embed(x)
            loss = nn.functional.cross_entropy(self.head(embedding), y)
            if self.way in ("plain", "callback"):
                return loss
            with torch.no_grad():
                features = teacher(x)
            if self.way == "by hand":
                return loss + relational(embedding, features)
            return loss if self.way == "teacher" else loss + embedding.sum()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.01)

    class Observer(pl.Callback):
        def __init__(self) -> None:
            self.calls: Counter[str] = Counter()
            self.times: list[float] = []

        def _count(self, frame: Any, event: str, arg: Any) -> None:
            if event == "call" and frame.f_code.co_filename.startswith(package):
                self.calls[f"{frame.f_code.co_filename.removeprefix(package)[1:]}:{frame.f_code.co_name}"] += 1

        def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
            if trainer.global_step == WARMUP:
                sys.setprofile(self._count)
            self.start = time.perf_counter()

        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            elapsed = time.perf_counter() - self.start
            sys.setprofile(None)
            if trainer.global_step > WARMUP + 1:
                self.times.append(1000 * elapsed)

    torch.set_num_threads(1)
    data = TensorDataset(torch.randn(ROWS * STEPS, INPUTS), torch.randint(4, (ROWS * STEPS,)))

    def run(way: str) -> Observer:
        pl.seed_everything(0, verbose=False)
        observer = Observer()
        callbacks: list[pl.Callback] = [observer]
        if way == "callback":
            callbacks.append(RelationalDistillation(teacher, relational, student_layer="embed"))
        trainer = pl.Trainer(
            max_epochs=1,
            accelerator="cpu",
            callbacks=callbacks,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(Student(way), DataLoader(data, batch_size=ROWS))
        return observer

    runs = {way: run(way) for way in WAYS}
    plain = statistics.median(runs["plain"].times)
    beyond = {way: statistics.median(runs[way].times) - plain for way in WAYS[1:]}
    return {"calls": dict(runs["callback"].calls), "beyond": beyond}


def tell(results: list[dict[str, Any]], way: str) -> str:
    """Median of a time in several turns, least and most."""
    times = sorted(result["beyond"][way] for result in results)
    return f"{statistics.median(times):.2f} ({times[0]:.2f} to {times[-1]:.2f})"


def in_process(root: Path, loss: str) -> dict[str, Any]:
    environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(Path(__file__).resolve()), "--loss", loss]
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", type=Path, help="another checkout, measured by turns with this one")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--verbose", action="store_true", help="list every function")
    parser.add_argument("--loss", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.loss:
        warnings.simplefilter("ignore")
        logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
        print(json.dumps(measure(options.loss)))
        return
    roots = [ROOT] if options.against is None else [ROOT, options.against.resolve()]
    print("Milliseconds beyond a plain step: median (least to most)\n")
    print(f"| loss | checkout | calls | files | {' | '.join(WAYS[1:])} |")
    print("|---|---|---:|---:|" + "---:|" * len(WAYS[1:]))
    for loss in ("RKD", "RKDDistance"):
        found: dict[Path, list[dict[str, Any]]] = {root: [] for root in roots}
        for _ in range(options.turns):
            for root in roots:
                found[root].append(in_process(root, loss))
        for root, results in found.items():
            calls = Counter(results[0]["calls"])
            files = {name.partition(":")[0] for name in calls}
            name, times = "this" if root == ROOT else "other", " | ".join(tell(results, way) for way in WAYS[1:])
            print(f"| {loss} | {name} | {calls.total()} | {len(files)} | {times} |")
            if options.verbose:
                for function, count in calls.most_common():
                    print(f"    {count:4} {function}")


if __name__ == "__main__":
    main()
