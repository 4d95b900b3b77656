"""A Ray cluster of its own for tests that submit jobs to one, or that two processes share."""

from __future__ import annotations

import os
import secrets
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

# Ray and Serve give up on their own processes after seconds, which these can take on a machine that is slow or busy.
PATIENCE = {
    "RAY_agent_register_timeout_ms": "240000",
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "240",
    "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "240",
}


@contextmanager
def ray_head() -> Iterator[dict[str, str]]:
    """A local `ray start --head` with a dashboard, on ports and in a directory of its own.

    Yields:
        `ray` (the command), `dashboard` (its address), `address` (for RAY_ADDRESS), and the RAY_AUTH_* variables that
        its clients need.
    """
    ports = []
    # The agents' ports too: with the default ones, an agent fails beside another cluster's and no job is accepted.
    for _ in range(4):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            ports.append(probe.getsockname()[1])
    ray = str(Path(sys.executable).parent / "ray")
    with tempfile.TemporaryDirectory(prefix="rg", ignore_cleanup_errors=True) as directory:
        # A token of its own: whether Ray asks for one by default depends on whether this user's home has one.
        token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"} | token | PATIENCE
        process = subprocess.Popen(
            [ray, "start", "--head", "--block", "--num-cpus=2", f"--port={ports[0]}", f"--temp-dir={directory}",
             f"--dashboard-port={ports[1]}", f"--dashboard-agent-listen-port={ports[2]}",
             f"--dashboard-agent-grpc-port={ports[3]}", "--disable-usage-stats"],
            env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        try:
            wait_open(ports[0], process)
            yield {"ray": ray, "dashboard": f"http://127.0.0.1:{ports[1]}", "address": f"127.0.0.1:{ports[0]}", **token}
        finally:
            # `ray start --block` itself takes half a minute to end its processes.
            tree = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
            for member in tree:
                with suppress(psutil.NoSuchProcess):
                    member.kill()
            process.wait(timeout=60)


def wait_open(port: int, process: subprocess.Popen[bytes]) -> None:
    """Wait until somebody listens there."""
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and process.poll() is None:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.2)
    raise TimeoutError("ray start --head was not up within 240 s")
