"""The driver's log: what it and its libraries write beside raygym's own lines, kept out of a person's sight."""

from __future__ import annotations

import faulthandler
import logging
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from raygym.live_console import LiveConsole, Verbosity

_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
_SHOWN_FORMAT = "%(name)s: %(message)s"


@contextmanager
def driver_log(path: Path, console: LiveConsole) -> Iterator[None]:
    """Inside it, only the console reaches the standard output; all else that the process writes is in the file `path`.

    That is what is logged, warned of and printed, also by C++ code and by children that inherit its descriptors. Where
    the standard output is no descriptor, as in a notebook, only what is logged and warned of. With a verbose console,
    what is logged is shown as well. Where the file cannot be written, that is told, and nothing is redirected.

    Whatever else ends, its cause is told where people see it: an error gets a note that names the file, a thread that
    dies of one a line on the console, and a process that is aborted leaves its stacks on the real standard error.
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
        handlers[0].setFormatter(logging.Formatter(_FORMAT))
        if verbose:
            handlers.append(_Shown(console))
        stack.enter_context(_handled_by(handlers, logging.INFO if verbose else logging.WARNING))
        if _is_descriptor():
            stack.enter_context(_redirected(file.fileno(), console))
            stack.enter_context(_lost_threads_told(path, console))
        try:
            yield
        except Exception as error:
            error.add_note(f"what it and its libraries printed is in {path}")
            raise


class _Shown(logging.Handler):
    """Shows records on a console."""

    def __init__(self, console: LiveConsole) -> None:
        super().__init__()
        self._console = console
        self.setFormatter(logging.Formatter(_SHOWN_FORMAT))

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._console.detail(self.format(record))
        except Exception:  # a library's `"%d of" % "x"`: it must not fail for that
            self.handleError(record)


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
    """Descriptors 1 and 2 are `descriptor`; the console writes where 1 went before, a process that is aborted where 2
    did."""
    _flush()
    # Not inherited, so that a child which outlives this process holds no pipe open that somebody reads to its end.
    out, error = os.dup(1), os.dup(2)
    kept = os.fdopen(out, "w", encoding=sys.stdout.encoding, errors="replace", buffering=1)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    console.write_to(kept)
    had_handler = faulthandler.is_enabled()
    faulthandler.enable(error)
    try:
        yield
    finally:
        faulthandler.disable()
        _flush()
        os.dup2(out, 1)
        os.dup2(error, 2)
        console.write_to(None)
        with suppress(OSError):  # nobody reads it any more
            kept.close()
        os.close(error)
        if had_handler:
            faulthandler.enable()


@contextmanager
def _lost_threads_told(path: Path, console: LiveConsole) -> Iterator[None]:
    """An error that ends a thread is in the log, and one line on the console says so. Each once."""
    logs, told = threading.excepthook, set[str]()

    def tell(lost: threading.ExceptHookArgs) -> None:
        logs(lost)
        by = f"{lost.exc_type.__name__}: {' '.join(str(lost.exc_value).split())[:300]}"
        if lost.exc_type is not SystemExit and by not in told:
            told.add(by)
            name = lost.thread.name if lost.thread is not None else "of a library"
            console.line(f"warning: thread {name} has ended by {by}; see {path}")

    threading.excepthook = tell
    try:
        yield
    finally:
        threading.excepthook = logs


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            continue  # closed, or a full disk
