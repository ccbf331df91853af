"""``lightning-rkd compare``: a file says what is compared, workers train it, tables say what came of it.

``plan`` reads the file, ``tasks`` makes runs of it and has
them done by processes, each of which runs :mod:`~lightning_rkd.cli.experiments.work`;
:mod:`~lightning_rkd.cli.experiments.tuning` chooses values on validation data, and
:mod:`~lightning_rkd.cli.experiments.tables` writes.
"""
