"""What one local Serve-handle call costs, from an actor, with the flags that a PolicyServer's replica has."""

from __future__ import annotations

import time
from statistics import median
from typing import Any

import ray
from ray import serve

from raygym.actors import serving
from raygym.config import PolicyConfig

_APP = "handle-round-trip"
_WARM_UP = 50


class _Echo:
    async def __call__(self, value: int) -> int:
        return value


class _Caller:
    async def median_s(self, calls: int) -> float:
        handle = serve.get_app_handle(_APP)
        seconds = []
        for number in range(_WARM_UP + calls):
            started = time.perf_counter()
            await handle.remote(number)
            seconds.append(time.perf_counter() - started)
        return median(seconds[_WARM_UP:])


def handle_round_trip_s(calls: int = 300) -> float:
    """Median seconds of one call after another. Needs Ray and Serve to be up."""
    return handle_round_trips_s(1, calls)[0]


def handle_round_trips_s(repetitions: int, calls: int = 300) -> list[float]:
    """The same for each repetition. Serve is started if it is not up; Ray must be."""
    environment = serving.engine_environment(PolicyConfig(model="tiny", engine="simulated"))
    options: dict[str, Any] = {"num_cpus": 0, "runtime_env": {"env_vars": environment}}
    deployment: Any = serve.deployment(_Echo, ray_actor_options=options)
    actor: Any = ray.remote(_Caller)
    serve.run(deployment.bind(), name=_APP, route_prefix="/echo")
    caller = actor.options(num_cpus=0).remote()
    try:
        return [float(ray.get(caller.median_s.remote(calls), timeout=120)) for _ in range(repetitions)]
    finally:
        ray.kill(caller)
        serve.delete(_APP)
