"""The training loop: collect, advantage, learn, sync, log. Beside it, validations."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from raygym.actors.session import Session
from raygym.algorithms.advantages import ADVANTAGES
from raygym.batch import train_sequences
from raygym.config import RunConfig
from raygym.console import RunConsole
from raygym.metrics import rollout_metrics
from raygym.run_files import RunFiles
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
        self._advantages = ADVANTAGES[config.learner.advantage]
        self._metrics: dict[str, float] = {}
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
                sequences = train_sequences(collected.groups, self._advantages)
                with self._timed("learn"):
                    learned = session.learners.update(sequences)
                with self._timed("validate_wait"):  # it is played by the weights that go now
                    self._validation.wait()
                with self._timed("sync"):
                    published = session.weights.publish(version + 1)
                self._record(collected, version, learned, published)
                version = published.version
                session.rollouts.set_version(version)
                self._files.ledger(step + 1, collected)
                self._files.rollouts(step + 1, collected)
            self._log(step + 1)
        return self._finish(version)

    def _record(self, collected: Any, version: int, learned: Any, published: Any) -> None:
        self._metrics |= rollout_metrics(collected, version)
        self._metrics |= {
            "policy/logprob_abs_diff": learned["logprob_abs_diff"],
            "policy/logprob_abs_diff_max": learned["logprob_abs_diff_max"],
            "policy/kl": learned["kl"],
            "policy/entropy": learned["entropy"],
            "policy/clip_fraction": learned["clip_fraction"],
            "policy/reference_kl": learned["reference_kl"],
            "loss": learned["loss"],
            "lr": learned["lr"],
            "grad/norm": learned["grad_norm"],
            "tokens/trained": learned["tokens_trained"],
            "tokens/total": learned["tokens_total"],
            "tokens/padding_fraction": learned["padding_fraction"],
            "tokens/shared_fraction": learned["shared_fraction"],
            "sync/bytes": published.nbytes,
            "sync/broadcast_s": published.broadcast_s,
            "sync/apply_s": published.apply_s,
            "sync/gib_per_s": published.nbytes / 2**30 / published.broadcast_s,
            "sync/turns_restarted": published.turns_restarted,
            "sync/turns_late": published.turns_late,
        }
        self._checksum = published.checksum

    def _log(self, step: int) -> None:
        metrics, self._metrics = self._metrics, {}
        row = {**metrics, "sync/checksum": self._checksum}
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
