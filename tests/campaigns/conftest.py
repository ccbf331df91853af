"""Campaigns kill processes and limit files, which needs POSIX."""

import os

collect_ignore_glob = [] if os.name == "posix" else ["test_*.py"]
