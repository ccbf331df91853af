"""Relational representation distillation by plain loops over samples and the rows of the queue."""

import math

import numpy as np


def unit(v: list[float]) -> list[float]:
    length = math.sqrt(sum(x * x for x in v))
    return [x / length for x in v]


def project(rows: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> list[list[float]]:
    return [
        unit(
            [
                float(b) + sum(float(w) * float(x) for w, x in zip(ws, row, strict=True))
                for ws, b in zip(weight, bias, strict=True)
            ]
        )
        for row in rows
    ]


def log_softmax(row: list[float], temperature: float) -> list[float]:
    top = max(row) / temperature
    total = math.log(sum(math.exp(x / temperature - top) for x in row)) + top
    return [x / temperature - total for x in row]


def rrd(
    student: list[list[float]],
    teacher: list[list[float]],
    queue: list[list[float]],
    student_temperature: float,
    teacher_temperature: float,
) -> float:
    """Projected rows, and the queue with the teacher's already in it."""
    total = 0.0
    for s, t in zip(student, teacher, strict=True):
        of_s, of_t = ([sum(a * b for a, b in zip(row, memory, strict=True)) for memory in queue] for row in (s, t))
        log_p, log_q = log_softmax(of_s, student_temperature), log_softmax(of_t, teacher_temperature)
        total -= sum(math.exp(q) * p for p, q in zip(log_p, log_q, strict=True))
    return total / len(student)
