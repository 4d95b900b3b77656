"""TRL's GRPOTrainer, fed with rollouts: `python -m harness.trl_side SETTINGS`, in TRL's own Python. No raygym here.

Rollouts come in by TRL's own seam for them, `rollout_func`; rewards by a reward function that reads them. TRL makes
its advantages, loss, gradient, clipping and AdamW step itself. One thing is put in: on its way without vLLM, TRL takes
the ratio to be 1 where samples are used once; here the samplers' logprobs stand where it keeps the old policy's, which
its loss uses wherever they are. That costs it nothing, and saves it the pass that would compute them.

A step's time begins when the rollouts are scored and in its buffer, and ends with the event that TRL fires after the
optimizer's step: loss, backward, clipping, AdamW, and what it measures meanwhile.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback
from trl import GRPOConfig, GRPOTrainer

from harness.learn_rollouts import Rollouts
from harness.learn_settings import LearnSettings
from harness.step_server import StepServer

MOST_STEPS = 1000


def main() -> None:
    """Load the policy, then one step of the same rollouts whenever it is asked for."""
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    server, settings = StepServer(), LearnSettings.from_json(sys.argv[1])
    torch.set_num_threads(settings.threads)
    rollouts = Rollouts.load(Path(settings.rollouts))
    groups = len(rollouts.rewards) // rollouts.group_size

    def fed_rollouts(prompts: list[str], trainer: FedTrainer) -> dict[str, Any]:
        server.wait()
        return {
            "prompt_ids": [ids.tolist() for ids in rollouts.prompts],
            "completion_ids": [ids.tolist() for ids in rollouts.completions],
            "logprobs": [values.tolist() for values in rollouts.logprobs],
            "fed_reward": rollouts.rewards,
        }

    with tempfile.TemporaryDirectory(prefix="raygym-trl-") as folder:
        trainer = FedTrainer(
            server=server,
            model=settings.model_dir,
            reward_funcs=fed_reward,
            args=trl_config(settings, rollouts, folder),
            train_dataset=Dataset.from_dict({"prompt": [str(group) for group in range(groups)] * MOST_STEPS}),
            rollout_func=fed_rollouts,
        )
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(StepClock(trainer))
        trainer.train()


def fed_reward(completions: Sequence[str], fed_reward: Sequence[float], **_: Any) -> list[float]:
    """TRL's reward function: what came with the rollout."""
    return list(fed_reward)


class FedTrainer(GRPOTrainer):
    """GRPOTrainer, watched, with the samplers' logprobs as the old policy's."""

    def __init__(self, *, server: StepServer, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._server = server
        self._fed_advantages: list[float] = []
        self._fed_losses: list[torch.Tensor] = []
        self.began = self.ended = (0.0, 0.0)
        """Seconds by the clock, and of the processor."""

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        output = super()._generate_and_score_completions(inputs)
        output["old_per_token_logps"] = output["sampling_per_token_logps"]
        self._fed_advantages = output["advantages"].tolist()
        self.began = time.perf_counter(), time.process_time()
        return output

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Also keeps the micro-batch's share of the loss, since the logged one is rounded."""
        loss = super().training_step(*args, **kwargs)
        self._fed_losses.append(loss)
        return loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """TRL logs each step once it is over, with the gradient's norm before clipping."""
        super().log(logs, *args, **kwargs)
        if "grad_norm" in logs:
            self._server.answer(
                seconds=self.ended[0] - self.began[0],
                cpu_seconds=self.ended[1] - self.began[1],
                loss=sum(loss.item() for loss in self._fed_losses),
                grad_norm=logs["grad_norm"],
                advantages=self._fed_advantages,
            )
            self._fed_losses.clear()


class StepClock(TrainerCallback):
    """Notes when a step's optimizer update is made."""

    def __init__(self, trainer: FedTrainer) -> None:
        self._trainer = trainer

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Fired after the update and the zeroing of gradients, before anything is logged."""
        self._trainer.ended = time.perf_counter(), time.process_time()


def trl_config(settings: LearnSettings, rollouts: Rollouts, folder: str) -> GRPOConfig:
    """What the settings are in TRL's words; everything else is TRL's default."""
    loss_types = {"token": "dapo", "sequence": "grpo", "constant": "dr_grpo"}
    is_cispo = settings.loss == "cispo"
    return GRPOConfig(
        output_dir=folder,
        use_cpu=True,
        bf16=False,
        model_init_kwargs={"dtype": "float32"},
        learning_rate=settings.lr,
        lr_scheduler_type="constant",
        adam_beta1=settings.betas[0],
        adam_beta2=settings.betas[1],
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.grad_clip,
        temperature=settings.temperature,
        scale_rewards={"grpo": "group", "dr_grpo": "none"}[settings.advantage],
        loss_type="cispo" if is_cispo else loss_types[settings.loss_mean],
        importance_sampling_level="sequence" if settings.loss == "gspo" else "token",
        max_completion_length=settings.loss_length or max(map(len, rollouts.completions)),
        epsilon=settings.clip_low,
        # CISPO's bound is of the ratio itself.
        epsilon_high=settings.clip_high + (1 if is_cispo else 0),
        delta=settings.dual_clip,
        beta=settings.kl_coef,
        use_bias_correction_kl=False,
        num_generations=rollouts.group_size,
        per_device_train_batch_size=settings.trl_rows,
        gradient_accumulation_steps=len(rollouts.rewards) // settings.trl_rows,
        gradient_checkpointing=settings.trl_checkpointing,
        shuffle_dataset=False,
        max_steps=MOST_STEPS,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )


if __name__ == "__main__":
    main()
