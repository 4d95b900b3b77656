"""What one call of a Ray actor costs that does nothing, one after another."""

from __future__ import annotations

import time
from statistics import median
from typing import Any

import ray

_WARM_UP = 50
_TIMEOUT_S = 60.0


class _Echo:
    def echo(self, value: int) -> int:
        return value


def ray_round_trips_s(repetitions: int, calls: int = 300) -> list[float]:
    """Median seconds of a call, for each repetition. Needs Ray to be up."""
    actor: Any = ray.remote(_Echo)
    echo = actor.options(num_cpus=0).remote()
    try:
        return [_median_s(echo, calls) for _ in range(repetitions)]
    finally:
        ray.kill(echo)


def _median_s(echo: Any, calls: int) -> float:
    seconds = []
    for number in range(_WARM_UP + calls):
        started = time.perf_counter()
        ray.get(echo.echo.remote(number), timeout=_TIMEOUT_S)
        seconds.append(time.perf_counter() - started)
    return median(seconds[_WARM_UP:])
