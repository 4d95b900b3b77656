"""`raygym rollout`: play tasks without training, and keep every trajectory."""

from __future__ import annotations

import importlib.util
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event
from types import FrameType

from raygym.actors.rollouts import Rollouts
from raygym.actors.runs import prepared
from raygym.actors.session import Session
from raygym.config import RunConfig
from raygym.driver_log import driver_log
from raygym.live_console import Verbosity
from raygym.rollout_console import RolloutConsole
from raygym.rollout_store import Request, RolloutStore
from raygym.tasks import TaskCursor, validation_tasks
from raygym.types import Task

_MOST_AT_ONCE = 64
"""Groups that one call brings."""
_LOOK_UP_S = 0.5
"""How often the progress is shown, and an interrupt noticed, while nothing comes to its end."""


def rollout(
    config: RunConfig,
    model_dir: str,
    request: Request,
    out: Path | None,
    success: float,
    *,
    fresh: bool,
    verbosity: Verbosity = Verbosity.NORMAL,
) -> None:
    """Play what is missing of `request`, and leave its folder.

    Args:
        config: the run's.
        model_dir: the policy's files.
        request: which tasks, how often.
        out: the folder; None: `rollouts/<name>`.
        success: an episode with at least this reward is a success.
        fresh: move an earlier folder aside instead of going on in it.
        verbosity: how much is told of it.

    Raises:
        ConfigError: the folder is another rollout's.
        RolloutStopped: an environment or the engine fails always.
        KeyboardInterrupt: it was interrupted; everything that was whole is kept.
    """
    ready, port = prepared(config, model_dir)
    path = out or Path("rollouts") / config.name
    store = RolloutStore(path, config, request, _tasks(config, request), fresh=fresh)
    missing = store.missing()
    console = RolloutConsole(len(missing) * request.samples, verbosity=verbosity)
    temperature = config.validation.temperature if request.split == "validation" else config.rollout.temperature
    try:
        console.note(
            f"raygym: {config.name}, {config.policy.model}, {request.tasks} tasks of {request.split} x "
            f"{request.samples} at temperature {temperature:g} -> {path}"
        )
        _follow_in_parquet(store, console)
        _tell_what_was_there(store, request, len(missing), console)
        if request.samples > 1 and temperature == 0:
            console.line("at temperature 0 the episodes of a task are mostly alike; --temperature 1 makes them differ")
        try:
            if missing:
                with driver_log(path / "logs" / "driver.log", console), console.live(config.name):
                    _play(ready, model_dir, port, store, missing, request.samples, console)
        finally:
            left = len(store.missing())
            done = {"tasks": request.tasks, "missing_tasks": left, "samples": request.samples, "split": request.split}
            asked = {"policy": config.policy.model, "temperature": temperature}
            result = {**asked, **done, **store.summary.result(success, store.seconds)}
            store.write_summary(result)
            if left:
                console.line(f"{left} of {request.tasks} tasks are missing; the same command goes on with them")
    finally:
        store.close()
    console.result(result)
    console.line(f"see {path}")


def _tasks(config: RunConfig, request: Request) -> list[Task]:
    envs = [(env.label, env.weight) for env in config.envs]
    if request.split == "validation":
        return validation_tasks(envs, request.tasks)
    cursor = TaskCursor(envs, config.seed)
    return [cursor.next() for _ in range(request.tasks)]


def _tell_what_was_there(store: RolloutStore, request: Request, missing: int, console: RolloutConsole) -> None:
    if store.moved_to is not None:
        console.line(f"the earlier rollout was moved to {store.moved_to}")
    if store.cut:
        console.line(f"cut {store.cut} bytes of a group that was only half written off trajectories.jsonl")
    if missing < request.tasks:
        console.line(f"{request.tasks - missing} of {request.tasks} tasks are there already, {missing} are missing")


def _follow_in_parquet(store: RolloutStore, console: RolloutConsole) -> None:
    if importlib.util.find_spec("pyarrow") is None:
        console.line("pyarrow is not installed, so there is no trajectories.parquet (pip install 'raygym[parquet]');")
        console.line("once it is, the same command makes it from trajectories.jsonl")
        return
    parquet = importlib.import_module("raygym.rollout_parquet")
    store.mirror(parquet.ParquetParts(store.path / "trajectories.parquet"))


def _play(
    config: RunConfig,
    model_dir: str,
    port: int,
    store: RolloutStore,
    tasks: list[Task],
    samples: int,
    console: RolloutConsole,
) -> None:
    session = Session(config, model_dir, port, learning=False)
    try:
        with console.phase("starting engines and environments"):
            session.__enter__()
        with console.phase("playing"), _asked_to_stop() as stop:
            session.rollouts.play(tasks, samples, most_waiting=2 * _MOST_AT_ONCE)
            console.start_clock()
            _write_down(session.rollouts, store, stop, console)
    finally:
        why = sys.exc_info()
        try:
            with console.phase("stopping"):
                session.__exit__(*why)
        finally:
            session.__exit__(*why)  # a second interrupt came before it; once it has ended, it does nothing


def _write_down(rollouts: Rollouts, store: RolloutStore, stop: Event, console: RolloutConsole) -> None:
    """Take groups as they become whole, until all are, or until asked to stop and all that is whole is taken."""
    failures: Counter[str] = Counter()
    since = time.monotonic()
    done = False
    while not done:
        stopping = stop.is_set()
        taken = rollouts.take(_MOST_AT_ONCE, 0.0 if stopping else _LOOK_UP_S)
        now = time.monotonic()
        store.append(taken, now - since)
        since = now
        for (_, kind), count in taken.failures.items():
            failures[kind] += count
        console.progress(taken.episodes, taken.turns, taken.tokens, taken.running, dict(failures.most_common()))
        done = taken.done or (stopping and not taken.groups)
    if stopping and store.missing():
        raise KeyboardInterrupt


@contextmanager
def _asked_to_stop() -> Iterator[Event]:
    """Set by the first SIGINT or SIGTERM, which so interrupts no writing; a second one raises KeyboardInterrupt."""
    event = Event()

    def ask(_signal: int, _frame: FrameType | None) -> None:
        if event.is_set():
            raise KeyboardInterrupt
        event.set()

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield event
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
