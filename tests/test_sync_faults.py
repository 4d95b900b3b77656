"""Weights under faults: replicas and stores that die, stop or are sent other bytes. Simulated engines, no learner."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import psutil
import pytest
from ray_nodes import named
from weight_files import ModelFiles, simulated_engines

from raygym.config import SyncConfig
from raygym.lease import ReplicaState
from raygym.supervision import Kind, PartEvent, What
from raygym.types import EpisodeFailure, Generation, Sampling

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1500)]
# Replicas that are well answer within them, also where a successor loads on the same two cores.
LEASE_S = 8.0
TIMEOUT_S = 60.0
# Ends what hangs: a replica that starts anew is waited for, and one of another machine's speed.
DEADLINE_S = 240.0


class Fleet:
    """Two replicas, a sender, and turns that never stop."""

    def __init__(self, handle: Any, app: str, files: ModelFiles) -> None:
        from raygym.actors.serving import wanted_replicas
        from raygym.actors.supervisor import Supervisor
        from raygym.actors.weight_health import WeightHealth
        from raygym.actors.weight_sync import WeightSync

        self.files = files
        self.app = app
        self.events: list[PartEvent] = []
        config = SyncConfig(lease_s=LEASE_S, timeout_s=TIMEOUT_S, bucket_mib=1)
        health = WeightHealth(
            Supervisor(record=self.events.append), lambda: wanted_replicas(app.removeprefix("raygym-"))
        )
        self.sync = WeightSync(config, cast(Any, files), handle, 2, DEADLINE_S, health)
        self.version = 0
        self.asked: list[tuple[float, float, Generation]] = []
        """When it was asked, when it was answered, and the answer."""
        self.failures: list[EpisodeFailure] = []
        self._ended = threading.Event()
        self._asking = threading.Thread(target=lambda: asyncio.run(self._ask()), daemon=True)

    def publish(self) -> Any:
        self.version += 1
        self.files.call("change", self.version)
        return self.sync.publish(self.version)

    def start(self) -> None:
        self.sync.connect()
        self._asking.start()
        deadline = time.monotonic() + DEADLINE_S
        while not self.asked:
            assert time.monotonic() < deadline
            time.sleep(0.05)

    def close(self) -> None:
        self._ended.set()
        self._asking.join(60)
        self.sync.close()

    def answered_since(self, began: float) -> list[Generation]:
        return [answer for asked, _, answer in self.asked if asked > began]

    def wait_for_answers(self, began: float, count: int = 20) -> list[Generation]:
        deadline = time.monotonic() + DEADLINE_S
        while len(found := self.answered_since(began)) < count:
            assert time.monotonic() < deadline, "turns do not go on"
            time.sleep(0.05)
        return found

    def wait_for_events(self, kind: Kind, what: list[What]) -> None:
        """They are told by a thread of their own."""
        deadline = time.monotonic() + DEADLINE_S
        while (found := [event.what for event in self.events if event.kind is kind]) != what:
            assert time.monotonic() < deadline, found
            time.sleep(0.05)

    async def _ask(self) -> None:
        from raygym.actors.policy_server import DEPLOYMENT
        from raygym.actors.turn_exchange import TurnExchange

        exchange = TurnExchange(DEPLOYMENT, self.app)

        async def turns(number: int) -> None:
            turn = 0
            while not self._ended.is_set():
                turn += 1
                prompt = np.asarray([number, turn % 250], np.int32)
                asked = time.monotonic()
                try:
                    async with asyncio.timeout(20):
                        answer = await exchange(prompt, Sampling(max_tokens=8, seed=turn), f"s{number}-{turn}")
                except TimeoutError:
                    continue
                except EpisodeFailure as failure:
                    self.failures.append(failure)
                    await asyncio.sleep(0.05)
                else:
                    self.asked.append((asked, time.monotonic(), answer))

        await asyncio.gather(*(turns(number) for number in range(8)))


@contextmanager
def fleet(name: str) -> Iterator[Fleet]:
    with simulated_engines(name, 2, turn_latency_s=0.05) as (handle, model_dir):
        made = Fleet(handle, f"raygym-{name}", ModelFiles(model_dir))
        try:
            made.start()
            yield made
        finally:
            made.close()


@pytest.fixture
def two(ray_cluster: None) -> Iterator[Fleet]:
    with fleet("two") as made:
        yield made


def pids(states: list[ReplicaState]) -> set[int]:
    return {state.pid for state in states}


def versions_in_order(fleet: Fleet) -> None:
    """An answer to what was asked after a publish has none of the versions before; none is mixed but in order."""
    for _, _, answer in fleet.asked:
        assert (np.diff(answer.weight_versions) >= 0).all()


def current_only(fleet: Fleet, began: float) -> None:
    assert {v for answer in fleet.answered_since(began) for v in answer.weight_versions.tolist()} == {fleet.version}


def stores() -> list[psutil.Process]:
    return named("ray::WeightStore", psutil.Process().children(recursive=True))


def test_what_kills_stops_or_changes_something_costs_no_version(two: Fleet) -> None:
    """One fleet for all, since it takes long to start: each part ends with two replicas that serve what is current."""
    for part in (in_peace, other_bytes, a_killed_replica, a_stopped_replica, a_killed_store, all_killed, more, fewer):
        part(two)
        if part is more:
            continue
        states = two.sync.settle(DEADLINE_S, 2)
        assert len(states) == 2, part.__name__
        assert {state.weights.version for state in states} == {two.version}, part.__name__
        assert len({state.weights.checksum for state in states}) == 1
        versions_in_order(two)


def in_peace(two: Fleet) -> None:
    published = two.publish()
    assert (published.version, published.replicas, published.fenced, published.resent_buckets) == (1, 2, 0, 0)
    began = time.monotonic()
    two.wait_for_answers(began)
    current_only(two, began)
    assert two.publish().control_calls <= 4 + 2
    assert not two.failures
    assert two.events == [] and two.sync.epoch == 2


def other_bytes(two: Fleet) -> None:
    two.files.call("corrupt", 1)
    published = two.publish()
    assert (published.resent_buckets, published.replicas, published.fenced) == (1, 2, 0)
    two.files.call("corrupt", 2)
    assert two.publish().resent_buckets == 2


def a_killed_replica(two: Fleet) -> None:
    before = two.sync.serving()
    victim = before[0]
    os.kill(victim.pid, signal.SIGKILL)
    published = two.publish()
    assert published.replicas >= 1
    began = time.monotonic()
    two.wait_for_answers(began)
    current_only(two, began)
    after = two.sync.settle(DEADLINE_S, 2)
    assert len(after) == 2 and len(pids(after) - pids(before)) == 1
    two.wait_for_events(Kind.REPLICA, [What.LOST, What.RECOVERED])
    assert {event.name for event in two.events} == {f"replica {victim.replica}"}
    assert victim.replica not in {state.replica for state in after}


def a_stopped_replica(two: Fleet) -> None:
    before = two.sync.serving()
    victim = before[0]
    os.kill(victim.pid, signal.SIGSTOP)
    try:
        began = time.monotonic()
        published = two.publish()
        assert time.monotonic() - began < TIMEOUT_S, "it is noticed in time"
        assert (published.replicas, published.fenced) == (1, 1)
        began = time.monotonic()
        two.wait_for_answers(began)
        current_only(two, began)
        two.publish()
    finally:
        os.kill(victim.pid, signal.SIGCONT)
    began = time.monotonic()
    after = two.sync.settle(DEADLINE_S, 2)
    assert pids(after) == pids(before), "it is admitted again"
    two.wait_for_answers(time.monotonic(), 40)
    current_only(two, began)


def a_killed_store(two: Fleet) -> None:
    (store,) = stores()
    store.kill()
    store.wait(timeout=DEADLINE_S)
    published = two.publish()
    assert published.replicas == 2 and published.resent_buckets > 0
    (other,) = stores()
    assert other.pid != store.pid
    two.wait_for_events(Kind.WEIGHT_STORE, [What.LOST, What.RECOVERED])


def all_killed(two: Fleet) -> None:
    before = two.sync.serving()
    for state in before:
        os.kill(state.pid, signal.SIGKILL)
    published = two.publish()
    assert published.replicas >= 1, "it waited for a successor"
    after = two.sync.settle(DEADLINE_S, 2)
    assert len(pids(after) - pids(before)) == 2
    began = time.monotonic()
    two.wait_for_answers(began)
    current_only(two, began)


def more(two: Fleet) -> None:
    from raygym.actors.serving import scale

    scale("two", 3)
    assert len(two.sync.settle(DEADLINE_S, 3)) == 3, "the third has caught up"
    assert two.publish().replicas == 3


def fewer(two: Fleet) -> None:
    from raygym.actors.serving import scale

    lost = [event.what for event in two.events].count(What.LOST)
    scale("two", 2)
    deadline = time.monotonic() + DEADLINE_S
    while len(two.sync.serving()) > 2:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert two.publish().replicas == 2
    began = time.monotonic()
    two.wait_for_answers(began)
    current_only(two, began)
    assert [event.what for event in two.events].count(What.LOST) == lost, "what is taken away is not lost"
