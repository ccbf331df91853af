"""Experiments: ``plan`` reads a comparison, ``tasks`` are its runs, ``schedule`` executes them, ``tables`` sums up."""
