"""The training loop: collect, advantage, learn, sync, log. Beside it, validations."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

from raygym.actors.session import Session
from raygym.alarm_watch import AlarmWatch
from raygym.alarms import AlarmStop
from raygym.batch import train_sequences, without_advantages
from raygym.batch_statistics import advantage_histogram, batch_metrics
from raygym.config import RunConfig
from raygym.console import RunConsole
from raygym.histogram import Histogram
from raygym.metrics import learn_metrics, rollout_metrics, sync_metrics
from raygym.run_files import RunFiles
from raygym.schedule import Collected
from raygym.types import Group, TrainSequence
from raygym.validation import ValidationStream

# What the live line says of the parts of a step.
_DOING = {
    "generate": "collecting",
    "learn": "learning",
    "validate_wait": "waiting for the validation",
    "sync": "sending the weights",
}


class Trainer:
    """One run on a started session."""

    def __init__(self, config: RunConfig, session: Session, files: RunFiles, console: RunConsole) -> None:
        self._config = config
        self._session = session
        self._files = files
        self._console = console
        self._metrics: dict[str, float] = {}
        self._more: dict[str, str | Histogram] = {}
        self._alarms = AlarmWatch(config, files, console)
        self._doing = ""
        self._validation = ValidationStream(config, session.rollouts.validate, files, console, self._validating)

    def run(self) -> dict[str, Any]:
        """Train for `steps` steps. Returns what summary.json holds."""
        session, version = self._session, 0
        self._console.start_clock()
        if self._validation.due(0):
            self._validation.start(0, self._files.hold(0, {}))
        for step in range(self._config.steps):
            with self._timed("step"), self._console.live(f"step {step + 1}"):
                with self._timed("generate"):
                    collected = session.rollouts.collect(step, self._console.progress)
                sequences = self._train_sequences(collected.groups)
                self._metrics |= rollout_metrics(collected, version) | batch_metrics(collected.groups, sequences)
                self._require_finite(step + 1, version, collected)
                self._more["advantage/histogram"] = advantage_histogram(sequences)
                with self._timed("learn"):
                    self._metrics |= learn_metrics(session.learners.update(sequences))
                self._require_finite(step + 1, version, collected)
                with self._timed("validate_wait"):  # it is played by the weights that go now
                    self._validation.wait()
                with self._timed("sync"):
                    published = session.weights.publish(version + 1)
                self._metrics |= sync_metrics(published)
                self._more["sync/checksum"] = self._checksum = published.checksum
                version = published.version
                session.rollouts.set_version(version)
                self._files.ledger(step + 1, collected)
                self._files.rollouts(step + 1, collected)
                self._metrics |= self._alarms.observe(step + 1, self._metrics, collected)
            self._log(step + 1)
            if self._alarms.stop is not None:
                self._end(version, self._alarms.stop)
        return self._finish(version)

    def _train_sequences(self, groups: Sequence[Group]) -> list[TrainSequence]:
        reference = None
        if self._config.learner.kl_in_reward:
            reference = self._session.learners.reference_logprobs(without_advantages(groups))
        return train_sequences(groups, self._config.learner, reference)

    def _require_finite(self, step: int, version: int, collected: Collected) -> None:
        try:
            self._alarms.require_finite(step, self._metrics, collected)
        except AlarmStop as stop:
            if self._metrics.get("learn/updates"):  # what the learners hold is no version any more
                raise
            self._end(version, stop)

    def _end(self, version: int, stop: AlarmStop) -> NoReturn:
        """End the run by an alarm: the policy is saved, and the validation that plays it waited for."""
        try:
            self._finish(version)
        except Exception as error:  # the alarm is what has to be told
            self._console.line(f"after the alarm, the policy could not be saved or validated: {error}")
        raise stop

    def _log(self, step: int) -> None:
        metrics, self._metrics = self._metrics, {}
        more, self._more = self._more, {}
        row = {**metrics, **more}
        if self._validation.due(step):
            held = self._files.hold(step, row)
            self._console.step(step, metrics)
            self._validation.start(step, held)
        else:  # what is shown is on disk
            self._files.metrics(step, row)
            self._console.step(step, metrics)

    def _finish(self, version: int) -> dict[str, Any]:
        self._doing = "finishing"
        saved = self._save(version)
        with self._console.live("waiting for the last validation"):
            self._validation.wait()
        summary: dict[str, Any] = {
            "name": self._config.name,
            "steps": self._config.steps,
            "policy_version": version,
            "validation_reward": {str(step): reward for step, reward in self._validation.rewards.items()},
        }
        if version:
            summary["weights_checksum"] = self._checksum
        return summary | saved

    def _save(self, version: int) -> dict[str, Any]:
        """The final policy, which the last validation is playing meanwhile."""
        if not version or not self._config.checkpoint.save_final:
            return {}
        path = self._files.path / "checkpoints" / f"step_{version:06d}"
        with self._console.phase(f"saving the policy to {path}"):
            self._session.learners.save_hf(str(path.resolve()))
        (path.parent / "latest").write_text(path.name + "\n", encoding="utf-8")
        return {"checkpoint": str(path)}

    def _validating(self, progress: str) -> None:
        if self._doing != _DOING["generate"]:  # what is told of collecting covers the validation
            self._console.progress(f"{self._doing}; {progress}")

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        self._doing = _DOING.get(name, "")
        self._console.progress(self._doing)
        started = time.monotonic()
        yield
        self._metrics[f"time/{name}_s"] = time.monotonic() - started
