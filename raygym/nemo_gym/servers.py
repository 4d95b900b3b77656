"""The server processes of one environment: started, watched, restarted together, and ended without leftovers."""

from __future__ import annotations

import copy
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from contextlib import suppress
from pathlib import Path
from typing import Any

from raygym.nemo_gym import guard
from raygym.nemo_gym.config import NemoGymError
from raygym.nemo_gym.endpoints import Endpoint, write_endpoints
from raygym.nemo_gym.interpreter import clean_environment
from raygym.nemo_gym.layout import RESOURCES, Server
from raygym.nemo_gym.play import Environment

HOST = "127.0.0.1"
# Above those of Ray's workers and below those that Linux gives to connections: a server binds its port seconds after it
# was chosen.
_PORTS = range(20_001, 32_000)
_POLL_S = 0.1
_CHECK_EVERY_S = 10.0
_CHECK_TIMEOUT_S = 30.0
_STEADY_S = 60.0
"""After this long without trouble, earlier restarts are forgotten."""
_MOST_RESTARTS = 5
_LONGEST_BACK_OFF_S = 30.0
_COUNTING_AGENTS = {"simple_agent", "gymnasium_agent"}
"""Agents that take `max_steps`; their episodes are then as long as raygym's own may be."""
_INSTANCE_KINDS = {"resources_servers", "responses_api_agents", "responses_api_models", "environment_servers"}


class ServerSet:
    """Keeps the servers of one environment running. If one ends, all restart: none may know half of an episode."""

    def __init__(self, environment: Environment, folder: Path, back_off_s: float = 1.0) -> None:
        """Nothing is started yet.

        Args:
            environment: which servers, and where to publish their addresses.
            folder: for logs (`<server>.log`) and what servers write themselves.
            back_off_s: pause before the first restart; doubles with each one that follows soon.
        """
        self._environment = environment
        self._folder = folder
        self._back_off_s = back_off_s
        self._published = Path(environment.play.endpoints)
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._used_ports: set[int] = set()
        self._stopping = threading.Event()
        self._ready = threading.Event()
        self._problem = ""
        # One thread for everything, alive for as long as the servers.
        self._thread = threading.Thread(target=self._supervise, name="raygym-nemo-gym", daemon=True)

    def start(self) -> None:
        """Start the servers; returns at once."""
        self._folder.mkdir(parents=True, exist_ok=True)
        write_endpoints(self._published, {})
        self._thread.start()

    def wait_ready(self) -> None:
        """Block until all servers answer.

        Raises:
            NemoGymError: they could not be started; the text has the last line of the log.
        """
        self._ready.wait()
        if self._problem:
            raise NemoGymError(self._problem)

    def stop(self) -> None:
        """End all servers and wait until their processes are gone."""
        self._stopping.set()
        self._thread.join()

    def processes(self) -> dict[str, int]:
        """Process ids of the guards, by server."""
        return {name: process.pid for name, process in self._processes.items()}

    def _supervise(self) -> None:
        restarts = 0
        while not self._stopping.is_set():
            up_at = None
            try:
                write_endpoints(self._published, self._start_all())
                up_at = time.monotonic()
                self._ready.set()
                problem = self._watch()
            except Exception as error:  # nobody else hears of it: whatever it is, episodes and driver are told
                problem = str(error) if isinstance(error, NemoGymError) else f"{type(error).__name__}: {error}"
            write_endpoints(self._published, {})
            self._end_all()
            if self._stopping.is_set():
                return
            restarts = 1 if up_at is not None and time.monotonic() - up_at > _STEADY_S else restarts + 1
            # What does not start at all is told at once.
            if restarts > _MOST_RESTARTS or not self._ready.is_set():
                self._problem = problem
                write_endpoints(self._published, {}, problem)
                self._ready.set()
                return
            self._stopping.wait(min(_LONGEST_BACK_OFF_S, self._back_off_s * 2 ** (restarts - 1)))

    def _start_all(self) -> dict[str, Endpoint]:
        servers = self._environment.servers
        ports = {server.name: self._free_port() for server in servers}
        config = json.dumps(with_addresses(self._environment, ports, self._folder))
        for server in servers:
            self._processes[server.name] = self._spawn(server, config)
        deadline = time.monotonic() + self._environment.section.startup_timeout_s
        return {server.name: self._wait_up(server, ports[server.name], deadline) for server in servers}

    def _spawn(self, server: Server, config: str) -> subprocess.Popen[bytes]:
        folder = server.folder(self._environment.resolved.root)
        if not (folder / str(server.settings["entrypoint"])).is_file():
            raise NemoGymError(f"{server.name}: {folder} has no {server.settings['entrypoint']}")
        command = [self._environment.resolved.interpreter, str(server.settings["entrypoint"])]
        environment = {"NEMO_GYM_CONFIG_DICT": config, "NEMO_GYM_CONFIG_PATH": server.name, "PYTHONUNBUFFERED": "1"}
        with self._log(server.name).open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-I", "-S", guard.__file__, *command],
                cwd=folder,
                env=clean_environment() | environment,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def _wait_up(self, server: Server, port: int, deadline: float) -> Endpoint:
        url = f"http://{HOST}:{port}"
        while not self._stopping.is_set():
            self._check_alive(server.name)
            if time.monotonic() > deadline:
                timeout = self._environment.section.startup_timeout_s
                raise NemoGymError(f"{server.name} does not answer within {timeout:g} s (startup_timeout_s); "
                                   f"see {self._log(server.name)}")  # fmt: skip
            if (paths := _paths(url)) is not None:
                gymnasium = server.kind == RESOURCES and "/reset" in paths and "/step" in paths
                return Endpoint(url, gymnasium, "/close_session" in paths)
            time.sleep(_POLL_S)
        raise NemoGymError("stopped while starting")

    def _watch(self) -> str:
        """Returns what went wrong, or nothing when asked to stop."""
        checked = time.monotonic()
        endpoints = json.loads(self._published.read_text())["servers"]
        while not self._stopping.wait(_POLL_S):
            for name in self._processes:
                self._check_alive(name)
            if time.monotonic() - checked > _CHECK_EVERY_S:
                checked = time.monotonic()
                for name, at in endpoints.items():
                    if _paths(at["url"], _CHECK_TIMEOUT_S) is None:
                        return f"{name} has not answered for {_CHECK_TIMEOUT_S:g} s"
        return ""

    def _check_alive(self, name: str) -> None:
        if self._processes[name].poll() is not None:
            raise NemoGymError(f"{name} ended: {_last_line(self._log(name))} (see {self._log(name)})")

    def _end_all(self) -> None:
        for process in self._processes.values():
            assert process.stdin is not None
            process.stdin.close()  # which the guard takes as the order to end
        deadline = time.monotonic() + 2 * guard.GRACE_S
        for process in self._processes.values():
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=max(0.1, deadline - time.monotonic()))
            # Also what is left of a group whose guard was killed itself.
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
            process.wait()
        self._processes = {}

    def _free_port(self) -> int:
        for port in random.sample(_PORTS, len(_PORTS)):
            with socket.socket() as probe, suppress(OSError):
                if port not in self._used_ports:
                    probe.bind((HOST, port))
                    self._used_ports.add(port)
                    return port
        raise NemoGymError(f"no port from {_PORTS.start} to {_PORTS.stop - 1} is free on {HOST}")

    def _log(self, name: str) -> Path:
        return self._folder / f"{name}.log"


def with_addresses(environment: Environment, ports: dict[str, int], folder: Path) -> dict[str, Any]:
    """The config that each server gets: only the servers that run, each with its address."""
    needed = {server.name: server for server in environment.servers}
    config: dict[str, Any] = {}
    for name, entry in copy.deepcopy(environment.resolved.config).items():
        if name in needed:
            server = needed[name]
            settings = entry[server.kind][server.implementation]
            settings |= {"host": HOST, "port": ports[name]}
            if server.implementation in _COUNTING_AGENTS:
                turns = environment.play.max_turns
                settings["max_steps"] = min(turns, settings.get("max_steps") or turns)
        elif isinstance(entry, dict) and _INSTANCE_KINDS & set(entry):
            continue
        config[name] = entry
    return {**config, "results_dir": str(folder / "results"), "cache_dir": str(folder / "cache")}


def _paths(url: str, timeout_s: float = 2.0) -> set[str] | None:
    """The paths that a server serves; None while it does not answer."""
    try:
        with urllib.request.urlopen(f"{url}/openapi.json", timeout=timeout_s) as answer:
            return set(json.load(answer)["paths"])
    except urllib.error.HTTPError:
        return set()
    except (OSError, ValueError, KeyError):
        return None


def _last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    said = [line for line in lines if not line.startswith("raygym: ")]
    return said[-1][-300:] if said else "without a word"
