"""A command of raygym in a process of its own, for callers that are programs.

A run ends its own cluster, handles signals and blocks for hours, and a process can have only one Ray. None of that
belongs into a notebook's kernel, whose event loop runs already, or into a script that uses Ray itself.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Sequence
from typing import IO

from raygym.config import ConfigError
from raygym.errors import RunFailed

_PROGRAM = [sys.executable, "-m", "raygym.owned_command"]
_BAD_CONFIG = 2
_INTERRUPTED = 130
_STOP_S = 200.0
"""After an interrupt; the command itself gives up before that (see `owned_command`)."""
_PREFIX = "raygym: "
_LAST_LINES = 20
"""Of what a command said, where it ended without naming a cause."""


def run_command(arguments: Sequence[str], *, quiet: bool = False) -> None:
    """Run `raygym <arguments>` to its end; what it prints appears where this process prints.

    An interrupt of the caller interrupts the command, and is raised again once that has stopped everything.

    Args:
        arguments: of the command line.
        quiet: nothing is printed.

    Raises:
        ConfigError: it refused its config or its inputs.
        RunFailed: it failed; the text is the cause.
        KeyboardInterrupt: it was interrupted.
    """
    # In a terminal the command draws there itself. Elsewhere it may be a cell's output, which has no descriptor.
    own_terminal = not quiet and sys.stdout is sys.__stdout__ and sys.stdout is not None and sys.stdout.isatty()
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as errors:
        process = subprocess.Popen(
            [*_PROGRAM, *arguments],
            stdin=subprocess.PIPE,
            stdout=None if own_terminal else subprocess.PIPE,
            stderr=errors,
            text=True,
            encoding="utf-8",
            errors="replace",
            env=dict(os.environ) if own_terminal else _plain_environment(),
            # A terminal's Ctrl-C would reach it beside ours, and a second one skips what it still has to stop.
            start_new_session=True,
        )
        try:
            _to_the_end(process, quiet=quiet)
        except BaseException:
            _interrupt(process, quiet=quiet)
            raise
        finally:
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    with contextlib.suppress(OSError):
                        pipe.close()
        if process.returncode:
            raise _failure(process.returncode, errors)


def _plain_environment() -> dict[str, str]:
    """A notebook's kernel asks for colours, which would also bring a live line's control characters into the cell."""
    forced = ("FORCE_COLOR", "CLICOLOR_FORCE")
    return {key: value for key, value in os.environ.items() if key not in forced} | {"TTY_COMPATIBLE": "0"}


def _to_the_end(process: subprocess.Popen[str], *, quiet: bool) -> None:
    if process.stdout is not None:
        for line in process.stdout:
            if not quiet:
                print(line, end="", flush=True)
    process.wait()


def _interrupt(process: subprocess.Popen[str], *, quiet: bool) -> None:
    """Have it stop everything, as Ctrl-C would, and wait for that, or kill it; a second interrupt does not wait."""
    if process.poll() is None and process.stdin is not None:
        process.stdin.close()
    too_late = threading.Timer(_STOP_S, process.kill)
    too_late.daemon = True
    too_late.start()
    try:
        _to_the_end(process, quiet=quiet)
    finally:
        too_late.cancel()


def _failure(status: int, errors: IO[str]) -> BaseException:
    errors.seek(0)
    said = deque(errors, maxlen=1000)
    told = [line.removeprefix(_PREFIX).rstrip() for line in said if line.startswith(_PREFIX)]
    if status == _INTERRUPTED:
        return KeyboardInterrupt()
    if status == _BAD_CONFIG and said:
        return ConfigError("\n".join(told) or said[-1].strip())  # what argparse says has another prefix
    if told:
        return RunFailed("\n".join(told))
    how = f"was ended by signal {-status}" if status < 0 else f"ended with exit code {status}"
    last = "".join(list(said)[-_LAST_LINES:]).strip()
    return RunFailed(f"the run {how}" + (f"; the last that it said:\n{last}" if last else " and said nothing"))
