"""Runs ``python -m lightning_rkd.cli``."""

import sys

from lightning_rkd.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
