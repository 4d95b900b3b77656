"""What this machine does at its best, measured before a benchmark, so that others can read its figures."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from functools import cache
from pathlib import Path
from statistics import median

import numpy as np

from harness.result import ResultError, Skipped, parse_result, read_result

VARIABLE = "RAYGYM_BENCH_CALIBRATION"
"""The file of a calibration that was made already, as the suite does for all benchmarks; `off`: only what is cheap."""
OFF = "off"
_SCRIPT = Path(__file__).resolve().parent.parent / "calibrate.py"
_TIMEOUT_S = 600.0


@cache
def calibrate() -> dict[str, float]:
    """Medians and spreads of `calibrate.py`, which runs now unless it did before, or unless `VARIABLE` says otherwise.

    Call it before anything else is started. Where the calibration fails, that is said and what is cheap is measured.
    """
    given = os.environ.get(VARIABLE, "")
    if given and given != OFF:
        return dict(read_result(Path(given)).metrics)
    if not given:
        print(f"calibrating, about a minute; {VARIABLE}={OFF} leaves it out", file=sys.stderr, flush=True)
        try:
            return _by_itself()
        except ResultError as error:
            print(f"calibration failed, only memory is measured: {error}", file=sys.stderr, flush=True)
    return {"memcpy_gib_per_s": round(median(memcpy_gib_per_s()), 2)}


def _by_itself() -> dict[str, float]:
    """In a process of its own: Ray and an engine would leave something of them in this one."""
    command, environment = [sys.executable, str(_SCRIPT), "--quick"], {**os.environ, VARIABLE: OFF}
    try:
        done = subprocess.run(
            command, env=environment, stdout=subprocess.PIPE, text=True, timeout=_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        raise ResultError(f"{_SCRIPT.name} took more than {_TIMEOUT_S:.0f} s") from None
    if done.returncode:
        raise ResultError(f"{_SCRIPT.name} ended with exit status {done.returncode}")
    found = parse_result((done.stdout.splitlines() or [""])[-1], _SCRIPT.name)
    if isinstance(found, Skipped):
        raise ResultError(f"{_SCRIPT.name} was skipped: {found.skipped}")
    return dict(found.metrics)


def memcpy_gib_per_s(copies: int = 5, nbytes: int = 2**28) -> list[float]:
    """Copies of 256 MiB by one thread, between arrays that are there already; GiB/s of each."""
    source = np.ones(nbytes, np.uint8)
    target = source.copy()
    speeds = []
    for _ in range(copies):
        started = time.perf_counter()
        np.copyto(target, source)
        speeds.append(source.nbytes / 2**30 / (time.perf_counter() - started))
    return speeds
