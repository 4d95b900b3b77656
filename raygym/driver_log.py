"""The driver's log: what it and its libraries write beside raygym's own lines, kept out of a person's sight."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from raygym.live_console import LiveConsole, Verbosity

_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


@contextmanager
def driver_log(path: Path, console: LiveConsole) -> Iterator[None]:
    """Inside it, only the console reaches the standard output; all else that the process writes is in the file `path`.

    That is what is logged, warned of and printed, also by C++ code and by children that inherit its descriptors. Where
    the standard output is no descriptor, as in a notebook, only what is logged and warned of. With a verbose console,
    what is logged is shown as well. Where the file cannot be written, that is told, and nothing is redirected.
    """
    with ExitStack() as stack:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(path.open("a", encoding="utf-8", errors="backslashreplace", buffering=1))
        except OSError as error:
            console.line(f"{path} cannot be written ({error}), so warnings of libraries are shown here")
            yield
            return
        verbose = console.verbosity >= Verbosity.VERBOSE
        handlers: list[logging.Handler] = [logging.StreamHandler(file)]
        if verbose:
            handlers.append(_Shown(console))
        for handler in handlers:
            handler.setFormatter(logging.Formatter(_FORMAT))
        stack.enter_context(_handled_by(handlers, logging.INFO if verbose else logging.WARNING))
        if _is_descriptor():
            stack.enter_context(_redirected(file.fileno(), console))
        yield


class _Shown(logging.Handler):
    """Shows records on a console."""

    def __init__(self, console: LiveConsole) -> None:
        super().__init__()
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        self._console.detail(f"{record.name}: {record.getMessage()}")


@contextmanager
def _handled_by(handlers: list[logging.Handler], own_level: int) -> Iterator[None]:
    """Records and warnings go to `handlers`; of raygym's own, those from `own_level` on."""
    root, own = logging.getLogger(), logging.getLogger("raygym")
    level = own.level
    logging.captureWarnings(True)
    own.setLevel(own_level)
    for handler in handlers:
        root.addHandler(handler)
    try:
        yield
    finally:
        for handler in handlers:
            root.removeHandler(handler)
        own.setLevel(level)
        logging.captureWarnings(False)


def _is_descriptor() -> bool:
    try:
        return sys.stdout.fileno() == 1 and sys.stderr.fileno() == 2
    except (OSError, ValueError, AttributeError):
        return False


@contextmanager
def _redirected(descriptor: int, console: LiveConsole) -> Iterator[None]:
    """Descriptors 1 and 2 are `descriptor`, and the console writes where 1 went before."""
    _flush()
    # Not inherited, so that a child which outlives this process holds no pipe open that somebody reads to its end.
    out, error = os.dup(1), os.dup(2)
    kept = os.fdopen(out, "w", encoding=sys.stdout.encoding, errors="replace", buffering=1)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    console.write_to(kept)
    try:
        yield
    finally:
        _flush()
        os.dup2(out, 1)
        os.dup2(error, 2)
        console.write_to(None)
        with suppress(OSError):  # nobody reads it any more
            kept.close()
        os.close(error)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            continue  # closed, or a full disk
