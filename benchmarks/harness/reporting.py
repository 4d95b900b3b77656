"""The JSON line that a benchmark ends with."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil

from harness.calibration import calibrate
from harness.machine import this_commit, this_machine
from harness.result import SPREAD, Result, ResultError, Skipped, summary
from harness.units import unit_of


def report(
    name: str,
    samples: Mapping[str, Sequence[float]],
    *,
    config: Any = None,
    calibration: Mapping[str, float] | None = None,
    **details: Any,
) -> None:
    """Print what was measured, as one line of JSON (`harness.result.Result`).

    Args:
        name: of the benchmark.
        samples: of each metric, one for each repetition; a name tells its unit (`harness.units`).
        config: what was measured with; the same text means that two runs can be compared.
        calibration: default: `calibrate()`, which was measured when the benchmark began if it has asked for it then.
        details: anything else, which JSON must be able to hold.

    Raises:
        ResultError: a metric has no samples, or one that is no number.
    """
    for key, values in samples.items():
        if not values or not all(math.isfinite(value) for value in values):
            raise ResultError(f"{name}: {key}: has the samples {list(values)}; expected numbers, one at least")
        if key.endswith(SPREAD):
            raise ResultError(f"{name}: {key}: a metric's name may not end with {SPREAD}, as that of its spread does")
    # Six digits: more is noise, and would be in every committed file.
    kept = {key: [float(f"{value:.6g}") for value in values] for key, values in samples.items()}
    began = psutil.Process().create_time()
    result = Result(
        name=name,
        command=f"python benchmarks/{Path(sys.argv[0]).name} {' '.join(sys.argv[1:])}".strip(),
        config=config,
        machine=this_machine(),
        started=datetime.fromtimestamp(began, UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        seconds=round(time.time() - began, 1),
        commit=this_commit(),
        calibration=dict(calibrate() if calibration is None else calibration),
        repetitions=max(map(len, kept.values()), default=1),
        metrics=summary(kept),
        samples=kept,
        units={key: unit for key in kept if (unit := unit_of(key)) is not None},
        details=details,
    )
    print(result.model_dump_json(), flush=True)


def report_skipped(name: str, why: str) -> None:
    """Print that something is missing here, for people and as a line of JSON."""
    print(f"skipped: {why}")
    print(Skipped(name=name, skipped=why).model_dump_json(), flush=True)
