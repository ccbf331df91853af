"""Relational representation distillation by plain loops over samples and the rows of the queue."""

import math

from tests.oracles.vectors import Rows, dot, softmax


def rrd(student: Rows, teacher: Rows, queue: Rows, student_temperature: float, teacher_temperature: float) -> float:
    """Projected rows, and the queue with the teacher's already in it."""
    total = 0.0
    for s, t in zip(student, teacher, strict=True):
        of_s, of_t = ([dot(row, memory) for memory in queue] for row in (s, t))
        q = softmax(of_t, teacher_temperature)
        total -= sum(a * math.log(b) for a, b in zip(q, softmax(of_s, student_temperature), strict=True) if a > 0)
    return total / len(student)
