"""Whole commands: a training run, an evaluation, a server."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from raygym.actor_logs import gather_logs
from raygym.actors.cluster import http_port, kept_logs, session_logs
from raygym.actors.learner_recovery import train_through_losses
from raygym.actors.ray_errors import cause as cause
from raygym.actors.ray_metrics import RayMetrics
from raygym.actors.serving import front_options, with_engine_defaults
from raygym.actors.session import Session
from raygym.actors.supervisor import Supervisor
from raygym.config import ConfigError, RunConfig
from raygym.console import RunConsole
from raygym.deepspeed_options import unloadable_state
from raygym.driver_log import driver_log
from raygym.live_console import Verbosity
from raygym.metrics import validation_metrics
from raygym.mirror_finished import send_left
from raygym.mirror_restore import restore_newer
from raygym.mirror_store import MirrorStore
from raygym.mirror_upload import CheckpointMirror, mirrored
from raygym.resume import FinishedError, ResumePoint, only_writer, resume_point
from raygym.run_files import RunFiles
from raygym.tasks import validation_tasks
from raygym.tracking.tracker import Outcome
from raygym.tracking.tracking import Tracking

__all__ = ["cause", "evaluate", "kept_logs", "prepared", "serve", "train"]


def train(
    config: RunConfig,
    model_dir: str,
    *,
    fresh: bool = False,
    allow_config_change: bool = False,
    verbosity: Verbosity = Verbosity.NORMAL,
) -> None:
    """Train a policy; leaves `runs/<name>/`, or goes on in it.

    Args:
        config: the run's.
        model_dir: the policy's files.
        fresh: an earlier run of this name is moved aside, also where it could go on.
        allow_config_change: it goes on also where the config has changed.
        verbosity: how much is told of it.

    Raises:
        ConfigError: the run cannot begin, or not go on, as it is configured.
        MirrorError: a checkpoint was not mirrored, and `checkpoint.mirror_required` is set.
    """
    config, port = prepared(config, model_dir)
    console = RunConsole(config.steps, verbosity=verbosity)
    url = config.checkpoint.mirror
    store = None if url is None else MirrorStore.open(url, config.name)
    with only_writer(config.run_dir):
        if store is not None and not fresh:
            restore_newer(config, store, console.line)
        try:
            found = None if fresh else resume_point(config, allow_change=allow_config_change, told=console.line)
        except FinishedError as finished:
            console.line(f"raygym: {finished}")
            if store is not None:
                send_left(config, store, finished.newest, console.line)
            return
        with mirrored(config, store, console.line, cause) as mirror:
            _train(config, model_dir, port, console, found, mirror)


def _train(
    config: RunConfig,
    model_dir: str,
    port: int,
    console: RunConsole,
    resumed: ResumePoint | None,
    mirror: CheckpointMirror | None,
) -> None:
    started, started_at = time.monotonic(), time.time()
    if unloadable := unloadable_state(config.learner.deepspeed):
        if resumed is not None:
            raise ConfigError(unloadable)
        console.line(f"warning: {unloadable}")
    files = RunFiles(config, resumed, console.line)
    logs = files.path / "logs"
    console.note(f"raygym: {config.name}, {config.policy.model}, {config.steps} steps -> {files.path}")
    if files.moved_to is not None:
        console.line(f"an earlier run of this name is not gone on with and was moved to {files.moved_to}")
    if resumed is not None and resumed.checkpoint is not None:
        console.line(f"resuming {files.path} at step {resumed.step} (checkpoint {resumed.checkpoint.path.name})")
    if files.discarded is not None:
        console.line(f"what it had done after that was moved to {files.discarded}")
    if mirror is not None:
        mirror.begin()
        if resumed is not None and resumed.checkpoint is not None:
            mirror.submit(resumed.step, files.scores)  # a kill may have come before it was sent
    supervisor = Supervisor(config.supervision, files.event, console.line)
    rollouts = resumed.rollouts if resumed else None
    session = Session(config, model_dir, port, resumed=rollouts, supervisor=supervisor)
    with driver_log(logs / "driver.log", console), console.live(config.name), _tracked(config, files, console):
        try:
            with console.phase("starting engines, learners and environments"):
                session.__enter__()
            ready_s = time.monotonic() - started
            console.note(f"ready after {ready_s:.0f} s; OpenAI API at {session.url}; logs in {logs / 'driver.log'}")
            console.detail(f"logs of the actors, until the run ends: {session_logs() or 'see Ray'}")
            summary = train_through_losses(config, session, files, console, resumed, mirror)
            first_token_at = session.first_token_at
        finally:
            with ExitStack() as stack:
                stack.callback(files.close)
                # Also where the rest does not come to it: a second interrupt. Once it has ended, it does nothing.
                stack.callback(session.__exit__, *(why := sys.exc_info()))
                if (actors_logs := session_logs()) is not None:
                    gather_logs(actors_logs, logs / "actors")
                with console.phase("stopping"):
                    session.__exit__(*why)
    summary["started_at"] = round(started_at, 3)
    summary["ready_s"] = round(ready_s, 3)
    if first_token_at is not None:
        summary["first_token_s"] = round(first_token_at - started_at, 3)
    summary["seconds"] = round(time.monotonic() - started, 1)
    files.summary(summary)
    rewards = list(summary["validation_reward"].values())
    if rewards:
        console.line(f"validation reward {rewards[0]:.3f} -> {rewards[-1]:.3f} after {config.steps} steps")
    console.line(f"done in {summary['seconds']:.0f} s; see {files.path}")


@contextmanager
def _tracked(config: RunConfig, files: RunFiles, console: RunConsole) -> Iterator[None]:
    """Inside it, the run's trackers get its rows; after it, they know how it ended."""
    beside = [RayMetrics(config.name).log] if config.logging.ray_metrics else []
    tracking = Tracking(config, console.line, beside)
    tracking.catch_up(files.rows)
    files.follow(tracking.log)
    outcome = Outcome.FAILED
    try:
        yield
        outcome = Outcome.FINISHED
    except KeyboardInterrupt:
        outcome = Outcome.INTERRUPTED
        raise
    finally:
        with console.live("sending the last metrics"):
            tracking.close(outcome)


def evaluate(config: RunConfig, model_dir: str) -> None:
    """Play the validation tasks once with the policy as it is; prints one JSON object."""
    config, port = prepared(config, model_dir)
    tasks = validation_tasks([(env.label, env.weight) for env in config.envs], config.validation.tasks or 64)
    with Session(config, model_dir, port, learning=False) as session:
        collected, _ = session.rollouts.validate(tasks, lambda _: None)
    print(json.dumps({"policy": config.policy.model, "tasks": len(tasks), **validation_metrics(collected)}))


def serve(config: RunConfig, model_dir: str) -> None:
    """Serve the policy over HTTP until interrupted. Prints one line when it is ready."""
    config, port = prepared(config, model_dir)
    with Session(config, model_dir, port, learning=False, rolling_out=False) as session:
        asks = f", key from ${config.policy.api_key_env}" if config.policy.api_key_env else ""
        replicas = f"{config.policy.replicas} replica" + "s" * (config.policy.replicas > 1)
        print(f"raygym: serving {config.policy.model} at {session.url} ({replicas}{asks}); Ctrl-C stops it", flush=True)
        threading.Event().wait()


def prepared(config: RunConfig, model_dir: str) -> tuple[RunConfig, int]:
    """The config with the engine's defaults filled in, and the port of its HTTP API. Raises ConfigError."""
    front_options(config)
    policy = with_engine_defaults(config.policy, model_dir)
    return config.model_copy(update={"policy": policy}), http_port(policy.http)
