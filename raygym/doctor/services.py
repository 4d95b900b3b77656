"""What a run talks to: ports, proxies, a Ray cluster that it is to join, NeMo Gym's own Python."""

from __future__ import annotations

import importlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from raygym.doctor.finding import Finding, ok, problem, warning

_FEW_PORTS = 5000
_CONNECT_S = 3.0
_PROBE_S = 60.0
_RAY_PORT, _DASHBOARD_PORT = 6379, 8265


def ports() -> Iterator[Finding]:
    """Whether the loopback interface can be listened on, and connected to, at ports that the system chooses."""
    try:
        with (
            socket.create_server(("127.0.0.1", 0)) as server,
            socket.create_connection(server.getsockname(), _CONNECT_S),
        ):
            pass
    except OSError as error:
        advice = "allow it (firewall, sandbox): Ray and the engines talk over the loopback interface"
        yield problem("ports", f"127.0.0.1 cannot be listened on or connected to ({error})", advice)
        return
    low, high = (int(text) for text in Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    if high - low < _FEW_PORTS:
        advice = "sysctl net.ipv4.ip_local_port_range='32768 60999'"
        yield warning("ports", f"only {low} to {high} for connections", advice)
    else:
        yield ok("ports", f"127.0.0.1 works, {low} to {high} for connections")


def proxies() -> Iterator[Finding]:
    """A proxy for the internet that would also get the calls between a run's own parts."""
    set_ones = [name for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY") if os.environ.get(name)]
    if not set_ones:
        return
    spared = (os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or "").replace(" ", "").split(",")
    if "*" in spared or "127.0.0.1" in spared:
        yield ok("proxy", f"{set_ones[0]}, not for 127.0.0.1")
    else:
        advice = "export no_proxy=127.0.0.1,localhost (and the cluster's addresses), in capitals as well"
        yield warning("proxy", f"{set_ones[0]} is set, also for 127.0.0.1", advice)


def ray() -> Iterator[Finding]:
    """The cluster that a run would join, or that it starts its own."""
    address = os.environ.get("RAY_ADDRESS", "")
    if address:
        yield from _joined(address)
        return
    here = [port for port in (_RAY_PORT, _DASHBOARD_PORT) if _answers("127.0.0.1", port)]
    if _RAY_PORT in here:
        advice = "to use that one: export RAY_ADDRESS=auto"
        yield warning("Ray", f"a cluster seems to be here (port {_RAY_PORT}), and a run starts another one", advice)
    else:
        yield ok("Ray", "a run starts a cluster of its own and ends it")


def _joined(address: str) -> Iterator[Finding]:
    if address.startswith("ray://"):
        advice = "run on the cluster: ray job submit, or RAY_ADDRESS=auto on its head node"
        yield problem("Ray", f"RAY_ADDRESS is {address}, Ray Client's", advice)
        return
    host, _, port = address.rpartition(":")
    if port.isdigit() and not _answers(host, int(port)):
        advice = "start it (ray start --head), correct the address, or unset RAY_ADDRESS for a cluster of its own"
        yield problem("Ray", f"RAY_ADDRESS is {address}, where nobody answers", advice)
        return
    done = subprocess.run(
        [sys.executable, "-m", "raygym.actors.cluster_probe", address],
        capture_output=True, text=True, timeout=_PROBE_S, check=False, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        advice = "see `ray status`; a cluster with a token needs RAY_AUTH_TOKEN or ~/.ray/auth_token here as well"
        yield problem("Ray", f"the cluster of RAY_ADDRESS={address} cannot be asked: {last}", advice)
        return
    told = json.loads(done.stdout.splitlines()[-1])
    theirs, ours = (told["cluster_ray"], told["cluster_python"]), (told["ray"], told["python"])
    text = f"cluster of RAY_ADDRESS={address}: Ray {theirs[0]}, Python {theirs[1]}"
    if theirs != ours:
        yield problem("Ray", f"{text}; here {ours[0]}, {ours[1]}", "install the same versions on all machines")
    else:
        yield ok("Ray", text)


def chaos() -> Iterator[Finding]:
    """Variables that change what a run does, and are forgotten easily."""
    if os.environ.get("RAYGYM_CHAOS"):
        yield warning("RAYGYM_CHAOS", "is set: faults are injected into every run", "unset it, unless that is wanted")


def nemo_gym() -> Iterator[Finding]:
    """The Python of NeMo Gym, which only its environments need."""
    interpreter = importlib.import_module("raygym.nemo_gym.interpreter")
    try:
        python: str = interpreter.find_interpreter("")
    except Exception:  # NemoGymMissing; its module comes with imports that may be broken themselves
        yield ok("NeMo Gym", "not prepared; only its environments need it (make nemo-gym)")
        return
    code = "from importlib.metadata import version; print(version('nemo-gym'))"
    done = subprocess.run(
        [python, "-c", code], env=interpreter.clean_environment(),
        capture_output=True, text=True, timeout=_PROBE_S, check=False,
    )  # fmt: skip
    if done.returncode:
        yield problem("NeMo Gym", f"{python} does not have it", f"rm -r {Path(python).parent.parent}; make nemo-gym")
    elif (found := done.stdout.strip()) != interpreter.VERSION:
        advice = "make nemo-gym"
        yield warning("NeMo Gym", f"{found}, and raygym is tested with {interpreter.VERSION}", advice)
    else:
        yield ok("NeMo Gym", f"{found} at {python}")


def _answers(host: str, port: int) -> bool:
    try:
        with socket.create_connection((host, port), timeout=_CONNECT_S):
            return True
    except OSError:
        return False
