"""The Ray cluster that a run uses: the one it is submitted to, or one of its own."""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
from typing import Any

import ray

from raygym.config import ConfigError, HttpConfig
from raygym.testing import chaos


def connect() -> None:
    """Join the cluster of `RAY_ADDRESS`, or start one on this machine, which then ends with this process.

    Actors get the driver's working directory as a place to import environments from.

    Raises:
        ConfigError: RAYGYM_CHAOS names no plan of faults.
    """
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
    _init(address="local", include_dashboard=False, **options)


def _init(**options: Any) -> None:
    numbers = (signal.SIGINT, signal.SIGTERM)
    handlers = {number: signal.getsignal(number) for number in numbers}
    ray.init(**options)
    if threading.current_thread() is threading.main_thread():
        # Ray takes SIGTERM for itself, in Python and in its core, and ends the process without letting us clean up.
        for number, handler in handlers.items():
            if handler is not None:
                signal.signal(number, handler)


def disconnect() -> None:
    """Leave the cluster, which ends it where it is our own."""
    if ray.is_initialized():
        ray.shutdown()


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
