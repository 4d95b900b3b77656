"""raygym's learner as it is in a run, one rank, without Ray: `python -m harness.learner_side SETTINGS`."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np

from harness.learn_rollouts import Rollouts
from harness.learn_settings import LearnSettings
from harness.step_server import StepServer
from raygym.actors.learner import Learner
from raygym.algorithms.advantages import ADVANTAGES
from raygym.config import LearnerConfig
from raygym.types import TrainSequence


def main() -> None:
    """Load the policy, then one update of the same rollouts whenever it is asked for."""
    server, settings = StepServer(), LearnSettings.from_json(sys.argv[1])
    rollouts = Rollouts.load(Path(settings.rollouts))
    advantages = np.concatenate(ADVANTAGES[settings.advantage](np.split(np.array(rollouts.rewards), groups(rollouts))))
    learner = Learner(0, 1, settings.model_dir, learner_config(settings), settings.temperature)
    learner.setup(learner.rendezvous())
    while True:
        server.wait()
        sequences = train_sequences(rollouts, advantages)
        began, cpu_began = time.perf_counter(), time.process_time()
        stats = learner.update(sequences)
        server.answer(
            seconds=time.perf_counter() - began,
            cpu_seconds=time.process_time() - cpu_began,
            loss=stats["loss"],
            grad_norm=stats["grad_norm"],
            clip_fraction=stats["clip_fraction"],
            padding_fraction=stats["padding_fraction"],
            advantages=advantages.tolist(),
        )


def learner_config(settings: LearnSettings) -> LearnerConfig:
    """What the settings are in raygym's config; everything else is a default."""
    return LearnerConfig(
        lr=settings.lr,
        betas=settings.betas,
        weight_decay=settings.weight_decay,
        grad_clip=settings.grad_clip,
        loss=settings.loss,
        loss_mean=settings.loss_mean,
        loss_length=settings.loss_length,
        clip_low=settings.clip_low,
        clip_high=settings.clip_high,
        dual_clip=settings.dual_clip,
        kl_coef=settings.kl_coef,
        threads=settings.threads,
        **settings.learner,
    )


def groups(rollouts: Rollouts) -> int:
    """How many groups there are."""
    return len(rollouts.rewards) // rollouts.group_size


def train_sequences(rollouts: Rollouts, advantages: np.ndarray) -> list[TrainSequence]:
    """The rollouts as the trainer hands them to the learner."""
    sequences = []
    for prompt, completion, logprobs, advantage in zip(
        rollouts.prompts, rollouts.completions, rollouts.logprobs, advantages.tolist(), strict=True
    ):
        before = np.zeros(len(prompt), dtype=np.float32)
        sequences.append(
            TrainSequence.uniform(
                token_ids=np.concatenate([prompt, completion]),
                loss_mask=np.arange(len(prompt) + len(completion)) >= len(prompt),
                logprobs=np.concatenate([before, logprobs]),
                advantage=advantage,
            )
        )
    return sequences


if __name__ == "__main__":
    main()
