"""All benchmarks, one after the other; one that fails or takes too long is told as such, and the others go on."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from harness.calibration import OFF, VARIABLE

from suite.entries import CALIBRATION, Entry
from suite.interrupts import interruptible
from suite.outcomes import Kept, Outcome
from suite.process import GRACE_S, run_benchmark

ROOT = Path(__file__).resolve().parent.parent.parent
_LEAST_S = 20.0
"""With less time left than this, a benchmark is not begun."""


@dataclass(frozen=True, slots=True)
class SuiteRun:
    """What to run, and how."""

    entries: Sequence[Entry]
    kept: Kept
    logs: Path
    full: bool = False
    within_s: float | None = None
    """Of all together; None: without end."""
    scripts: Path = ROOT / "benchmarks"
    grace_s: float = GRACE_S

    def run(self, tell: Callable[[str], None]) -> dict[str, Outcome]:
        """Run all of them.

        Args:
            tell: is given a line of progress.

        Returns:
            How each has ended.

        Raises:
            Interrupted: by a signal; nothing runs any more, and what has ended is kept.
        """
        self.kept.forget(entry.name for entry in self.entries)
        outcomes: dict[str, Outcome] = {}
        try:
            with interruptible():
                self._all(outcomes, tell)
        except KeyboardInterrupt:
            for entry in self.entries:
                if entry.name not in outcomes:
                    self.kept.keep(entry.name, self._not_run(entry, "the suite was interrupted"), None)
            raise
        return outcomes

    def _all(self, outcomes: dict[str, Outcome], tell: Callable[[str], None]) -> None:
        began = time.monotonic()
        for entry in self.entries:
            limit_s = entry.limit_s(full=self.full)
            if self.within_s is not None:
                limit_s = min(limit_s, self.within_s - (time.monotonic() - began) - self.grace_s)
            tell(f"{entry.name} ...")
            outcomes[entry.name] = outcome = self._one(entry, round(limit_s, 1))
            tell(f"{entry.name}: {outcome.status} after {outcome.seconds:.0f} s{told(outcome)}")

    def _one(self, entry: Entry, limit_s: float) -> Outcome:
        if limit_s < min(_LEAST_S, entry.limit_s(full=self.full)):
            outcome = self._not_run(entry, f"the {(self.within_s or 0) / 60:.0f} minutes of all together were over")
            self.kept.keep(entry.name, outcome, None)
            return outcome
        if missing := entry.missing(full=self.full):
            why = f"{' and '.join(missing)} is not installed here; run `make setup` once"
            outcome = Outcome(status="skipped", seconds=0.0, limit_s=limit_s, why=why)
            self.kept.keep(entry.name, outcome, None)
            return outcome
        script = self.scripts / f"{entry.name}.py"
        ended = run_benchmark(
            entry.name,
            [sys.executable, str(script), *entry.arguments(full=self.full)],
            environment=self._environment(),
            folder=ROOT,
            logs=self.logs,
            limit_s=limit_s,
            grace_s=self.grace_s,
        )
        self.kept.keep(entry.name, ended.outcome, ended.result)
        return ended.outcome

    def _not_run(self, entry: Entry, why: str) -> Outcome:
        return Outcome(status="not run", seconds=0.0, limit_s=entry.limit_s(full=self.full), why=why)

    def _environment(self) -> dict[str, str]:
        # Benchmarks start clusters of their own.
        own = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
        calibration = self.kept.result_file(CALIBRATION)
        paths = [str(ROOT), *filter(None, [own.get("PYTHONPATH")])]
        return own | {
            "PYTHONPATH": os.pathsep.join(paths),
            VARIABLE: str(calibration.absolute()) if calibration.exists() else OFF,
        }


def told(outcome: Outcome) -> str:
    """Why, behind what it is of."""
    return f": {outcome.why}" if outcome.why else ""
