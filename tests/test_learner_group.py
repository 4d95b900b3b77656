"""How the driver finds out that a rank is lost, on a stand-in for Ray."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
from ray.exceptions import RayActorError, RayTaskError

from raygym.actors import learner_group
from raygym.actors.learner_group import LearnerError, LearnerGroup
from raygym.actors.learner_placement import LearnerPlacement
from raygym.config import LearnerConfig
from raygym.errors import LearnerStateError

pytestmark = [pytest.mark.ray, pytest.mark.timeout(60)]


class Rank:
    """Answers every call with its number; `error` is raised instead, and with `hangs` nothing comes."""

    def __init__(self, number: int) -> None:
        self.number, self.asked = number, list[str]()
        self.answer: Any = number
        self.error: Exception | None = None
        self.hangs = self.killed = False

    def __getattr__(self, method: str) -> Any:
        def remote(*args: Any) -> tuple[Rank]:
            self.asked.append(args[0] if method == "call" else method)
            return (self,)

        return SimpleNamespace(remote=remote, options=lambda name: SimpleNamespace(remote=remote))


class FakeRay:
    """As much of Ray as a LearnerGroup calls. A reference is a tuple of its rank."""

    def wait(self, references: list[Any], num_returns: int, timeout: float) -> tuple[list[Any], list[Any]]:
        done = [reference for reference in references if not reference[0].hangs or reference[0].killed]
        return done[:num_returns], [reference for reference in references if reference not in done[:num_returns]]

    def get(self, reference: Any, timeout: float) -> Any:
        (rank,) = reference
        if rank.error is not None:
            raise rank.error
        return rank.answer

    def kill(self, rank: Rank) -> None:
        rank.killed = True

    def get_runtime_context(self) -> Any:
        return SimpleNamespace(get_node_id=lambda: "here")


@pytest.fixture
def ranks() -> list[Rank]:
    return [Rank(0), Rank(1)]


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]

    def slept(seconds: float) -> None:
        now[0] += seconds

    monkeypatch.setattr(learner_group, "ray", FakeRay())
    monkeypatch.setattr(learner_group, "time", SimpleNamespace(monotonic=lambda: now[0], sleep=slept))
    return now


def group_of(ranks: list[Rank]) -> LearnerGroup:
    config = LearnerConfig(num_learners=2, update_timeout_s=10)
    return LearnerGroup(cast(list[Any], ranks), config, LearnerPlacement(config, None))


def test_a_rank_that_died_while_nothing_was_asked_of_it_is_named(ranks: list[Rank], now: list[float]) -> None:
    group = group_of(ranks)
    group.check_alive()
    group.check_alive()
    assert [rank.asked.count("ping") for rank in ranks] == [2, 2]
    ranks[1].error = RayActorError(error_msg="The actor died.\n\tpid: 7\nIts process was killed.")
    with pytest.raises(LearnerError, match=r"^learner rank 1 of 2 failed in ping: Its process was killed\.$"):
        group.check_alive()


def test_a_rank_that_does_not_answer_is_lost_after_its_deadline(ranks: list[Rank], now: list[float]) -> None:
    group = group_of(ranks)
    ranks[1].hangs = True
    group.check_alive()
    now[0] += 9.0
    group.check_alive()
    assert ranks[1].asked.count("ping") == 1, "it is not asked again before it has answered"
    now[0] += 2.0
    with pytest.raises(LearnerError, match="learner rank 1 of 2 did not finish ping within 10 s"):
        group.check_alive()


def test_answers_come_in_the_order_of_ranks(ranks: list[Rank], now: list[float]) -> None:
    assert group_of(ranks).call_all("ping", timeout_s=5) == [0, 1]


def test_a_state_that_does_not_fit_is_not_a_lost_rank(ranks: list[Rank], now: list[float]) -> None:
    ranks[0].error = RayTaskError("load_state", "traceback", LearnerStateError("it is of another policy"))
    with pytest.raises(LearnerStateError, match="it is of another policy"):
        group_of(ranks).load_state("folder")


def test_a_lost_gang_is_killed_without_being_asked_to_close(ranks: list[Rank], now: list[float]) -> None:
    ranks[0].hangs = True
    group_of(ranks).kill()
    assert all(rank.killed and "close" not in rank.asked for rank in ranks)


@pytest.mark.parametrize(("nodes", "pause_s"), [(("here", "here"), 0.0), (("here", "there"), 1.0)])
def test_a_killed_gang_is_waited_for_until_its_processes_are_gone(
    ranks: list[Rank], now: list[float], monkeypatch: pytest.MonkeyPatch, nodes: tuple[str, str], pause_s: float
) -> None:
    """Ray says that an actor is dead before it is: it could still write into a checkpoint."""
    waited: list[list[int]] = []

    def wait_ended(pids: list[int], timeout_s: float) -> bool:
        assert all(rank.killed for rank in ranks)
        waited.append(pids)
        return True

    monkeypatch.setattr(learner_group, "wait_ended", wait_ended)
    for rank, node in zip(ranks, nodes, strict=True):
        rank.answer = (node, 70 + rank.number)
    group = group_of(ranks)
    group.wait_ready()
    group.kill()
    assert waited == [[70, 71] if nodes[1] == "here" else [70]]
    assert now[0] == 100.0 + pause_s
