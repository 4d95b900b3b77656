"""What every benchmark shares: the JSON line it ends with, medians with their spreads, and a calibration."""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np


def report(name: str, samples: Mapping[str, Sequence[float]], **details: Any) -> None:
    """Print one JSON line: the median of each metric's samples, and as `<metric>_spread` largest minus smallest."""
    metrics = {key: rounded(median(values)) for key, values in samples.items()}
    metrics |= {f"{key}_spread": rounded(max(values) - min(values)) for key, values in samples.items()}
    result = {
        "name": name,
        "command": f"python benchmarks/{Path(sys.argv[0]).name} {' '.join(sys.argv[1:])}".strip(),
        "machine": f"{cpu_model()}, {os.cpu_count()} cores, Python {platform.python_version()}",
        "calibration": {"memcpy_gib_per_s": round(memcpy_gib_per_s(), 2)},
        "repetitions": max(len(values) for values in samples.values()),
        "metrics": metrics,
        **details,
    }
    print(json.dumps(result), flush=True)


def rounded(value: float) -> float:
    """To four decimals, but what is small to three digits, so that a difference of 1e-7 is not shown as none."""
    return round(value, 4) if abs(value) >= 0.1 else float(f"{value:.3g}")


def cpu_model() -> str:
    """The processor's name, where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def memcpy_gib_per_s() -> float:
    """Median of five copies of 256 MiB."""
    source = np.ones(2**28, np.uint8)
    target = np.empty_like(source)
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        np.copyto(target, source)
        seconds.append(time.perf_counter() - started)
    return source.nbytes / 2**30 / median(seconds)
