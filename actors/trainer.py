"""The training loop: collect, advantage, learn, sync, log."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from raygym.actors.session import Session
from raygym.algorithms.advantages import group_normalized
from raygym.batch import train_sequences
from raygym.config import RunConfig
from raygym.console import RunConsole
from raygym.metrics import rollout_metrics, validation_metrics
from raygym.run_files import RunFiles
from raygym.tasks import validation_tasks


class Trainer:
    """One run on a started session."""

    def __init__(self, config: RunConfig, session: Session, files: RunFiles, console: RunConsole) -> None:
        self._config = config
        self._session = session
        self._files = files
        self._console = console
        self._metrics: dict[str, float] = {}
        self._validation_rewards: dict[int, float] = {}

    def run(self) -> dict[str, Any]:
        """Train for `steps` steps. Returns what summary.json holds."""
        session, version = self._session, 0
        self._validate(0)
        self._console.start_clock()
        for step in range(self._config.steps):
            with self._timed("step"):
                with self._timed("generate"):
                    collected = session.rollouts.collect(step, self._console.progress)
                sequences = train_sequences(collected.groups, group_normalized)
                with self._timed("learn"):
                    learned = session.learners.update(sequences)
                with self._timed("sync"):
                    published = session.weights.publish(version + 1)
                self._record(collected, version, learned, published)
                version = published.version
                session.rollouts.set_version(version)
                self._files.ledger(step + 1, collected)
                self._files.rollouts(step + 1, collected)
            metrics, due = self._metrics, self._validation_due(step + 1)
            if due:
                self._console.step(step + 1, metrics)
                self._validate(step + 1)
            self._log(step + 1)
            if not due:  # what is shown is on disk
                self._console.step(step + 1, metrics)
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
            "sync/bytes": published.nbytes,
            "sync/broadcast_s": published.broadcast_s,
            "sync/apply_s": published.apply_s,
            "sync/gib_per_s": published.nbytes / 2**30 / published.broadcast_s,
            "sync/turns_restarted": published.turns_restarted,
            "sync/turns_late": published.turns_late,
        }
        self._checksum = published.checksum

    def _validation_due(self, step: int) -> bool:
        every = self._config.validation.every
        return step == self._config.steps or (every > 0 and step % every == 0)

    def _validate(self, step: int) -> None:
        count = self._config.validation.tasks
        if not count:
            return
        tasks = validation_tasks([(env.label, env.weight) for env in self._config.envs], count)
        with self._timed("validate"), self._console.phase(f"validating on {count} held-out tasks"):
            collected = self._session.rollouts.validate(tasks, self._console.progress)
        metrics = validation_metrics(collected)
        self._metrics |= metrics
        if "val/reward" in metrics:
            self._validation_rewards[step] = metrics["val/reward"]
        self._files.rollouts(step, collected, kind="validation")
        self._console.validation(step, self._metrics)
        if step == 0:
            self._files.metrics(0, self._metrics)
            self._metrics = {}

    def _log(self, step: int) -> None:
        self._files.metrics(step, {**self._metrics, "sync/checksum": self._checksum})
        self._metrics = {}

    def _finish(self, version: int) -> dict[str, Any]:
        summary: dict[str, Any] = {
            "name": self._config.name,
            "steps": self._config.steps,
            "policy_version": version,
            "validation_reward": {str(step): reward for step, reward in self._validation_rewards.items()},
        }
        if version:
            summary["weights_checksum"] = self._checksum
            if self._config.checkpoint.save_final:
                path = self._files.path / "checkpoints" / f"step_{version:06d}"
                with self._console.phase(f"saving the policy to {path}"):
                    self._session.learners.save_hf(str(path.resolve()))
                (path.parent / "latest").write_text(path.name + "\n", encoding="utf-8")
                summary["checkpoint"] = str(path)
        return summary

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        started = time.monotonic()
        yield
        self._metrics[f"time/{name}_s"] = time.monotonic() - started
