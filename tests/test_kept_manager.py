"""Two calls that wait for one RolloutManager, and the moments at which it can be lost; on a stand-in for Ray."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import RayActorError

from raygym.actors import kept_manager
from raygym.actors.kept_manager import KeptManager
from raygym.rollout_state import RolloutState
from raygym.schedule import Collected, RolloutStopped, SchedulerState
from raygym.types import Task

pytestmark = [pytest.mark.ray, pytest.mark.timeout(60)]
TASKS = [Task(0, "a", 1, split="validation")]


class Reference:
    """What a call to a stand-in manager gives: its answer, or how it was lost, when it is got."""

    def __init__(self, answer: Callable[[], Any]) -> None:
        self.answer = answer


class Manager:
    """Answers `collect` with a state whose cursor tells which manager made it."""

    def __init__(self, number: int, state: SchedulerState) -> None:
        self.number, self.state, self.killed = number, state, False
        self.before_answer: Callable[[], None] = lambda: None
        self.asked: list[tuple[Any, ...]] = []

    def __getattr__(self, method: str) -> Any:
        def remote(*args: Any) -> Reference:
            self.asked.append((method, *args))
            return Reference(self._collected)

        return type("Method", (), {"remote": staticmethod(remote)})

    def _collected(self) -> Collected:
        self.before_answer()
        return Collected((), (), {}, state=SchedulerState(cursor=self.number))


class FakeRay:
    """As much of Ray as a KeptManager calls."""

    def __init__(self) -> None:
        self.waited_s: list[float] = []

    def wait(self, references: list[Reference], timeout: float) -> tuple[list[Reference], list[Reference]]:
        return references, []

    def get(self, asked: Reference | list[Reference], timeout: float) -> Any:
        self.waited_s.append(timeout)
        return [reference.answer() for reference in asked] if isinstance(asked, list) else asked.answer()

    def kill(self, manager: Manager) -> None:
        manager.killed = True


@pytest.fixture
def managers(monkeypatch: pytest.MonkeyPatch) -> list[Manager]:
    monkeypatch.setattr(kept_manager, "ray", FakeRay())
    return []


def kept(managers: list[Manager], resumed: SchedulerState | None = None) -> KeptManager:
    def start(state: SchedulerState) -> Manager:
        managers.append(Manager(len(managers) + 1, state))
        return managers[-1]

    return KeptManager(start, state=resumed)


def lost() -> None:
    raise RayActorError


def quiet(text: str) -> None:
    pass


def test_a_step_from_a_manager_that_the_other_call_has_replaced_is_played_again(managers: list[Manager]) -> None:
    """Else it would come twice: its successor goes on from the state before that step."""
    rollouts = kept(managers)

    def other_call() -> None:
        managers[0].before_answer = lost
        rollouts.validate(TASKS, quiet)

    managers[0].before_answer = other_call
    with_restart = rollouts.collect(0, quiet)
    assert (with_restart.state.cursor, with_restart.manager_restarts) == (2, 1)
    assert managers[0].killed and managers[1].state.restarts == 1 and managers[1].state.cursor == 0
    assert [call[0] for call in managers[1].asked] == ["validate", "collect"]
    assert rollouts.collect(1, quiet).manager_restarts == 0


def test_what_a_validation_says_of_the_training_is_not_kept(managers: list[Manager]) -> None:
    """Its answer may be older, or newer, than the last step that the run has seen."""
    rollouts = kept(managers)
    rollouts.collect(0, quiet)
    managers[0]._collected = lambda: Collected((), (), {}, state=SchedulerState(cursor=99))  # type: ignore[method-assign]
    rollouts.validate(TASKS, quiet)
    managers[0]._collected = lost  # type: ignore[assignment]
    assert rollouts.collect(1, quiet).state.cursor == 2
    assert managers[1].state.cursor == 1


def test_a_snapshot_is_taken_of_the_successor_where_the_manager_is_lost(managers: list[Manager]) -> None:
    rollouts = kept(managers)
    rollouts.collect(0, quiet)
    rollouts.set_version(1)
    managers[0]._collected = lost  # type: ignore[assignment]
    state = RolloutState(SchedulerState(cursor=5))
    original = Manager._collected
    try:
        Manager._collected = lambda self: state  # type: ignore[method-assign, assignment, return-value]
        assert rollouts.snapshot() is state
    finally:
        Manager._collected = original  # type: ignore[method-assign]
    assert managers[1].state == SchedulerState(cursor=1, version=1, restarts=1)


def test_a_resumed_run_begins_where_it_stood(managers: list[Manager]) -> None:
    state = SchedulerState(cursor=7, version=3, delivered=6)
    managers_started = kept(managers, state)
    assert managers[0].state == state
    managers[0].before_answer = lost
    managers_started.collect(3, quiet)
    assert managers[1].state == state.successor(3)


def test_a_successor_is_given_what_is_left_of_the_deadline(
    managers: list[Manager], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr(kept_manager, "time", SimpleNamespace(monotonic=lambda: now[0]))
    rollouts = kept(managers)

    def dies_after_seven_seconds() -> None:
        now[0] += 7.0
        lost()

    managers[0].before_answer = dies_after_seven_seconds
    assert rollouts.validate(TASKS, quiet, 10.0)[1] == 7.0
    assert [manager.asked for manager in managers] == [[("validate", TASKS, 10.0)], [("validate", TASKS, 3.0)]]
    rollouts.validate(TASKS, quiet)
    assert managers[1].asked[-1] == ("validate", TASKS, math.inf)


def test_one_that_starts_is_not_taken_for_one_that_hangs(managers: list[Manager]) -> None:
    rollouts, asked = kept(managers), kept_manager.ray
    assert isinstance(asked, FakeRay)
    rollouts.set_version(1)
    rollouts.set_version(2)
    managers[0].before_answer = lost
    rollouts.set_version(3)
    rollouts.set_version(4)
    rollouts.set_version(5)
    starts, answers = kept_manager.START_TIMEOUT_S, kept_manager.ANSWER_TIMEOUT_S
    assert asked.waited_s == [starts, answers, answers, starts, answers] and len(managers) == 2


def test_after_the_end_no_manager_is_started(managers: list[Manager]) -> None:
    rollouts = kept(managers)

    def ended_meanwhile() -> None:
        rollouts._calls = 0  # this very call cannot leave before `close` has returned
        rollouts.close()
        rollouts._calls = 1
        lost()

    managers[0].before_answer = ended_meanwhile
    with pytest.raises(RolloutStopped, match="being ended"):
        rollouts.collect(0, quiet)
    with pytest.raises(RolloutStopped, match="being ended"):
        rollouts.validate(TASKS, quiet)
    assert len(managers) == 1 and managers[0].killed
