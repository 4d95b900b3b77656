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
for the scheduler's time with 25,600 episodes in flight, and not for its throughput, which is then not reported.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from statistics import median

from harness import calibrate, report
from harness.manager_cost import measure_manager, measure_ray_call
from harness.scale_figures import SLOWED_GPUS, Parts, Row, figures, for_a_moment, in_short, told
from harness.virtual_cluster import ClusterSetup, batch_s, engine_alone, runners_for, simulate_cluster
from harness.virtual_engines import MODEL, Workload, gpu_engine

from raygym.actors import cluster
from raygym.batching_config import BatchingConfig

GPUS = (1, 4, 16, 64, 256, 1024)
QUICK_GPUS = (1, 4, 16, 64, 256)
LARGEST_OF_ALL_BOUNDS = 256
"""Beyond it only `max_staleness` 1 is played, unless `--gpus` says otherwise: each takes minutes."""
PLACES_PER_GPU = 100
LEARN_SHARE = 0.5
# Processor seconds of Ray in a manager's process: of a call and its answer, and of a trajectory of an episode's size in
# it. The median of three measurements by `--measure-ray`, beside other work, in a sandbox where system calls are dear.
RAY_CALL_S, RAY_TRAJECTORY_S = 680e-6, 7e-6
SLOWED_BY, QUICK_SLOWED_BY = (8, 16, 32, 64, 128), (128,)


@dataclass(frozen=True, slots=True)
class Player:
    """Plays runs, and tells each on standard error."""

    engine: BatchingConfig
    workload: Workload
    parts: Parts
    learn_share: float
    quick: bool

    def play(self, gpus: int, max_staleness: int, slower: float = 1.0) -> Row:
        """One run, with a manager that is slower by a factor."""
        cost = self.parts.cost.times(slower)
        base = ClusterSetup(self.engine, self.workload, cost, gpus, PLACES_PER_GPU, runners=runners_for(gpus))
        learn_s = self.learn_share * batch_s(base, self.parts.tokens_per_s)
        setup = replace(base, max_staleness=max_staleness, learn_s=learn_s)
        if for_a_moment(gpus, self.quick):
            setup = replace(setup, warm_up=1, steps=1, batches_in_places=2.0)
        began_s = time.process_time()
        with no_garbage_collection():
            run = simulate_cluster(setup)
        row = {"gpus": gpus, "max_staleness": max_staleness, "manager_slower": slower}
        row |= told(setup, run, self.parts.tokens_per_s) | {"real_cpu_s": time.process_time() - began_s}
        print(in_short(row), file=sys.stderr, flush=True)
        return row


def main() -> None:
    """Measure the manager, play all sizes, and print what became of them."""
    options = parsed()
    calibrate()
    engine, workload = gpu_engine(), Workload()
    parts = measured(options, engine, workload)
    player = Player(engine, workload, parts, options.learn_share, options.quick)
    rows, slowed = played(options, player)
    report(
        "scale",
        figures(rows, slowed, parts, workload.turns, quick=options.quick),
        simulated=True,
        config=described(options, workload),
        workload=asdict(workload),
        engine=engine.model_dump(),
        ray_ms={
            "call": parts.ray_call_s * 1000,
            "trajectory": parts.ray_trajectory_s * 1000,
            "measured": options.measure_ray,
        },
        rows=[in_short(row) for row in rows],
        slowed_manager_rows=[in_short(row) for row in slowed],
    )


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="max_staleness 1 only, and the largest size for a moment")
    parser.add_argument("--gpus", type=int, nargs="+", help="instead of 1 to 1,024; 64 is always among them")
    parser.add_argument("--staleness", type=int, nargs="+", help="max_staleness, instead of 0, 1 and 2")
    parser.add_argument("--repetitions", type=int, default=3, help="of what is measured in real time")
    parser.add_argument("--measure-ray", action="store_true", help="a call's cost by a real actor, not by its constant")
    parser.add_argument("--manager-slower", type=float, default=1.0, help="of all sizes; 0: it takes no time")
    parser.add_argument("--learn-share", type=float, default=LEARN_SHARE, help="of a batch's least time on the engines")
    return parser.parse_args()


def measured(options: argparse.Namespace, engine: BatchingConfig, workload: Workload) -> Parts:
    """An engine by itself in virtual time, and the manager's process in real time."""
    with no_garbage_collection():
        tokens_per_s, episodes_per_s = engine_alone(engine, workload, PLACES_PER_GPU, 500 if options.quick else 4000)
    tokens = round(tokens_per_s / episodes_per_s) + workload.prompt_tokens + 2 * workload.observation_tokens
    ray_call_s, ray_trajectory_s = RAY_CALL_S, RAY_TRAJECTORY_S
    if options.measure_ray:
        ray_call_s, ray_trajectory_s = ray_costs(tokens, options.repetitions)
    costs = [measure_manager(ray_call_s, tokens, 2048 if options.quick else 4096) for _ in range(options.repetitions)]
    costs = [replace(cost, end_s=cost.end_s + ray_trajectory_s) for cost in costs]
    return Parts(tokens_per_s, episodes_per_s, costs, ray_call_s, ray_trajectory_s)


def played(options: argparse.Namespace, player: Player) -> tuple[list[Row], list[Row]]:
    """All sizes with all bounds, and beside SLOWED_GPUS a manager that is slower and slower, from the usual one on."""
    staleness = options.staleness or ([1] if options.quick else [0, 1, 2])
    sizes = sorted({*(options.gpus or (QUICK_GPUS if options.quick else GPUS)), SLOWED_GPUS})
    rows = [
        player.play(gpus, bound, options.manager_slower)
        for bound in staleness
        for gpus in sizes
        if bound == 1 or gpus <= LARGEST_OF_ALL_BOUNDS or options.gpus
    ]
    usual = (row for row in rows if (row["gpus"], row["max_staleness"], row["manager_slower"]) == (SLOWED_GPUS, 1, 1))
    slowed = [next(usual, None) or player.play(SLOWED_GPUS, 1)]
    slowed += [player.play(SLOWED_GPUS, 1, factor) for factor in (QUICK_SLOWED_BY if options.quick else SLOWED_BY)]
    return rows, slowed


def described(options: argparse.Namespace, workload: Workload) -> str:
    """The config, with what the command line has changed of it."""
    config = f"{MODEL} on simulated H100s, {PLACES_PER_GPU} episodes for each, groups of {workload.group_size}"
    if options.learn_share != LEARN_SHARE:
        config += f", learners {options.learn_share:g} of a batch's least time"
    if options.manager_slower != 1:
        config += f", a manager {options.manager_slower:g} times as slow"
    return config


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
