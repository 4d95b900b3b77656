"""`raygym view`: serve one run's page on this machine until Ctrl-C."""

from __future__ import annotations

import contextlib
import signal
import socket
import threading
import webbrowser
from pathlib import Path
from types import FrameType

import uvicorn

from raygym.config import ConfigError
from raygym.viewer.app import viewer_app
from raygym.viewer.run_folder import NotARun, RunFolder

HOST = "127.0.0.1"
DEFAULT_PORT = 8642


def view(path: Path, port: int | None, *, opens: bool) -> None:
    """Serve until interrupted.

    Args:
        path: of a run, a rollout, or one file of trajectories.
        port: on the loopback interface; 0 takes any free one, None the usual one or else any.
        opens: show it in the browser.

    Raises:
        ConfigError: there is nothing to view, or the port is taken.
    """
    try:
        run = RunFolder(path)
    except NotARun as error:
        raise ConfigError(str(error)) from error
    with listening_socket(port) as bound:
        address = f"http://{HOST}:{bound.getsockname()[1]}/"
        server = uvicorn.Server(
            uvicorn.Config(viewer_app(run), log_level="warning", server_header=False, timeout_graceful_shutdown=2)
        )
        print(f"{path} is shown at {address}  (Ctrl-C ends it)", flush=True)
        if opens:
            # One in this terminal returns when it is left, and waits for what the server answers.
            threading.Thread(target=webbrowser.open, args=(address,), daemon=True).start()
        # uvicorn raises again what it was stopped by.
        signal.signal(signal.SIGTERM, _interrupt)
        with contextlib.suppress(KeyboardInterrupt):
            server.run(sockets=[bound])


def listening_socket(port: int | None) -> socket.socket:
    """A socket of the loopback interface; see `view`."""
    if port is not None and not 0 <= port < 2**16:
        raise ConfigError(f"--port: {port} is none; expected 0 to 65535, or leave it out for any free one")
    listening = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        try:
            listening.bind((HOST, DEFAULT_PORT if port is None else port))
        except OSError:
            if port is not None:
                raise
            listening.bind((HOST, 0))
        listening.listen()
    except OSError as error:
        listening.close()
        told = f"no port of {HOST} can be used" if port is None else f"--port: {port} cannot be used"
        advice = "" if port is None else "; leave it out for any free one"
        raise ConfigError(f"{told} ({error.strerror}){advice}") from error
    return listening


def _interrupt(_signal: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt
