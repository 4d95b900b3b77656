"""The Ray cluster that a run uses: the one it is submitted to, or one of its own."""

from __future__ import annotations

import logging
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import ray
from ray._common.utils import get_default_ray_temp_dir
from ray._private import auto_init_hook, ray_constants

from raygym import cluster_guard
from raygym.config import ConfigError, HttpConfig
from raygym.testing import chaos

logger = logging.getLogger(__name__)
# Ray and Serve give up on their own processes after seconds, which the start of several engines and learners on a small
# machine can take.
_PATIENCE = {
    "RAY_agent_register_timeout_ms": "120000",
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "120",
    "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "60",
}
# gloo, in learners and in engines, listens where the machine's name leads, which may be a network.
_LOOPBACK = {"GLOO_SOCKET_IFNAME": "lo"}
_STARTS = 3
_GUARD_TIMEOUT_S = 60.0
_TOKEN_FILE = Path(".ray") / "auth_token"


class _OwnCluster:
    """What is known of a cluster that this process started, and the guard that sees to its end."""

    def __init__(self) -> None:
        """Before Ray's start, so that its death in the middle of it is seen to as well."""
        root, driver = Path(get_default_ray_temp_dir()).resolve(), os.getpid()
        self._root = root
        self._known = cluster_guard.sessions_of(root, driver)
        arguments = [str(root), str(driver), str(cluster_guard.GRACE_S), *self._known]
        self._guard = subprocess.Popen(
            [sys.executable, "-I", "-S", cluster_guard.__file__, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    @contextmanager
    def hidden_token(self) -> Iterator[None]:
        """Ray leaves the file of its token as the user's umask makes it, which other users can often read.

        Where it makes one in here, its folder lets nobody else in until the file does not either. Another umask would
        be inherited by Ray's workers, and be that of what they write.
        """
        token = Path.home() / _TOKEN_FILE
        made, folder = not token.exists(), token.parent
        mode: int | None = None
        if made:
            with suppress(OSError):  # a home that cannot be written: Ray says so itself, if it needs the file
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
                mode = stat.S_IMODE(folder.stat().st_mode)
                folder.chmod(0o700)
        try:
            yield
        finally:
            with suppress(OSError):  # the token came from a variable or another file
                token.chmod(0o600)
            if mode is not None:
                with suppress(OSError):
                    folder.chmod(mode)

    def end(self, *, keep_logs: bool) -> Path | None:
        """Wait until nothing of it is left, Ray itself being shut down; returns where its logs are kept."""
        logs = [session / "logs" for session in self._sessions()] if keep_logs else []
        assert self._guard.stdin is not None
        with suppress(OSError):  # it was killed: what it would have removed stays
            self._guard.stdin.write(cluster_guard.KEEP_LOGS if keep_logs else cluster_guard.REMOVE)
            self._guard.stdin.close()
        try:
            self._guard.wait(timeout=_GUARD_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._guard.kill()
            self._guard.wait()
        return logs[-1] if logs else None

    def logs(self) -> Path | None:
        """Where Ray writes its logs now; None before it has begun."""
        sessions = self._sessions()
        return sessions[-1] / "logs" if sessions else None

    def _sessions(self) -> list[Path]:
        names = cluster_guard.sessions_of(self._root, os.getpid()) - self._known
        return [self._root / name for name in sorted(names)]


_own: _OwnCluster | None = None
_logs: Path | None = None


def connect() -> None:
    """Join the cluster of `RAY_ADDRESS`, or start one on this machine, which then ends with this process.

    Actors get the driver's working directory as a place to import environments from. A cluster of our own listens on
    the loopback interface alone, and asks for Ray's token (Ray's default) unless the user has set RAY_AUTH_MODE.

    Raises:
        ConfigError: RAYGYM_CHAOS names no plan of faults.
    """
    global _own, _logs
    # A thread that still deploys when a run is interrupted must not start another cluster by its next call.
    auto_init_hook.enable_auto_connect = False
    # Serve tells the driver about every start and stop; the console does that in fewer words.
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    paths = [os.getcwd(), *filter(None, [os.environ.get("PYTHONPATH")])]
    options: dict[str, Any] = {
        "log_to_driver": False,
        "logging_level": "ERROR",
        "runtime_env": {"env_vars": {"PYTHONPATH": os.pathsep.join(paths), "TOKENIZERS_PARALLELISM": "false"}},
    }
    # Where faults are injected, in this machine's actors too.
    chaos.load()
    options["runtime_env"]["env_vars"] |= chaos.inherited()
    if os.environ.get("RAY_ADDRESS"):
        if os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR"):
            # A submitted job brings its own working directory; its runtime_env may not be given twice.
            options.pop("runtime_env")
        _init(address="auto", **options)
        return
    for name, value in (_PATIENCE | _LOOPBACK).items():
        os.environ.setdefault(name, value)
    _logs, _own = None, _OwnCluster()
    cluster_allowed = ray_constants.ENABLE_RAY_CLUSTER
    # Ray's own switch for machines that no other one may join; given as an option, 127.0.0.1 is replaced.
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        with _own.hidden_token():
            _start(address="local", include_dashboard=False, **options)
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = cluster_allowed


def _start(**options: Any) -> None:
    """Start a cluster. Ray gives its raylet 30 s, whatever it is told, and then leaves half a cluster behind."""
    for attempt in range(1, _STARTS + 1):
        try:
            return _init(**options)
        except Exception as error:  # Ray has no class for it
            if "timed out during startup" not in str(error) or attempt == _STARTS:
                raise
            logger.warning("Ray did not come up in time and is started again: %s", error)
            ray.shutdown()


def _init(**options: Any) -> None:
    numbers = (signal.SIGINT, signal.SIGTERM)
    handlers = {number: signal.getsignal(number) for number in numbers}
    try:
        ray.init(**options)
    except SystemExit as error:  # what Ray makes of a SIGTERM that comes meanwhile
        raise KeyboardInterrupt from error
    finally:
        if threading.current_thread() is threading.main_thread():
            # Ray takes SIGTERM for itself, in Python and in its core, and ends the process without letting us clean up.
            for number, handler in handlers.items():
                if handler is not None:
                    signal.signal(number, handler)


def disconnect(*, keep_logs: bool = False) -> None:
    """Leave the cluster. One of our own ends, with all of its processes and files; `keep_logs`: but for Ray's logs."""
    global _own, _logs
    try:
        if ray.is_initialized():
            ray.shutdown()
    finally:
        own, _own = _own, None
        if own is not None:
            _logs = own.end(keep_logs=keep_logs)


def is_own() -> bool:
    """Whether this process has started the cluster that it is connected to."""
    return _own is not None


def session_logs() -> Path | None:
    """Where the actors' logs are, on a cluster of our own; None on another one, whose logs outlive the run."""
    return _own.logs() if _own is not None else None


def kept_logs() -> Path | None:
    """Where Ray's logs of the last cluster of our own are, which ended by a failure."""
    return _logs


def http_port(http: HttpConfig) -> int:
    """The port to serve on: the configured one, checked to be free, or a free one for 0.

    Raises:
        ConfigError: the port is taken or the host is not one of this machine.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((http.host, http.port))
        except OSError as error:
            raise ConfigError(
                f"policy.http.port: cannot listen on {http.host}:{http.port} ({error.strerror}); "
                f"expected a free port, or 0 for any"
            ) from error
        return int(probe.getsockname()[1])
