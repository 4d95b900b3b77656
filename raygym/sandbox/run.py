"""`run_program`: one Python program under limits, awaited without blocking the event loop."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

logger = logging.getLogger(__name__)
_ROOT = str(Path(__file__).resolve().parents[2])
_BOOT = (
    f"import sys; sys.path.insert(0, {_ROOT!r}); from raygym.sandbox.supervisor import main; "
    f"sys.path.remove({_ROOT!r}); main()"
)
# What starting, killing and cleaning up may take beyond the program's own wall time on a busy machine.
_GRACE_S = 20.0
_AT_ONCE = 2 * len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 2
_places: WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Semaphore] = WeakKeyDictionary()
_LIMITS_IN_WORDS = {"wall": "took too long", "cpu": "used too much processor time", "output": "printed too much"}
_namespaces_work = True


class SandboxError(RuntimeError):
    """The sandbox itself failed: no verdict on the program."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What one program may use."""

    wall_s: float = 5.0
    cpu_s: int = 1
    memory_mib: int = 256
    """Address space, the interpreter's own 30 MiB or so included."""
    output_kib: int = 64
    """What it prints and returns, together."""
    file_mib: int = 1
    """Each file; with namespaces also all files together."""
    processes: bool = False
    """Whether it may start processes and threads: up to 64, which the kernel counts for all programs of a user."""

    def __post_init__(self) -> None:
        for name in ("wall_s", "cpu_s", "memory_mib", "output_kib", "file_mib"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}: {getattr(self, name)}; expected more than 0")


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a program did."""

    ended: str
    """`exit`, or the limit that ended it: `wall`, `cpu`, `output`."""
    code: int | None
    """Exit status, or minus the signal that ended it; None when it was killed for a limit."""
    output: str
    """Standard output and error, interleaved, up to the limit."""
    results: tuple[Any, ...]
    """One for each finished call: `{"value": ...}` (through JSON, so tuples are lists) or `{"error": text}`."""

    def describe(self) -> str:
        """How it ended, in words; empty after exit status 0."""
        if self.ended == "exit":
            if self.code is not None and self.code < 0:
                return f"killed by signal {-self.code}"
            return f"exit status {self.code}" if self.code else ""
        return _LIMITS_IN_WORDS[self.ended]


async def run_program(
    source: str,
    calls: Sequence[tuple[str, Sequence[Any]]] = (),
    limits: Limits | None = None,
    *,
    name: str = "__main__",
    namespaces: bool = True,
) -> Outcome:
    """Run `source` and then call its functions, in a process that is gone with all its children when this returns.

    At most two programs for each processor run at once; more wait, and their limits count from their start. Cancelling
    the call kills the program.

    Args:
        source: the program's text.
        calls: function names with their arguments, which must be JSON values; made in order in the same process, until
            one of them breaks a limit.
        limits: what it may use.
        name: the program's `__name__`.
        namespaces: try the kernel's namespaces; without them the other defences remain (see the package's docstring).

    Raises:
        SandboxError: the program could not be run, or nothing is known about how it ended.
    """
    global _namespaces_work
    limits = limits or Limits()
    request = {"source": source, "calls": list(calls), "name": name, "limits": asdict(limits)}
    request["parent_directory"] = tempfile.gettempdir()
    async with _places.setdefault(asyncio.get_running_loop(), asyncio.Semaphore(_AT_ONCE)):
        if namespaces and _namespaces_work:
            report = await _supervised({**request, "namespaces": True}, limits.wall_s)
            if report["ended"] != "not jailed":
                return _outcome(report)
            _namespaces_work = False
            logger.warning(
                "programs run without namespaces (%s): the network and readable files are kept from them by Python's "
                "audit hook alone; see raygym.sandbox",
                report["detail"],
            )
        return _outcome(await _supervised({**request, "namespaces": False}, limits.wall_s))


async def _supervised(request: dict[str, Any], wall_s: float) -> dict[str, Any]:
    if sys.platform != "linux":
        raise SandboxError(f"programs can be run on Linux only; this is {sys.platform}")
    try:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-I", "-S", "-B", "-c", _BOOT),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env={},
            start_new_session=True,
        )
    except OSError as error:
        raise SandboxError(f"the sandbox could not be started: {error}") from error
    assert process.stdin and process.stdout and process.stderr
    try:
        async with asyncio.timeout(wall_s + _GRACE_S):
            process.stdin.write(json.dumps(request).encode() + b"\n")
            said, complaint = await asyncio.gather(process.stdout.read(), process.stderr.read())
            await process.wait()
    except TimeoutError as error:
        process.kill()
        raise SandboxError(f"the sandbox gave no answer within {wall_s + _GRACE_S:g} s") from error
    finally:
        # Without standard input the supervisor kills the program and cleans up, whatever happens here.
        process.stdin.close()
        with suppress(TimeoutError):
            await asyncio.wait_for(process.wait(), _GRACE_S)
    try:
        report: dict[str, Any] = json.loads(said)
    except ValueError as error:
        last = complaint.decode("utf-8", "replace").strip()[-500:]
        raise SandboxError(f"the sandbox ended with status {process.returncode}: {last}") from error
    return report


def _outcome(report: dict[str, Any]) -> Outcome:
    if report["ended"] == "not jailed":
        raise SandboxError(f"a program could not be shut in: {report['detail']}")
    return Outcome(report["ended"], report["code"], report["output"], tuple(map(_result, report["results"])))


def _result(line: str) -> dict[str, Any]:
    # The program can write lines of its own there; they are graded like any other.
    try:
        result = json.loads(line)
    except (ValueError, RecursionError):
        result = None
    return result if isinstance(result, dict) else {"error": "no JSON"}
