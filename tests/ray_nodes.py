"""More nodes for the tests' cluster: raylets of their own on this machine."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import ray


def named(name: str, processes: list[psutil.Process]) -> list[psutil.Process]:
    """Those that are called so, as far as they have not ended meanwhile."""
    found = []
    for process in processes:
        with suppress(psutil.Error):
            if name in " ".join(process.cmdline()):
                found.append(process)
    return found


class Node:
    """One raylet with all that runs on it."""

    def __init__(self, *options: str) -> None:
        command = [
            str(Path(sys.executable).parent / "ray"), "start", f"--address={ray.get_runtime_context().gcs_address}",
            "--block", "--disable-usage-stats", *options,
        ]  # fmt: skip
        environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
        before = {node["NodeID"] for node in ray.nodes()}
        self._process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 120
        while not (new := [n for n in ray.nodes() if n["Alive"] and n["NodeID"] not in before]):
            assert time.monotonic() < deadline and self._process.poll() is None, "the node did not join"
            time.sleep(0.1)
        self.node_id: str = new[0]["NodeID"]

    def processes(self) -> list[psutil.Process]:
        """All that run on it."""
        return psutil.Process(self._process.pid).children(recursive=True)

    def end(self, how: int = signal.SIGTERM) -> None:
        """End all of its processes.

        A raylet that is asked to end tells the cluster; one that is killed is missed a minute later.
        """
        if self._process.poll() is None:
            tree = [*psutil.Process(self._process.pid).children(recursive=True), psutil.Process(self._process.pid)]
            for process in tree:
                with suppress(psutil.NoSuchProcess):
                    process.send_signal(how)
            for process in psutil.wait_procs(tree, timeout=30)[1]:
                process.kill()
        self._process.wait(timeout=60)

    def wait_until_missed(self) -> None:
        """Until then, tests that follow would be given it."""
        deadline = time.monotonic() + 180
        while any(node["Alive"] for node in ray.nodes() if node["NodeID"] == self.node_id):
            assert time.monotonic() < deadline, "the node that was ended is still there"
            time.sleep(0.1)


def wait_until_used(nodes: list[Node]) -> None:
    """Until Ray spreads what it starts over them, too: it hears of new ones bit by bit.

    Those without a CPU get none of it.
    """

    @ray.remote(num_cpus=1, scheduling_strategy="SPREAD")
    class Probe:
        def node(self) -> str:
            return str(ray.get_runtime_context().get_node_id())

    deadline = time.monotonic() + 120
    with_cpu = {node["NodeID"] for node in ray.nodes() if node["Resources"].get("CPU")}
    missing = {node.node_id for node in nodes} & with_cpu
    while missing:
        assert time.monotonic() < deadline, f"nothing is started on {missing}"
        probe = Probe.remote()
        missing.discard(ray.get(probe.node.remote(), timeout=120))
        ray.kill(probe)


@contextmanager
def more_nodes(count: int, *options: str) -> Iterator[list[Node]]:
    """Nodes that join the tests' cluster and leave it again; `options` are those of `ray start`."""
    nodes: list[Node] = []
    try:
        for _ in range(count):  # one after the other: two that start at once on one machine hinder each other
            nodes.append(Node(*options))
        wait_until_used(nodes)
        yield nodes
    finally:
        for node in nodes:
            node.end()
        for node in nodes:
            node.wait_until_missed()
