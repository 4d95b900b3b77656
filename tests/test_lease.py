"""Leases: whatever is stopped, delayed or lost, no replica serves weights that the driver has declared past."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raygym.admission import Admission, FencedError
from raygym.lease import Beat, Lease, LeaseBook, ReplicaState
from raygym.weights import WeightsId

LEASE_S = 10.0
OLD, NEW = WeightsId(1, "a"), WeightsId(2, "b")


class Time:
    def __init__(self, offset: float = 0.0) -> None:
        self.now = 0.0
        self.offset = offset

    def __call__(self) -> float:
        return self.now + self.offset


@dataclass
class Replica:
    """One end as a replica keeps it, with the clock of its own machine."""

    name: str
    time: Time
    offset: float
    weights: WeightsId = OLD
    inbox: list[Beat] = field(default_factory=list)
    stopped: bool = False

    def __post_init__(self) -> None:
        self.admission = Admission(self.name, Lease(True, self.clock))

    def clock(self) -> float:
        return self.time.now + self.offset

    def state(self) -> ReplicaState:
        admission = self.admission
        return ReplicaState(
            self.name, "n", self.weights, self.clock(), admission.admitted, admission.ended_s, admission.fenced
        )

    def serves(self) -> WeightsId | None:
        return self.weights if self.admission.admitted and not self.stopped else None


def beat(book: LeaseBook, *replicas: Replica) -> None:
    sent = book.beat()
    for replica in replicas:
        if not replica.stopped:
            replica.admission.beat(sent)
            book.heard(replica.state())


def test_a_replica_is_admitted_by_the_second_beat_and_by_no_other_clock() -> None:
    time = Time()
    book, replica = LeaseBook(LEASE_S, time), Replica("r", time, offset=1e6)
    book.weights = OLD
    beat(book, replica)
    assert replica.serves() is None and book.epoch == 0
    beat(book, replica)
    assert replica.serves() == OLD and book.epoch == 1
    assert [state.replica for state in book.serving()] == ["r"]
    time.now += LEASE_S + 0.1
    assert replica.serves() is None, "without beats its lease ends"


def test_other_weights_are_granted_nothing_but_while_an_update_goes_on() -> None:
    time = Time()
    book, late, quick = LeaseBook(LEASE_S, time), Replica("late", time, 5.0), Replica("quick", time, 7.0)
    book.weights = OLD
    for _ in range(2):
        beat(book, late, quick)
    book.updating(NEW)
    quick.weights = NEW
    for _ in range(5):
        time.now += LEASE_S / 2
        beat(book, late, quick)
    assert (late.serves(), quick.serves()) == (OLD, NEW)
    book.updated()
    assert book.may_serve() == {"late", "quick"}
    time.now = book.may_serve_until_s("late")
    assert "late" not in book.may_serve() and late.serves() is None
    assert book.fence("late") and not book.fence("late")
    assert late.admission.beat(book.beat()), "it hears that it was fenced"
    late.weights = NEW
    for _ in range(3):
        time.now += 0.1
        beat(book, late, quick)
    assert late.serves() == quick.serves() == NEW
    assert book.epoch == 2 + 1 + 1, "both were admitted, late was fenced, late was admitted again"


def test_a_grant_from_before_it_fenced_itself_does_not_count() -> None:
    time = Time()
    book, replica = LeaseBook(LEASE_S, time), Replica("r", time, 0.0)
    book.weights = OLD
    for _ in range(2):
        beat(book, replica)
    on_its_way = book.beat()
    time.now += 0.1
    replica.admission.fence()
    replica.admission.beat(on_its_way)
    assert replica.serves() is None
    book.heard(replica.state())
    assert not book.may_serve(), "it said so itself"


def test_one_that_will_never_serve_again_is_fenced_at_once_with_its_reason() -> None:
    time = Time()
    book, dead, well = LeaseBook(LEASE_S, time), Replica("dead", time, 3.0), Replica("well", time, 0.0)
    book.weights = OLD
    for _ in range(2):
        beat(book, dead, well)
    dead.admission.fence()
    book.heard(replace(dead.state(), broken="EngineDeadError: no memory"))
    assert book.silent() == ["dead"] and book.answering() == {"well"} and not book.behind()
    assert "dead" not in book.may_serve() and "dead" not in book.beat().granted
    assert book.fence("dead") and book.why_silent("dead") == "waits to be replaced: EngineDeadError: no memory"
    time.now += LEASE_S + 0.1
    assert book.why_silent("well") == "gave no answer for 10 s"


def test_what_is_overtaken_is_ignored() -> None:
    time = Time()
    book, replica = LeaseBook(LEASE_S, time), Replica("r", time, 0.0)
    book.weights = OLD
    beat(book, replica)
    overtaken = book.beat()
    time.now += 1
    book.heard(replica.state())
    assert replica.admission.beat(book.beat()) is False
    until = replica.clock() + LEASE_S
    replica.admission.beat(overtaken)
    time.now = until - 0.01
    assert replica.serves() == OLD
    old_state = ReplicaState("r", "n", NEW, clock_s=0.5)
    book.heard(old_state)
    assert book.current(), "an answer from before does not replace a later one"


steps = st.lists(
    st.tuples(
        st.sampled_from(["beat", "hear", "tick", "stop", "cont", "update", "publish", "fence"]), st.integers(0, 2)
    ),
    max_size=80,
)


@settings(max_examples=200)
@given(steps)
def test_nobody_serves_what_was_declared_past(moves: list[tuple[str, int]]) -> None:
    """Beats are queued in stopped replicas and read when they go on, however late; so are their answers on the way."""
    time = Time()
    book = LeaseBook(LEASE_S, time)
    replicas = [Replica(f"r{i}", time, 1000.0 * i, WeightsId()) for i in range(3)]
    answers: list[ReplicaState] = []
    version, past = 0, False
    for move, index in moves:
        replica = replicas[index]
        if move == "beat":
            sent = book.beat()
            for each in replicas:
                each.inbox.append(sent)
        elif move == "hear":
            for state in answers if index else reversed(answers):
                book.heard(state)
            answers.clear()
        elif move == "tick":
            time.now += (0.5, 3.0, 11.0)[index]
        elif move == "stop":
            replica.stopped = True
        elif move == "cont":
            replica.stopped = False
        elif move == "update" and not replica.stopped:
            replica.weights = book.weights
            answers.append(replica.state())
            if index:
                book.heard(answers[-1])
        elif move == "publish":
            version += 1
            book.updating(WeightsId(version, str(version)))
            past = False
        elif move == "fence":
            # As `Replicas.fence_the_rest`: it waits for the leases of the others to end.
            book.updated()
            others = {r.name for r in replicas if r.weights != book.weights}
            for name in others & book.may_serve():
                time.now = max(time.now, book.may_serve_until_s(name))
            for name in others & set(book.known()):
                book.fence(name)
            past = True
        for each in replicas:
            if not each.stopped:
                for sent in each.inbox:
                    each.admission.beat(sent)
                    answers.append(each.state())
                each.inbox.clear()
        time.now += 0.001
        if past:
            assert all(each.serves() in (None, book.weights) for each in replicas)
        may_serve = book.may_serve()
        assert all(each.name in may_serve for each in replicas if each.serves() is not None)


def test_a_late_answer_does_not_hide_a_grant_that_is_on_its_way() -> None:
    time = Time()
    book, replica = LeaseBook(LEASE_S, time), Replica("r", time, 0.0)
    book.weights = OLD
    for _ in range(2):
        beat(book, replica)
    book.updating(NEW)
    book.updated()
    book.fence("r")
    fencing = book.beat()
    time.now = 1.0
    replica.weights = NEW
    applied = replica.state()
    time.now = 2.0
    assert replica.admission.beat(fencing)
    late = replica.state()
    book.heard(applied)
    grant = book.beat()
    book.heard(late)
    time.now = 3.0
    replica.admission.beat(grant)
    book.heard(replica.state())
    for _ in range(2):
        time.now += 1.0
        beat(book, replica)
    assert replica.serves() == NEW and "r" in book.may_serve()


def test_a_driver_that_stood_still_calls_nobody_silent() -> None:
    time = Time()
    book, replica = LeaseBook(LEASE_S, time), Replica("r", time, 0.0)
    book.weights = OLD
    for _ in range(2):
        beat(book, replica)
    time.now = 100.0
    assert book.silent() == ["r"]
    book.stood_still(100.0)
    assert book.silent() == [] and replica.serves() is None, "its lease has ended all the same"
    beat(book, replica)
    beat(book, replica)
    assert replica.serves() == OLD


async def test_turns_wait_for_a_lease_and_fail_where_it_is_fenced() -> None:
    time = Time()
    replica = Replica("r", time, 0.0)
    admission = replica.admission
    waiting = asyncio.ensure_future(admission.enter())
    await asyncio.sleep(0)
    assert not waiting.done()
    admission.beat(Beat(1, LEASE_S, {"r": 0.0}))
    ticket = await waiting
    await admission.leave(ticket)
    time.now = 20.0
    leaving = asyncio.ensure_future(admission.leave(ticket))
    await asyncio.sleep(0)
    assert not leaving.done(), "the answer waits: perhaps the driver is only late"
    admission.beat(Beat(2, LEASE_S, {"r": 15.0}))
    await leaving
    time.now = 40.0
    entering, leaving = asyncio.ensure_future(admission.enter()), asyncio.ensure_future(admission.leave(ticket))
    await asyncio.sleep(0)
    assert admission.beat(Beat(3, LEASE_S, {}, ["r"])) and admission.fenced
    for task in (entering, leaving):
        with pytest.raises(FencedError, match="replica r was fenced"):
            await task
    admission.beat(Beat(4, LEASE_S, {"r": 41.0}))
    with pytest.raises(FencedError):
        await admission.leave(ticket)
    time.now = 42.0
    admission.beat(Beat(5, LEASE_S, {"r": 42.0}))
    await admission.leave(await admission.enter())


async def test_a_replica_that_nobody_trains_serves_always() -> None:
    admission = Admission("r", Lease(needed=False))
    await admission.leave(await admission.enter())
    assert admission.admitted and not admission.fenced
