"""``lightning-rkd compare``: a file says what is compared, workers train it, tables say what came of it.

:mod:`~lightning_rkd.comparison.plan` reads the file, :mod:`~lightning_rkd.comparison.tasks` makes runs of it and has
them done by processes, each of which runs :mod:`~lightning_rkd.comparison.work`;
:mod:`~lightning_rkd.comparison.tuning` chooses values on validation data, and
:mod:`~lightning_rkd.comparison.tables` writes.
"""
