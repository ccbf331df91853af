"""Cost model of a training step and of an evaluation on many GPUs: the tables of docs/scaling.md.

    python benchmarks/scaling.py

Bytes and collectives are exact, and counted with 2 and 4 processes in ``tests/distillation/test_traffic.py``. Seconds
follow from nominal rates and are not measured: a ring gathers or sums over the slowest link, a step is as long as the
sum of its parts, and searches and triplets run at a share of the peak.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

GATHER, SUM, BROADCAST = "all_gather", "all_reduce", "broadcast"
STEP_CALLS = {GATHER: 3, SUM: 3}

# nominal rates of one GPU and its links
NODE, WITHIN, BETWEEN = 8, 450e9, 50e9  # GPUs of a node; bytes per second of a GPU inside a node and to others
HOP = 5e-6  # seconds from one GPU of a ring to the next
TRIPLETS = 8.5e11  # per second, as measured on an H100: 18 TFLOP/s at 21 operations each
PRODUCTS = 3e13  # operations per second of float32 products, and of float64 ones
MATRIX = 57  # bytes of RKD-DA for a pair of rows: 0.9 GiB for 4,096 rows on an H100
QUERY_MEMORY = 4 * 2**30  # working memory of a search on a GPU


def step_traffic(ranks: int, rows: int, student_dim: int, teacher_dim: int) -> dict[str, int]:
    """Bytes that each rank has after the collectives of a step with RKD over ``rows`` rows, equally many on each."""
    return {
        GATHER: 8 * ranks + 4 * rows * (student_dim + teacher_dim),  # row counts, both embeddings
        SUM: 4 * rows * student_dim * 2 + 4,  # gradient and value of the split loss, gradient of the gathered rows
    }


def search_traffic(ranks: int, rows: int, dim: int, k: Sequence[int] = (1,), passes: int = 1) -> dict[str, int]:
    """The same of ``EmbeddingRetrieval`` where every row is a query, in so many passes over the gallery.

    In a pass the gallery travels twice: for the search, and for the exact distances of close calls.
    """
    table = 8 * ranks * 7  # rows, columns that were given, width, type and first bad row
    return {
        GATHER: table + 8 * rows + 8 * ranks * (3 + 2 * passes),  # labels; row counts
        SUM: 8 * (dim + 1) + 8 * (len(k) + 3),  # mean and spread; totals
        BROADCAST: passes * 2 * 4 * rows * dim,
    }


def sharded_traffic(rows: int, dim: int, neighbours: int) -> int:
    """Bytes that each rank receives if the gallery stays, and queries and their candidates travel (sharded faiss)."""
    return 4 * rows * dim + 12 * rows * neighbours


def passes_of(rows_per_rank: int, dim: int, neighbours: int) -> int:
    """Passes over the gallery of a search on a GPU, whose queries and neighbours fill the working memory."""
    return math.ceil(rows_per_rank / (QUERY_MEMORY // (16 * dim + 80 * (neighbours + 4))))


def ring_seconds(ranks: int, size: int, rounds: int) -> float:
    """Seconds of a ring that moves a tensor of ``size`` bytes past all ranks: once to gather, twice to sum."""
    speed = WITHIN if ranks <= NODE else BETWEEN
    return rounds * (ranks - 1) * (size / ranks / speed + HOP)


def step_table(per_rank: int = 128, student_dim: int = 128, teacher_dim: int = 512) -> str:
    """RKD-DA with the same number of rows on each GPU."""
    head = ["GPUs", "N", "gathered", "summed", "both, ms", "distances, ms"]
    head += ["triplets on each", "ms", f"{MATRIX} N^2 bytes"]
    table = []
    for ranks in (8, 16, 32, 64, 128, 256, 512):
        rows = ranks * per_rank
        traffic = step_traffic(ranks, rows, student_dim, teacher_dim)
        seconds = ring_seconds(ranks, traffic[GATHER], 1) + ring_seconds(ranks, traffic[SUM], 2)
        triplets = rows**3 / ranks
        distances = 2 * rows**2 * (student_dim + teacher_dim) / PRODUCTS  # on every rank
        sizes = (as_size(traffic[GATHER]), as_size(traffic[SUM]))
        work = (f"{triplets:.1e}".replace("e+", "e"), as_seconds(1e3 * triplets / TRIPLETS), as_size(MATRIX * rows**2))
        table.append([str(ranks), f"{rows:,}", *sizes, as_seconds(1e3 * seconds), as_seconds(1e3 * distances), *work])
    return as_table(head, table)


def search_table(dim: int = 128, neighbours: int = 5) -> str:
    """Every row a query; travelling blocks against a gallery that stays on its ranks."""
    head = ["gallery", "GPUs", "passes", "travelling blocks", "s", "sharded", "s", "products, s"]
    table = []
    for rows in (10**6, 10**7, 10**8):
        for ranks in (8, 64, 512):
            passes = passes_of(rows // ranks, dim, neighbours)
            travelling = search_traffic(ranks, rows, dim, passes=passes)[BROADCAST]
            sharded = sharded_traffic(rows, dim, neighbours)
            speed = WITHIN if ranks <= NODE else BETWEEN
            products = 2 * rows**2 * dim / ranks / PRODUCTS
            cells = [as_size(travelling), as_seconds(travelling / speed), as_size(sharded), as_seconds(sharded / speed)]
            table.append([f"10^{round(math.log10(rows))}", str(ranks), str(passes), *cells, as_seconds(products)])
    return as_table(head, table)


def as_seconds(x: float) -> str:
    return f"{x:,.0f}" if x >= 10 else f"{x:.2g}"


def as_size(size: float) -> str:
    unit, name = (2**30, "GiB") if size >= 2**30 else (2**20, "MiB")
    return f"{size / unit:,.0f} {name}" if size >= 10 * unit else f"{size / unit:.1f} {name}"


def as_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---:"] * len(head), *rows))


if __name__ == "__main__":
    print(step_table(), search_table(), sep="\n\n")
