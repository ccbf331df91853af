"""Differences between operating systems, and marks for tests that need what only some of them have."""

import os
import sys

import pytest

LOOPBACK = {"linux": {"GLOO_SOCKET_IFNAME": "lo"}, "darwin": {"GLOO_SOCKET_IFNAME": "lo0"}}.get(sys.platform, {})
"""Environment in which gloo uses the loopback device, where it has a fixed name."""

posix_only = pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals or links")
linux_only = pytest.mark.skipif(sys.platform != "linux", reason="needs fork or /proc as on Linux")
