"""Trajectories without training: the stream of tasks, the folder that they are kept in, pass@k."""

from __future__ import annotations

import io
import itertools
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from raygym.config import ConfigError, RunConfig
from raygym.config_file import parse_config
from raygym.pass_at_k import ks, pass_at_k
from raygym.rollout_console import RolloutConsole
from raygym.rollout_store import Request, RolloutStore
from raygym.rollout_summary import RolloutSummary
from raygym.schedule import Assignment, Dropped, RolloutStopped, SchedulerOptions
from raygym.task_stream import Taken, TaskStream
from raygym.tasks import validation_tasks
from raygym.types import EpisodeFailure, EpisodeStatus, FailureKind, Group, Sampling, Task, Trajectory, Turn

LOST = EpisodeFailure(FailureKind.ENV_LOST, "gone")
TASKS = validation_tasks([("a", 1.0), ("b", 1.0)], 6)
REQUEST = Request(6, 2, "validation")


def played(task: Task, episode: int, reward: float = 1.0, attempt: int = 0) -> Trajectory:
    mask = np.asarray([False, True, True])
    return Trajectory(
        task=task,
        group_id=f"{task.split}-{task.index}",
        episode=episode,
        attempt=attempt,
        status=EpisodeStatus.TERMINATED,
        token_ids=np.asarray([5, 6, task.index], np.int32),
        loss_mask=mask,
        logprobs=np.where(mask, -0.25, 0.0).astype(np.float32),
        weight_versions=np.where(mask, 3, -1).astype(np.int32),
        turns=(Turn(1, 3, reward, "stop", 0.1, 0.01),),
        reward=reward,
        messages=({"role": "user", "content": f"hallo {task.index} ☃"},),
        sampling=Sampling(0.5, 8),
    )


def taken(*tasks: Task, samples: int = 2, dropped: tuple[Task, ...] = ()) -> Taken:
    groups = tuple(
        Group(f"{task.split}-{task.index}", task, tuple(played(task, e, float(e)) for e in range(samples)))
        for task in tasks
    )
    drops = tuple(Dropped(task, f"{task.split}-{task.index}", "env_lost: gone") for task in dropped)
    return Taken(groups, drops, {("a", "env_lost"): 3} if drops else {}, 0, 0, 0, 0, done=False)


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    envs = [{"id": "a"}, {"id": "b"}]
    return parse_config({"name": "t", "steps": 1, "runs_dir": str(tmp_path), "policy": {"model": "tiny"}, "envs": envs})


def store(config: RunConfig, path: Path, request: Request = REQUEST, **changes: Any) -> RolloutStore:
    return RolloutStore(path, config, request, TASKS, **({"fresh": False} | changes))


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("n", [1, 2, 5])
def test_pass_at_k_is_the_share_of_choices_with_a_success(n: int) -> None:
    for successes, k in itertools.product(range(n + 1), range(1, n + 1)):
        attempts = [True] * successes + [False] * (n - successes)
        choices = list(itertools.combinations(attempts, k))
        assert pass_at_k(n, successes, k) == pytest.approx(sum(map(any, choices)) / len(choices))


def test_ks() -> None:
    assert [ks(n) for n in (1, 2, 3, 8, 10)] == [[1], [1, 2], [1, 2, 3], [1, 2, 4, 8], [1, 2, 4, 8, 10]]


@pytest.mark.parametrize("seed", range(8))
def test_any_interleaving_plays_each_task_once_in_whole_groups(seed: int) -> None:
    chance = random.Random(seed)
    places, samples, most_waiting = chance.randint(1, 9), chance.randint(1, 3), chance.randint(1, 4)
    options = SchedulerOptions(1, 2, 0, places, max_retries=1, max_replaced_groups=100)
    tasks = validation_tasks([("a", 1.0), ("b", 2.0)], 30)
    stream = TaskStream(tasks, samples, options, most_waiting)
    running: list[Assignment] = []
    seen: list[int] = []
    told = 0
    while True:
        running += stream.start(places - stream.running)
        assert len(running) == stream.running <= places
        gone = stream.obsolete()
        assert set(gone) <= set(running)
        if running and chance.random() < 0.9:
            assignment = running.pop(chance.randrange(len(running)))
            fails = chance.random() < 0.2
            outcome = LOST if fails else played(assignment.task, assignment.episode, attempt=assignment.attempt)
            assert assignment in stream
            stream.finish(assignment, outcome)
            assert assignment not in stream
        else:
            news = stream.take(2)
            told += sum(news.failures.values())
            assert all(len(group.trajectories) == samples for group in news.groups)
            seen += [group.task.index for group in news.groups] + [drop.task.index for drop in news.dropped]
            if news.done:
                break
    assert sorted(seen) == list(range(30))
    assert told > 0


def test_no_task_begins_while_too_many_groups_wait() -> None:
    stream = TaskStream(TASKS, 1, SchedulerOptions(1, 2, 0, 8), most_waiting=2)
    for _ in range(2):
        (assignment,) = stream.start(1)
        stream.finish(assignment, played(assignment.task, 0))
    assert stream.start(8) == []
    assert stream.has_news()
    assert [group.task.index for group in stream.take(1).groups] == [0]
    assert len(stream.start(8)) == 4


def test_an_environment_that_always_fails_stops_the_stream_with_its_name_and_every_cause_is_told() -> None:
    stream = TaskStream(TASKS, 2, SchedulerOptions(1, 2, 0, 8, max_retries=0, max_replaced_groups=2), most_waiting=2)
    with pytest.raises(RolloutStopped, match=r"3 tasks in a row.*'a'.*env_lost: gone"):
        while True:
            stream.finish(stream.start(1)[0], LOST)
    news = stream.take(9)
    assert [drop.cause for drop in news.dropped] == ["env_lost: gone"] * 3
    assert news.failures == {("a", "env_lost"): 3}
    assert not news.groups


def test_a_rollout_goes_on_where_a_kill_left_it(config: RunConfig, tmp_path: Path) -> None:
    path = tmp_path / "out"
    first = store(config, path)
    first.append(taken(TASKS[0], TASKS[3], dropped=(TASKS[1],)), 2.0)
    first.append(taken(TASKS[5]), 1.0)
    first.close()
    with (path / "trajectories.jsonl").open("rb+") as file:  # the second episode of the last group is only half there
        file.truncate(file.seek(0, 2) - 20)
    with (path / "dropped.jsonl").open("a") as file:
        file.write('{"task": 2, "env"')

    again = store(config, path)
    assert [task.index for task in again.missing()] == [2, 4, 5]
    assert again.cut > 20
    assert again.seconds == 3.0
    again.append(taken(*again.missing()), 1.0)
    again.close()
    records = lines(path / "trajectories.jsonl")
    assert [(record["task"], record["episode"]) for record in records] == [
        (t, e) for t in (0, 3, 2, 4, 5) for e in (0, 1)
    ]
    assert [drop["task"] for drop in lines(path / "dropped.jsonl")] == [1]

    last = store(config, path)
    assert last.missing() == []
    assert last.cut == 0
    result = last.summary.result(1.0, last.seconds)
    last.close()
    assert (result["episodes"], result["dropped_tasks"], result["failures"]) == (10, 1, {"env_lost": 3})
    assert result["reward"] == 0.5, "a dropped task is no reward of 0"
    assert result["pass_at"] == {"1": 0.5, "2": 1.0}


def test_a_changed_config_is_refused_with_its_keys_unless_fresh(config: RunConfig, tmp_path: Path) -> None:
    path = tmp_path / "out"
    first = store(config, path)
    first.append(taken(TASKS[0]), 1.0)
    first.close()
    changed = config.model_copy(update={"seed": 9, "rollout": config.rollout.model_copy(update={"max_turns": 2})})
    with pytest.raises(
        ConfigError, match=r"seed \(was 0, is 9\), rollout.max_turns \(was 4, is 2\), --samples .*--fresh"
    ):
        store(changed, path, Request(6, 3, "validation"))
    fresh = store(changed, path, fresh=True)
    assert len(fresh.missing()) == 6
    with pytest.raises(ConfigError, match="another rollout is writing"):
        store(changed, path)
    fresh.close()
    assert fresh.moved_to is not None
    assert len(lines(fresh.moved_to / "trajectories.jsonl")) == 2


def test_what_no_rollout_wrote_is_told(config: RunConfig, tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/a.txt").write_text("mine")
    with pytest.raises(ConfigError, match="something else than a rollout"):
        store(config, tmp_path / "notes")
    path = tmp_path / "out"
    first = store(config, path)
    first.append(taken(TASKS[0]), 1.0)
    with pytest.raises(ConfigError, match="task 0 is there twice"):
        first.append(taken(TASKS[0]), 1.0)
    first.close()
    text = (path / "trajectories.jsonl").read_text()
    (path / "trajectories.jsonl").write_text(text + text)
    with pytest.raises(ConfigError, match="task 0 is there twice"):
        store(config, path)
    (path / "trajectories.jsonl").write_text("nonsense\n" + text)
    with pytest.raises(ConfigError, match="line 1 is not JSON"):
        store(config, path)


@pytest.mark.parametrize("width", [80, 120])
def test_the_console_fits_and_tells_each_environment(width: int) -> None:
    summary = RolloutSummary(2)
    for env in ("raygym/NumberGuess-v0", "a" * 60 + "/last"):
        for episode in range(2000):
            turns = [{}] * 2
            summary.add({"env": env, "task": episode // 2, "reward": episode % 2, "turns": turns, "drifted": True,
                         "loss_mask": [0, 1]})  # fmt: skip
        summary.failed(env, "engine_error", 1000)
    console = Console(width=width, record=True, file=io.StringIO(), highlight=False, force_terminal=True)
    RolloutConsole(10, console).result(summary.result(1.0, 10.0))
    printed = console.export_text().splitlines()
    assert max(map(len, printed)) <= width
    assert "4000 episodes, 8000 turns, 4000 tokens in 10s (400 tok/s)" in printed
    assert "pass@1 0.500  pass@2 1.000  (success: reward >= 1)" in printed
    assert [line.split()[1:] for line in printed[-2:]] == [
        ["2000", "0.500", "0.500", "1.000", "2.0", "100.0%", "1000", "0"]
    ] * 2
    assert printed[-2].split()[0].endswith("last")


def test_parquet_equals_jsonl_also_after_a_kill(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parquet = pytest.importorskip("pyarrow.parquet", reason="raygym[parquet] is not installed")
    from raygym import rollout_parquet

    monkeypatch.setattr(rollout_parquet, "_ROWS_A_PART", 4)
    path = tmp_path / "out"
    folder = path / "trajectories.parquet"
    first = store(config, path)
    first.mirror(rollout_parquet.ParquetParts(folder))
    first.append(taken(*TASKS[:3]), 1.0)
    assert parquet.read_table(folder).num_rows == 4, "readable before the end"
    first._mirror = None  # as a kill does: what waits for the next part is lost
    first.close()
    (folder / ".new").write_bytes(b"half a part")

    again = store(config, path)
    again.mirror(rollout_parquet.ParquetParts(folder))
    again.append(taken(TASKS[4]), 1.0)
    again.close()
    table = parquet.read_table(folder)
    records = lines(path / "trajectories.jsonl")
    assert table.num_rows == len(records) == 8
    for row, record in zip(table.to_pylist(), records, strict=True):
        assert json.loads(row.pop("messages")) == record.pop("messages")
        for name in ("metrics", "reward_components"):
            assert dict(row.pop(name)) == record.pop(name)
        assert row == record, "0 and False are equal, and these floats have a short binary form"
    kinds = {name: str(table.schema.field(name).type.value_type) for name in ("token_ids", "loss_mask", "logprobs")}
    assert kinds == {"token_ids": "int32", "loss_mask": "bool", "logprobs": "float"}

    (path / "trajectories.jsonl").write_text("")  # the truth has less than its mirror
    last = store(config, path)
    last.mirror(rollout_parquet.ParquetParts(folder))
    last.append(taken(TASKS[5]), 1.0)
    last.close()
    assert [row["task"] for row in parquet.read_table(folder).to_pylist()] == [5, 5]
