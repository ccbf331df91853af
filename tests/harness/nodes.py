"""Two machines on one: network namespaces joined by a cable, in which nothing else can be reached."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).parents[2]
PORT = 29400


class Nodes:
    """Nodes 0 and 1, each with an address and a folder of its own below ``folder``; needs root and ``ip netns``."""

    def __init__(self, folder: Path) -> None:
        self.names = [f"lrkd-{os.getpid()}-{node}" for node in range(2)]
        self.folders = [folder / f"node{node}" for node in range(2)]
        self.started: list[subprocess.Popen[bytes]] = []
        for place in self.folders:
            place.mkdir(parents=True)
        try:
            for name in self.names:
                _ip("netns", "add", name)
            first, second = self.names
            _ip(*f"link add eth0 netns {first} type veth peer name eth0 netns {second}".split())
            for node, name in enumerate(self.names):
                _ip("-n", name, "addr", "add", f"{self.address(node)}/24", "dev", "eth0")
                for device in ("lo", "eth0"):
                    _ip("-n", name, "link", "set", device, "up")
        except OSError:
            self.close()
            raise

    @staticmethod
    def address(node: int) -> str:
        return f"10.0.0.{node + 1}"

    def start(self, node: int, command: Sequence[str], **environment: str) -> subprocess.Popen[bytes]:
        """Start a command on a node, in the node's folder; what it says goes to ``log`` there."""
        folder = self.folders[node]
        with (folder / "log").open("ab") as log:
            process = subprocess.Popen(
                ["ip", "netns", "exec", self.names[node], *command],
                cwd=folder,
                env=surroundings(folder) | {"GLOO_SOCKET_IFNAME": "eth0"} | environment,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        self.started.append(process)
        return process

    def torchrun(self, *program: str, timeout: float = 300) -> list[int]:
        """Run ``torchrun --nnodes 2``, one process on each node, and return the exit codes."""
        launch = [*TORCHRUN, "--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d"]
        launch += ["--rdzv-endpoint", f"{self.address(0)}:{PORT}"]
        # a host name that leads to its own address would spare these two
        here = [["--rdzv-conf", f"is_host={int(n == 0)}", "--local-addr", self.address(n)] for n in range(2)]
        both = [self.start(n, [*launch, *here[n], *program]) for n in range(2)]
        end = time.monotonic() + timeout
        try:
            return [process.wait(max(0.1, end - time.monotonic())) for process in both]
        finally:
            self.stop()

    def said(self, node: int) -> str:
        return (self.folders[node] / "log").read_text(errors="replace")

    def stop(self) -> None:
        """End every process of both nodes."""
        for name in self.names:
            listed = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True)
            for pid in listed.stdout.split():
                with suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
        while self.started:
            self.started.pop().wait(10)

    def close(self) -> None:
        """Leave no process and no namespace behind."""
        self.stop()
        for name in self.names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]


def surroundings(folder: Path) -> dict[str, str]:
    """The environment of a process that works in ``folder`` and keeps its caches there."""
    return os.environ | {"PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(folder / "cache"), "OMP_NUM_THREADS": "1"}


def _ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"ip {' '.join(words)}: {done.stderr.strip()}")
