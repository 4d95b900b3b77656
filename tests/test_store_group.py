"""The weight stores of several nodes and their group, without a cluster: who is lost when, and who is blamed."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import GetTimeoutError, RayActorError

from raygym.actors import collective, store_group, weight_store
from raygym.actors.store_group import StoreGroup
from raygym.actors.weight_health import WeightHealth
from raygym.actors.weight_store import WeightStore
from raygym.sent_version import SentVersion
from raygym.weights import CollectiveTimeout, Sending, plan_manifest

pytestmark = [pytest.mark.ray]
MANIFEST = plan_manifest([(name, (50,)) for name in "abcd"], "float32", 200)


class Call:
    """A method of an actor: `remote` makes the call, which is its own reference."""

    def __init__(self, answer: Callable[..., Any]) -> None:
        self._answer = answer

    def remote(self, *arguments: Any) -> Callable[[], Any]:
        return lambda: self._answer(*arguments)


class Store:
    """Of one node; its first `fails` calls of `join` come to nothing, though the others see it join."""

    def __init__(self, node: str, fails: int = 0) -> None:
        self.fails = fails
        self.groups: list[tuple[str, int, int]] = []
        self.received = 0
        self.killed = False
        self.slots = Call(lambda: ([f"/{node}/0", f"/{node}/1"], 8))
        self.dead = False
        self.ping = Call(lambda: self._alive(True))
        self.pull = Call(lambda source, slot, timeout_s: source._alive(None))
        self.join = Call(self._join)
        self.receive = Call(self._receive)

    def _alive(self, answer: Any) -> Any:
        if self.dead:
            raise RayActorError
        return answer

    def _join(self, name: str, rank: int, size: int, timeout_s: float) -> None:
        if self.fails:
            self.fails -= 1
            raise GetTimeoutError("no answer")
        self.groups.append((name, rank, size))

    def _receive(self, *_: Any) -> None:
        self.received += 1


class Learners:
    """Rank 0 is on node `a`."""

    weight_ranks = 1

    def __init__(self) -> None:
        self.groups: list[tuple[str, int]] = []

    def call_first(self, method: str, *arguments: Any, timeout_s: float) -> Any:
        if method == "join_weight_group":
            self.groups.append((arguments[0], arguments[1]))
        return "a" if method == "weight_node" else None

    def publish_weights(self, *_: Any) -> SentVersion:
        return SentVersion()


@pytest.fixture
def stores(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Store]]:
    """By node, in the order of their start; one that is there already is taken before a new one is made."""
    made: dict[str, list[Store]] = {}
    waiting: dict[str, list[Store]] = {"b": [Store("b", fails=1)]}

    def start(node: str, _: Any) -> Store:
        store = waiting[node].pop() if waiting.get(node) else Store(node)
        made.setdefault(node, []).append(store)
        return store

    fake = SimpleNamespace(
        get=lambda reference, timeout: reference(),
        wait=lambda references, timeout, num_returns=1: (references, []),
        kill=lambda store: setattr(store, "killed", True),
    )
    monkeypatch.setattr(store_group, "ray", fake)
    monkeypatch.setattr(store_group, "start_store", start)
    return made


def test_a_store_that_is_lost_while_it_joins_costs_no_learner(stores: dict[str, list[Store]]) -> None:
    learners, health = Learners(), WeightHealth()
    group = StoreGroup(MANIFEST, learners, 10, health)  # type: ignore[arg-type]
    group.ensure({"a", "b", "c"})
    group.send(1, range(4), Sending())
    assert stores["b"][0].killed and not stores["c"][0].killed
    assert set(group.paths(1)) == {"a", "c"}
    assert [size for _, size in learners.groups] == [3, 2], "who is left has met again"
    assert stores["c"][0].groups[-1] == (learners.groups[-1][0], 1, 2)
    assert (stores["b"][0].received, stores["c"][0].received) == (0, 1)
    assert group.ensure({"a", "b", "c"}) == {"b"}, "another one takes its place"
    group.send(0, range(4), Sending())
    assert [size for _, size in learners.groups] == [3, 2, 3]
    health.close()


def test_a_newcomer_finds_out_that_learner_0s_store_is_lost(stores: dict[str, list[Store]]) -> None:
    """Where its node has no replica, nobody else looks: the newcomer would be put off again and again."""
    learners, health = Learners(), WeightHealth()
    group = StoreGroup(MANIFEST, learners, 10, health)  # type: ignore[arg-type]
    group.ensure({"c", "d"})
    stores["a"][0].dead = True
    assert group.ensure({"c", "d", "e", "f"}, current=1) == {"a", "e", "f"}, "who has lost what he held is told"
    assert [len(stores[node]) for node in "acdef"] == [2, 1, 1, 2, 2]
    assert stores["a"][0].killed and stores["e"][0].killed and stores["f"][0].killed
    assert set(group.paths(1)) == set("acdef")
    health.close()


def test_what_is_received_stays_in_the_group_that_it_began_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a broken one a receive may be left while the store joins the next: it must take nothing from there."""
    store = WeightStore(MANIFEST)
    store.slots()
    taken: list[str] = []

    def broadcast_bytes(_: Any, group: str) -> None:
        taken.append(group)
        if len(taken) == 1:
            store.join("second", 1, 2, 1.0)
        elif group != "second":
            raise CollectiveTimeout(f"group {group} is gone")

    module = SimpleNamespace(broadcast_bytes=broadcast_bytes, join_group=lambda *_: None, leave_group=lambda *_: None)
    monkeypatch.setattr(weight_store, "_collective", lambda: module)
    store.join("first", 1, 2, 1.0)
    with pytest.raises(CollectiveTimeout, match="first"):
        store.receive(1, range(4))
    assert taken == ["first", "first"]


def test_a_group_whose_members_do_not_come_leaves_no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    keys: set[bytes] = set()

    def put(key: bytes, record: bytes, overwrite: bool, namespace: bytes) -> None:
        keys.add(key)

    monkeypatch.setattr(collective, "_internal_kv_put", put)
    monkeypatch.setattr(collective, "_internal_kv_del", lambda key, namespace: keys.remove(key))
    monkeypatch.setattr(collective.ray.util, "get_node_ip_address", lambda: "127.0.0.1")
    with monkeypatch.context() as patch, pytest.raises(RuntimeError):
        patch.setattr(collective.GlooGroup, "timeout_s", 0.5)
        collective.GlooGroup(2, 0, "alone")
    assert keys == set()
    alone = collective.GlooGroup(1, 0, "one")
    assert keys == {b"one"}
    alone.destroy_group()
    assert keys == set()
