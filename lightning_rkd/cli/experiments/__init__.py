"""Experiments: runs that resume, comparisons of several networks over seeds, tables, tuning and the report page.

:mod:`~lightning_rkd.cli.experiments.plan` reads a comparison, :mod:`~lightning_rkd.cli.experiments.tasks` turns it into
training runs, :mod:`~lightning_rkd.cli.experiments.processes` executes them in parallel, and
:mod:`~lightning_rkd.cli.experiments.tables` summarises the results.
"""
