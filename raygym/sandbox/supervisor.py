"""The process between raygym and a program: reads one request, runs the program in the jail, and reports once.

It lives in a process of its own so that it can adopt and kill whatever the program leaves behind. Its standard input
stays open as long as somebody wants the answer; when it closes, the program is killed and all traces are removed.
"""

from __future__ import annotations

import importlib
import io
import json
import os
import select
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from raygym.sandbox import jail, program

_READ = 1 << 16
# Without a root of its own, a program that runs as another user may be unable to read Python's library.
_LIKELY_IMPORTS = (
    *("bisect", "collections", "copy", "dataclasses", "datetime", "decimal", "enum", "fractions", "functools"),
    *("heapq", "itertools", "json", "math", "operator", "random", "re", "statistics", "string", "textwrap", "typing"),
)


def main() -> None:
    """Serve the one request on standard input, a line of JSON; the report on standard output is another."""
    os.umask(0o022)
    # Whatever the one who started us ignores or blocks is inherited; we, and the program, start afresh.
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    request = json.loads(sys.stdin.buffer.readline())
    os.set_blocking(0, False)
    directory = tempfile.mkdtemp(prefix="raygym-", dir=request["parent_directory"])
    try:
        report = _run(request, directory)
    finally:
        _remove(directory)
    sys.stdout.write(json.dumps(report))
    sys.stdout.flush()


def _run(request: Mapping[str, Any], directory: str) -> dict[str, Any]:
    try:
        if request["namespaces"]:
            jail.enter_namespaces()
    except OSError as error:
        return {"ended": "not jailed", "detail": str(error)}
    jail.adopt_orphans()
    pipes = {"output": os.pipe(), "results": os.pipe(), "trouble": os.pipe()}
    pid = os.fork()
    if pid == 0:
        _jailed(request, directory, {name: ends[1] for name, ends in pipes.items()})
    for _, end in pipes.values():
        os.close(end)
    watch = _Watch(pid, {name: ends[0] for name, ends in pipes.items()}, request["limits"])
    try:
        ended = watch.until_end()
    finally:
        _kill_tree(pid)
    return watch.report(ended)


def _jailed(request: Mapping[str, Any], directory: str, pipes: Mapping[str, int]) -> None:
    """The fork: shut itself in, run the program, end. Never returns."""
    try:
        _shut_in(request, directory, pipes)
    except BaseException as error:
        try:
            os.write(pipes["trouble"], f"{type(error).__name__}: {error}".encode())
        finally:
            os._exit(1)
    status = 1
    try:
        status = program.run(request["source"], request["name"], request["calls"], pipes["results"])
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(status)


def _shut_in(request: Mapping[str, Any], directory: str, pipes: Mapping[str, int]) -> None:
    limits = request["limits"]
    os.setsid()
    sys.path[:] = [os.path.realpath(path) for path in sys.path if os.path.isdir(path)]
    if request["namespaces"]:
        jail.change_root(directory, limits["file_mib"] << 20)
        writable = "/tmp"
    else:
        for name in _LIKELY_IMPORTS:
            importlib.import_module(name)
        os.chdir(directory)
        writable = os.path.realpath(directory)
        if os.geteuid() == 0:
            os.chown(directory, jail.NOBODY, jail.NOBODY)
    null = os.open("/dev/null", os.O_RDONLY)
    os.dup2(null, 0)
    os.dup2(pipes["output"], 1)
    os.dup2(pipes["output"], 2)
    for descriptor in range(3, max(*pipes.values(), null) + 1):
        if descriptor not in (pipes["results"], pipes["trouble"]):
            with suppress(OSError):
                os.close(descriptor)
    jail.become_nobody()
    jail.die_with_parent(pipes["trouble"])
    os.environ.clear()
    # By lines, so that what was said before a kill is not lost; the replaced descriptors are the same streams.
    for stream in (sys.stdout, sys.stderr):
        assert isinstance(stream, io.TextIOWrapper)
        stream.reconfigure(encoding="utf-8", errors="backslashreplace", line_buffering=True)
    jail.set_limits({**limits, "processes": 64 if limits["processes"] else 1})
    sys.addaudithook(jail.audit_hook(writable, limits["processes"]))
    for name in [name for name in sys.modules if name.partition(".")[0] in ("raygym", "ctypes", "_ctypes")]:
        del sys.modules[name]
    os.close(pipes["trouble"])


class _Watch:
    """What the program says and how it ends, within wall time and amount."""

    def __init__(self, pid: int, pipes: Mapping[str, int], limits: Mapping[str, Any]) -> None:
        self._pid, self._pipes, self._limits = pid, dict(pipes), limits
        self._room = limits["output_kib"] << 10
        self._said = {name: bytearray() for name in pipes}
        self._status: int | None = None
        self._cpu_s = 0.0

    def until_end(self) -> str:
        """Wait. Returns `exit`, `wall`, `output` or `abandoned`."""
        awake, wake = os.pipe()
        os.set_blocking(awake, False)
        os.set_blocking(wake, False)
        signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        ends = time.monotonic() + self._limits["wall_s"]
        while not self._has_exited():
            left = ends - time.monotonic()
            if left <= 0:
                return "wall"
            ready, _, _ = select.select([0, awake, *self._pipes.values()], [], [], left)
            if awake in ready:
                os.read(awake, _READ)
            if 0 in ready and not os.read(0, _READ):
                return "abandoned"
            if not self._read(ready):
                return "output"
        return "exit" if self._read(list(self._pipes.values())) else "output"

    def report(self, ended: str) -> dict[str, Any]:
        """For the one who asked."""
        status = self._status
        code = None if status is None else os.waitstatus_to_exitcode(status)
        # The kernel enforces the limit by counting ticks, which can be a tenth ahead of what it reports as used.
        if code == -signal.SIGKILL and self._cpu_s >= 0.75 * self._limits["cpu_s"]:
            ended = "cpu"
        trouble = self._said["trouble"].decode("utf-8", "replace")
        if trouble:
            ended = "not jailed"
        return {
            "ended": ended,
            "detail": trouble,
            "code": code,
            "output": self._said["output"].decode("utf-8", "replace"),
            "results": self._said["results"].decode("utf-8", "replace").splitlines(),
        }

    def _has_exited(self) -> bool:
        while self._status is None:
            try:
                pid, status, usage = os.wait4(-1, os.WNOHANG)
            except ChildProcessError:
                return True
            if pid == 0:
                return False
            if pid == self._pid:
                self._status, self._cpu_s = status, usage.ru_utime + usage.ru_stime
        return True

    def _read(self, ready: list[int]) -> bool:
        """Take what is there. False when there was more of it than allowed."""
        for name, pipe in list(self._pipes.items()):
            if pipe not in ready:
                continue
            os.set_blocking(pipe, False)
            while True:
                try:
                    said = os.read(pipe, _READ)
                except BlockingIOError:
                    break
                if not said:
                    os.close(self._pipes.pop(name))
                    break
                self._said[name] += said[: self._room]
                self._room -= len(said)
                if self._room < 0:
                    return False
        return True


def _kill_tree(pid: int) -> None:
    """Kill the program and all that descends from it, and wait until they are gone."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)
    while True:
        for child in _children():
            with suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        try:
            # Their own children become ours, as `adopt_orphans` asked, and are found in the next round.
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


def _children() -> list[int]:
    own, found = os.getpid(), []
    for name in os.listdir("/proc"):
        if name.isdigit():
            # Gone since it was listed, perhaps.
            with suppress(OSError, IndexError), open(f"/proc/{name}/stat", "rb") as file:
                # The name in parentheses may hold anything.
                if int(file.read().rpartition(b")")[2].split()[1]) == own:
                    found.append(int(name))
    return found


def _remove(directory: str) -> None:
    for root, directories, _ in os.walk(directory):
        for name in directories:
            with suppress(OSError):
                if not os.path.islink(os.path.join(root, name)):
                    os.chmod(os.path.join(root, name), 0o700)
    shutil.rmtree(directory, ignore_errors=True)
