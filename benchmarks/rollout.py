"""Rollouts on the simulated engine: how near to the ideal schedule, what a turn costs, and beside other schedulers.

The ideal is a lower bound: list scheduling of the very durations that the simulated engine drew, on as many places as
episodes may run at once, everything else taking no time. Last line: one JSON object.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from harness import calibrate, report
from harness.handle_round_trip import handle_round_trip_s
from harness.ideal import lock_step_s, makespan_s, steady_s, whole_batches_s
from harness.peer_policies import OVERLAPPING, peer_scheduler
from harness.rollout_stack import APP, Measured, rollout_stack
from harness.watched import Watch

from raygym.simulate import SimulatedConfig, draw_latency_s, generator
from raygym.tasks import turn_seed
from raygym.types import Trajectory

TURNS = 5
_LEAST_AT_16 = 5


def main() -> None:
    """Measure, then report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one repetition of the first measurement only")
    parser.add_argument("--only", nargs="+", default=[], choices=list(MEASUREMENTS), help="names of measurements")
    options = parser.parse_args()
    calibrate()
    repetitions = 1 if options.quick else 3
    wanted = options.only or (["64"] if options.quick else list(MEASUREMENTS))
    samples: dict[str, list[float]] = {}
    for name in wanted:
        for key, values in MEASUREMENTS[name](repetitions).items():
            samples[key] = values
    report("rollout", samples, config=f"simulated engine, {TURNS} turns an episode, one replica, one EnvRunner")


def efficiency_64(repetitions: int) -> dict[str, list[float]]:
    """64 episodes at once, 100 ms a turn; 80 in each place, so that filling and emptying them weighs 1 %."""
    return efficiency("64", {"turn_latency_s": 0.1}, 64, 5120, repetitions)


def efficiency_1024(repetitions: int) -> dict[str, list[float]]:
    """1,024 episodes at once, 2 s a turn."""
    samples = efficiency("1024", {"turn_latency_s": 2.0}, 1024, 2048, repetitions)
    # Of the RolloutManager, and at this load: 1,024 times 2 s.
    return samples | {"loop_lag_ms_p99": samples["loop_lag_ms_p99_1024"]}


def heavy_tail(repetitions: int, places: int = 1024) -> dict[str, list[float]]:
    """Log-normal turns of 2 s in the mean, steps that overlap, over-sampling on: what was delivered over what could be.

    Episodes that were started and thrown away are no part of the ideal, so they count against us.
    """
    samples: dict[str, list[float]] = {}
    simulated = {"turn_latency_s": 2.0, "latency_sigma": 1.0}
    config = SimulatedConfig(**{"max_model_len": 8192, **simulated})
    # A step lasts as long as two episodes, so that a group whose slowest takes five is still in time.
    rollout = {"groups_per_step": places // 2, "group_size": 4, "max_concurrent": places, "max_staleness": 2}
    rollout |= {"order": "completion", "over_sampling": 0.5}
    # The first steps fill the pipeline, and a last one is never collected: nothing may drain while we measure.
    warm_up = 2
    with rollout_stack(simulated, rollout, turns=TURNS, steps=warm_up + 2 * repetitions + 3) as stack:
        for _ in range(warm_up):
            stack.collect()
        # Episodes go on between two collections: nothing else is done meanwhile, and the clock never stops.
        pairs, ends = [], [time.perf_counter()]
        for _ in range(repetitions):
            pairs.append([stack.collect(), stack.collect()])
            ends.append(time.perf_counter())
    for pair, began, ended in zip(pairs, ends, ends[1:], strict=False):
        played = [t for measured in pair for t in trajectories(measured)]
        durations = [sum(latencies_s(config, t)) for t in played]
        dropped = sum(len(measured.collected.dropped) for measured in pair)
        add(samples, {"efficiency_heavy_tail": steady_s(durations, places) / (ended - began)})
        add(samples, {"dropped_groups_heavy_tail": dropped})
        add(samples, {"episodes_per_s_heavy_tail": len(played) / (ended - began)})
    return samples


def peers(
    repetitions: int,
    *,
    mean_s: float = 0.25,
    places: int = 64,
    spread: int = 0,
    staleness: int = 1,
    policies: Sequence[str] = ("top_up", "threads", "whole_batch", "lock_step"),
    name: str = "",
) -> dict[str, Any]:
    """Ours beside the policies of `harness.peer_policies`, on the same order of tasks with the same drawn latencies.

    Episodes a second that were delivered in a step's batch, which has as many as there are places. Ours is the
    RolloutManager with steps that overlap and no over-sampling. All times are the same share of what they stand for:
    `mean_s` of a turn of 2 s, half of it for top-up's second. The `of_its_own_schedule` of a policy is the time that
    it would take if nothing but the engine took any, over what it took: far below 1, it would not be carried out well.
    There is no efficiency of overlapping policies: of what a repetition delivers, much was played before it began.
    """
    samples: dict[str, list[float]] = {}
    simulated = {"turn_latency_s": mean_s, "latency_sigma": 1.0}
    config = SimulatedConfig(**{"max_model_len": 8192, **simulated})
    rollout = {"groups_per_step": places // 4, "group_size": 4, "max_concurrent": places}
    rollout |= {"max_staleness": staleness, "order": "completion"}
    # Steps of one repetition, and before the first: overlapping ones fill their pipeline.
    in_one = {"lock_step": 1, "whole_batch": 2}
    warm_up = {"lock_step": 0, "whole_batch": 1}
    rates: dict[str, list[float]] = {}

    def steps_of(policy: str) -> int:
        return warm_up.get(policy, staleness + 1) + in_one.get(policy, 5) * repetitions

    def take(policy: str, steps: Sequence[tuple[list[Trajectory], float]]) -> None:
        size = in_one.get(policy, 5)
        for start in range(len(steps) - size * repetitions, len(steps), size):
            taken = steps[start : start + size]
            drawn = [[latencies_s(config, t) for t in played] for played, _ in taken]
            durations = [[sum(turns) for turns in batch] for batch in drawn]
            seconds = sum(seconds for _, seconds in taken)
            rates.setdefault(policy, []).append(sum(map(len, durations)) / seconds)
            add(samples, {f"episodes_per_s_{policy}{name}": rates[policy][-1]})
            own_s = {"lock_step": lock_step_s(drawn), "whole_batch": whole_batches_s(durations)}
            if policy in own_s:
                add(samples, {f"of_its_own_schedule_{policy}{name}": own_s[policy] / seconds})

    with rollout_stack(simulated, rollout, turns=TURNS, spread=spread, steps=steps_of("ours") + 3) as stack:
        steps, before = [], time.perf_counter()
        for _ in range(steps_of("ours")):
            played = trajectories(stack.collect())
            now = time.perf_counter()
            steps.append((played, now - before))
            before = now
        take("ours", steps)
    with peer_scheduler(simulated, rollout, turns=TURNS, spread=spread) as play:
        for policy in policies:
            played_steps = play(policy, steps_of(policy), wake_s=mean_s / 2)
            take(policy, [([t for g in step.groups for t in g.trajectories], step.seconds) for step in played_steps])
    for policy in policies:
        ratios = [ours / theirs for ours, theirs in zip(rates["ours"], rates[policy], strict=True)]
        samples[f"speedup_over_{policy.replace('lock_step', 'lockstep')}{name}"] = ratios
    return samples


def peers_varying(repetitions: int) -> dict[str, list[float]]:
    """The same where each task has its own number of turns, 1 to 9."""
    return peers(repetitions, spread=TURNS - 1, name="_varying")


def peers_stale(repetitions: int) -> dict[str, list[float]]:
    """The overlapping ones with a bound of staleness that holds up nobody: places are what is short."""
    return peers(repetitions, staleness=4, policies=OVERLAPPING, name="_stale")


def overhead(repetitions: int) -> dict[str, list[float]]:
    """The time of a turn beyond the engine's: alone, over one Serve-handle call; and of 16 episodes at 100 ms."""
    samples: dict[str, list[float]] = {}
    rollout = {"groups_per_step": 20, "group_size": 2, "max_concurrent": 1}
    with rollout_stack({}, rollout, turns=TURNS, steps=repetitions + 1) as stack:
        stack.collect()
        for _ in range(repetitions):
            turn_s = float(np.median([turn.generate_s for t in trajectories(stack.collect()) for turn in t.turns]))
            handle_s = handle_round_trip_s()
            add(samples, {"overhead_ms_p50": turn_s * 1000, "handle_round_trip_ms_p50": handle_s * 1000})
            add(samples, {"overhead_over_handle_round_trip_p50": turn_s / handle_s})
    # Six of 640 turns decide about the 99th percentile, and one moment in which both cores are busy is in more: one
    # repetition gave 5 to 36 ms within minutes.
    at_16 = efficiency("16", {"turn_latency_s": 0.1}, 16, 128, max(repetitions, _LEAST_AT_16))
    return samples | {"overhead_ms_p99": at_16["overhead_ms_p99_16"], "efficiency_16": at_16["efficiency_16"]}


def saturation(repetitions: int) -> dict[str, list[float]]:
    """An engine of no latency: turns a second, and processor time by process; on one core, and on all.

    What one more core buys is read off the steps from one to two, and off the process that is the first to be full.
    """
    samples: dict[str, list[float]] = {}
    cores = sorted(os.sched_getaffinity(0))
    all_cores = len(cores)
    for used, runners in sorted({(1, 1), (min(2, all_cores), 1), (all_cores, 1), (all_cores, 2)}):
        # Processes that are started from here on have the same cores.
        os.sched_setaffinity(0, cores[:used])
        try:
            measured = saturated(repetitions, runners)
        finally:
            os.sched_setaffinity(0, cores)
        name = f"_{used}_cores_{runners}_runners"
        samples |= {f"{key}{name}": values for key, values in measured.items()}
        if (used, runners) == (all_cores, 1):
            samples |= measured
    return samples


def saturated(repetitions: int, runners: int) -> dict[str, list[float]]:
    """256 episodes at once on an engine of no latency."""
    samples: dict[str, list[float]] = {}
    rollout = {"groups_per_step": 256, "group_size": 4, "max_concurrent": 256, "env_runners": runners}
    with rollout_stack({}, rollout, turns=TURNS, steps=repetitions + 1) as stack:
        stack.collect()
        for _ in range(repetitions):
            measured = stack.collect()
            turns = sum(len(t.turns) for t in trajectories(measured))
            add(samples, {"saturation_turns_per_s": turns / measured.seconds})
            add(samples, {"episodes_per_s": len(trajectories(measured)) / measured.seconds})
            add(samples, {f"cpu_ms_per_turn_{kind}": s / turns * 1000 for kind, s in measured.cpu_s.items()})
            busy = {f"cores_of_{kind}": s / measured.seconds for kind, s in measured.cpu_s.items()}
            add(samples, busy)
    return samples


def scale(repetitions: int) -> dict[str, list[float]]:
    """10,000 simulated episodes at once, beside 100: what one costs and what it holds.

    The cost is the processor time of all processes, Ray's own too, from the first call to the last group. So that
    neither side pays more seconds of an idle Ray, both play the same 10,000 episodes at the same wanted 500 turns/s:
    the places differ, and with them the engine's time of a turn, 20 s and 0.2 s. Starting the stack is not in it.
    """
    samples: dict[str, list[float]] = {}
    for _ in range(min(repetitions, 2)):  # of three minutes each
        few, many = at_once(100), at_once(10_000)
        for values in (few, many):
            add(samples, values)
        ratio = many["cpu_ms_per_episode_10000"] / few["cpu_ms_per_episode_100"]
        add(samples, {"cost_per_episode_10000_over_100": ratio})
    return samples


def at_once(places: int, episodes: int = 10_000, turns_per_s: float = 500, turns: int = 3) -> dict[str, float]:
    """So many places, from empty to empty, once; all episodes must come back whole."""
    rollout = {"groups_per_step": episodes // 4, "group_size": 4, "max_concurrent": places}
    latency_s = places / turns_per_s
    with rollout_stack({"turn_latency_s": latency_s}, rollout, turns=turns, steps=1) as stack:
        stack.warm_up()
        with Watch(APP) as watch:
            measured = stack.collect()
        played = trajectories(measured)
        assert len(played) == episodes and all(len(t.turns) == turns for t in played), "not all episodes were played"
        assert not measured.collected.failures, measured.collected.failures
        values = {
            "episodes_at_once": watch.most_requests,
            "efficiency": makespan_s([latency_s * turns] * episodes, places) / measured.seconds,
            "cpu_ms_per_episode": sum(measured.cpu_s.values()) / episodes * 1000,
            **{f"cpu_ms_per_episode_{kind}": s / episodes * 1000 for kind, s in measured.cpu_s.items()},
            "loop_lag_ms_p99": measured.collected.loop_lag_ms[1],
            # While all were running none had come back, so the manager held none of their tokens.
            "manager_kib_per_episode": watch.grown_kib("manager") / watch.most_requests,
            "runner_kib_per_episode": watch.grown_kib("runner") / watch.most_requests,
            "replica_kib_per_episode": watch.grown_kib("replica") / watch.most_requests,
            # At the end it holds them all, until they are collected.
            "manager_kib_per_finished_episode": (watch.most_kib("manager") - token_kib(played)) / episodes,
        }
    return {f"{key}_{places}": value for key, value in values.items()}


def token_kib(played: list[Trajectory]) -> float:
    """What the arrays of all trajectories hold."""
    arrays = [(t.token_ids, t.loss_mask, t.logprobs, t.weight_versions) for t in played]
    return sum(array.nbytes for four in arrays for array in four) / 1024


def efficiency(name: str, simulated: dict[str, Any], places: int, episodes: int, repetitions: int) -> dict[str, Any]:
    """Ideal seconds over measured ones, and the time of a turn beyond the engine's own."""
    samples: dict[str, list[float]] = {}
    rollout = {"groups_per_step": episodes // 4, "group_size": 4, "max_concurrent": places}
    config = SimulatedConfig(**{"max_model_len": 8192, **simulated})
    with rollout_stack(simulated, rollout, turns=TURNS, steps=repetitions) as stack:
        stack.warm_up()
        for _ in range(repetitions):
            measured = stack.collect()
            played = trajectories(measured)
            drawn = [latencies_s(config, t) for t in played]
            overheads = [
                turn.generate_s - s
                for t, ss in zip(played, drawn, strict=True)
                for turn, s in zip(t.turns, ss, strict=True)
            ]
            turns = sum(len(t.turns) for t in played)
            add(
                samples,
                {
                    f"efficiency_{name}": makespan_s([sum(ss) for ss in drawn], places) / measured.seconds,
                    f"loop_lag_ms_p99_{name}": measured.collected.loop_lag_ms[1],
                    f"overhead_ms_p50_{name}": float(np.percentile(overheads, 50)) * 1000,
                    f"overhead_ms_p99_{name}": float(np.percentile(overheads, 99)) * 1000,
                    **{f"cpu_ms_per_turn_{kind}_{name}": s / turns * 1000 for kind, s in measured.cpu_s.items()},
                },
            )
    return samples


MEASUREMENTS = {
    "64": efficiency_64,
    "1024": efficiency_1024,
    "heavy_tail": heavy_tail,
    "peers": peers,
    "peers_varying": peers_varying,
    "peers_stale": peers_stale,
    "overhead": overhead,
    "saturation": saturation,
    "10000": scale,
}


def trajectories(measured: Measured) -> list[Trajectory]:
    """All of one collection."""
    return [t for group in measured.collected.groups for t in group.trajectories]


def latencies_s(config: SimulatedConfig, trajectory: Trajectory) -> list[float]:
    """What the simulated engine drew for each turn."""
    drawn = []
    for number, turn in enumerate(trajectory.turns):
        seed = turn_seed(0, trajectory.task, trajectory.episode, trajectory.attempt, number)
        version = int(trajectory.weight_versions[turn.start])
        drawn.append(draw_latency_s(config, generator(trajectory.token_ids[: turn.start], seed, version)))
    return drawn


def add(samples: dict[str, list[float]], values: dict[str, float]) -> None:
    """One more sample of each."""
    for key, value in values.items():
        samples.setdefault(key, []).append(value)


if __name__ == "__main__":
    os.environ.setdefault("RAY_SERVE_LOG_TO_STDERR", "0")
    main()
