"""One run of `raygym train` in a process of its own, with when it printed what."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from raygym.run_reading import UnreadableRun, is_number, json_file, json_lines

ROOT = Path(__file__).resolve().parents[2]
_STEP_ROW = re.compile(r"\s*(\d+)/(\d+)\s")
_LINES_TOLD = 12


class RunFailed(RuntimeError):
    """The run did not end well; the text has the command and the end of what it said."""


@dataclass(frozen=True, slots=True)
class TrainRun:
    """What is known of one run. All times are seconds since its process was started."""

    rows: list[dict[str, Any]]
    """Of metrics.jsonl, from step 1 on."""
    shown_s: list[float]
    """When the console showed each of them."""
    first_line_s: float
    """The first line that a person sees."""
    ready_s: float
    """Engines, learners and environments are up."""
    first_token_s: float
    """An engine has made its first token; of a simulated one, its first answer."""

    @property
    def first_step_s(self) -> float:
        """The first step is done and shown."""
        return self.shown_s[0]


def train(arguments: Sequence[str], timeout_s: float = 900.0) -> TrainRun:
    """Run `raygym train` to its end.

    Args:
        arguments: the config's file and overrides.
        timeout_s: until it is ended, which counts as a failure.

    Raises:
        RunFailed: it failed, or has not left what a run leaves.
    """
    # It ends with this process, also where a benchmark is killed that takes too long.
    command = [sys.executable, "-m", "raygym.owned_command", "train", *arguments]
    # A cluster of its own: one that runs on this machine already has other work.
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as runs, tempfile.TemporaryFile("w+") as errors:
        started, started_at = time.monotonic(), time.time()
        with subprocess.Popen(
            [*command, f"runs_dir={runs}", "name=run"],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        ) as process:
            assert process.stdin is not None and process.stdout is not None
            timer = threading.Timer(timeout_s, process.stdin.close)
            timer.daemon = True
            timer.start()
            lines = [(time.monotonic() - started, line) for line in process.stdout]
            status = process.wait()
            timer.cancel()
        if status:
            errors.seek(0)
            said = [*(line for _, line in lines), *errors][-_LINES_TOLD:]
            late = f" (ended after {timeout_s:g} s)" if time.monotonic() - started > timeout_s else ""
            raise RunFailed(f"{' '.join(command)} ended with status {status}{late}:\n{''.join(said)}")
        return read_run(Path(runs) / "run", lines, started_at)


def read_run(folder: Path, lines: Sequence[tuple[float, str]], started_at: float) -> TrainRun:
    """A run's folder and output as a `TrainRun`.

    Args:
        folder: `<runs_dir>/<name>`.
        lines: what it printed, each with the seconds after its process was started.
        started_at: when that was, in seconds since the epoch.

    Raises:
        RunFailed: something is missing.
    """
    try:
        rows = [row for row in json_lines(folder / "metrics.jsonl") if row.get("step", 0) > 0]
        summary = json_file(folder / "summary.json")
    except UnreadableRun as error:
        raise RunFailed(str(error)) from None
    shown_s = [seconds for seconds, line in lines if _STEP_ROW.match(line)]
    if not rows or len(rows) != len(shown_s):
        raise RunFailed(
            f"{folder}: metrics.jsonl has {len(rows)} steps and the console showed {len(shown_s)}; expected as many, "
            "and at least one. Has the console's table changed (harness/train_run.py)?"
        )
    missing = [key for key in ("started_at", "ready_s", "first_token_s") if not is_number(summary.get(key))]
    if missing:
        raise RunFailed(f"{folder / 'summary.json'}: {missing[0]} is missing or no number; was a replica replaced?")
    command_s = summary["started_at"] - started_at
    return TrainRun(rows, shown_s, lines[0][0], command_s + summary["ready_s"], command_s + summary["first_token_s"])


def override(section: str, values: dict[str, Any]) -> str:
    """A config's section as an argument of the command line."""
    return f"{section}={yaml.safe_dump(values, default_flow_style=True, width=10**6).strip()}"
