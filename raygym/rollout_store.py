"""The folder of `raygym rollout`: trajectories as they come, and how an interrupted rollout finds its place again.

`trajectories.jsonl` is the truth. It grows by whole groups; what a kill left half-written at its end is cut off.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from filelock import FileLock, Timeout

from raygym.config import ConfigError, RunConfig
from raygym.config_change import flat
from raygym.config_file import dump_config, load_config
from raygym.rollout_summary import RolloutSummary
from raygym.run_files import move_aside, trajectory_record
from raygym.task_stream import Taken
from raygym.types import Task
from raygym.whole_file import write_whole

_FRESH = "give another --out, or --fresh to move this folder aside and begin anew"
_OPENING = {"lock", "config.yaml", "request.json", "request.json.new"}


@dataclass(frozen=True, slots=True)
class Request:
    """Which tasks, how often: what the command line says beside the config."""

    tasks: int
    samples: int
    split: str


class Mirror(Protocol):
    """A second form of the trajectories, which follows `trajectories.jsonl` and may lag behind it."""

    rows: int
    """Trajectories that it already has, the first ones of the file."""

    def add(self, records: Sequence[Mapping[str, Any]]) -> None:
        """The next ones."""

    def flush(self) -> None:
        """Write what was added."""

    def clear(self) -> None:
        """Forget everything."""


class RolloutStore:
    """The writer of one rollout's folder. A task is in it once: with all its episodes, or as dropped with its cause."""

    def __init__(self, path: Path, config: RunConfig, request: Request, tasks: Iterable[Task], *, fresh: bool) -> None:
        """Open the folder, or make it. Nobody else can have it open meanwhile.

        Args:
            path: the folder.
            config: the run's.
            request: what is played.
            tasks: all that belong to it.
            fresh: an earlier folder is moved aside.

        Raises:
            ConfigError: the folder is in use, or is another rollout's; the keys that differ are named.
        """
        self.path = path
        self.moved_to: Path | None = None
        self.cut = 0
        """Bytes that a kill had left behind the last whole group, and that were removed."""
        self.summary = RolloutSummary(request.samples)
        self.seconds = 0.0
        """Spent playing, earlier starts included."""
        self._samples = request.samples
        self._mirror: Mirror | None = None
        self._tasks = {task.index: task for task in tasks}
        self._done: set[int] = set()
        self._lock = self._locked()
        try:
            if fresh and _used(path):
                self._lock.release()
                self.moved_to = move_aside(path)
                self._lock = self._locked()
            self._claim(config, request)
            self._read()
        except BaseException:
            self._lock.release()
            raise
        self._file = (path / "trajectories.jsonl").open("ab")

    def missing(self) -> list[Task]:
        """Tasks that are neither played nor dropped yet, in order."""
        return [task for index, task in sorted(self._tasks.items()) if index not in self._done]

    def mirror(self, mirror: Mirror) -> None:
        """Have `mirror` follow, beginning with what it lacks of what is there."""
        if mirror.rows > self.summary.episodes:
            mirror.clear()
        behind = mirror.rows
        for number, (record, _) in enumerate(_lines(self.path / "trajectories.jsonl")):
            if number >= behind:
                mirror.add([record])
        mirror.flush()
        self._mirror = mirror

    def append(self, taken: Taken, seconds: float) -> None:
        """Write what came to its end; whoever kills the process after this call loses none of it.

        Args:
            taken: whole groups and dropped tasks, none of them twice.
            seconds: of playing since the last call.
        """
        self.seconds += seconds
        for env, kind in taken.failures:
            self.summary.failed(env, kind, taken.failures[env, kind])
        for task in [*(group.task for group in taken.groups), *(drop.task for drop in taken.dropped)]:
            self._account(task.index)
        records = [trajectory_record(trajectory) for group in taken.groups for trajectory in group.trajectories]
        self._file.write(b"".join(json.dumps(record).encode() + b"\n" for record in records))
        self._file.flush()
        if taken.dropped:
            with (self.path / "dropped.jsonl").open("a", encoding="utf-8") as file:
                for drop in taken.dropped:
                    self.summary.dropped(drop.task.env)
                    named = {"task": drop.task.index, "env": drop.task.env, "seed": drop.task.seed}
                    file.write(json.dumps({**named, "group_id": drop.group_id, "cause": drop.cause}) + "\n")
        for record in records:
            self.summary.add(record)
        if self._mirror is not None:
            self._mirror.add(records)
        if records or taken.dropped or taken.failures:
            _replace(self.path / "tally.json", {"seconds": self.seconds, "failures": self.summary.failures_by_env()})

    def write_summary(self, result: Mapping[str, Any]) -> None:
        """Write summary.json anew."""
        _replace(self.path / "summary.json", result)

    def close(self) -> None:
        """Bring the mirror up to date and let others have the folder."""
        try:
            if self._mirror is not None:
                self._mirror.flush()
        finally:
            self._file.close()
            self._lock.release()

    def _locked(self) -> FileLock:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"--out: {self.path} cannot be made a folder ({error.strerror})") from error
        lock = FileLock(self.path / "lock")
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            raise ConfigError(f"--out: another rollout is writing to {self.path}; wait for it, or stop it") from error
        return lock

    def _claim(self, config: RunConfig, request: Request) -> None:
        request_path, config_path = self.path / "request.json", self.path / "config.yaml"
        if not request_path.exists():
            if _used(self.path):
                raise ConfigError(f"--out: {self.path} holds something else than a rollout; {_FRESH}")
            config_path.write_text(dump_config(config), encoding="utf-8")
            _replace(request_path, asdict(request))
            return
        before = flat(load_config(config_path).model_dump(mode="json"))
        now = flat(config.model_dump(mode="json"))
        before |= {f"--{key}": value for key, value in json.loads(request_path.read_text(encoding="utf-8")).items()}
        now |= {f"--{key}": value for key, value in asdict(request).items()}
        keys = [key for key in dict.fromkeys([*before, *now]) if before.get(key) != now.get(key)]
        if keys:
            differences = ", ".join(f"{key} (was {before.get(key)}, is {now.get(key)})" for key in keys)
            raise ConfigError(
                f"{self.path} was begun with other settings and cannot go on with these: {differences}; "
                f"go on with the old ones, or {_FRESH}"
            )

    def _read(self) -> None:
        """Find out what is done, and cut off what is not whole."""
        path = self.path / "trajectories.jsonl"
        whole = 0
        group: list[dict[str, Any]] = []
        for record, end in _lines(path):
            group.append(record)
            if record["task"] != group[0]["task"] or record["episode"] != len(group) - 1:
                raise self._corrupt(f"group {group[0]['group_id']} has not its {self._samples} episodes in a row")
            if len(group) == self._samples:
                self._account(record["task"])
                for finished in group:
                    self.summary.add(finished)
                whole, group = end, []
        if path.exists() and (size := path.stat().st_size) > whole:
            self.cut = size - whole
            os.truncate(path, whole)
        dropped = self.path / "dropped.jsonl"
        whole = 0
        for record, end in _lines(dropped):
            self._account(record["task"])
            self.summary.dropped(record["env"])
            whole = end
        if dropped.exists():
            os.truncate(dropped, whole)
        tally = self.path / "tally.json"
        if tally.exists():
            told = json.loads(tally.read_text(encoding="utf-8"))
            self.seconds = told["seconds"]
            for env, kinds in told["failures"].items():
                for kind, attempts in kinds.items():
                    self.summary.failed(env, kind, attempts)

    def _account(self, index: int) -> None:
        if index not in self._tasks:
            raise self._corrupt(f"task {index} is none of this rollout's {len(self._tasks)}")
        if index in self._done:
            raise self._corrupt(f"task {index} is there twice")
        self._done.add(index)

    def _corrupt(self, what: str) -> ConfigError:
        return ConfigError(f"{self.path}: {what}: its files were changed, and it cannot go on; {_FRESH}")


def _used(path: Path) -> bool:
    """Whether a folder has more than what opening one leaves in it."""
    names = {entry.name for entry in path.iterdir()}
    return "request.json" in names or bool(names - _OPENING)


def _lines(path: Path) -> Iterator[tuple[dict[str, Any], int]]:
    """The records of a JSONL file with the position of each one's end; ends before a line that is only half there."""
    if not path.exists():
        return
    end = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            end += len(line)
            if not line.endswith(b"\n"):
                return
            try:
                record = json.loads(line)
            except ValueError as error:
                raise ConfigError(f"{path}: line {number} is not JSON: the file was changed; {_FRESH}") from error
            yield record, end


def _replace(path: Path, value: Mapping[str, Any]) -> None:
    write_whole(path, json.dumps(value, indent=2) + "\n")
