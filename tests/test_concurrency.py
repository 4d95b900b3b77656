"""Adaptive concurrency: by hand, under any observations, and in front of a modelled engine. Time is simulated."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiers import examples

from raygym.concurrency import AdaptiveConcurrency
from raygym.load_meter import LoadMeter
from raygym.types import EngineLoad


class Clock:
    """Seconds that pass only when told."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Driven:
    """A controller that is asked once a second; each turn takes `turn_s` and each episode one turn."""

    def __init__(self, least: int = 8, most: int = 256, turn_s: float = 1.0) -> None:
        self.clock = Clock()
        self.control = AdaptiveConcurrency(least, most, self.clock)
        self.control.episode_ended(1, turn_s)

    def see(
        self, *loads: EngineLoad, episodes: int | None = None, seconds: float = 1.0, ended: int | None = None
    ) -> int:
        """One observation `seconds` later, all places used and all surplus episodes ended unless told otherwise."""
        self.clock.now += seconds
        for _ in range(self.control.limit if ended is None else ended):
            self.control.episode_ended()
        used = self.control.limit if episodes is None else episodes
        return self.control.observe({f"r{i}": load for i, load in enumerate(loads)}, used)


FREE = EngineLoad(running=100, waiting=0)
SOME_WAIT = EngineLoad(running=100, waiting=5)
FULL = EngineLoad(running=100, waiting=40)


def test_it_doubles_until_the_first_queue_then_goes_in_steps() -> None:
    driven = Driven()
    assert [driven.see(FREE) for _ in range(4)] == [16, 32, 64, 128]
    assert driven.see(FULL) == 128, "one long queue may be chance"
    assert driven.see(FULL) == 96
    assert [driven.see(FREE) for _ in range(3)] == [102, 108, 114], "a sixteenth of 96 each"
    assert driven.see(SOME_WAIT) == 114, "a short queue keeps the batch full"


def test_a_short_queue_ends_the_doubling() -> None:
    driven = Driven()
    assert [driven.see(FREE), driven.see(SOME_WAIT), driven.see(FREE)] == [16, 16, 17]


def test_steps_grow_with_the_distance_from_the_last_congestion() -> None:
    driven = Driven(least=16, most=4096)
    driven.see(SOME_WAIT)
    limits = [16, *(driven.see(FREE) for _ in range(40))]
    steps = [after - before for before, after in pairwise(limits)]
    assert steps == [1] * 16 + [2] * 16 + [4] * 8


def test_a_preemption_counts_at_once_and_only_once() -> None:
    driven = Driven()
    for _ in range(3):
        driven.see(FREE)
    assert driven.see(EngineLoad(60, 0, preemptions=0)) == 128
    assert driven.see(EngineLoad(60, 0, preemptions=1)) == 96
    assert driven.see(EngineLoad(60, 0, preemptions=1)) == 102


def test_preemptions_from_before_the_first_observation_and_of_a_replica_that_started_anew() -> None:
    driven = Driven(most=64)
    for _ in range(4):
        driven.see(FREE)
    assert driven.control.limit == 64
    clock, control = driven.clock, driven.control

    def see(**preemptions: int) -> int:
        clock.now += 5.0
        for _ in range(64):
            control.episode_ended()
        return control.observe({name: EngineLoad(50, 0, count) for name, count in preemptions.items()}, control.limit)

    assert see(a=7, b=0) == 64
    assert see(a=7, c=30) == 64, "c took the place of b"
    assert see(a=0, c=30) == 64, "a began anew"
    assert see(a=2, c=30) == 48
    assert see(a=1, c=30) == 36, "anew, and preempted since"
    assert see(c=30) == 39 and see(c=30, a=1) == 42


def test_within_a_reaction_time_one_decrease_and_no_increase() -> None:
    driven = Driven(turn_s=10.0)
    driven.see(FREE, seconds=10.0)
    assert [driven.see(FREE) for _ in range(9)] == [16] * 9
    assert driven.see(FREE) == 32
    # A decrease does not wait for an increase to show.
    assert [driven.see(FULL), driven.see(FULL)] == [32, 24]
    assert [driven.see(FULL) for _ in range(9)] == [24] * 9
    assert driven.see(FULL) == 18


def test_the_next_decrease_waits_for_the_episodes_that_are_too_many() -> None:
    driven = Driven()
    for _ in range(4):
        driven.see(FREE)
    assert [driven.see(FULL, episodes=160), driven.see(FULL, episodes=160)] == [128, 96]
    assert [driven.see(FULL, episodes=160, ended=1) for _ in range(31)] == [96] * 31
    assert driven.see(FULL, episodes=128, ended=1) == 72
    # They need not end one by one: nothing is above the limit any more.
    assert [driven.see(FULL, episodes=72, ended=0) for _ in range(2)][-1] == 54


def test_places_that_nobody_uses_say_nothing() -> None:
    driven = Driven()
    for _ in range(3):
        driven.see(FREE)
    assert [driven.see(FREE, episodes=63) for _ in range(5)] == [64] * 5
    assert [driven.see(FULL, episodes=0) for _ in range(5)] == [64] * 5, "not our load"
    assert driven.see(FULL, episodes=40) == 30, "three quarters of what was used"


def test_missing_answers_change_nothing() -> None:
    driven = Driven()
    driven.see(FULL)
    assert [driven.see() for _ in range(50)] == [8] * 50
    assert driven.control.reaction_s == 1.0


def test_an_engine_that_runs_nothing_is_paused() -> None:
    driven = Driven()
    for _ in range(3):
        driven.see(FREE)
    paused = EngineLoad(running=0, waiting=64)
    assert [driven.see(paused) for _ in range(5)] == [64] * 5
    assert driven.see(paused, FREE) == 128, "the other one counts"


def test_a_cache_that_is_nearly_full_stops_the_increase() -> None:
    driven = Driven()
    driven.see(FREE)
    assert [driven.see(FREE, EngineLoad(8, 0, 0, kv_cache_usage=0.95)) for _ in range(5)] == [16] * 5


def test_the_queues_of_all_replicas_count_together() -> None:
    driven = Driven(least=64)
    assert [driven.see(FULL, EngineLoad(900, 0)) for _ in range(3)] == [64] * 3
    assert [driven.see(FULL, EngineLoad(100, 10)) for _ in range(2)] == [64, 64], "at the least already"


def test_the_reaction_time_follows_the_turns() -> None:
    control = AdaptiveConcurrency(8, 64, Clock())
    assert control.reaction_s == 5.0
    control.episode_ended(4, 40.0)
    assert control.reaction_s == 10.0
    control.episode_ended(1, 30.0)
    assert control.reaction_s == 11.0
    control.episode_ended()
    assert control.reaction_s == 11.0
    for seconds, bound in ((0.01, 1.0), (1e6, 60.0)):
        for _ in range(300):
            control.episode_ended(1, seconds)
        assert control.reaction_s == bound


def test_the_mean_is_over_the_observations() -> None:
    driven = Driven()
    assert driven.control.take_mean() == 8
    driven.see(FREE)
    driven.see(FREE)
    assert driven.control.take_mean() == 24
    assert driven.control.take_mean() == 32


@settings(max_examples=examples(30, 60), deadline=None)
@given(
    data=st.data(),
    least=st.integers(1, 40),
    more=st.integers(0, 400),
    turn_s=st.floats(0.1, 100.0),
)
def test_under_any_observations(data: st.DataObject, least: int, more: int, turn_s: float) -> None:
    """In its bounds, never up on a bad sign, and at most one change of a direction in a reaction time."""
    driven = Driven(least, least + more, turn_s)
    control, clock = driven.control, driven.clock
    load = st.builds(
        EngineLoad,
        st.integers(0, 100),
        st.sampled_from([0, 0, 0, 1, 2, 10, 100]),
        st.sampled_from([0, 0, 3, 3, 4, 50]),
        st.floats(0, 1),
    )
    steps = data.draw(
        st.lists(st.tuples(st.floats(0.1, 30.0), st.dictionaries(st.sampled_from("abc"), load), st.integers(0, 3)))
    )
    before: dict[str, EngineLoad] = {}
    lowered_s = changed_s = float("-inf")
    for seconds, loads, share in steps:
        clock.now += seconds
        limit = control.limit
        episodes = limit * share // 2
        for _ in range(data.draw(st.integers(0, limit))):
            control.episode_ended()
        after = control.observe(loads, episodes)
        assert least <= after <= least + more
        busy = [load for load in loads.values() if load.running]
        queue = sum(load.waiting for load in busy) > max(1, 0.1 * sum(load.running for load in busy))
        preempted = any(
            name in before and load.preemptions and load.preemptions != before[name].preemptions
            for name, load in loads.items()
        )
        if after > limit:
            assert not queue and not preempted and busy and episodes >= limit
            assert clock.now - changed_s >= control.reaction_s
        if after < limit:
            assert episodes and (queue or preempted)
            assert clock.now - lowered_s >= control.reaction_s
            lowered_s = clock.now
        if after != limit:
            changed_s = clock.now
        before = loads or before


class ModelledEngine:
    """A number of episodes that an engine can take, simulated second by second.

    Episodes are in a turn all the time but for the share that is in the environment; what does not fit waits (a batch
    that is full) or is preempted (a cache that is full).
    """

    def __init__(self, control: AdaptiveConcurrency, clock: Clock, capacity: int, how: str, seed: int) -> None:
        self.control, self.clock, self.capacity, self.how = control, clock, capacity, how
        self.rng = random.Random(seed)
        self.episodes = self.preemptions = 0

    def second(self, work_left: bool = True) -> int:
        self.clock.now += 1.0
        for _ in range(self.episodes):
            if self.rng.random() < 0.2:
                self.episodes -= 1
                self.control.episode_ended(5, 5.0)
        if work_left:
            self.episodes = max(self.episodes, self.control.limit)
        asking = sum(self.rng.random() < 0.9 for _ in range(self.episodes))
        running, usage = min(asking, self.capacity), min(1.0, asking / self.capacity)
        if self.how == "preempts" and asking > self.capacity:
            self.preemptions += asking - self.capacity
        waiting = asking - running
        return self.control.observe({"r": EngineLoad(running, waiting, self.preemptions, usage)}, self.episodes)


@pytest.mark.parametrize("how", ["queues", "preempts"])
@settings(max_examples=8, deadline=None)
@given(capacity=st.integers(10, 120), seed=st.integers(0, 1000))
def test_it_comes_near_the_capacity_and_stays(how: str, capacity: int, seed: int) -> None:
    clock = Clock()
    control = AdaptiveConcurrency(4, 512, clock)
    engine = ModelledEngine(control, clock, capacity, how, seed)
    limits = [engine.second() for _ in range(200)][80:]
    # 0.9 of the episodes ask at once.
    fits = capacity / 0.9
    assert 0.8 * fits <= sum(limits) / len(limits) <= 1.12 * fits
    assert 0.6 * fits <= min(limits) <= max(limits) <= 1.4 * fits


def test_it_follows_a_capacity_that_rises_and_falls() -> None:
    clock = Clock()
    control = AdaptiveConcurrency(8, 512, clock)
    engine = ModelledEngine(control, clock, 200, "queues", 0)
    for capacity, seconds in ((200, 60), (25, 60), (200, 150)):
        engine.capacity = capacity
        limits = [engine.second() for _ in range(seconds)]
        assert 0.8 * capacity <= sum(limits[-20:]) / 20 <= 1.4 * capacity, capacity


def test_it_comes_down_from_the_top_without_falling_through() -> None:
    clock = Clock()
    control = AdaptiveConcurrency(4, 512, clock)
    engine = ModelledEngine(control, clock, 1000, "queues", 0)
    for _ in range(30):
        engine.second()
    assert control.limit == 512
    engine.capacity = 100
    assert min(engine.second() for _ in range(100)) >= 60


class TestLoadMeter:
    def test_the_last_step_of_each_scheduler_counts(self) -> None:
        meter = LoadMeter()
        assert meter.load(0) == EngineLoad(0, 0, 0, 0.0)
        meter.stepped(0, 9, 9, 0.9)
        meter.stepped(0, 4, 2, 0.5)
        meter.stepped(1, 3, 0, 0.7)
        meter.preempted(2)
        assert meter.load(9) == EngineLoad(7, 2, 2, 0.7)

    def test_the_first_token_is_the_first_that_a_step_has_made(self) -> None:
        now_s = iter([10.0, 11.0])
        meter = LoadMeter(lambda: next(now_s))
        meter.generated(0)
        assert meter.first_token_at is None
        meter.generated(2)
        meter.generated(1)
        assert meter.first_token_at == 10.0

    def test_what_was_cancelled_since_the_last_step_is_not_there(self) -> None:
        meter = LoadMeter()
        meter.stepped(0, 4, 3, 0.5)
        assert meter.load(5) == EngineLoad(4, 1, 0, 0.5)
        assert meter.load(2) == EngineLoad(2, 0, 0, 0.5)
        assert meter.load(0) == EngineLoad(0, 0, 0, 0.0)

    def test_a_change_of_weights_is_neither_preemption_nor_queue(self) -> None:
        meter = LoadMeter()
        meter.stepped(0, 10, 2, 0.5)
        meter.paused(12)
        meter.resumed(14)
        # Ten frozen ones, two that waited before and two new ones; the batch takes four again.
        meter.stepped(0, 4, 10, 0.2)
        assert meter.load(14).waiting == 0
        meter.preempted(4)
        assert meter.load(14) == EngineLoad(4, 4, 0, 0.2)
        meter.preempted(6)
        meter.stepped(0, 10, 4, 0.5)
        assert meter.load(14) == EngineLoad(10, 4, 0, 0.5)
        meter.preempted(1)
        assert meter.load(14).preemptions == 1, "this one is real"

    def test_frozen_requests_that_are_cancelled_hide_nothing_later(self) -> None:
        meter = LoadMeter()
        meter.stepped(0, 10, 0, 0.5)
        meter.paused(10)
        meter.resumed(0)
        meter.preempted(3)
        assert meter.load(9).preemptions == 3
        meter.paused(9)
        meter.resumed(9)
        meter.preempted(9)
        # Nothing of it is left when the next version comes.
        meter.stepped(0, 2, 0, 0.5)
        meter.paused(2)
        meter.resumed(2)
        meter.preempted(3)
        assert meter.load(9).preemptions == 4

    def test_nor_do_they_when_the_rest_of_them_is_back_in_the_batch(self) -> None:
        meter = LoadMeter()
        meter.stepped(0, 64, 0, 0.5)
        meter.paused(64)
        meter.stepped(0, 64, 0, 0.5)  # late, of the step before the pause
        meter.resumed(64)
        meter.stepped(0, 24, 40, 0.5)
        assert meter.load(64).waiting == 0
        meter.preempted(24)
        meter.stepped(0, 24, 0, 0.5)  # forty were cancelled
        meter.stepped(0, 24, 38, 0.5)
        assert meter.load(62).waiting == 38
