"""raygym's rollouts beside NeMo Gym 0.7.0's own collector: turns a second, and processor time of an episode.

Both policies are SIMULATED. What is equal: 5 turns an episode; a policy that takes 100 ms for a turn and answers with
at most 16 tokens and their IDs; as many episodes at once; an environment that has next to nothing to do; the machine
and the run, one after the other. Both are warm. A measurement begins with the first turn of a batch and ends with its
last one, so both pay for filling and for emptying their places, and for nothing before or after it.

What is not equal: theirs is a counter that NeMo Gym ships (`example_session_state_mgmt`), with four tool calls and a
verdict; ours (`FixedTurns`) says a word, since a simulated engine calls no tools. Ours renders each new message with
the policy's chat template and builds groups; their token IDs are made up. Their turns go over HTTP, as NeMo Gym is made
of servers: collector, environment server, agent, resources server, model server. The processor time of their policy is
not counted, that of our engine and of the server around it is; Ray is counted on both sides.

NeMo Gym lives in a Python of its own: `make nemo-gym` first. Without it the benchmark says so and succeeds. Last line:
one JSON object.
"""

from __future__ import annotations

import argparse
import math
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from harness import calibrate, report, report_skipped
from harness.fake_policy import FakePolicy
from harness.nemo_gym_stack import Collection, nemo_gym
from harness.rollout_stack import rollout_stack

from raygym.nemo_gym.config import NemoGymError
from raygym.nemo_gym.interpreter import VERSION, find_interpreter

TURNS = 5
LATENCY_S = 0.1
EPISODES = {1: 8, 16: 96, 64: 384, 256: 1024}
"""By episodes at once: how many to play in one batch."""


def main() -> None:
    """Measure, then report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one repetition of 64 at once only")
    parser.add_argument("--only", nargs="+", type=int, default=[], choices=list(EPISODES), help="episodes at once")
    options = parser.parse_args()
    try:
        find_interpreter("")
    except NemoGymError as error:
        report_skipped("nemo_gym", str(error))
        return
    calibrate()
    repetitions = 1 if options.quick else 3
    levels = options.only or ([64] if options.quick else list(EPISODES))
    samples: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory(prefix="rg-gym-") as folder:
        theirs = play_theirs(levels, repetitions, Path(folder))
    for places in levels:
        compare(samples, places, play_ours(places, repetitions), theirs[places])
    report("nemo_gym", samples, config=f"simulated policies, {TURNS} turns of {LATENCY_S} s, NeMo Gym {VERSION}")


def play_theirs(levels: Sequence[int], repetitions: int, folder: Path) -> dict[int, list[Collection]]:
    """By episodes at once, one collection a repetition; servers and connections are warm."""
    with FakePolicy(TURNS, LATENCY_S).serving() as policy, nemo_gym(policy, folder) as gym:
        gym.collect(max(levels), TURNS, max(levels))
        return {places: [gym.collect(EPISODES[places], TURNS, places) for _ in range(repetitions)] for places in levels}


def play_ours(places: int, repetitions: int) -> list[Collection]:
    """The same through RolloutManager, EnvRunner and PolicyServer."""
    episodes = EPISODES[places]
    rollout = {"groups_per_step": episodes // 4, "group_size": 4, "max_concurrent": places}
    collections = []
    with rollout_stack({"turn_latency_s": LATENCY_S}, rollout, turns=TURNS, steps=repetitions + 1) as stack:
        stack.collect()
        for _ in range(repetitions):
            measured = stack.collect()
            turns = [len(t.turns) for group in measured.collected.groups for t in group.trajectories]
            assert turns == [TURNS] * episodes, turns
            collections.append(Collection(episodes, measured.seconds, sum(measured.cpu_s.values())))
    return collections


def compare(samples: dict[str, list[float]], places: int, ours: list[Collection], theirs: list[Collection]) -> None:
    """One sample of each metric for each repetition; the plain names are of 64 episodes at once."""
    for mine, other in zip(ours, theirs, strict=True):
        ideal_s = math.ceil(mine.episodes / places) * TURNS * LATENCY_S
        measured = {
            f"nemo_gym_turns_ratio_{places}": other.seconds / mine.seconds,
            f"nemo_gym_cpu_ratio_{places}": mine.cpu_s / other.cpu_s,
            f"nemo_gym_efficiency_{places}": ideal_s / other.seconds,
            f"efficiency_{places}": ideal_s / mine.seconds,
            f"nemo_gym_turns_per_s_{places}": other.episodes * TURNS / other.seconds,
            f"turns_per_s_{places}": mine.episodes * TURNS / mine.seconds,
            f"nemo_gym_cpu_s_per_episode_{places}": other.cpu_s / other.episodes,
            f"cpu_s_per_episode_{places}": mine.cpu_s / mine.episodes,
        }
        if places == 64:
            measured["nemo_gym_turns_ratio"] = measured["nemo_gym_turns_ratio_64"]
            measured["nemo_gym_cpu_ratio"] = measured["nemo_gym_cpu_ratio_64"]
        for key, value in measured.items():
            samples.setdefault(key, []).append(value)


if __name__ == "__main__":
    os.environ.setdefault("RAY_SERVE_LOG_TO_STDERR", "0")
    main()
