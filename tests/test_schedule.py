"""The scheduler under any interleaving of finishing, failing, expiring and updating."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable, Iterable
from types import FrameType
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiers import examples

from raygym.config import ConfigError, RolloutConfig
from raygym.config_file import parse_config
from raygym.rollout_state import RolloutState
from raygym.schedule import Assignment, Collected, RolloutStopped, Scheduler, SchedulerOptions, SchedulerState
from raygym.tasks import TaskCursor, validation_tasks
from raygym.types import EpisodeFailure, EpisodeStatus, FailureKind, Group, Sampling, Trajectory

ENVS = [("a", 1.0), ("b", 2.0)]


class Clock:
    """Seconds that pass only when told."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def scheduler(
    clock: Clock | None = None, state: SchedulerState | None = None, whole: Iterable[Group] = (), **changes: Any
) -> Scheduler:
    options: dict[str, Any] = {
        "groups_per_step": 2,
        "group_size": 2,
        "steps": 3,
        "max_concurrent": 3,
        "max_staleness": 0,
        "max_retries": 1,
        "max_replaced_groups": 5,
    }
    cursor = TaskCursor(ENVS, seed=0, position=state.cursor if state else 0)
    return Scheduler(cursor, SchedulerOptions(**(options | changes)), clock or Clock(), state, whole)


def played(assignment: Assignment, reward: float = 1.0) -> Trajectory:
    empty = np.empty(0)
    return Trajectory(
        task=assignment.task,
        group_id=assignment.group_id,
        episode=assignment.episode,
        attempt=assignment.attempt,
        status=EpisodeStatus.TERMINATED,
        token_ids=empty.astype(np.int32),
        loss_mask=empty.astype(np.bool_),
        logprobs=empty.astype(np.float32),
        weight_versions=empty.astype(np.int32),
        turns=(),
        reward=reward,
        messages=(),
        sampling=Sampling(),
    )


LOST = EpisodeFailure(FailureKind.ENV_LOST, "gone")


@settings(max_examples=examples(80, 200), deadline=None)
@given(
    seed=st.integers(0, 2**32),
    failure_rate=st.floats(0, 0.4),
    expiry_rate=st.sampled_from([0.0, 0.0, 0.02]),
    max_staleness=st.integers(0, 3),
    max_concurrent=st.integers(1, 12),
    groups_per_step=st.integers(1, 4),
    group_size=st.integers(2, 4),
    order=st.sampled_from(["task", "completion"]),
    over_sampling=st.sampled_from([0.0, 0.5, 2.0]),
    extra_episodes=st.integers(0, 2),
    dynamic_sampling=st.booleans(),
    restart_rate=st.sampled_from([0.0, 0.02, 0.1]),
    validation_rate=st.sampled_from([0.0, 0.05, 1.0]),
    validation_size=st.integers(1, 8),
    kill_rate=st.sampled_from([0.0, 0.0, 0.03]),
)
def test_any_interleaving_keeps_the_promises(
    seed: int,
    failure_rate: float,
    expiry_rate: float,
    max_staleness: int,
    max_concurrent: int,
    groups_per_step: int,
    group_size: int,
    order: Literal["task", "completion"],
    over_sampling: float,
    extra_episodes: int,
    dynamic_sampling: bool,
    restart_rate: float,
    validation_rate: float,
    validation_size: int,
    kill_rate: float,
) -> None:
    """Bounded staleness and concurrency, whole groups, each task trained once or dropped with its cause.

    Whatever happens to schedulers that are lost between two collections, as the driver of a run sees it, and whenever
    a validation is played beside the training: each is answered, and neither starves the other. And whenever all
    processes are killed and begin again from a checkpoint: what was whole then is not played again.
    """
    steps, rng, clock = 4, random.Random(seed), Clock()
    options: dict[str, Any] = dict(
        steps=steps,
        max_staleness=max_staleness,
        max_concurrent=max_concurrent,
        groups_per_step=groups_per_step,
        group_size=group_size,
        max_replaced_groups=10_000,
        max_failures_in_a_row=10_000,
        max_uniform_groups=10_000,
        order=order,
        over_sampling=over_sampling if order == "completion" else 0.0,
        extra_episodes=extra_episodes,
        dynamic_sampling=dynamic_sampling,
        group_deadline_s=10.0,
    )
    schedule, state = scheduler(clock, **options), SchedulerState()
    running: list[Assignment] = []
    version, collected, started_at = 0, list[Collected](), dict[str, int]()
    attempts = dict[tuple[str, int], int]()
    held_out, validating, validated_last = validation_tasks(ENVS, validation_size), False, -1
    checkpoint, kept = (RolloutState(), version, list(collected), dict(started_at)), set[str]()
    while version < steps or validating:
        if rng.random() < 0.2:
            now = RolloutState(schedule.state(), schedule.whole_groups())
            began = {group.group_id: started_at[group.group_id] for group in now.whole}
            checkpoint = now, version, list(collected), began
        if rng.random() < kill_rate:
            rollouts, version, collected, started_at = checkpoint[0], checkpoint[1], [*checkpoint[2]], {**checkpoint[3]}
            rollouts = rollouts.resumed(version, groups_per_step, order)
            state, kept = rollouts.scheduler, {group.group_id for group in rollouts.whole}
            schedule, running = scheduler(clock, state, rollouts.whole, **options), []
            attempts.clear()
            if validating:
                schedule.add_validation(held_out, 30.0)
            validated_last = version
        if rng.random() < restart_rate:
            state = SchedulerState.from_json(json.loads(json.dumps(state.successor(version).to_json())))
            schedule, running = scheduler(clock, state, **options), []
            started_at.clear()  # all of it is played again
            kept.clear()
            if validating:  # and so is this
                schedule.add_validation(held_out, 30.0)
                validated_last = version  # at most one a version, as in a run
        if not validating and validated_last < version < steps and rng.random() < validation_rate:
            schedule.add_validation(held_out, 30.0)
            validating, validated_last = True, version
        started = schedule.start()
        assert_shared_fairly(running, started, max_concurrent)
        for assignment in started:
            assert assignment.group_id not in kept, "it was whole, and is played again"
            started_at.setdefault(assignment.group_id, version)
            episode = (assignment.group_id, assignment.episode)
            assert assignment.attempt > attempts.get(episode, -1), "an earlier attempt could be taken for this one"
            attempts[episode] = assignment.attempt
            running.append(assignment)
        assert schedule.running == len(running) <= max_concurrent
        assert running, "nothing runs although a step is missing"
        if rng.random() < expiry_rate:
            clock.now += 20.0
            schedule.expire()
        assignment = running.pop(rng.randrange(len(running)))
        schedule.finish(assignment, LOST if rng.random() < failure_rate else played(assignment, rng.randrange(3)))
        obsolete = schedule.obsolete()
        assert set(obsolete) <= set(running)
        for unwanted in obsolete:
            if rng.random() < 0.5:  # cancelled; else it comes to its end on its own
                running.remove(unwanted)
                schedule.finish(unwanted, EpisodeFailure(FailureKind.CANCELLED, "unwanted"))
        if validating and (validated := schedule.collect_validation()) is not None:
            validating = False
            assert {drop.task.split for drop in validated.dropped} <= {"validation"}
            played_or_not = [group.task for group in validated.groups] + [drop.task for drop in validated.dropped]
            assert sorted(task.index for task in played_or_not) == list(range(validation_size))
        # With staleness the next step may be whole already.
        while version < steps and (step := schedule.collect_step(version)) is not None:
            assert len(step.groups) == groups_per_step
            for group in step.groups:
                episodes = [t.episode for t in group.trajectories]
                assert len(set(episodes)) == group_size and set(episodes) <= set(range(group_size + extra_episodes))
                assert version - started_at[group.group_id] <= max_staleness
                assert not dynamic_sampling or len(set(group.rewards)) > 1
            collected.append(step)
            state = step.state
            version += 1
            schedule.set_version(version)
    trained = [group.task.index for step in collected for group in step.groups]
    dropped = [drop.task.index for step in collected for drop in step.dropped]
    assert len(trained) == steps * groups_per_step
    # Exactly once: nothing of the order is skipped, nothing comes twice.
    assert sorted(trained + dropped) == list(range(len(trained) + len(dropped)))
    assert all(drop.cause for step in collected for drop in step.dropped)


def steps_of(call: Callable[[], Any]) -> int:
    """Lines of Python that a call executes, each round of a loop or comprehension counted."""
    count = 0

    def trace(frame: FrameType, event: str, arg: Any) -> Any:
        nonlocal count
        count += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(before)
    return count


@pytest.mark.parametrize("order", ["task", "completion"])
@pytest.mark.parametrize("waits", [False, True])
def test_an_episodes_end_costs_the_same_whatever_is_in_play(order: str, waits: bool) -> None:
    """One that makes its group whole, and one that has its group replaced: with 10 groups in play and with 500."""

    def costs(groups: int) -> list[int]:
        schedule = scheduler(
            groups_per_step=groups,
            max_concurrent=12 if waits else 2 * groups,
            order=order,
            max_staleness=1,
            group_deadline_s=10.0,
            max_retries=0,
        )
        running = schedule.start()

        def end(outcome: Any) -> None:
            schedule.expire()
            schedule.finish(running.pop(0), outcome)
            running.extend(schedule.start())
            schedule.obsolete()
            schedule.next_expiry()
            assert schedule.collect_step(0) is None

        for _ in range(4):
            end(played(running[0]))
        return [steps_of(lambda: end(played(running[0]))) for _ in range(2)] + [steps_of(lambda: end(LOST))]

    assert costs(500) == costs(10)


def assert_shared_fairly(running: list[Assignment], started: list[Assignment], places: int) -> None:
    """Of what was started at once: validation got at most half of the places while training waited, and got them."""
    half = places // 2
    validating = sum(a.task.split == "validation" for a in running)
    for position, assignment in enumerate(started):
        later = {a.task.split for a in started[position + 1 :]}
        if assignment.task.split == "validation":
            assert validating < half or "train" not in later or not half, "training waited although it was its turn"
            validating += 1
        else:
            assert validating >= half or "validation" not in later, "validation waited although it was its turn"


def test_a_failed_episode_is_retried_then_its_group_replaced() -> None:
    schedule = scheduler(max_concurrent=4)
    first, sibling, *others = schedule.start()
    assert (first.group_id, first.attempt) == (sibling.group_id, 0)
    schedule.finish(first, LOST)
    assert schedule.obsolete() == []
    (retry,) = schedule.start()
    assert retry == Assignment(first.group_id, first.task, first.episode, 1)
    schedule.finish(retry, LOST)
    assert schedule.obsolete() == [sibling]
    assert schedule.obsolete() == [], "each is told once"
    replacement = schedule.start()
    assert {a.task.index for a in replacement} == {2}
    schedule.finish(sibling, played(sibling))  # too late: it belongs to no group any more
    for assignment in others + replacement + schedule.start():
        schedule.finish(assignment, played(assignment))
    step = schedule.collect_step(0)
    assert step is not None
    assert [group.task.index for group in step.groups] == [2, 1]
    assert [(drop.task.index, drop.cause) for drop in step.dropped] == [(0, "env_lost: gone")]
    assert step.failures == {"env_lost": 2} and sum(step.failures_by_env.values()) == 2


def test_kinds_have_budgets_of_their_own() -> None:
    schedule = scheduler(max_retries=3, retries={"context_overflow": 0}, max_concurrent=4)
    first, *_ = schedule.start()
    schedule.finish(first, EpisodeFailure(FailureKind.CONTEXT_OVERFLOW, "too long"))
    assert {a.task.index for a in schedule.start()} == {2}, "not retried: its group was replaced"


def test_groups_that_cannot_be_completed_stop_the_run_with_the_last_cause() -> None:
    schedule = scheduler(max_retries=0, max_replaced_groups=3)
    with pytest.raises(RolloutStopped, match=r"4 groups in a row.*environment '[ab]'.*env_lost: gone"):
        while True:
            for assignment in schedule.start():
                schedule.finish(assignment, LOST)


def test_one_hopeless_environment_of_a_mixture_stops_the_run() -> None:
    """Its neighbour's successes do not hide it."""
    schedule = scheduler(steps=1000, max_replaced_groups=10_000, max_failures_in_a_row=20)
    version = 0
    with pytest.raises(RolloutStopped, match=r"environment 'a' failed 21 times in a row.*env_lost: gone"):
        while True:
            for assignment in schedule.start():
                schedule.finish(assignment, LOST if assignment.task.env == "a" else played(assignment))
            if schedule.collect_step(version):
                version += 1
                schedule.set_version(version)


def test_a_process_that_dies_with_all_that_it_plays_does_not_stop_the_run() -> None:
    schedule = scheduler(groups_per_step=500, max_concurrent=1000, max_retries=3, steps=1)
    for _ in range(3):
        for assignment in schedule.start():
            schedule.finish(assignment, LOST)
    for assignment in schedule.start():
        schedule.finish(assignment, played(assignment))
    step = schedule.collect_step(0)
    assert step is not None and step.failures == {"env_lost": 3000} and not step.dropped


def test_extra_episodes_let_the_slowest_go_and_replace_the_lost() -> None:
    schedule = scheduler(groups_per_step=1, extra_episodes=2, max_concurrent=4, max_retries=0)
    one, two, three, four = schedule.start()
    schedule.finish(one, LOST)
    schedule.finish(four, played(four))
    assert schedule.collect_step(0) is None
    schedule.finish(two, played(two))
    assert schedule.obsolete() == [three]
    step = schedule.collect_step(0)
    assert step is not None and [t.episode for t in step.groups[0].trajectories] == [1, 3]


def test_over_sampling_takes_the_first_groups_and_drops_the_rest_with_their_cause() -> None:
    schedule = scheduler(order="completion", over_sampling=1.0, max_concurrent=100)
    episodes = schedule.start()
    assert {a.task.index for a in episodes} == {0, 1, 2, 3}
    for assignment in episodes:
        if assignment.task.index in (1, 3):
            schedule.finish(assignment, played(assignment))
    step = schedule.collect_step(0)
    assert step is not None and [group.task.index for group in step.groups] == [1, 3]
    assert {drop.task.index for drop in step.dropped} == {0, 2}
    assert all(drop.cause.startswith("surplus") for drop in step.dropped)
    assert {a.task.index for a in schedule.obsolete()} == {0, 2}


def test_a_group_waits_for_places_before_it_is_admitted_not_after() -> None:
    schedule = scheduler(order="completion", over_sampling=2.0, max_staleness=1, max_concurrent=4)
    first = schedule.start()
    assert len(first) == 4
    # Eight groups may be in play, but for two there are places: the clock of the others has not begun.
    assert [group.admitted_at for group in schedule.state().groups] == [0, 0]
    for assignment in first:
        schedule.finish(assignment, played(assignment))
    assert schedule.collect_step(0) is not None
    schedule.set_version(1)
    schedule.start()
    assert [group.admitted_at for group in schedule.state().groups] == [1, 1]


def test_a_group_past_its_deadline_is_replaced() -> None:
    clock = Clock()
    schedule = scheduler(clock, max_concurrent=4, group_deadline_s=5.0)
    episodes = schedule.start()
    clock.now = 3.0
    assert schedule.next_expiry() == 5.0
    schedule.expire()
    assert schedule.obsolete() == []
    for assignment in episodes[:2]:
        schedule.finish(assignment, played(assignment))
    clock.now = 5.0
    schedule.expire()
    assert schedule.obsolete() == episodes[2:]
    assert schedule.next_expiry() is None, "its replacement has not started"
    assert {a.task.index for a in schedule.start()} == {2}
    assert schedule.next_expiry() == 10.0


def test_dynamic_sampling_replaces_what_teaches_nothing_and_stops_when_all_is_like_that() -> None:
    schedule = scheduler(dynamic_sampling=True, max_uniform_groups=3)
    with pytest.raises(RolloutStopped, match=r"4 groups in a row had no two different rewards \(all 1 .*temperature"):
        while True:
            for assignment in schedule.start():
                schedule.finish(assignment, played(assignment))


def test_validation_shares_the_places_and_its_failures_are_not_replaced() -> None:
    schedule = scheduler(max_retries=0, max_concurrent=2)
    waiting = schedule.start()
    schedule.add_validation(validation_tasks(ENVS, 3))
    for assignment in waiting:
        schedule.finish(assignment, played(assignment))
    splits: list[str] = []
    failed = 0
    while schedule.collect_step(0) is None or splits.count("validation") < 3:
        started = schedule.start()
        splits += [a.task.split for a in started]
        for assignment in started:
            lost = assignment.task.split == "validation" and not failed
            failed += lost
            schedule.finish(assignment, LOST if lost else played(assignment))
        if not started:
            break
    assert splits[:2] == ["validation", "train"], "neither starves the other"
    result = schedule.collect_validation()
    assert result is not None
    assert [group.task.index for group in result.groups] == [1, 2]
    assert [drop.task.index for drop in result.dropped] == [0]


@pytest.mark.parametrize(("places", "most"), [(8, 4), (3, 1), (1, 1)])
def test_while_training_waits_validation_holds_at_most_half_of_the_places(places: int, most: int) -> None:
    schedule = scheduler(max_concurrent=places, groups_per_step=20, steps=1)
    running = schedule.start()
    schedule.add_validation(validation_tasks(ENVS, 20))
    splits = list[str]()
    while schedule.collect_step(0) is None and len(splits) < 20:
        schedule.finish(running[0], played(running.pop(0)))
        started = schedule.start()
        running += started
        splits += [a.task.split for a in started]
        assert sum(a.task.split == "validation" for a in running) <= most
    assert 6 <= splits.count("validation") <= 12, "each gets on, with one place or with many"


def test_a_validation_that_is_late_is_ended_and_stops_nothing() -> None:
    clock = Clock()
    schedule = scheduler(clock, max_concurrent=30, max_replaced_groups=0)
    training = schedule.start()
    schedule.add_validation(validation_tasks(ENVS, 20), deadline_s=7.0)
    first, *late = schedule.start()
    schedule.finish(first, played(first))
    assert schedule.next_expiry() == 7.0 and schedule.collect_validation() is None
    clock.now = 7.0
    schedule.expire()
    assert schedule.obsolete() == late and schedule.next_expiry() is None
    validated = schedule.collect_validation()
    assert validated is not None and len(validated.groups) == 1 and len(validated.dropped) == 19
    assert all(drop.cause.startswith("validation_deadline") for drop in validated.dropped)
    for assignment in training:
        schedule.finish(assignment, played(assignment))
    step = schedule.collect_step(0)
    assert step is not None and not step.dropped


@pytest.mark.parametrize("failing", ["train", "validation"])
def test_neither_stream_hides_that_the_other_always_fails(failing: str) -> None:
    schedule = scheduler(max_retries=0, max_replaced_groups=3, max_concurrent=2, groups_per_step=100)
    schedule.add_validation(validation_tasks(ENVS, 100))
    running = schedule.start()
    with pytest.raises(RolloutStopped, match="4 groups in a row could not be completed"):
        for _ in range(40):
            assignment = running.pop(0)
            schedule.finish(assignment, LOST if assignment.task.split == failing else played(assignment))
            running += schedule.start()


def test_a_scheduler_that_was_lost_owes_what_was_not_told() -> None:
    """Groups in flight, groups that were whole, and what was dropped for good meanwhile."""
    schedule = scheduler(max_retries=0, max_staleness=1, max_concurrent=100)
    first, sibling, *others = schedule.start()
    assert {a.task.index for a in others} == {1, 2, 3}
    schedule.finish(first, LOST)  # task 4 takes its slot
    for assignment in others:
        schedule.finish(assignment, played(assignment))
    schedule.add_validation([])
    validated = schedule.collect_validation()
    assert validated is not None and not validated.dropped, "a training task is not told with a validation"
    successor = scheduler(state=validated.state.successor(), max_retries=0, max_staleness=1, max_concurrent=100)
    again = successor.start()
    assert [a.task.index for a in again] == [4, 4, 1, 1, 2, 2, 3, 3], "in the order of their slots"
    assert {a.group_id for a in others} < {a.group_id for a in again} and {a.attempt for a in again} == {1}
    successor.finish(sibling, played(sibling))  # its predecessor's
    for assignment in again:
        successor.finish(assignment, played(assignment))
    step = successor.collect_step(0)
    assert step is not None and [group.task.index for group in step.groups] == [4, 1]
    assert [(drop.task.index, drop.group_id, drop.cause) for drop in step.dropped] == [(0, "train-0", "env_lost: gone")]
    assert step.failures == {"env_lost": 1} and step.failures_by_env == {first.task.env: 1}


def test_attempts_after_a_restart_have_their_whole_budget() -> None:
    schedule = scheduler(state=SchedulerState().successor().successor(), retries={"env_lost": 2}, max_concurrent=1)
    (assignment,) = schedule.start()
    assert assignment.attempt == 6, "two schedulers of up to three attempts each went before"
    for attempt in (7, 8):
        schedule.finish(assignment, LOST)
        (assignment,) = schedule.start()
        assert assignment.attempt == attempt and assignment.task.index == 0
    schedule.finish(assignment, LOST)
    assert {a.task.index for a in schedule.start()} == {2}, "its group was replaced"


def test_the_config_offers_exactly_the_schedulers_options() -> None:
    assert set(SchedulerOptions.__slots__) - {"steps"} <= set(RolloutConfig.model_fields)


@pytest.mark.parametrize(
    ("rollout", "words"),
    [
        ({"over_sampling": 0.5}, ["rollout.over_sampling", "order: completion"]),
        ({"retries": {"env_lots": 2}}, ["rollout.retries", "'env_lots'", "env_lost"]),
    ],
)
def test_what_does_not_fit_is_told(rollout: dict[str, Any], words: list[str]) -> None:
    base = {"name": "x", "steps": 1, "policy": {"model": "tiny"}, "envs": [{"id": "raygym/NumberGuess-v0"}]}
    with pytest.raises(ConfigError) as raised:
        parse_config({**base, "rollout": rollout})
    assert all(word in str(raised.value) for word in words)
