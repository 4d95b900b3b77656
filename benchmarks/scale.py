"""Scale, **simulated**: 1 to 1,024 GPUs' worth of engines and 100 to 100,000 episodes at once, in virtual time.

Real is the run's own Scheduler, which decides about every episode, the engines' model of continuous batching, and the
processor time that the RolloutManager takes for an episode: that is measured first, on the real class. Simulated are
engines (the roofline estimate of `raygym config check` for a policy of 7 B parameters on an H100), environments,
learners and the way between processes. Learners take half of the time that the engines need at least for a batch, and
grow with the engines. No GPU was used.

The manager is a process that does one thing after the other, so where it has too much to do the engines idle. How that
is beyond 1,024 GPUs is told by a manager that is slower by a factor, beside 64 GPUs: all that its answers carry is as
it would be with so many times the GPUs and the EnvRunners.

With `--quick` of the largest size only one step, of half as many episodes as run at once, is played after one: enough
for the scheduler's time with 100,000 episodes in flight, and not for its throughput, which is then not reported.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from statistics import median
from typing import Any

from harness import calibrate, report
from harness.manager_cost import measure_manager, measure_ray_call
from harness.result import rounded
from harness.virtual_cluster import ClusterRun, ClusterSetup, batch_s, engine_alone, runners_for, simulate_cluster
from harness.virtual_engines import MODEL, Workload, gpu_engine
from harness.virtual_manager import ManagerCost

from raygym.actors import cluster

GPUS = (1, 4, 16, 64, 256, 1024)
QUICK_GPUS = (1, 4, 16, 64, 1024)
LARGEST_OF_ALL_BOUNDS = 256
"""Beyond it only `max_staleness` 1 is played, unless `--gpus` says otherwise: each takes minutes."""
PLACES_PER_GPU = 100
LEARN_SHARE = 0.5
# Processor seconds of Ray in a manager's process: of a call and its answer, and of a trajectory of an episode's size in
# it. The median of three measurements by `--measure-ray`, beside other work, in a sandbox where system calls are dear.
RAY_CALL_S, RAY_TRAJECTORY_S = 680e-6, 7e-6
SLOWED_GPUS, SLOWED_BY, QUICK_SLOWED_BY = 64, (8, 16, 32, 64, 128), (128,)
# Of a turn, in ms, and turns of an episode there: `cpu_ms_per_turn_*` of `rollout.py`, see docs/measurements.md.
CPU_MS_PER_TURN = {"env_runner": 0.26, "replica": 0.08}


def main() -> None:
    """Measure the manager, play all sizes, and print what became of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="max_staleness 1 only, and the largest size for a moment")
    parser.add_argument("--gpus", type=int, nargs="+", help="instead of 1 to 1,024; 64 is always among them")
    parser.add_argument("--staleness", type=int, nargs="+", help="max_staleness, instead of 0, 1 and 2")
    parser.add_argument("--repetitions", type=int, default=3, help="of what is measured in real time")
    parser.add_argument("--measure-ray", action="store_true", help="a call's cost by a real actor, not by its constant")
    parser.add_argument("--manager-slower", type=float, default=1.0, help="of all sizes; 0: it takes no time")
    parser.add_argument("--learn-share", type=float, default=LEARN_SHARE, help="of a batch's least time on the engines")
    options = parser.parse_args()
    calibrate()
    staleness = options.staleness or ([1] if options.quick else [0, 1, 2])
    sizes = sorted({*(options.gpus or (QUICK_GPUS if options.quick else GPUS)), SLOWED_GPUS})
    engine, workload = gpu_engine(), Workload()
    with no_garbage_collection():
        tokens_per_s, episodes_per_s = engine_alone(engine, workload, PLACES_PER_GPU, 500 if options.quick else 4000)
    tokens = round(tokens_per_s / episodes_per_s) + workload.prompt_tokens + 2 * workload.observation_tokens
    ray_call_s, ray_trajectory_s = RAY_CALL_S, RAY_TRAJECTORY_S
    if options.measure_ray:
        ray_call_s, ray_trajectory_s = ray_costs(tokens, options.repetitions)
    costs = [measure_manager(ray_call_s, tokens, 2048 if options.quick else 4096) for _ in range(options.repetitions)]
    costs = [replace(cost, end_s=cost.end_s + ray_trajectory_s) for cost in costs]
    samples: dict[str, list[float]] = {
        "manager_call_ms": [cost.call_s * 1000 for cost in costs],
        "manager_begin_ms": [cost.begin_s * 1000 for cost in costs],
        "manager_end_ms": [cost.end_s * 1000 for cost in costs],
        "engine_alone_tokens_per_s": [tokens_per_s],
        "engine_alone_episodes_per_s": [episodes_per_s],
    }
    # What is simulated has one cost, so that it is the same at each repetition of a size.
    cost = ManagerCost(*(median(getattr(cost, part) for cost in costs) for part in ("call_s", "begin_s", "end_s")))

    def play(gpus: int, max_staleness: int, slower: float = 1.0) -> dict[str, Any]:
        base = ClusterSetup(engine, workload, cost.times(slower), gpus, PLACES_PER_GPU, runners=runners_for(gpus))
        setup = replace(base, max_staleness=max_staleness, learn_s=options.learn_share * batch_s(base, tokens_per_s))
        if options.quick and gpus > SLOWED_GPUS:
            setup = replace(setup, warm_up=1, steps=1, batches_in_places=2.0)
        began_s = time.process_time()
        with no_garbage_collection():
            run = simulate_cluster(setup)
        row = {"gpus": gpus, "max_staleness": max_staleness, "manager_slower": slower}
        row |= told(setup, run, tokens_per_s) | {"real_cpu_s": time.process_time() - began_s}
        print({key: rounded(value) for key, value in row.items()}, file=sys.stderr, flush=True)
        return row

    rows = [
        play(gpus, bound, options.manager_slower)
        for bound in staleness
        for gpus in sizes
        if bound == 1 or gpus <= LARGEST_OF_ALL_BOUNDS or options.gpus
    ]
    by_itself = next((row for row in rows if (row["gpus"], row["max_staleness"]) == (SLOWED_GPUS, 1)), None)
    if options.manager_slower != 1:
        by_itself = None
    slowed = [by_itself or play(SLOWED_GPUS, 1)]
    slowed += [play(SLOWED_GPUS, 1, factor) for factor in (QUICK_SLOWED_BY if options.quick else SLOWED_BY)]
    for row in rows:
        name = f"_{row['gpus']}_gpus" + (f"_staleness_{row['max_staleness']}" if row["max_staleness"] != 1 else "")
        keys = ["scheduler_us"]
        if not (options.quick and row["gpus"] > SLOWED_GPUS):
            keys += ["episodes_per_s", "share_of_ideal", "staleness_mean", "manager_share_of_core"]
        samples |= {key + name: [row[key]] for key in keys}
    # The most that the slowest manager did, over what engines that wait for no manager do.
    most = slowed[-1]["episodes_per_s"] * slowed[-1]["manager_slower"]
    turns_per_s = slowed[0]["episodes_per_s"] / SLOWED_GPUS * workload.turns
    samples |= {
        "manager_saturates_at_gpus": [most / (slowed[0]["episodes_per_s"] / SLOWED_GPUS)],
        # In answers that carry many, which is what a manager that is late gets.
        "manager_limit_episodes_per_s": [1 / cost.episode_s for cost in costs],
        "gpus_per_env_runner": [1000 / (CPU_MS_PER_TURN["env_runner"] * turns_per_s)],
        "replica_share_of_core": [CPU_MS_PER_TURN["replica"] * turns_per_s / 1000],
    }
    report(
        "scale",
        samples,
        simulated=True,
        config=f"{MODEL} on simulated H100s, {PLACES_PER_GPU} episodes for each, groups of {workload.group_size}",
        workload=asdict(workload),
        engine=engine.model_dump(),
        ray_ms={"call": ray_call_s * 1000, "trajectory": ray_trajectory_s * 1000, "measured": options.measure_ray},
        rows=[{key: rounded(value) for key, value in row.items()} for row in rows],
        slowed_manager_rows=[{key: rounded(value) for key, value in row.items()} for row in slowed],
    )


def told(setup: ClusterSetup, run: ClusterRun, tokens_per_s: float) -> dict[str, float]:
    """One row of the table."""
    return {
        "episodes_at_once": run.most_at_once,
        "episodes_per_s": run.episodes / run.seconds,
        "tokens_per_s": run.tokens / run.seconds,
        "share_of_ideal": run.tokens / run.seconds / (tokens_per_s * setup.gpus),
        "empty_places": run.empty_places,
        "learner_waits": run.learner_waits,
        "staleness_mean": run.staleness_mean,
        "staleness_max": run.staleness_max,
        "slowest_over_median": run.straggler,
        "manager_share_of_core": run.manager_share,
        "manager_longest_wait_s": run.manager_wait_s,
        "scheduler_us": run.scheduler_us,
        "runners": setup.runners,
        "episodes_of_a_step": setup.groups_per_step * setup.workload.group_size,
        "steps_measured": setup.steps,
        "preemptions": run.preemptions,
    }


def ray_costs(tokens: int, repetitions: int) -> tuple[float, float]:
    """Medians of `measure_ray_call`."""
    cluster.connect()
    try:
        measured = [measure_ray_call(tokens) for _ in range(repetitions)]
    finally:
        cluster.disconnect()
    return median(call_s for call_s, _ in measured), median(trajectory_s for _, trajectory_s in measured)


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Millions of objects live until the end, and looking at them again and again would take a third of the time."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.collect()


if __name__ == "__main__":
    # For the actors that `--measure-ray` starts: where the harness is.
    folder = os.path.dirname(os.path.abspath(__file__))
    paths = [folder, os.path.dirname(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)
    main()
