"""The training loop: collect, advantage, learn, sync, log. Beside it, validations."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, NoReturn

from raygym.actors.learner_group import GANG
from raygym.actors.session import Session
from raygym.alarm_watch import AlarmWatch
from raygym.alarms import AlarmStop
from raygym.batch import train_sequences, without_advantages
from raygym.batch_statistics import advantage_histogram, batch_metrics
from raygym.config import RunConfig
from raygym.console import RunConsole
from raygym.histogram import Histogram
from raygym.metrics import learn_metrics, rollout_metrics, sync_metrics
from raygym.mirror_upload import CheckpointMirror
from raygym.resume import ResumePoint, checkpoint_store, require_shared, save_run_state
from raygym.rollout_state import RolloutState
from raygym.run_files import HeldRow, LearnedLogprobs, RunFiles
from raygym.run_row import Row, scalars
from raygym.schedule import Collected, SchedulerState
from raygym.supervision import Kind
from raygym.types import Group, TrainSequence
from raygym.validation import ValidationStream

# The last checkpoint, on a full disk: each try writes all of it that there is room for.
_RETRY_SAVING_EVERY_S = 5.0
# What the live line says of the parts of a step.
_DOING = {
    "generate": "collecting",
    "learn": "learning",
    "validate_wait": "waiting for the validation",
    "sync": "sending the weights",
    "checkpoint": "saving a checkpoint",
}


class Trainer:
    """One run on a started session."""

    def __init__(
        self,
        config: RunConfig,
        session: Session,
        files: RunFiles,
        console: RunConsole,
        resumed: ResumePoint | None = None,
        mirror: CheckpointMirror | None = None,
    ) -> None:
        """Nothing is done yet. `resumed`: where the run goes on; `session` was started with its rollouts."""
        self._config = config
        self._session = session
        self._files = files
        self._console = console
        self._metrics: dict[str, float] = {}
        self._more: dict[str, str | Histogram] = {}
        self._alarms = AlarmWatch(config, files, console)
        # Of the last whole step: its row, and where the scheduler stood after its collection.
        self._last: tuple[Row, SchedulerState] = ({}, SchedulerState())
        self._doing = ""
        self._resumed = resumed
        self._checkpoints = checkpoint_store(config)
        self._mirror = mirror
        self._validation = ValidationStream(config, session.rollouts.validate, files, console, self._validating)

    def run(self) -> dict[str, Any]:
        """Train for `steps` steps. Returns what summary.json holds.

        Raises:
            LearnerError: the gang is lost; another one can go on from the last checkpoint.
            LearnerStateError: the checkpoint is not one of this policy.
            RolloutStopped: the rollouts cannot go on.
            WeightsError: the engines cannot be given the weights.
            AlarmStop: an alarm ends the run; the last whole step was saved.
            GivenUp: a part was lost more often than the config allows.
            DiskFull: there was no room for a file of the run within `logging.disk_wait_s`.
            MirrorError: a checkpoint was not mirrored, and `checkpoint.mirror_required` is set.
        """
        session, version = self._session, self._begin()
        for step in range(version, self._config.steps):
            with self._timed("step"), self._console.live(f"step {step + 1}"):
                with self._timed("generate"):
                    collected = session.rollouts.collect(step, self._collecting)
                sequences = self._train_sequences(collected.groups)
                self._metrics |= rollout_metrics(collected, version) | batch_metrics(collected.groups, sequences)
                self._require_finite(step + 1, version, collected)
                self._more["advantage/histogram"] = advantage_histogram(sequences)
                with self._timed("learn"):
                    self._metrics |= learn_metrics(session.learners.update(sequences))
                with self._timed("log"):
                    learned = self._learned_logprobs(sequences)
                self._require_finite(step + 1, version, collected)
                with self._timed("validate_wait"):  # it is played by the weights that go now
                    self._validation.wait()
                with self._timed("sync"):
                    published = session.weights.publish(version + 1)
                self._metrics |= sync_metrics(published)
                self._more["sync/checksum"] = self._checksum = published.checksum
                version = published.version
                session.rollouts.set_version(version)
                with self._timed("log"):
                    self._files.ledger(step + 1, collected)
                    self._files.rollouts(step + 1, collected, learned=learned)
                self._metrics |= session.supervisor.take_metrics()
                self._metrics |= self._alarms.observe(step + 1, self._metrics, collected)
            self._last = (self._log(step + 1), collected.state)
            if self._alarms.stop is not None:
                self._end(version, self._alarms.stop)
            if self._checkpoint_due(step + 1):
                self._save(step + 1, self._last[0], session.rollouts.snapshot(), last=step + 1 == self._config.steps)
        return self._finish(version)

    def abandon(self) -> None:
        """Leave a run whose learners are lost and whose rollouts were stopped: nothing here writes files any more."""
        self._validation.abandon()

    def _begin(self) -> int:
        """Make everything ready for the next step; returns how many were made."""
        if self._resumed is None:
            self._console.start_clock()
            if self._validation.due(0):
                self._validate(0, self._write(0, {}))
            return 0
        step, row = self._resumed.step, self._resumed.row
        self._last = (row, self._resumed.rollouts.scheduler)
        self._alarms.replay(step, [*self._files.scalars, *([] if self._files.has_row(step) else [scalars(row)])])
        with self._console.phase("loading the learners' state"):
            if self._resumed.checkpoint is not None:
                self._session.learners.load_state(str(self._resumed.checkpoint.state.resolve()))
            self._checksum = self._session.weights.publish(step).checksum
        self._session.rollouts.set_version(step)
        self._session.supervisor.recovered(Kind.LEARNER, GANG)
        self._validation.rewards.update(self._files.validation_rewards)
        self._console.resume(step)
        # What was lost before its first checkpoint begins anew: step 0 has a row only where it is validated.
        if not self._files.has_row(step) and (step or self._validation.due(step)):
            self._validate(step, self._write(step, row))
        self._files.forget_rows()
        return step

    def _train_sequences(self, groups: Sequence[Group]) -> list[TrainSequence]:
        reference = None
        if self._config.learner.kl_in_reward:
            reference = self._session.learners.reference_logprobs(without_advantages(groups))
        return train_sequences(groups, self._config.learner, reference)

    def _learned_logprobs(self, sequences: Sequence[TrainSequence]) -> list[LearnedLogprobs] | None:
        if not (self._config.logging.trajectories and self._config.logging.learner_logprobs):
            return None
        found = self._session.learners.learned_logprobs()
        return [(found.get(index), sequence.loss_mask) for index, sequence in enumerate(sequences)]

    def _require_finite(self, step: int, version: int, collected: Collected) -> None:
        try:
            self._alarms.require_finite(step, self._metrics, collected)
        except AlarmStop as stop:
            if self._metrics.get("learn/updates"):  # what the learners hold is no version any more
                raise
            self._end(version, stop)

    def _end(self, version: int, stop: AlarmStop) -> NoReturn:
        """End the run by an alarm: its last whole step is saved, and the validation that plays it waited for."""
        row, scheduler = self._last
        # Not the manager's own state: it may have given out the groups of a step that was refused. So all that is owed
        # is played again.
        rollouts = RolloutState(replace(scheduler, version=version))
        try:
            if version and version not in self._checkpoints.steps():
                self._save(version, row, rollouts, last=True)
            self._finish(version)
        except Exception as error:  # the alarm is what has to be told
            self._console.line(f"after the alarm, the policy could not be saved or validated: {error}")
        raise stop

    def _log(self, step: int) -> Row:
        """Tell of a step that is done; returns its row as far as it is known."""
        metrics, self._metrics = self._metrics, {}
        more, self._more = self._more, {}
        row: Row = {**metrics, **more}
        with self._timed("log"):  # a row cannot tell of itself, so that is told with the next step's
            held = self._write(step, row)  # before it is shown: what is shown is on disk, or held
            self._console.step(step, metrics)
        self._validate(step, held)
        return row

    def _write(self, step: int, row: Row) -> HeldRow | None:
        """Write a step's row, or hold it back for the validation that belongs into it."""
        if self._validation.due(step):
            return self._files.hold(step, row)
        self._files.metrics(step, row)
        return None

    def _validate(self, step: int, held: HeldRow | None) -> None:
        if held is not None:
            self._validation.start(step, held)

    def _finish(self, version: int) -> dict[str, Any]:
        self._doing = "finishing"
        with self._console.live("waiting for the last validation"):
            self._validation.wait()
        self._files.disk.write(str(self._checkpoints.path), partial(self._checkpoints.retain, self._files.scores))
        summary: dict[str, Any] = {
            "name": self._config.name,
            "steps": self._config.steps,
            "policy_version": version,
            "validation_reward": {str(step): reward for step, reward in sorted(self._validation.rewards.items())},
        }
        if version:
            summary["weights_checksum"] = self._checksum
            served = self._session.weights.settle(self._config.sync.timeout_s)
            summary["replicas"] = {state.replica: state.weights.checksum for state in served}
        if restarts := self._session.supervisor.restarts:
            summary["restarts"] = restarts
        if self._resumed is not None:
            summary["resumed_at"] = self._resumed.step
        if version in self._checkpoints.steps():
            summary["checkpoint"] = str(self._checkpoints.path_of(version))
        return summary

    def _checkpoint_due(self, step: int) -> bool:
        options = self._config.checkpoint
        regular = options.every > 0 and step % options.every == 0
        return regular or (options.save_final and step == self._config.steps)

    def _save(self, step: int, row: Row, rollouts: RolloutState, *, last: bool) -> None:
        """Make the checkpoint of a step. On a full disk, the last one waits for room; others leave it to the next."""
        what, disk = f"checkpoint {self._checkpoints.path_of(step).name}", self._files.disk
        saving = partial(self._write_checkpoint, step, row, rollouts)
        if last:
            disk.write(what, saving, _RETRY_SAVING_EVERY_S)
        elif not disk.attempt(what, saving, "the run goes on, and the next checkpoint is tried when it is due"):
            return
        # Once, also after the last one: the run's end does it again.
        retaining = partial(self._checkpoints.retain, self._files.scores)
        disk.attempt("which checkpoint is the newest and the best", retaining, "the next checkpoint tells it")
        if self._mirror is not None:
            self._mirror.submit(step, self._files.scores)

    def _write_checkpoint(self, step: int, row: Row, rollouts: RolloutState) -> None:
        """Make the checkpoint of a step, which a validation of its policy may be playing meanwhile.

        The ledger has the step by now. So a kill before the end of this leaves lines of steps that will be made again,
        which the next start cuts off; a kill after it leaves nothing to be made again.
        """
        session, path = self._session, self._checkpoints.path_of(step)
        with self._timed("checkpoint"), self._console.phase(f"saving {path}"):
            self._files.sync()
            with self._checkpoints.writing(step, self._config.model_dump(mode="json")) as folder:
                state = folder / "training_state"
                session.learners.save_hf(str(folder.resolve()))
                session.learners.save_state(str(state.resolve()))
                require_shared(folder, ("config.json", "training_state/learner.json"))
                save_run_state(state, rollouts, row, self._validation.due(step))

    def _collecting(self, progress: str) -> None:
        self._session.learners.check_alive()  # they have nothing to do now, so nobody else would notice
        self._session.weights.check()
        self._console.progress(f"{_DOING['generate']}: {progress}")

    def _validating(self, progress: str) -> None:
        if self._doing != _DOING["generate"]:  # what is told of collecting covers the validation
            self._console.progress(f"{self._doing}; {progress}")

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        self._doing = _DOING.get(name, "")
        self._console.progress(self._doing)
        started = time.monotonic()
        yield
        key = f"time/{name}_s"
        self._metrics[key] = self._metrics.get(key, 0.0) + time.monotonic() - started
