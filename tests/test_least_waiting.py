"""The choice of a replica is that of a look at each of them, whatever has happened to them."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from raygym.least_waiting import LeastWaiting


@dataclass
class Client:
    waiting: int = 0
    suspect: bool = False


NAMES = st.sampled_from("abcdef")


class Choosing(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.replicas: LeastWaiting[Client] = LeastWaiting()
        self.clients: dict[str, Client] = {}

    @rule(name=NAMES, waiting=st.integers(0, 3))
    def come(self, name: str, waiting: int) -> None:
        if name not in self.clients:
            self.clients[name] = Client(waiting)
            self.replicas.add(name, self.clients[name])

    @rule(name=NAMES)
    def go(self, name: str) -> None:
        if name in self.clients:
            del self.clients[name]
            self.replicas.remove(name)

    @rule(name=NAMES, turns=st.integers(1, 3))
    def ask(self, name: str, turns: int) -> None:
        """Nobody is told: turns of sessions that a replica has already are not chosen for."""
        if name in self.clients:
            self.clients[name].waiting += turns

    @rule(name=NAMES, turns=st.integers(1, 9))
    def answer(self, name: str, turns: int) -> None:
        if name in self.clients:
            self.clients[name].waiting = max(0, self.clients[name].waiting - turns)
        self.replicas.fell(name)

    @rule(name=NAMES)
    def doubt_or_trust(self, name: str) -> None:
        """By the clock, so nobody is told."""
        if name in self.clients:
            self.clients[name].suspect = not self.clients[name].suspect

    @precondition(lambda self: self.clients)
    @rule(turns=st.integers(0, 1))
    def choose(self, turns: int) -> None:
        wanted = min(self.clients, key=lambda name: (self.clients[name].suspect, self.clients[name].waiting))
        assert self.replicas.least() == wanted
        self.clients[wanted].waiting += turns

    @invariant()
    def the_same_ones_are_there(self) -> None:
        assert len(self.replicas) == len(self.clients)
        assert list(self.replicas) == list(self.clients.values())
        assert all(name in self.replicas and self.replicas[name] is client for name, client in self.clients.items())


TestChoosing = Choosing.TestCase
TestChoosing.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_what_is_old_does_not_pile_up() -> None:
    replicas: LeastWaiting[Client] = LeastWaiting()
    clients = {str(number): Client() for number in range(8)}
    for name, client in clients.items():
        replicas.add(name, client)
    for _ in range(200):
        for name, client in clients.items():
            client.waiting = 32
            replicas.least()
            while client.waiting:
                client.waiting -= 1
                replicas.fell(name)
    assert len(replicas._heap) <= 4 * len(clients) + 17
    assert replicas.least() == "0"


def test_there_is_none() -> None:
    with pytest.raises(IndexError):
        LeastWaiting[Client]().least()
