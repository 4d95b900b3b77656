"""What is lost, what is back, and when it was too often; without any processes."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raygym.actors.supervisor import Supervisor
from raygym.config import ConfigError
from raygym.config_change import changes
from raygym.config_file import parse_config
from raygym.resume import ResumePoint
from raygym.rollout_state import RolloutState
from raygym.run_files import RunFiles
from raygym.supervision import GivenUp, Health, Kind, PartEvent, RestartBudget, What
from raygym.supervision_config import SupervisionConfig

GANG = (Kind.LEARNER, "the learner gang")


class Clock:
    def __init__(self) -> None:
        self.now_s = 1_700_000_000.0

    def __call__(self) -> float:
        return self.now_s


@given(
    st.lists(st.integers(0, 50), max_size=40).map(sorted),
    st.integers(0, 5),
    st.integers(1, 60),
)
def test_a_budget_counts_what_is_within_its_window(times: list[int], most: int, window_s: int) -> None:
    budget = RestartBudget(most, window_s)
    for number, now_s in enumerate(times, 1):
        within = sum(now_s - window_s < earlier <= now_s for earlier in times[:number])
        assert budget.lost(now_s) == (within if within > most else None)


def test_a_budget_without_a_limit_allows_everything() -> None:
    budget = RestartBudget(None, 10)
    assert [budget.lost(0.0) for _ in range(1000)] == [None] * 1000


def test_a_loss_its_restart_and_its_recovery_are_told_with_the_seconds_between() -> None:
    clock = Clock()
    health = Health(SupervisionConfig(), clock)
    assert not health.recovered(*GANG) and not health.restarted(*GANG), "nothing was lost"
    assert health.lost(*GANG, "rank 1 died") == [PartEvent(clock.now_s, *GANG, What.LOST, "rank 1 died")]
    clock.now_s += 4.0
    health.lost(*GANG, "rank 0 died as well")
    assert health.down == [GANG]
    clock.now_s += 3.0
    assert [event.what for event in health.restarted(*GANG)] == [What.RESTARTED]
    clock.now_s += 0.25
    (back,) = health.recovered(*GANG)
    assert (back.recovery_s, back.cause) == (7.25, "rank 0 died as well"), "from the first of both losses"
    assert str(back) == "the learner gang is back after 7.2 s; it was lost: rank 0 died as well"
    assert health.down == [] and not health.recovered(*GANG)
    assert health.take_metrics() == {"supervision/learner_restarts": 2.0, "supervision/recovery_s_max": 7.25}
    assert health.take_metrics() == {}
    assert health.restarts == {"learner": 2}


def test_over_the_budget_the_cause_comes_first() -> None:
    clock = Clock()
    told, recorded = list[str](), list[PartEvent]()
    config = SupervisionConfig(learner_restarts=1, window_s=100)
    supervisor = Supervisor(config, recorded.append, told.append, clock)
    supervisor.lost(*GANG, "rank 0 died.")
    clock.now_s += 100  # the first one is out of the window
    supervisor.lost(*GANG, "rank 0 died.")
    clock.now_s += 99
    with pytest.raises(GivenUp) as raised:
        supervisor.lost(*GANG, "rank 3 hangs.")
    expected = "rank 3 hangs. It was loss number 2 within 100 s, and supervision.learner_restarts allows 1"
    assert str(raised.value) == expected
    assert [event.what for event in recorded] == ["lost", "lost", "lost", "given_up"]
    assert told[-1] == f"the learner gang is given up: {expected}"
    supervisor.lost(Kind.MANAGER, "the RolloutManager", "budgets are each kind's own")


def test_what_has_progressed_is_counted_anew() -> None:
    supervisor = Supervisor(SupervisionConfig(manager_restarts=2))
    part = (Kind.MANAGER, "the RolloutManager")
    for _ in range(3):
        supervisor.lost(*part, "it died")
        supervisor.lost(*part, "it died")
        supervisor.progressed(Kind.MANAGER)
    assert supervisor.restarts == {"manager": 6}


def test_what_another_process_has_noticed_keeps_its_times() -> None:
    recorded: list[PartEvent] = []
    supervisor = Supervisor(record=recorded.append)
    runner = (Kind.ENV_RUNNER, "EnvRunner 2")
    events = [PartEvent(50.0, *runner, What.LOST, "killed"), PartEvent(53.5, *runner, What.RECOVERED)]
    supervisor.relay([*events, PartEvent(60.0, *runner, What.GIVEN_UP, "killed")])
    assert [(event.time_s, event.what, event.recovery_s) for event in recorded] == [
        (50.0, "lost", None),
        (53.5, "recovered", 3.5),
        (60.0, "given_up", None),
    ]
    assert supervisor.take_metrics() == {"supervision/env_runner_restarts": 1.0, "supervision/recovery_s_max": 3.5}


def test_every_kind_has_its_budget() -> None:
    assert {f"{kind}_restarts" for kind in Kind} == set(SupervisionConfig.model_fields) - {"window_s"}


def test_who_is_told_may_take_its_time_and_nobody_else_waits_for_it() -> None:
    """A full disk, say: what keeps the other parts alive tells of them meanwhile."""
    writing, go_on = threading.Event(), threading.Event()
    recorded: list[str] = []

    def record(event: PartEvent) -> None:
        writing.set()
        assert go_on.wait(30)
        recorded.append(event.name)

    supervisor = Supervisor(record=record)
    slow = threading.Thread(target=supervisor.lost, args=(Kind.REPLICA, "replica 0", "it died"))
    slow.start()
    try:
        assert writing.wait(30)
        other = threading.Thread(target=supervisor.lost, args=(Kind.REPLICA, "replica 1", "it died"))
        other.start()
        other.join(10)
        assert not other.is_alive()
        assert [name for _, name in supervisor.down()] == ["replica 0", "replica 1"] and not recorded
    finally:
        go_on.set()
        slow.join()
    assert recorded == ["replica 0", "replica 1"]


def test_many_threads_tell_at_once() -> None:
    recorded: list[PartEvent] = []
    supervisor = Supervisor(SupervisionConfig(replica_restarts=40), recorded.append)
    given_up: list[str] = []

    def tell(number: int) -> None:
        for _ in range(10):
            try:
                supervisor.lost(Kind.REPLICA, f"replica {number}", "it died")
                supervisor.recovered(Kind.REPLICA, f"replica {number}")
            except GivenUp as error:
                given_up.append(str(error))

    threads = [threading.Thread(target=tell, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert supervisor.restarts == {"replica": 40} and len(given_up) == 40
    assert sum(event.what is What.LOST for event in recorded) == 80


def test_events_are_lines_that_no_rewind_cuts(tmp_path: Path) -> None:
    config = parse_config(
        {
            "name": "t",
            "steps": 4,
            "runs_dir": str(tmp_path),
            "policy": {"model": "tiny"},
            "envs": [{"id": "a"}],
            "validation": {"tasks": 2},
            "logging": {"tensorboard": False},
        }
    )
    files = RunFiles(config)
    files.metrics(0, {"val/failed": 0.0})
    files.metrics(1, {"loss": 0.5})
    files.hold(2, {"loss": 0.25})
    files.event(PartEvent(1_700_000_000.5, *GANG, What.LOST, "rank 1 died"))
    files.rewind(ResumePoint(None, RolloutState(), {}, validated=True))
    files.event(PartEvent(1_700_000_007.75, *GANG, What.RECOVERED, "rank 1 died", 7.25))
    files.close()
    told = [json.loads(line) for line in (files.path / "events.jsonl").read_text().splitlines()]
    assert told == [
        {
            "time": "2023-11-14T22:13:20.500+00:00",
            "kind": "learner",
            "name": "the learner gang",
            "what": "lost",
            "cause": "rank 1 died",
            "recovery_s": None,
        },
        {
            "time": "2023-11-14T22:13:27.750+00:00",
            "kind": "learner",
            "name": "the learner gang",
            "what": "recovered",
            "cause": "rank 1 died",
            "recovery_s": 7.25,
        },
    ]
    assert [json.loads(line)["step"] for line in (files.path / "metrics.jsonl").read_text().splitlines()] == [0]
    assert files.has_row(0) and not files.has_row(1)
    assert files.discarded is not None
    cut = [json.loads(line)["step"] for line in (files.discarded / "metrics.jsonl").read_text().splitlines()]
    assert cut == [1, 2], "the row that was held as well"


def test_budgets_can_be_changed_when_a_run_goes_on() -> None:
    (change,) = changes({"supervision": {"learner_restarts": 3}}, {"supervision": {"learner_restarts": 9}})
    assert change.harmless


def test_a_wrong_budget_is_told_by_its_key() -> None:
    data = {"name": "t", "steps": 1, "policy": {"model": "tiny"}, "envs": [{"id": "a"}]}
    with pytest.raises(ConfigError, match=r"supervision\.learner_restarts"):
        parse_config({**data, "supervision": {"learner_restarts": -1}})
