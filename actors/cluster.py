"""The Ray cluster that a run uses: the one it is submitted to, or one of its own."""

from __future__ import annotations

import os
import socket
from typing import Any

import ray
from ray import serve

from raygym.config import ConfigError, HttpConfig


def connect() -> bool:
    """Join the cluster of `RAY_ADDRESS`, or start one on this machine. Returns whether it is our own.

    Actors get the driver's working directory as a place to import environments from.
    """
    paths = [os.getcwd(), *filter(None, [os.environ.get("PYTHONPATH")])]
    options: dict[str, Any] = {
        "log_to_driver": False,
        "logging_level": "ERROR",
        "runtime_env": {"env_vars": {"PYTHONPATH": os.pathsep.join(paths), "TOKENIZERS_PARALLELISM": "false"}},
    }
    if os.environ.get("RAY_ADDRESS"):
        if os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR"):
            # A submitted job brings its own working directory; its runtime_env may not be given twice.
            options.pop("runtime_env")
        ray.init(address="auto", **options)
        return False
    ray.init(address="local", include_dashboard=False, **options)
    return True


def disconnect(own: bool) -> None:
    """Leave the cluster; end it, Serve included, where it is our own."""
    if not ray.is_initialized():
        return
    if own:
        serve.shutdown()
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
