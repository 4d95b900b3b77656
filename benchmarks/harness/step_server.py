"""A learner's side of `harness.step_process`: it makes a step when it is told to, and says what it took.

Imported by raygym's Python and by TRL's: standard library and torch only.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

SHOWN_OPERATORS = 25


class StepServer:
    """Commands come as lines of standard input; lines of JSON, and nothing else, go to standard output."""

    def __init__(self) -> None:
        """From here on, what anybody prints goes to standard error."""
        self._answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        self._steps = 0
        self._profile: Any = None

    def wait(self) -> None:
        """Until a step is wanted. Ends the process when none will be."""
        command = sys.stdin.readline().strip()
        if not command:
            sys.exit(0)
        if self._steps == 0:
            # So that the peak is of learning, not of loading. See proc(5), clear_refs.
            Path("/proc/self/clear_refs").write_text("5")
        if command == "profile":
            from torch.profiler import ProfilerActivity, profile

            self._profile = profile(activities=[ProfilerActivity.CPU])
            self._profile.__enter__()

    def answer(self, **values: Any) -> None:
        """The step is made: `seconds`, `cpu_seconds`, `loss`, `grad_norm` and what else there is to say."""
        if self._profile is not None:
            self._profile.__exit__(None, None, None)
            averages = self._profile.key_averages()
            values["operators"] = averages.table(sort_by="self_cpu_time_total", row_limit=SHOWN_OPERATORS)
            self._profile = None
        self._steps += 1
        self._answers.write(json.dumps({**values, "peak_mib": _peak_mib()}) + "\n")
        self._answers.flush()


def _peak_mib() -> float:
    """The most memory that this process had resident since the first step began."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024
