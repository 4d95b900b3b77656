"""Which benchmarks the suite has, in the order in which they run: what matters most comes first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec

CALIBRATION = "calibrate"
"""The one whose figures all others get."""
QUICK_MINUTES = 20.0


@dataclass(frozen=True, slots=True)
class Entry:
    """One script of benchmarks/."""

    name: str
    quick_s: float | None
    """Its time limit in a quick run; None: it is only part of a full one."""
    full_s: float
    quick: Sequence[str] = ("--quick",)
    """Its arguments in a quick run. In a full one it has none."""
    needs: Sequence[str] = ()
    """Packages, by the name that they are imported by, without which it is skipped."""
    full_needs: Sequence[str] = ()
    """More of them in a full run."""

    def arguments(self, *, full: bool) -> list[str]:
        """Of the command line."""
        return [] if full else list(self.quick)

    def limit_s(self, *, full: bool) -> float:
        """Beyond it the benchmark is ended."""
        return self.full_s if full or self.quick_s is None else self.quick_s

    def missing(self, *, full: bool) -> list[str]:
        """What it needs and is not installed here."""
        return [name for name in (*self.needs, *(self.full_needs if full else ())) if find_spec(name) is None]


# Not among them: soak.py, which takes hours.
ENTRIES = (
    Entry(CALIBRATION, 180, 300),
    Entry("serving", 240, 1800, needs=("vllm",)),
    # A quarter of a minute.
    Entry("environments", 90, 300),
    Entry("rollout", 300, 3600, quick=("--quick", "--only", "64", "1024", "overhead")),
    Entry("learner", 240, 5400, needs=("deepspeed",)),
    Entry("weight_sync", 150, 1800, needs=("deepspeed",), full_needs=("vllm",)),
    Entry("end_to_end", 420, 3000, needs=("deepspeed", "vllm")),
    Entry("scale", 150, 1200),
    Entry("nemo_gym", 180, 1800),
    Entry("rollout_faults", None, 1200),
    Entry("staleness", None, 5400, needs=("deepspeed", "vllm")),
    Entry("calibrate_simulated", None, 1800, needs=("vllm",)),
    Entry("generation", None, 1800, needs=("vllm",)),
)
